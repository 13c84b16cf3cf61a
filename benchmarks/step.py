"""What a step costs in the trainer, beside the loops that one writes by hand.

    python benchmarks/step.py [--rounds 7] [--only small large memory imports options]  (6 minutes)

One thread; every figure comes from a process of its own, all kinds in turn; told are medians, and the median and the spread of
the ratios within a round. A step's cost is the lower quartile over stretches of 50 steps, the first 200 left out.

bare: the loop that everybody writes, with a DataLoader, AdamW, clipping to 1 and a LambdaLR. best: the same work tuned by
hand: a fused optimizer that divides by the clip factor and skips bad steps, one gather a batch, no scheduler object.
trainer: Trainer(..., run=False). logged: with its run folder, a row every 10 steps and checkpoints.

options: the trainer with each option on beside the trainer without, for each batch. The differences are smaller than those
between two processes, so one trains them all in turn; told is the median of the ratios of neighbours.
"""
import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

BATCH, LR, CLIP, CLASSES = 32, 1e-3, 1.0, 10
WIDTHS = {"small": 64, "large": 1024}
STEPS = {"small": 2000, "large": 400}


def task(size: str):
    "A model that notes the time of each of its calls, and its data."
    import torch
    torch.set_num_threads(1)
    torch.manual_seed(0)
    width, steps = WIDTHS[size], STEPS[size]
    class Timed(torch.nn.Sequential):
        def forward(self, x):
            self.times.append(time.perf_counter())
            return super().forward(x)
    inner = [torch.nn.Linear(width, width), torch.nn.ReLU()] * (1 if size == "small" else 8)
    model = Timed(*inner, torch.nn.Linear(width, CLASSES))
    model.times = []
    inputs = torch.randn(steps * BATCH, width)
    return model, torch.utils.data.TensorDataset(inputs, torch.randint(0, CLASSES, (len(inputs),))), steps


def bare(model, data, steps):
    import torch
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    schedule, losses = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps), []
    for x, y in torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())


def best(model, data, steps):
    import torch
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    group, parameters, losses = optimizer.param_groups[0], list(model.parameters()), []
    (inputs, targets), limit = data.tensors, torch.tensor(CLIP)
    for step, index in enumerate(torch.randperm(len(data)).split(BATCH)):
        loss = torch.nn.functional.cross_entropy(model(inputs.index_select(0, index)), targets.index_select(0, index))
        loss.backward()
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([one.grad for one in parameters])))
        optimizer.grad_scale = torch.maximum(norm, limit).div_(CLIP)
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        group["lr"] = LR * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.step()
        for one in parameters: one.grad = None
        losses.append(loss.detach())


def trainer(model, data, steps, **more):
    import torch

    from trainbook.trainer import Trainer
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True)
    Trainer(model, loader, loss="cross_entropy", lr=LR, clip=CLIP, scheduler="cosine", epochs=1, quiet=True,
            **({"run": False} | more)).train()


def logged(model, data, steps):
    with tempfile.TemporaryDirectory() as folder: trainer(model, data, steps, run=None, save_dir=f"{folder}/run")


OPTIONS = {  # name → keywords beside those of the trainer
    "nothing": {}, "clip off": {"clip": None}, "clip_value": {"clip_value": 0.1}, "accumulate 4": {"accumulate": 4},
    "nonfinite skip": {"nonfinite": "skip"}, "ema": {"ema": 0.99}, "no_decay": {"no_decay": True},
    "groups, no_decay": {"groups": [{"match": "0.*", "lr": 1e-4}], "no_decay": True},
    "freeze": {"freeze": "0.*"}, "thawed": {"freeze": {"0.*": 1}},
    "label_smoothing": {"label_smoothing": 0.1}, "class_weights": {"class_weights": [1.0] * CLASSES},
    "warmup": {"warmup": "100 steps"}, "scheduler multistep": {"scheduler": "multistep", "milestones": ["50 steps"]},
    **{f"scheduler {name}": {"scheduler": name} for name in ("constant", "linear", "polynomial", "onecycle", "step")},
    "scheduler plateau": {"scheduler": "plateau", "monitor": "train_loss"}, "scheduler of torch's": {"of_torch": True},
    "early_stopping": {"early_stopping": True, "monitor": "train_loss", "patience": 99},
    "epoch_line": {"config": {"logging": {"epoch_line": ["Epoch {epoch}/{epochs} - Loss: {train_loss:.2f}"]}}},
    "sgd": {"optimizer": "sgd"}, "adam": {"optimizer": "adam"}, "rmsprop": {"optimizer": "rmsprop"},
    "deterministic": {"deterministic": True}, "gradient_checkpointing": {"gradient_checkpointing": True},
    "bf16": {"precision": "bf16"}}


KINDS = {"bare": bare, "best": best, "trainer": trainer, "logged": logged}


def one(kind: str, size: str) -> None:
    "Trains once in this process and prints what it cost."
    model, data, steps = task(size)
    KINDS[kind](model, data, steps)
    times = model.times
    assert len(times) == steps
    stretch = 50 if size == "small" else 10
    each = sorted((times[at + stretch] - times[at]) / stretch * 1e6 for at in range(steps // 10, steps - stretch, stretch))
    print(json.dumps({"us": each[len(each) // 4], "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def run(*words: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # as an installed package is
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env={**env, "OMP_NUM_THREADS": "1"})
    if done.returncode: sys.exit(done.stderr[-2000:])
    return done.stdout.strip().rpartition("\n")[2]


def table(kinds: tuple, size: str, key: str, unit: str, to: tuple, rounds: int) -> None:
    "All in turn, round by round; a line each."
    rows = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds: rows[kind].append(json.loads(run(__file__, "--one", kind, "--size", size))[key])
    for kind, mine in rows.items():
        told = f"{size:6} {kind:8} {statistics.median(mine):9,.0f} {unit}"
        for base in to:
            ratios = sorted(a / b for a, b in zip(mine, rows[base]))
            told += f"   / {base} {statistics.median(ratios):.3f} ({ratios[0]:.3f}–{ratios[-1]:.3f})"
        print(told, flush=True)


def blocks(width: int):
    "The small model; its hidden layer is a block that gradient_checkpointing finds."
    import torch
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU())
    return torch.nn.Sequential(block, torch.nn.Linear(width, CLASSES))


def with_option(data, of_torch: bool = False, **more) -> float:
    "Microseconds a batch of an epoch, the first epoch left out."
    import torch

    from trainbook.events import Callback
    from trainbook.trainer import Trainer
    class Clock(Callback):
        def epoch_start(self, trainer): self.began = time.perf_counter()
        def epoch_end(self, trainer): self.took = time.perf_counter() - self.began
    clock, model = Clock(), blocks(WIDTHS["small"])
    words = {"loss": "cross_entropy", "clip": CLIP, "scheduler": "cosine", "lr": LR, "epochs": 2, "quiet": True, "run": False}
    if of_torch:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
        more |= {"optimizer": optimizer, "scheduler": (torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999), "update")}
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True)
    Trainer(model, loader, callbacks=clock, **(words | more)).train()
    return clock.took / len(loader) * 1e6


def options(rounds: int) -> None:
    "Each option beside none of them, in turn in one process."
    import torch
    torch.set_num_threads(1)
    data = task("small")[1]
    data = torch.utils.data.TensorDataset(*(one[:400 * BATCH] for one in data.tensors))
    ratios = {name: [] for name in OPTIONS}
    for _ in range(rounds + 1):
        for name, more in OPTIONS.items():
            base = with_option(data)
            ratios[name].append(((took := with_option(data, **more)) / base, took - base))
            torch.use_deterministic_algorithms(False)
    for name, pairs in ratios.items():
        each = sorted(ratio for ratio, _ in pairs[1:])  # the first round warms up
        more = statistics.median(difference for _, difference in pairs[1:])
        print(f"{name:22} / nothing {statistics.median(each):.3f} ({each[0]:.3f}–{each[-1]:.3f})   {more:+6.1f} µs", flush=True)


def imports(rounds: int) -> None:
    modules, times = ("torch", "trainbook.trainer"), {}
    for number in range(rounds + 1):
        for module in modules:
            code = f"import time; began = time.perf_counter(); import {module}; print(time.perf_counter() - began)"
            if number: times.setdefault(module, []).append(float(run("-c", code)))
            else: run("-c", code)  # warms the page cache
    ratios = sorted(b / a for a, b in zip(*times.values()))
    print(f"import trainbook.trainer {statistics.median(times['trainbook.trainer']):.2f} s   / import torch "
          f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}–{ratios[-1]:.3f})   wanted ≤ 1.20")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=("small", "large", "memory", "imports", "options"))
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=WIDTHS, default="small", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: return one(args.one, args.size)
    wants = lambda part: not args.only or part in args.only
    if wants("small"):
        print("a small model; wanted: trainer / bare ≤ 0.60, trainer / best ≤ 1.03")
        table(tuple(KINDS), "small", "us", "µs", ("bare", "best"), args.rounds)
    if wants("large"):
        print("a step of 20 ms; wanted: trainer / best ≤ 1.005")
        table(("best", "trainer", "logged"), "large", "us", "µs", ("best",), args.rounds)
    if wants("memory"):
        print("peak memory; wanted: trainer / bare ≤ 1.02")
        table(("bare", "trainer"), "large", "mb", "MB", ("bare",), 3)
    if wants("imports"): imports(args.rounds)
    if wants("options"):
        print("the small model with each option; wanted: no more than its own arithmetic")
        options(args.rounds)


if __name__ == "__main__": main()
