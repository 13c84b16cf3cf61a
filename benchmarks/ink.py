"""What a step of the ink recipe costs in its trainer, beside the same model in a loop by hand; and how fast strokes are made.

    python benchmarks/ink.py [--blocks 25]  (4 minutes)

Two threads, one process: a block of ten steps of the trainer, then one of the loop, and so on; told are the median of the ratios
of neighbours and their quartiles. The trainer writes its run, with a row every ten steps. Both draw the same kind of strokes.

loop: what everybody writes, with AdamW, OneCycleLR, clipping to 1, the losses kept.
"""
import argparse
import os
import statistics
import tempfile
import time

import torch

from trainbook import Callback, Config
from trainbook.data import KeyedLoader
from trainbook.recipes.ink import DenseTrainer, InkTrainer, StructuralTrainer
from trainbook.recipes.ink_strokes import Strokes, draw

CONFIG = {"run": {"name": "bench"}, "model": {"embed_dim": 32, "num_layers": 1, "channels": 8},
          "data": {"img_size": 32, "difficulty": 0},
          "training": {"lr": 1e-3, "batch_size": 16, "scheduler": "onecycle", "clip": 1.0, "weight_decay": 1e-4,
                       "eval_every": None, "save_interval": "100000 steps"}}
BLOCK = 10


class ByHand:
    "The loop, a block at a time."
    def __init__(self, trainer: InkTrainer, steps: int):
        self.seen, self.loss, self.model = trainer.seen, trainer.loss, trainer.build_model(trainer.config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=1e-4)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 1e-3, total_steps=steps + BLOCK)
        self.at, self.losses = 0, []

    def block(self) -> None:
        for _ in range(BLOCK):
            batch = draw(range(self.at, self.at + 16), 0, 32)
            self.at += 16
            loss = self.loss(self.model(self.seen(batch)), batch)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.detach())


class InTurn(Callback):
    "After each block of the trainer, one of the loop."
    def fit_start(self, trainer):
        self.hand, self.ratios, self.began = ByHand(trainer, trainer.plan.total), [], time.perf_counter()

    def step_end(self, trainer):
        if trainer.step % BLOCK: return
        now = time.perf_counter()
        self.hand.block()
        after = time.perf_counter()
        self.ratios.append((now - self.began) / (after - now))
        self.began = after


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--blocks", type=int, default=25)
    blocks = words.parse_args().blocks
    torch.set_num_threads(2)
    os.chdir(tempfile.mkdtemp())
    for kind in (StructuralTrainer, DenseTrainer):
        turn = InTurn()
        full = {"model": {"full_heads": kind is DenseTrainer}}
        config = Config.from_dict(CONFIG).merge(full | {"data": {"epoch_length": 16 * BLOCK * blocks}, "training": {"epochs": 1}})
        kind(config, callbacks=[turn], quiet=True).train()
        low, middle, high = statistics.quantiles(turn.ratios[3:], n=4)
        print(f"{kind.__name__:18} a step is {middle:.3f} of the loop's ({low:.3f} to {high:.3f})", flush=True)
    for difficulty in (0, 2, 6, 9):
        draw(range(32), difficulty)
        began = time.perf_counter()
        for number in range(30): draw(range(32 * number, 32 * number + 32), difficulty)
        print(f"difficulty {difficulty}: {960 / (time.perf_counter() - began):,.0f} samples a second on one core", flush=True)
    loader = KeyedLoader(torch.utils.data.DataLoader(Strokes(10_000, 2), 32, num_workers=2))
    next(iter(loader.batches(0)))
    began = time.perf_counter()
    for _ in loader.batches(1): pass
    print(f"an epoch of 10,000 samples of difficulty 2 through two workers: {time.perf_counter() - began:.1f} s")
    loader.close()


if __name__ == "__main__": main()
