"""What it costs to show a run: the first read of a long log, a look for new rows, one drawing.

    make bench        (or python benchmarks/curves.py)

The log has a million step rows of 180 bytes, an evaluation and a checkpoint after every thousand. Beside each figure
stands something everybody has: json.loads of each line, a read of the file, matplotlib's figure of the same curve.
"""
import json
import random
import statistics
import sys
import tempfile
import time
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np

from trainbook.curves import Curves
from trainbook.drawing import chart, picture
from trainbook.series import Series

ROW = '{"event": "step", "stage": "train", "step": %d, "time": %.3f, "epoch": %s, "lr": %r, "loss": %r, "grad_norm": %r}\n'


def ms(call, times=1) -> str:
    "The median of so many calls, with the range."
    took = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        took.append(1e3 * (time.perf_counter() - began))
    return f"{statistics.median(took):10.2f} ms" + (f" ({min(took):.2f}–{max(took):.2f})" if times > 1 else "")


def rows(first: int, last: int) -> str:
    lines = []
    for i in range(first, last + 1):
        lines.append(ROW % (10 * i, 1.8e9 + i / 60, i / 250, 1e-3 / i, 2 / i ** 0.3 + random.random() / 10, random.random()))
        if i % 1000: continue
        for event, value in (("eval", '"val_loss": %r' % (2.1 / i ** 0.3)), ("checkpoint", '"epoch": 1')):
            lines.append(f'{{"event": "{event}", "stage": "train", "step": {10 * i}, "time": {1.8e9 + i / 60:.3f}, {value}}}\n')
    return "".join(lines)


def of_length(points: int, folder: Path) -> Curves:
    "Curves of so many points, without their log."
    curves = Curves(folder/"none")
    stage = curves._stage("train")
    for name in ("loss", "lr"):
        one = stage.series[name] = Series()
        for at in range(0, points, 1 << 20):
            steps = np.arange(at + 1, min(at + (1 << 20), points) + 1, dtype=float)
            one.add(steps, 2 / steps ** 0.3 * (0.95 + 0.1 * np.random.default_rng(at).random(len(steps))), steps)
    curves.stage, stage.step = "train", points
    return curves


def everyday(x, y) -> None:
    "matplotlib's figure of a curve."
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.6, 3.1))
    figure.subplots().plot(x, y)
    figure.savefig(BytesIO(), format="png", dpi=110)


def main(many: int = 1_000_000) -> None:
    random.seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = folder/"events.jsonl"
        with open(log, "w") as file:
            for at in range(0, many, 10_000): file.write(rows(at + 1, at + 10_000))
        print(f"{many:,} rows, {log.stat().st_size / 1e6:.0f} MB")
        print(f"first read, no cache        {ms(lambda: Curves(folder, cache=False))}")
        print(f"  json.loads of each line   {ms(lambda: [json.loads(line) for line in open(log, 'rb')] and None)}")
        print(f"  reading the bytes         {ms(log.read_bytes)}")
        print(f"first read that leaves one  {ms(lambda: Curves(folder))}")
        print(f"first read with the cache   {ms(lambda: Curves(folder), 9)}   promise ≤ 500 ms")
        curves, at = Curves(folder), many
        def more():
            nonlocal at
            with open(log, "a") as file: file.write(text)
            at += 1000
        took = []
        for _ in range(9):
            text = rows(at + 1, at + 1000)
            more()
            began = time.perf_counter()
            curves.poll()
            took.append(1e3 * (time.perf_counter() - began))
        print(f"poll of 1,000 new rows      {statistics.median(took):10.2f} ms ({min(took):.2f}–{max(took):.2f})")
        print(f"poll of nothing             {ms(lambda: [curves.poll() for _ in range(1000)], 9)} for 1,000")
        for points in (10**3, 10**5, 10**7):
            one = of_length(points, folder)
            print(f"draw at {points:10,} points   {ms(partial(chart, one), 9)}   {len(chart(one)) / 1e3:.0f} kB")
        print(f"  matplotlib, {10**5:,}     {ms(partial(everyday, np.arange(10**5), np.random.rand(10**5)), 5)}")
        print(f"PNG of the last             {ms(lambda: picture(one), 3)}")


if __name__ == "__main__": main(*map(int, sys.argv[1:]))
