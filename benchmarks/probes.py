"""What probes cost: a training of steps of ten milliseconds, by turns with probes on and without, in one process.

    python benchmarks/probes.py [turns]
"""
import statistics
import sys
import time

import torch
from torch.utils.data import DataLoader, TensorDataset

from trainbook import Callback, Trainer
from trainbook.probes import clip

torch.set_num_threads(1)


class Clock(Callback):
    "The seconds of so many steps."
    def __init__(self): self.at = []
    def step_end(self, trainer): self.at.append(time.perf_counter())


def made(seconds: float) -> tuple[Trainer, Clock]:
    torch.manual_seed(0)
    wide = 640 if seconds > 0.005 else 64
    x = torch.randn(64 * 500, wide)
    layers = [layer for _ in range(6) for layer in (torch.nn.Linear(wide, wide), torch.nn.ReLU())] + [torch.nn.Linear(wide, 2)]
    clock = Clock()
    data = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), 64)
    trainer = Trainer(torch.nn.Sequential(*layers), data, loss="cross_entropy", num_epochs=10**5, lr=1e-4, run=False, quiet=True,
                      callbacks=[clock])
    return trainer, clock


def turn(trainer: Trainer, clock: Clock, steps: int) -> float:
    clock.at = []
    end = trainer.step + steps
    trainer.train(f"{end} steps")
    return (clock.at[-1] - clock.at[0]) / (len(clock.at) - 1)


def main(turns: int) -> None:
    for seconds, steps in ((0.010, 400), (0.001, 3000)):
        (plain, first), (probed, second) = made(seconds), made(seconds)
        probes = clip(probed)
        turn(plain, first, 50)
        turn(probed, second, 50)
        ratios = []
        for _ in range(turns):
            without, beside = turn(plain, first, steps), turn(probed, second, steps)
            ratios.append(beside / without)
        print(f"a step of {1000 * without:.2f} ms: with probes {statistics.median(ratios):.4f} of its time "
              f"(from {min(ratios):.3f} to {max(ratios):.3f}, {turns} turns, {probes.number} readings), wanted ≤ 1.01")
        probes.off()
        again = [turn(probed, second, steps) / turn(plain, first, steps) for _ in range(turns)]
        print(f"  taken off: {statistics.median(again):.4f} (from {min(again):.3f} to {max(again):.3f})")


if __name__ == "__main__": main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
