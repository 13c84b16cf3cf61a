"""Batches as a function of (seed, epoch, number): for every source, worker count and DataLoader argument, after every kind of pause."""
import gc
import inspect
import multiprocessing
import os
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from torch.utils.data import (BatchSampler, ConcatDataset, DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, SequentialSampler,
                              Subset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler, default_collate, get_worker_info)
from torch.utils.data.distributed import DistributedSampler

from trainbook.data import KeyedLoader
from trainbook.device import ahead, mix, reseed, rng_state
from trainbook.source import ConfigError

torch.set_num_threads(1)


def draws(): return [random.random(), numpy.random.rand(), torch.rand(()).item()]


class Noisy(Dataset):
    "Sample i, and a draw of each generator."
    def __init__(self, n=22): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return torch.tensor([int(i), *draws()], dtype=torch.float64)


class Quiet(Dataset):
    def __init__(self, n=22): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return float(i)


class Many(Noisy):
    "Fetches a whole batch at once."
    def __getitems__(self, indices): return [self[i] for i in reversed(indices)]


class Where(Dataset):
    "Who loads it, and what they were told."
    told = -1
    def __len__(self): return 8
    def __getitem__(self, i): return torch.tensor([os.getpid(), self.told, i])


def noisy_collate(samples): return torch.cat([torch.as_tensor(samples, dtype=torch.float64).flatten() if not torch.is_tensor(samples[0])
                                              else torch.stack(samples).flatten(), torch.tensor(draws(), dtype=torch.float64)])


def all_of(loader, epoch=0, start=0): return list(loader.batches(epoch, start))


def plain(batch): return [plain(part) for part in batch] if isinstance(batch, (list, tuple)) else batch.tolist() if torch.is_tensor(batch) else batch


def same(a, b): return plain(a) == plain(b)


def indices(loader, epoch=0): return [batch[:, 0].int().tolist() for _, batch in loader.batches(epoch)]


# ---------------------------------------------------------------- resume = the tail, for every source

class Buckets(Sampler):
    "A batch sampler of one's own, with NumPy's global generator and a set_epoch."
    epoch = 0
    def __len__(self): return 6
    def set_epoch(self, epoch): self.epoch = epoch
    def __iter__(self):
        for b in numpy.random.permutation(6).tolist(): yield [b, b + 6 + self.epoch % 2]


class OwnGenerators(Sampler):
    "Draws from generators of its own, of every kind."
    def __init__(self): self.a, self.b, self.c, self.d = torch.Generator(), numpy.random.default_rng(), random.Random(), numpy.random.RandomState()
    def __len__(self): return 12
    def __iter__(self):
        order = torch.randperm(12, generator=self.a).tolist()
        self.c.shuffle(order)
        return iter([order[i] for i in self.b.permutation(12)[self.d.permutation(12)].tolist()])


class Lines(IterableDataset):
    "A stream that knows where it is."
    def __init__(self, n=13): self.n, self.line = n, 0
    def __iter__(self):
        while self.line < self.n:
            self.line += 1
            yield torch.tensor([self.line, *draws()], dtype=torch.float64)
        self.line = 0
    def state_dict(self): return {"line": self.line}
    def load_state_dict(self, state): self.line = state["line"]


class Counted(IterableDataset):
    "A stream without a state."
    def __iter__(self):
        info = get_worker_info()
        yield from range(info.id if info else 0, 12, info.num_workers if info else 1)


class OwnLoader:
    "Somebody's loader with a state, no torch in it."
    def __init__(self): self.at = 0
    def __len__(self): return 5
    def __iter__(self):
        while self.at < 5:
            self.at += 1
            yield torch.full((2,), self.at) + torch.rand(2)
        self.at = 0
    def state_dict(self): return {"at": self.at}
    def load_state_dict(self, state): self.at = state["at"]


TENSORS = TensorDataset(torch.arange(44.).reshape(22, 2), torch.arange(22))
SOURCES = {
    "shuffle": lambda w: DataLoader(Noisy(), 4, shuffle=True, num_workers=w),
    "sequence": lambda w: DataLoader(Noisy(), 4, num_workers=w),
    "drop_last": lambda w: DataLoader(Noisy(), 4, shuffle=True, drop_last=True, num_workers=w),
    "collate": lambda w: DataLoader(Quiet(), 4, shuffle=True, collate_fn=noisy_collate, num_workers=w),
    "both random": lambda w: DataLoader(Noisy(), 4, shuffle=True, collate_fn=noisy_collate, num_workers=w),
    "getitems": lambda w: DataLoader(Many(), 4, shuffle=True, num_workers=w),
    "concat": lambda w: DataLoader(ConcatDataset([Noisy(9), Noisy(9)]), 4, shuffle=True, num_workers=w),
    "list dataset": lambda w: DataLoader([1., 2, 3, 4, 5], 2, shuffle=True, collate_fn=noisy_collate, num_workers=w),
    "no batching": lambda w: DataLoader(Noisy(), batch_size=None, shuffle=True, num_workers=w),
    "batches of one": lambda w: DataLoader(Noisy(), shuffle=True, num_workers=w),
    "tensors": lambda w: DataLoader(TENSORS, 4, shuffle=True, num_workers=w),
    "subset": lambda w: DataLoader(Subset(Subset(TENSORS, range(1, 21)), [-1, 3, 4, 5, 7, 9]), 4, shuffle=True, num_workers=w),
    "tensors, buckets": lambda w: DataLoader(TENSORS, batch_sampler=Buckets(), num_workers=w),
    "tensors, collate": lambda w: DataLoader(TENSORS, 4, shuffle=True, collate_fn=lambda s: default_collate(s) + draws(), num_workers=w),
    "replacement": lambda w: DataLoader(Noisy(), 4, sampler=RandomSampler(range(22), replacement=True), num_workers=w),
    "part": lambda w: DataLoader(Noisy(), 4, sampler=RandomSampler(range(22), num_samples=10), num_workers=w),
    "weighted": lambda w: DataLoader(Noisy(), 4, sampler=WeightedRandomSampler(list(range(1, 23)), 12), num_workers=w),
    "subset sampler": lambda w: DataLoader(Noisy(), 4, sampler=SubsetRandomSampler([1, 3, 5, 7, 9]), num_workers=w),
    "distributed": lambda w: DataLoader(Noisy(), 4, sampler=DistributedSampler(range(22), 2, 1, shuffle=True), num_workers=w),
    "own generators": lambda w: DataLoader(Noisy(), 4, sampler=OwnGenerators(), num_workers=w),
    "indices": lambda w: DataLoader(Noisy(), 4, sampler=[5, 4, 3, 2, 1, 0], num_workers=w),
    "buckets": lambda w: DataLoader(Noisy(), batch_sampler=Buckets(), num_workers=w),
    "BatchSampler": lambda w: DataLoader(Noisy(), batch_sampler=BatchSampler(OwnGenerators(), 5, True), num_workers=w),
    "batches given": lambda w: DataLoader(Noisy(), batch_sampler=[[1, 2], [5, 4, 3]], num_workers=w),
}


@pytest.mark.parametrize("name", SOURCES)
def test_any_worker_count_and_any_start_give_the_same(name):
    reseed(1)
    whole = all_of(KeyedLoader(SOURCES[name](0)), epoch=1)
    reseed(2)  # whatever was drawn before
    loader = KeyedLoader(SOURCES[name](0))
    assert len(loader) == len(whole) and not loader.exact
    for start in range(len(whole) + 1): assert same(all_of(loader, 1, start), whole[start:]), start
    reseed(3)
    two = KeyedLoader(SOURCES[name](2))
    assert same(all_of(two, 1), whole)
    assert same(all_of(two, 1, len(whole) - 1), whole[-1:])
    assert [samples for samples, _ in whole] == [samples for samples, _ in all_of(two, 1)]


@pytest.mark.parametrize("name", sorted(SOURCES.keys() - {"sequence", "indices", "batches given"}))
def test_epochs_and_seeds_differ(name):
    loader = KeyedLoader(SOURCES[name](0), seed=1)
    assert not same(all_of(loader, 0), all_of(loader, 1))
    assert not same(all_of(loader, 0), all_of(KeyedLoader(SOURCES[name](0), seed=2), 0)) or name == "distributed"  # it has its own seed


@pytest.mark.parametrize("name", ["tensors", "subset", "sequence", "drop_last", "list dataset", "no batching", "indices", "batches given"])
def test_the_epoch_has_what_the_plain_loader_has(name):
    make = SOURCES[name] if name != "list dataset" else lambda w: DataLoader([1., 2, 3], 2)
    count = lambda batches: sorted(repr(plain(batch)) for batch in batches)
    dull = lambda loader: not loader.batch_sampler or isinstance(loader.dataset, (TensorDataset, Subset))
    ours, theirs = [b for _, b in all_of(KeyedLoader(make(0)))], list(make(0))
    assert len(ours) == len(theirs) and [type(b) for b in ours] == [type(b) for b in theirs]
    if dull(make(0)) and name != "no batching":
        rows = lambda batches: sorted(row for batch in batches for row in batch[1].tolist())
        assert rows(ours) == rows(theirs)
    if name in ("sequence", "indices", "batches given"): assert [b[:, 0].tolist() for b in ours] == [b[:, 0].tolist() for b in theirs]
    assert count(ours) and all(b.dtype == t.dtype for b, t in zip(ours, theirs) if torch.is_tensor(b))


def rebuilt_with(loader, workers): return DataLoader(loader.dataset, loader.batch_size, sampler=loader.sampler, num_workers=workers)


def test_tensors_come_as_the_default_collate_makes_them():
    class Slow(Dataset):  # the same samples, with code in between
        def __len__(self): return 22
        def __getitem__(self, i): return TENSORS[i]
    for w in (0, 2):
        ours, theirs = all_of(KeyedLoader(DataLoader(TENSORS, 4, shuffle=True, num_workers=w))), all_of(KeyedLoader(DataLoader(Slow(), 4, shuffle=True)))
        assert same(ours, theirs) and {type(b) for _, b in ours} == {list}
        assert all(x.is_contiguous() and x.dtype == y.dtype for (_, a), (_, b) in zip(ours, theirs) for x, y in zip(a, b))
    for make in (lambda: DataLoader(Subset(TENSORS, [-1, 3, -22]), 2), lambda: DataLoader(TENSORS, 2, sampler=[-1, 3, -22])):
        for w in (0, 1): assert same([b for _, b in KeyedLoader(rebuilt_with(make(), w)).batches(0)], list(make()))
    assert all_of(KeyedLoader(DataLoader(TENSORS, 11, collate_fn=len))) == [(11, 11), (11, 11)]
    with pytest.raises(IndexError): all_of(KeyedLoader(DataLoader(Subset(TENSORS, [3, 22]), 2)))


def test_what_may_run_code_is_no_tensor_dataset():
    class Own(TensorDataset):
        def __getitem__(self, i): return super().__getitem__(i)[0] + torch.rand(())
    loader = lambda w: KeyedLoader(DataLoader(Own(torch.zeros(6)), 3, num_workers=w))
    assert same(all_of(loader(0)), all_of(loader(2)))
    assert max(max(plain(b)) for _, b in all_of(loader(0))) > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_is_its_own_function_with_per_sample(workers):
    def rows(size, per, seed=42): return sorted(row for _, batch in KeyedLoader(DataLoader(Noisy(), size, shuffle=True, num_workers=workers), seed, per).batches(3) for row in batch.tolist())
    assert rows(3, "sample") == rows(5, "sample") != rows(5, "sample", 43)
    assert rows(3, "batch") != rows(5, "batch")
    single = KeyedLoader(DataLoader(Noisy(), None, num_workers=workers), per="sample")
    assert sorted(batch.tolist() for _, batch in single.batches(3)) == rows(3, "sample")
    keyed = KeyedLoader(DataLoader(Quiet(), 4, collate_fn=noisy_collate, num_workers=workers), per="sample")
    _, batch = next(keyed.batches(0))
    reseed(mix(mix(42, 0, 2)))
    assert batch[-3:].tolist() == draws()  # the collate has the key of the batch
    with pytest.raises(ConfigError, match="expected batch or sample"): KeyedLoader([1], per="row")


# ---------------------------------------------------------------- the training process

def streams(make, workers, touch=False):
    "What the training process draws beside its batches."
    reseed(9)
    out = draws()
    for _ in KeyedLoader(make(workers)).batches(2): out += draws() if touch else []
    return out + draws()


@pytest.mark.parametrize("name", ["shuffle", "collate", "weighted", "tensors", "subset", "buckets", "own generators", "no batching"])
@pytest.mark.parametrize("touch", [False, True])
def test_the_training_process_draws_the_same_with_any_workers(name, touch):
    assert streams(SOURCES[name], 0, touch) == streams(SOURCES[name], 2, touch)


@pytest.mark.parametrize("workers", [0, 2])
def test_torch_goes_on_as_if_nothing_was_loaded_and_pure_data_touches_nothing(workers):
    reseed(5); torch_only = torch.get_rng_state()
    all_of(KeyedLoader(SOURCES["both random"](workers)))
    assert torch.equal(torch.get_rng_state(), torch_only)
    before = repr(rng_state())
    torch.set_printoptions(profile="full")
    for name in ("tensors", "subset", "tensors, buckets"): all_of(KeyedLoader(SOURCES[name](workers)))
    all_of(KeyedLoader([torch.zeros(2)]))
    torch.set_printoptions(profile="default")
    assert repr(rng_state()) == before


def test_samplers_are_put_back():
    sampler = OwnGenerators()
    kept, states = (sampler.a, sampler.b, sampler.c, sampler.d), (sampler.a.get_state().tolist(), sampler.c.getstate(), str(sampler.b.bit_generator.state))
    state = repr(rng_state())
    list(KeyedLoader(DataLoader(Quiet(), batch_sampler=BatchSampler(sampler, 2, False)))._kind.plan(0))
    assert all(a is b for a, b in zip(kept, (sampler.a, sampler.b, sampler.c, sampler.d)))
    assert states == (sampler.a.get_state().tolist(), sampler.c.getstate(), str(sampler.b.bit_generator.state)) and repr(rng_state()) == state


# ---------------------------------------------------------------- every argument of a DataLoader

def told(number): get_worker_info().dataset.told = number + 100
def slow_collate(samples): time.sleep(3); return samples


def worker_values(**arguments): return torch.cat([batch for _, batch in KeyedLoader(DataLoader(Where(), 2, **arguments)).batches(0)])


def row_dataset(): assert sorted(sum(indices(KeyedLoader(DataLoader(Noisy(7), 2))), [])) == list(range(7))
def row_batch_size(): assert [n for n, _ in all_of(KeyedLoader(DataLoader(Noisy(7), 3)))] == [3, 3, 1]


def row_shuffle():
    loader = KeyedLoader(DataLoader(Noisy(), 4, shuffle=True))
    assert sorted(sum(indices(loader), [])) == list(range(22)) != sum(indices(loader), [])
    assert sum(indices(KeyedLoader(DataLoader(Noisy(), 4))), []) == list(range(22))


def row_sampler():
    assert indices(KeyedLoader(DataLoader(Noisy(), 2, sampler=[3, 1, 2]))) == [[3, 1], [2]]
    class Endless(Sampler):
        def __iter__(self):
            while True: yield 0
    with pytest.raises(ConfigError, match="^sampler  Endless has no length"): KeyedLoader(DataLoader(Noisy(), 2, sampler=Endless()))
    with pytest.raises(ConfigError, match="^sampler  Endless has no length"): KeyedLoader(DataLoader(Noisy(), batch_sampler=Endless()))


def row_batch_sampler():
    assert indices(KeyedLoader(DataLoader(Noisy(), batch_sampler=[[3, 1], [2]]))) == [[3, 1], [2]]
    odd = KeyedLoader(DataLoader(Noisy(), batch_sampler=Buckets()))
    assert max(sum(indices(odd, 0), [])) == 11 and max(sum(indices(odd, 1), [])) == 12  # it was told the epoch


def row_num_workers():
    assert set(worker_values()[:, 0].tolist()) == {os.getpid()}
    assert len(set(worker_values(num_workers=2)[:, 0].tolist()) - {os.getpid()}) == 2


def row_collate_fn():
    for w in (0, 1): assert all_of(KeyedLoader(DataLoader(Quiet(3), 2, collate_fn=tuple, num_workers=w))) == [(2, (0., 1.)), (1, (2.,))]


def row_pin_memory(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no accelerator: nothing to do, and nothing to say once an epoch
        for w in (0, 1): assert len(all_of(KeyedLoader(DataLoader(TENSORS, 4, pin_memory=True, num_workers=w)))) == 6
    import trainbook.data
    import trainbook.workers
    monkeypatch.setattr(trainbook.data, "can_pin", lambda loader: loader.pin_memory)
    monkeypatch.setattr(trainbook.workers, "can_pin", lambda loader: loader.pin_memory)
    monkeypatch.setattr(trainbook.data, "pin_memory", lambda batch: ("pinned", batch))
    for data in (TENSORS, Noisy()): assert all(b[0] == "pinned" for _, b in KeyedLoader(DataLoader(data, 4, pin_memory=True)).batches(0))
    assert not any(b[0] == "pinned" for _, b in KeyedLoader(DataLoader(TENSORS, 4)).batches(0))
    assert KeyedLoader(DataLoader(TENSORS, 4, pin_memory=True, num_workers=1))._kind.workers.loader.pin_memory


def row_drop_last():
    assert [n for n, _ in all_of(KeyedLoader(DataLoader(Noisy(7), 3, drop_last=True)))] == [3, 3]
    with pytest.raises(ConfigError, match="7 samples make no batch of 8"): KeyedLoader(DataLoader(Noisy(7), 8, drop_last=True))


def row_timeout():
    with pytest.raises(RuntimeError, match="timed out after 1"):
        all_of(KeyedLoader(DataLoader(Quiet(4), 2, collate_fn=slow_collate, num_workers=1, timeout=1)))


def row_worker_init_fn(): assert set(worker_values(num_workers=2, worker_init_fn=told)[:, 1].tolist()) == {100, 101}


def row_multiprocessing_context():
    loader = KeyedLoader(DataLoader([1., 2., 3.], 2, num_workers=1, multiprocessing_context="spawn"))
    batches = loader.batches(0)
    assert next(batches)[1].tolist() == [1, 2]
    assert type(loader._kind.workers.running._workers[0]).__name__ == "SpawnProcess"
    assert next(batches)[1].tolist() == [3]
    locks = KeyedLoader(DataLoader([multiprocessing.get_context("spawn").Lock()], collate_fn=len, num_workers=1, multiprocessing_context="spawn"))
    assert all_of(locks) == [(1, 1)]  # a lock travels to a process that starts, and only there


def row_generator():
    def order(seed):
        generator = torch.Generator().manual_seed(seed)
        loader = KeyedLoader(DataLoader(Noisy(), 4, shuffle=True, generator=generator, num_workers=1))
        found = indices(loader)
        assert torch.equal(generator.get_state(), torch.Generator().manual_seed(seed).get_state())
        return found
    assert order(1) == order(2)


def row_prefetch_factor():
    loader = KeyedLoader(DataLoader(Noisy(), 2, num_workers=1, prefetch_factor=5))
    batches = loader.batches(0); next(batches)
    assert loader._kind.workers.running._tasks_outstanding + len(loader._kind.workers.running._task_info) >= 5


def row_persistent_workers():
    loader = KeyedLoader(DataLoader(Where(), 2, num_workers=2, persistent_workers=True))
    first, second = (set(torch.cat([b for _, b in loader.batches(e)])[:, 0].tolist()) for e in (0, 1))
    assert first == second and all(map(alive, first))
    loader.close()
    assert not any(map(alive, first))
    assert len(all_of(loader)) == 4  # and it can be asked again
    loader.close()
    third = KeyedLoader(DataLoader(Where(), 2, num_workers=2))
    assert not set(torch.cat([b for _, b in third.batches(0)])[:, 0].tolist()) & set(torch.cat([b for _, b in third.batches(1)])[:, 0].tolist())


def row_pin_memory_device(): assert KeyedLoader(DataLoader(Noisy(), 2, num_workers=1, pin_memory_device="cuda"))._kind.workers.loader.pin_memory_device == "cuda"


def row_in_order():
    loader = KeyedLoader(DataLoader(Noisy(), 4, num_workers=2, in_order=False))
    assert "in_order=False" in loader.exact and "starts over" in loader.exact and not loader._kind.workers.loader.in_order
    assert sorted(sum(indices(loader), [])) == list(range(22)) and sum(n for n, _ in loader.batches(0, start=3)) == 22
    assert KeyedLoader(DataLoader(Noisy(), 4, in_order=False)).exact == ""  # nobody overtakes without workers


@pytest.mark.parametrize("argument", [name for name in inspect.signature(DataLoader.__init__).parameters if name != "self"])
def test_every_argument_of_a_dataloader(argument, monkeypatch):
    row = globals()[f"row_{argument}"]  # a new argument of torch has no row: decide what becomes of it
    row(*([monkeypatch] if inspect.signature(row).parameters else []))


# ---------------------------------------------------------------- pauses and processes

def alive(pid):
    try: return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError: return False


def children():
    found = set()
    for task in Path("/proc/self/task").iterdir():
        try: found |= {int(pid) for pid in (task/"children").read_text().split()}
        except OSError: pass  # a thread that is gone
    return {pid for pid in found if alive(pid)}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("persistent", [False, True])
def test_an_abandoned_iteration_leaves_nothing(persistent, keep):
    gc.collect()
    before = children()
    make = lambda: KeyedLoader(DataLoader(Noisy(), 2, shuffle=True, num_workers=2, persistent_workers=persistent))
    whole, loader, held = all_of(make()), make(), []
    for start in (0, 3, 3, 9, 1):
        batches = loader.batches(0, start)
        assert same([next(batches), next(batches)], whole[start:start + 2])
        if keep: held.append(batches)  # a trainer, a traceback or a notebook may hold on to it
        assert len(children() - before) == 2
    for old in held[:-1]:
        with pytest.raises(RuntimeError, match="these batches are over"): next(old)
    if keep:
        held[:] = held[-1:]; old = None; gc.collect()  # an old one that is collected late does not end the new one
        assert same([next(held[0]), next(held[0])], whole[3:5]) and len(children() - before) == 2
    loader.close(); loader.close()
    gc.collect()
    assert not children() - before
    assert same(all_of(loader, 0, 9), whole[9:])
    loader.close()


def test_a_dropped_loader_leaves_no_process():
    before = children()
    batches = KeyedLoader(DataLoader(Noisy(), 2, num_workers=2)).batches(0); next(batches)
    assert len(children() - before) == 2
    del batches
    assert not children() - before


@pytest.mark.parametrize("persistent", [False, True])
def test_an_error_in_a_worker_is_told_and_the_next_epoch_works(persistent):
    class Bad(Quiet):
        def __getitem__(self, i):
            if i == 5: raise ValueError("sample 5 is torn")
            return float(i)
    loader = KeyedLoader(DataLoader(Bad(), 2, num_workers=2, persistent_workers=persistent))
    for _ in range(2):
        with pytest.raises(ValueError, match="sample 5 is torn"): all_of(loader)
    assert len(all_of(loader, 0, 3)) == 8
    loader.close()


def test_workers_survive_the_stop_button_and_a_sigterm_to_all():
    code = """if True:
        import os, signal, subprocess, sys, time, torch
        from torch.utils.data import DataLoader
        from trainbook.data import KeyedLoader
        signal.signal(signal.SIGTERM, lambda *a: print("the parent's handler", flush=True))
        class Data:
            def __len__(self): return 40
            def __getitem__(self, i): time.sleep(0.01); return os.getpid()
        loader = KeyedLoader(DataLoader(Data(), 2, num_workers=2, persistent_workers=True))
        pauses = 0
        signal.signal(signal.SIGINT, lambda *a: globals().update(pauses=pauses + 1))
        seen = set()
        for number, (n, batch) in enumerate(loader.batches(0)):
            seen |= set(batch.tolist())
            if number in (0, 1, 5): os.killpg(0, signal.SIGINT)
        again = {pid for _, batch in loader.batches(1) for pid in batch.tolist()}
        print(pauses, number, seen == again, flush=True)
        try:
            for number, (n, batch) in enumerate(loader.batches(2)):
                if number in (1, 2): subprocess.run(["kill", "-TERM" if number == 1 else "-KILL", str(min(again))])
        except RuntimeError as error: print("told" if any(word in f"{error} {error.__cause__}" for word in ("Killed", "exited unexpectedly")) else error)
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, start_new_session=True)
    assert done.stdout.split("\n")[:2] == ["3 19 True", "told"] and done.returncode == 0, done


def test_an_interrupt_while_workers_start_comes_afterwards():
    code = """if True:
        import os, signal, threading, torch
        from torch.utils.data import DataLoader
        from trainbook.data import KeyedLoader
        import torch.utils.data._utils.worker as worker
        real = worker._worker_loop
        def late(*arguments):                       # the world's slowest start of a worker
            import time; os.killpg(0, signal.SIGINT) if arguments[10] == 0 else None; time.sleep(0.3); return real(*arguments)
        worker._worker_loop = late
        hits = []
        signal.signal(signal.SIGINT, lambda *a: (hits.append(1), signal.default_int_handler(*a)) if os.getpid() != main else hits.append(1))
        main = os.getpid()
        print(len([1 for _ in KeyedLoader(DataLoader(list(range(8)), 2, num_workers=2)).batches(0)]), len(hits))
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, start_new_session=True)
    assert done.stdout.split() == ["4", "1"], done


# ---------------------------------------------------------------- sessions without a file

SESSION = """
import torch
from torch.utils.data import DataLoader, Subset
from trainbook.data import KeyedLoader
class Mine:
    def __len__(self): return 4
    def __getitem__(self, i): return i
def collate(samples): return samples
def init(number): pass
def say(**arguments):
    try: print(len(KeyedLoader(DataLoader(**{"batch_size": 2, "num_workers": 1, "multiprocessing_context": "METHOD"} | arguments))))
    except Exception as error: print(type(error).__name__, error)
say(dataset=Subset(Mine(), [0, 1]))
say(dataset=[1, 2, 3], collate_fn=collate)
say(dataset=[1, 2, 3], worker_init_fn=init)
say(dataset=[1, 2, 3], collate_fn=lambda samples: samples)
say(dataset=[1, 2, 3])
say(dataset=Mine(), num_workers=0, multiprocessing_context=None)
"""


@pytest.mark.parametrize("how", ["-c", "-", "file"])
@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_what_a_session_defined_cannot_be_spawned(how, method, tmp_path):
    text = SESSION.replace("METHOD", method)
    (tmp_path/"script.py").write_text(text)
    words = {"-c": ["-c", text], "-": ["-"], "file": [str(tmp_path/"script.py")]}[how]
    done = subprocess.run([sys.executable, *words], input=text, capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert lines[-2:] == ["2", "2"], done
    if method == "fork": assert lines[:4] == ["1", "2", "2", "2"]
    elif how == "file": assert lines[:3] == ["1", "2", "2"] and "collate_fn  cannot be sent" in lines[3]  # a script is imported again; a lambda is not found
    else:
        for line, what in zip(lines, ("dataset  Mine", "collate_fn  collate", "worker_init_fn  init", "collate_fn  <lambda>")):
            assert line.startswith(f"ConfigError {what} is defined in this session; a worker ({method})") and "move it to a module" in line and "num_workers=0" in line


# ---------------------------------------------------------------- streams

STREAMS = {"dataset": lambda: DataLoader(Lines(), 3), "unbatched": lambda: DataLoader(Lines(), None), "drop_last": lambda: DataLoader(Lines(), 5, drop_last=True),
           "own loader": OwnLoader, "bare dataset": Lines}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_with_a_state_goes_on_anywhere(name):
    make = lambda: KeyedLoader(STREAMS[name]())
    assert make().exact == ""
    one = make(); epochs = [all_of(one, 0), all_of(one, 1)]
    assert not same(*epochs)
    for epoch, batches in enumerate(epochs):
        for start in range(len(batches) + 1):
            stopped = make()
            for before in range(epoch): all_of(stopped, before)
            running = stopped.batches(epoch)
            assert same([next(running) for _ in range(start)], batches[:start])
            reseed(start)
            state = stopped.state_dict()
            resumed = make(); resumed.load_state_dict(state)
            assert resumed.state_dict() == state
            assert same(all_of(resumed, epoch, start), batches[start:]), (epoch, start)
            assert same(all_of(stopped, epoch, start), batches[start:]) or not start  # in the same process, with the old one still there


@pytest.mark.parametrize("n", [12, 13])
def test_a_state_at_the_end_of_an_epoch_begins_the_next(n):
    one = KeyedLoader(DataLoader(Lines(n), 3)); count = len(all_of(one, 0)); second = all_of(one, 1)
    stopped = KeyedLoader(DataLoader(Lines(n), 3)); running = stopped.batches(0)
    for _ in range(count): next(running)
    resumed = KeyedLoader(DataLoader(Lines(n), 3)); resumed.load_state_dict(stopped.state_dict())
    assert same(all_of(resumed, 1), second)
    assert same(all_of(stopped, 1), second)


def test_a_state_is_a_copy_and_a_missing_one_is_told():
    class Live(Lines):
        def __init__(self): super().__init__(); self.live = {"line": 0}
        def state_dict(self): self.live["line"] = self.line; return self.live
    loader = KeyedLoader(DataLoader(Live(), 2)); batches = loader.batches(0); next(batches)
    state = loader.state_dict(); next(batches); loader.state_dict()
    assert state == {"source": {"line": 2}, "ended": False}
    with pytest.raises(ConfigError, match="without the source's state"): all_of(KeyedLoader(DataLoader(Lines(), 2)), 0, 3)


def test_what_cannot_be_exact_says_so_and_starts_over():
    for source, why in ((DataLoader(Counted(), 2), "no state_dict"), (DataLoader(Lines(), 2, num_workers=2), "runs ahead in its workers"),
                        ((b for b in [1, 2]), "generator has no state_dict")):
        loader = KeyedLoader(source)
        assert why in loader.exact and loader.exact.endswith("the epoch starts over") and loader.state_dict() == {}
    loader = KeyedLoader(DataLoader(Counted(), 2))
    assert same(all_of(loader, 0, 3), all_of(loader, 0))
    loader = KeyedLoader(DataLoader(Counted(), 2, num_workers=2, persistent_workers=True))
    assert same(all_of(loader, 0, 3), all_of(loader, 0)) and sorted(sum((b.tolist() for _, b in loader.batches(1)), [])) == list(range(12))
    loader.close()


def test_a_stream_is_told_the_epoch():
    class Told(Counted):
        def set_epoch(self, epoch): self.epoch = epoch
        def __iter__(self): yield self.epoch
    assert [all_of(KeyedLoader(DataLoader(Told(), None)), e) for e in (0, 3)] == [[(1, 0)], [(1, 3)]]


def test_a_loader_of_ones_own_class():
    class Same(DataLoader): pass
    class Doubled(DataLoader):
        def __iter__(self): return (batch * 2 for batch in super().__iter__())
    assert same(all_of(KeyedLoader(Same(Noisy(), 4, shuffle=True))), all_of(KeyedLoader(SOURCES["shuffle"](0))))
    loader = KeyedLoader(Doubled(Quiet(), 4))
    assert loader.exact and len(loader) == 6 and all_of(loader)[0][1].tolist() == [0, 2, 4, 6]


def test_ready_batches():
    ready = [torch.zeros(3, 2), torch.ones(2, 2)]
    loader = KeyedLoader(ready)
    assert same(all_of(loader, 4, 1), [(2, ready[1])]) and not loader.exact and len(loader) == 2
    class Made:
        def __len__(self): return 4
        def __getitem__(self, b): return torch.rand(2) + b
    made = KeyedLoader(Made()); reseed(1); whole = all_of(made, 1); reseed(2)
    assert same(all_of(made, 1, 2), whole[2:]) and not same(whole, all_of(made, 2))


# ---------------------------------------------------------------- errors, identity, device

@pytest.mark.parametrize("source, words", [
    (lambda: DataLoader([]), "batches  found none: the dataset is empty"),
    (list, "batches  found none: the list is empty"),
    (lambda: DataLoader(Noisy(3), 4, drop_last=True), "3 samples make no batch of 4; use a smaller batch_size or drop_last=False"),
    (lambda: DataLoader(Noisy(), sampler=[]), "batches  found none: BatchSampler lists none"),
    (lambda: TENSORS, r"loader  found TensorDataset, a dataset; write DataLoader\(dataset"),
    (lambda: {"a": 1}, "loader  found dict; accepted are"), (lambda: 3, "loader  found int"), (lambda: torch.zeros(3), "loader  found Tensor"), (lambda: None, "found NoneType"),
])
def test_what_is_no_loader_is_told_up_front(source, words):
    with pytest.raises(ConfigError, match=words) as told: KeyedLoader(source())
    assert "\n" not in str(told.value)


def test_used_up():
    loader = KeyedLoader(torch.ones(2) for _ in range(3))
    assert [n for n, _ in all_of(loader)] == [2, 2, 2]
    with pytest.raises(ConfigError, match="found none in epoch 2: generator can be read once and is used up; wrap it in a list or in a DataLoader"): all_of(loader, 1)
    with pytest.raises(TypeError, match="unknown: generator has no length"): len(loader)
    with pytest.raises(ConfigError, match="Empty yields nothing"): all_of(KeyedLoader(DataLoader(type("Empty", (IterableDataset,), {"__iter__": lambda self: iter([])})())))


def test_identity_and_differences():
    import json
    old = json.loads(json.dumps(KeyedLoader(DataLoader(Noisy(1000), 10, shuffle=True), seed=1).identity()))
    assert old == {"seed": 1, "samples": 1000, "batch_size": 10, "batches": 100, "order": "shuffled", "per": "batch"}
    assert KeyedLoader(DataLoader(Noisy(1000), 10, shuffle=True, num_workers=2), seed=1).differences(old) == []
    assert KeyedLoader(DataLoader(Noisy(900), 5), per="sample").differences(old) == [
        "seed  was 1, is 42", "samples  was 1,000, is 900", "batch_size  was 10, is 5", "batches  was 100, is 180", "order  was shuffled, is in sequence", "per  was batch, is sample"]
    assert KeyedLoader(b for b in [1]).identity() == {"seed": 42, "samples": None, "batch_size": None, "batches": None}
    assert KeyedLoader([1, 2]).differences(old)[0:2] == ["seed  was 1, is 42", "samples  was 1,000, is unknown"]


def test_the_order_is_pinned():
    "Checkpoints outlive versions: what a key gives must never change."
    assert indices(KeyedLoader(DataLoader(Noisy(8), 4, shuffle=True)))[0] == PINNED
    _, batch = next(KeyedLoader(DataLoader(Noisy(8), 4, shuffle=True)).batches(0))
    reseed(mix(mix(42, 0, 2)))
    assert batch[0, 1:].tolist() == draws()


PINNED = [7, 6, 4, 0]


def test_ahead_moves_and_fetches_nothing_early():
    taken = []
    batches = ahead(((taken.append(i), (1, {"x": torch.zeros(1)}))[1] for i in range(3)), torch.device("meta"))
    assert next(batches)[1]["x"].device.type == "meta" and taken == [0]
    assert len(list(batches)) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ahead_on_cuda_copies_right_and_waits_for_nothing():
    device, data = torch.device("cuda"), TensorDataset(torch.arange(4_000_000.).reshape(1000, 4000), torch.arange(1000))
    loader = KeyedLoader(DataLoader(data, 50, pin_memory=True)); all_of(loader)
    torch.cuda.set_sync_debug_mode("error")
    try: sums = [(batch[0] @ batch[0].T).sum() + batch[1].sum() for _, batch in ahead(loader.batches(0), device)]
    finally: torch.cuda.set_sync_debug_mode("default")
    expected = [(b[0].double() @ b[0].double().T).sum() + b[1].sum() for _, b in loader.batches(0)]
    torch.testing.assert_close(torch.stack(sums).cpu().double(), torch.stack(expected), rtol=1e-4, atol=0)


def test_any_start_costs_the_same():
    loader = KeyedLoader(DataLoader(Quiet(200_000), 8, shuffle=True)); next(loader.batches(0))
    def first(start):
        times = []
        for _ in range(7): began = time.perf_counter(); next(loader.batches(0, start)); times.append(time.perf_counter() - began)
        return min(times)
    assert first(24_000) < 2 * first(0) + 1e-3


def test_the_sequential_order_is_the_datasets(): assert sum(indices(KeyedLoader(DataLoader(Noisy(), 5, sampler=SequentialSampler(range(9))))), []) == list(range(9))
