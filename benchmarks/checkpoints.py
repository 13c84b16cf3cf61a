"""What a checkpoint costs: the training's wait, the whole save, the load, the steps meanwhile, the memory.

    make bench        (or python benchmarks/checkpoints.py [GIGABYTES])

1 GB of AdamW state, each figure beside something everybody has: one memcpy of the same bytes, torch.save with and without
fsync, torch.load. Rounds are interleaved; medians, and the range of the ratio round by round. The last column is the promise.
"""
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from trainbook import checkpoint
from trainbook.checkpoint import CheckpointManager

WIDTH, HEIGHT = 1024, 1024
ROUNDS = 7


def adamw_state(gigabytes: float) -> dict:
    "A model of square layers after one step of AdamW: a third weights, two thirds averages."
    layers = max(1, round(gigabytes * 1e9 / (3 * 4 * WIDTH * HEIGHT)))
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, HEIGHT) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters(): parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def tensors_of(state):
    if isinstance(state, torch.Tensor): return [state]
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return [tensor for value in inner for tensor in tensors_of(value)]


def seconds(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def tell(name: str, ours: list, theirs_name: str, theirs: list, promise: str) -> None:
    ratios = sorted(a / b for a, b in zip(ours, theirs))
    print(f"{name:28} {statistics.median(ours):8.3f} s   {theirs_name:28} {statistics.median(theirs):8.3f} s   "
          f"ratio {statistics.median(ratios):6.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})   {promise}", flush=True)


def torch_save(state: dict, path: Path, sync: bool) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        if sync: file.flush(); os.fsync(file.fileno())


def saving(state: dict, folder: Path) -> None:
    tensors = tensors_of(state)
    room = [torch.empty_like(tensor) for tensor in tensors]
    print(f"{sum(t.nbytes for t in tensors) / 1e9:.2f} GB in {len(tensors)} tensors, "
          f"torch {torch.__version__}, {os.cpu_count()} cores")
    rows = {name: [] for name in ("memcpy", "stall", "total", "torch.save", "torch.save + fsync")}
    manager = CheckpointManager(folder/"ours", save_interval="1 step", keep_last_n=1)
    deleting, discard = [0.0], checkpoint.discard
    def timed(path): deleting[0] += seconds(partial(discard, path))
    checkpoint.discard = timed
    for step in range(ROUNDS + 1):  # the first round warms the buffers
        now = {"memcpy": seconds(lambda: [b.copy_(t) for b, t in zip(room, tensors)])}
        now["stall"] = seconds(partial(manager.save, state, step))
        now["total"] = now["stall"] + seconds(manager.wait) - deleting.pop()  # deleting old ones is in neither figure
        deleting.append(0.0)
        # as with ours, the old file is there while the new one is written
        now["torch.save"] = seconds(partial(torch_save, state, folder/f"plain-{step}.pth", False))
        (folder/f"plain-{step - 1}.pth").unlink(missing_ok=True)
        now["torch.save + fsync"] = seconds(partial(torch_save, state, folder/f"new-{step}.pth", True))
        os.replace(folder/f"new-{step}.pth", folder/"theirs.pth")
        if step: [rows[name].append(value) for name, value in now.items()]
        else: print(f"first save: the training waits {now['stall']:.3f} s")
    tell("training waits", rows["stall"], "one memcpy", rows["memcpy"], "≤ 1.3")
    tell("training waits", rows["stall"], "torch.save", rows["torch.save"], "≤ 0.25")
    tell("save, hashed, on disk", rows["total"], "torch.save + fsync", rows["torch.save + fsync"], "≤ 1.3")
    manager.close()
    checkpoint.discard = discard


LOAD = """
import sys, time, torch
from trainbook.stepfolder import read_step
began = time.perf_counter()
torch.load(sys.argv[1], weights_only=True) if sys.argv[1].endswith(".pth") else read_step(sys.argv[1])
print(time.perf_counter() - began)
"""


def loading(folder: Path) -> None:
    "In a process of its own each, as after a restart; the files are in the page cache."
    ours, theirs = max((folder/"ours").glob("step-*")), folder/"theirs.pth"
    once = lambda path: float(subprocess.run([sys.executable, "-c", LOAD, str(path)],
                                             capture_output=True, text=True, check=True).stdout)
    pairs = [(once(ours), once(theirs)) for _ in range(ROUNDS + 1)][1:]
    tell("load, every byte compared", [a for a, _ in pairs], "torch.load", [b for _, b in pairs], "≤ 1.2")
    theirs.unlink()


def steps_meanwhile(state: dict, folder: Path) -> None:
    "A training of small steps on one thread; the worst step while a save is in progress."
    torch.set_num_threads(1)
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4)))
    optimizer, inputs = torch.optim.AdamW(model.parameters()), torch.randn(64, 256)
    def step():
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    for _ in range(200): step()
    with CheckpointManager(folder/"meanwhile", save_interval="1 step", keep_last_n=1) as manager:
        manager.save(state, 0, wait=True)
        quiet, quiet_worst, worst, median = [], [], [], []
        for number in range(1, ROUNDS + 1):
            without = [seconds(step) for _ in range(400)]
            manager.save(state, number)
            during = []
            while not manager._writing.is_set(): during.append(seconds(step))
            quiet.append(statistics.median(without))
            quiet_worst.append(max(without))
            worst.append(max(during))
            median.append(statistics.median(during))
    tell("worst step during a save", worst, "median step without", quiet, "≤ 3")
    tell("worst step without a save", quiet_worst, "median step without", quiet, "(what the machine does by itself)")
    tell("median step during a save", median, "median step without", quiet, "")


MEMORY = """
import sys, resource; sys.path.insert(0, {here!r})
import checkpoints, os
from trainbook.checkpoint import CheckpointManager
state = checkpoints.adamw_state({size})
bytes_ = sum(t.nbytes for t in checkpoints.tensors_of(state))
def resident(): return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
before, peak = resident(), 0
with CheckpointManager({folder!r}, save_interval='1 step', keep_last_n=1) as manager:
    for step in range(3):
        manager.save(state, step)
        while not manager._writing.is_set(): peak = max(peak, resident())
print((peak - before) / bytes_)
"""


def memory(size: float, folder: Path) -> None:
    code = MEMORY.format(here=str(Path(__file__).parent), size=size, folder=str(folder/"memory"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    print(f"memory while saving: {float(done.stdout):.2f} × the state   ≤ 1 (one extra copy)")


def main() -> None:
    size = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    with tempfile.TemporaryDirectory() as folder:
        state = adamw_state(size)
        saving(state, Path(folder))
        loading(Path(folder))
        steps_meanwhile(state, Path(folder))
        del state
        memory(size, Path(folder))


if __name__ == "__main__": main()
