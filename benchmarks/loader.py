"""What keys cost: the keyed loader beside the plain DataLoader that it was made from.

    python benchmarks/loader.py          (40 s)

One process, one thread. Both loaders read the same epochs in turn, in alternating order; told are the medians of samples
a second, and of the ratio keyed/plain round by round with its spread. Then the time to the first batch when an epoch
begins at its first, middle and last batch, with and without workers: it must not grow.
"""
import os

os.environ["OMP_NUM_THREADS"] = "1"

import statistics
import time

import numpy
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from trainbook.data import KeyedLoader

torch.set_num_threads(1)


class Slow(Dataset):
    "0.4 ms of work a sample, as a small picture takes."
    def __len__(self): return 1024

    def __getitem__(self, i):
        until = time.perf_counter() + 4e-4
        while time.perf_counter() < until: pass
        return torch.rand(8), i


class Tiny(Dataset):
    "Small samples out of arrays, as a Python dataset gives them."
    def __init__(self, n=20_000): self.x, self.y = numpy.random.rand(n, 8), numpy.arange(n) % 10
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return torch.from_numpy(self.x[i]), int(self.y[i])


class Nothing(Dataset):
    "Samples that cost nothing: they are there. The worst case of a cost per batch."
    def __init__(self, n=20_000): self.values = list(torch.arange(n * 8.).view(n, 8))
    def __len__(self): return len(self.values)
    def __getitem__(self, i): return self.values[i], i


def plain(loader):
    for _ in loader: pass


def keyed(loader, epoch):
    for _ in loader.batches(epoch): pass


def seconds(call, *arguments):
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began


def beside(name, make, rounds, wanted=""):
    "The plain and the keyed loader in turn."
    theirs, ours, pairs = make(), KeyedLoader(make()), []
    plain(theirs), keyed(ours, 0)
    for epoch in range(1, rounds + 1):
        if epoch % 2: a, b = seconds(plain, theirs), seconds(keyed, ours, epoch)
        else: b, a = seconds(keyed, ours, epoch), seconds(plain, theirs)
        pairs.append((a, b))
    ours.close()
    n, ratios = len(theirs.dataset), sorted(a / b for a, b in pairs)
    rates = [n / statistics.median(column) for column in zip(*pairs)]
    print(f"{name:38} plain {rates[0]:11,.0f} /s   keyed {rates[1]:11,.0f} /s   "
          f"ratio {statistics.median(ratios):6.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})   {wanted}", flush=True)


def first_batch(name, make, rounds=9):
    "Milliseconds to the first batch from three places of an epoch."
    loader = KeyedLoader(make())
    places, times = (0, len(loader) // 2, len(loader) - 1), {}
    next(loader.batches(0))
    for _ in range(rounds):
        for place in places: times.setdefault(place, []).append(seconds(next, loader.batches(1, place)) * 1e3)
    loader.close()
    told = (f"{place:,}: {statistics.median(ms):.2f} ({min(ms):.2f}–{max(ms):.2f})" for place, ms in times.items())
    print(f"{name:38} ms to the first batch from batch  " + "   ".join(told), flush=True)


def main():
    slow, tiny = Slow(), Tiny()
    tensors = TensorDataset(torch.randn(20_000, 32), torch.randint(0, 10, (20_000,)))
    kept = {"num_workers": 2, "persistent_workers": True}
    beside("0.4 ms a sample", lambda: DataLoader(slow, 32, shuffle=True), 7, "wanted ≥ 0.95")
    beside("0.4 ms a sample, 2 workers", lambda: DataLoader(slow, 32, shuffle=True, **kept), 9, "wanted ≥ 0.95")
    beside("tiny Python samples", lambda: DataLoader(tiny, 32, shuffle=True), 15, "wanted ≥ 0.85")
    beside("samples that cost nothing", lambda: DataLoader(Nothing(), 32, shuffle=True), 15)
    beside("tiny Python samples, 2 workers", lambda: DataLoader(tiny, 32, shuffle=True, **kept), 15)
    beside("TensorDataset", lambda: DataLoader(tensors, 32, shuffle=True), 15)
    beside("TensorDataset, 2 workers", lambda: DataLoader(tensors, 32, shuffle=True, **kept), 15)
    first_batch("tiny, no workers", lambda: DataLoader(tiny, 32, shuffle=True))
    first_batch("tiny, 2 workers", lambda: DataLoader(tiny, 32, shuffle=True, num_workers=2))
    first_batch("tiny, 2 persistent workers", lambda: DataLoader(tiny, 32, shuffle=True, **kept))
    first_batch("TensorDataset", lambda: DataLoader(tensors, 32, shuffle=True))


if __name__ == "__main__": main()
