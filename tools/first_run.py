"""What `make train` shows: a registered model trains through a config, is killed half-way, and goes on in another process."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from trainbook import Callback, Config, Run, Trainer, load_model, register


@register("model")
def spiral_net(hidden: int = 64, dropout: float = 0.1) -> torch.nn.Module:
    from torch.nn import Dropout, Linear, ReLU, Sequential
    return Sequential(Linear(2, hidden), ReLU(), Dropout(dropout), Linear(hidden, hidden), ReLU(), Linear(hidden, 2))


def spirals(count: int, seed: int) -> TensorDataset:
    "Points on the two arms of a spiral, and on which."
    random = torch.Generator().manual_seed(seed)
    arm, t = torch.randint(0, 2, (count,), generator=random), torch.rand(count, generator=random) * 4 + 1
    angle = t * 1.5 + arm * torch.pi
    place = torch.stack([t * angle.cos(), t * angle.sin()], 1) / 3
    return TensorDataset(place + torch.randn(count, 2, generator=random) * 0.05, arm)


class PowerCut(Callback):
    "Half-way the process dies, and has no time to tidy up."
    def step_end(self, trainer):
        if trainer.step == trainer.plan.total // 2: os.kill(os.getpid(), signal.SIGKILL)


def trainer(config: Config, run: Run, *callbacks: Callback) -> Trainer:
    return Trainer(None, spirals(1536, 1), spirals(512, 2), config=config, run=run, callbacks=callbacks)


def main(path: str, folder: str = "") -> None:
    config = Config.from_yaml(path)
    if folder: trainer(config, Run(folder), PowerCut()).train()  # the process that dies
    print(config, end="\n\n")
    run = Run.create(config, command=["make", "train"])
    died = subprocess.run([sys.executable, __file__, path, run.folder]).returncode
    print(f"\n\nThe process that trained was killed (signal {-died}). Another one goes on, as if nothing had been:\n", flush=True)
    trainer(config, run).train()

    model, test = load_model(f"{run.folder}@best"), spirals(512, 3)
    right = (model(test.tensors[0]).argmax(1) == test.tensors[1]).double().mean()
    print(f"\nThe best checkpoint, loaded by its name, is right on {right:.1%} of new points. The run is in\n  {run.folder}/")
    for part in sorted(run.folder.glob("[!.]*")): print(f"    {part.name}{'/' if part.is_dir() else ''}")
    bin = Path(sys.executable).parent
    trainbook = bin.relative_to(Path.cwd())/"trainbook" if bin.is_relative_to(Path.cwd()) else "trainbook"
    print(f"""
Next:
  {trainbook} show {run.folder}
  {trainbook} checkpoint ls {run.folder}
  {trainbook} runs""")


if __name__ == "__main__": main(*sys.argv[1:])
