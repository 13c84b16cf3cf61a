"""Rates and batch sizes that are found: near the best of a grid, the same twice, and nothing is left behind."""
import json
import math
import sys
import threading

import exact
import numpy as np
import pytest
import torch
from exact import at_step, make
from test_trial import MEANWHILE, odd, rows, taken_apart
from torch.utils.data import DataLoader, TensorDataset

from trainbook import Trainer, find_batch_size, find_lr, finders
from trainbook.finders import Rates, Sizes, lowest, shown, smoothed
from trainbook.source import ConfigError


def regression():
    torch.manual_seed(0)
    x = torch.randn(512, 10)
    y = (x @ torch.randn(10, 1)).tanh() + 0.1 * torch.randn(512, 1)
    return torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1)), DataLoader(TensorDataset(x, y), 32, shuffle=True), {"loss": "mse"}


def classification():
    torch.manual_seed(1)
    kind = torch.randint(0, 3, (600,))
    x = torch.stack([(2.1 * kind).cos(), (2.1 * kind).sin()], 1) * 2 + 0.8 * torch.randn(600, 2)
    model = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
    return model, DataLoader(TensorDataset(x, kind), 20, shuffle=True), {"loss": "cross_entropy"}


class Reverses(torch.nn.Module):
    "A transformer of two layers."

    def __init__(self):
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=True)
        self.embed, self.place = torch.nn.Embedding(16, 32), torch.nn.Parameter(torch.zeros(12, 32))
        self.layers, self.head = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.nn.Linear(32, 16)

    def forward(self, x): return self.head(self.layers(self.embed(x) + self.place)).transpose(1, 2)


def transformer():
    torch.manual_seed(2)
    x = torch.randint(0, 16, (512, 12))
    return Reverses(), DataLoader(TensorDataset(x, x.flip(1)), 32, shuffle=True), {"loss": "cross_entropy"}


def trainer_of(problem=classification, **words):
    model, data, own = problem()
    return Trainer(model, data, **({"epochs": 4, "run": False, "quiet": True, "lr": 1e-3} | own | words))


def end_of(problem, **words) -> float:
    trainer = trainer_of(problem, **words)
    try: trainer.train()
    except RuntimeError: return math.inf
    return trainer.evaluate(trainer.train_loader.source)["test_loss"]


# --- learning rate --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("problem", [regression, classification, transformer])
def test_the_suggestion_is_near_the_best_of_a_grid(problem, optimizer):
    found = find_lr(trainer_of(problem, optimizer=optimizer))
    ends = {rate: end_of(problem, optimizer=optimizer, lr=rate) for rate in np.geomspace(1e-4, 10**0.5, 10).tolist()}
    best = min(ends, key=ends.get)
    good = [rate for rate in ends if ends[rate] < 1.1 * ends[best]]
    assert min(good) / 10 <= found.suggestion <= max(good) * 3.2, (found.suggestion, good)
    assert end_of(problem, optimizer=optimizer, lr=found.suggestion) < min(ends[rate] for rate in ends if rate < found.suggestion / 30)


def test_the_same_twice_and_another_seed_about_the_same():
    one, two, other = find_lr(trainer_of()), find_lr(trainer_of()), find_lr(trainer_of(seed=7))
    assert one.row() == two.row() and 0.3 < one.suggestion / other.suggestion < 3
    assert one.rates[0] == 1e-7 and len(one.rates) == len(one.losses) <= 100 and one.suggestion == pytest.approx(one.rates[lowest(one.losses)[0]] / 2, rel=0.05)


@pytest.mark.parametrize("words", [{"accumulate": 3}, {"precision": "bf16"}, {"clip": 1.0}, {"ema": 0.9}, {"freeze": ["0.*"]}, {"scheduler": "cosine", "warmup": "5 steps"},
                                   {"groups": [{"match": "0.*", "lr": 1e-4}], "no_decay": True}])
def test_with_options(words):
    plain, found = find_lr(trainer_of()), find_lr(trainer_of(**words))
    assert 0.1 < found.suggestion / plain.suggestion < 10


def test_groups_keep_their_multiple(monkeypatch):
    from trainbook.trial import Trial
    seen, step = [], Trial.step
    monkeypatch.setattr(Trial, "step", lambda self, *rest: (step(self, *rest), seen.append([group["lr"] for group in self.trainer.updates[""].optimizer.param_groups]))[0])
    find_lr(trainer_of(groups=[{"match": "0.*", "lr": 1e-4}]))
    assert all(max(rates) == pytest.approx(10 * min(rates)) for rates in seen) and seen[0][0] != seen[-1][0]


def test_the_search_ends_when_it_explodes():
    found = find_lr(trainer_of(regression, optimizer="sgd"))
    assert len(found.losses) < 95 and found.suggestion < found.rates[-1]
    class Breaks(torch.nn.Module):
        def __init__(self): super().__init__(); self.layer, self.calls = torch.nn.Linear(2, 3), 0
        def forward(self, x): self.calls += 1; return self.layer(x) * (math.nan if self.calls > 30 else 1)
    for words, many in (({}, (31,)), ({"nonfinite": "skip"}, (33,))):
        model, data, own = classification()
        found = find_lr(Trainer(Breaks(), data, run=False, quiet=True, lr=1e-3, **own, **words))
        assert len(found.losses) in many and found.suggestion is None and "was not finite" in found.text and None in found.row()["losses"]


def test_what_no_rate_can_teach():
    torch.manual_seed(0)
    x, labels = torch.randn(4000, 8), torch.randint(0, 2, (4000,))
    shuffled = Trainer(torch.nn.Linear(8, 2), DataLoader(TensorDataset(x, labels), 16, shuffle=True), loss="cross_entropy", run=False, quiet=True)
    class Detached(torch.nn.Module):
        def __init__(self): super().__init__(); self.layer, self.head = torch.nn.Linear(8, 8), torch.nn.Parameter(torch.zeros(2))
        def forward(self, x): return self.layer(x).detach()[:, :2] + 0 * self.head
    detached = Trainer(Detached(), DataLoader(TensorDataset(x, labels), 16), loss="cross_entropy", run=False, quiet=True, optimizer="sgd")
    for trainer in (shuffled, detached):
        found = find_lr(trainer)
        assert found.suggestion is None and "no rate" in found.text and "<svg" in found._repr_html_() and repr(found), found.text


def test_a_model_that_has_learned_is_not_accused():
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(4000, 8), torch.randint(0, 2, (4000,))), 16, shuffle=True)
    trainer = Trainer(torch.nn.Linear(8, 2), data, loss="cross_entropy", run=False, quiet=True, epochs=1)
    assert "do the labels belong" in find_lr(trainer).text
    trainer.train()
    row = json.loads(json.dumps(find_lr(trainer).row()))
    assert "made the loss fall; after 250 steps the model may have learned what it can; look at its curve, or ask a fresh one" in Rates(row).text and "labels" not in Rates(row).text
    assert "after 250 steps" in shown(row) and "do the labels belong" in Rates({key: one for key, one in row.items() if key != "step"}).text  # of an older log


def test_ends_of_the_range():
    assert "try high=" in find_lr(trainer_of(), high=1e-3).text and "at the lowest" in find_lr(trainer_of(), low=1e-3).text
    for words, said in (({"low": 0}, "low < high"), ({"low": 1, "high": 0.1}, "low < high"), ({"steps": 3}, "at least 20")):
        with pytest.raises(ConfigError, match=said): find_lr(trainer_of(), **words)


def test_noise_does_not_decide():
    rng, shape = np.random.default_rng(3), np.concatenate([np.ones(50), np.linspace(1, 0.3, 30), np.linspace(0.3, 6, 12)])
    places = [lowest(shape + 0.15 * rng.normal(size=92))[0] for _ in range(50)]
    assert all(place is not None and 70 <= place <= 86 for place in places)
    none = [lowest(np.ones(n) + 0.3 * rng.normal(size=n))[0] for n in (20, 50, 100) for _ in range(100)]
    assert sum(place is not None for place in none) <= 6  # of three hundred
    assert smoothed([1.0, math.nan, 3.0])[1] == 2 and len(smoothed([])) == 0


class Two(Trainer):
    def training_step(self, batch):
        loss = self.loss(self.model(batch[0]), batch[1])
        self.backward(loss, "first")
        self.update("first")
        loss = self.loss(self.model(batch[0]), batch[1])
        self.backward(loss, "second")
        self.update("second")
        return {"loss": loss}


def two():
    model, data, words = classification()
    optimizers = {"first": torch.optim.Adam(model[0].parameters()), "second": torch.optim.SGD(model[5].parameters(), lr=0.1)}
    return Two(model, data, optimizer=optimizers, run=False, quiet=True, epochs=1, **words)


def test_several_optimizers_have_a_rate_each():
    with pytest.raises(ConfigError, match="^optimizer  find_lr is for one; first, second have a rate each$"): find_lr(two())
    assert find_batch_size(two(), seconds=0.3).sizes[0] == 2


# --- batch size -----------------------------------------------------------------------------------------------------------------------

class Room(torch.nn.Module):
    "Has room for so many samples; `late`: the backward pass finds out, or the optimizer."

    def __init__(self, room, late=""):
        super().__init__()
        self.layer, self.room, self.late = torch.nn.Linear(2, 3), room, late

    def forward(self, x):
        y = self.layer(x)
        if len(x) <= self.room: return y
        if self.late == "backward": y.register_hook(self.fail); return y
        self.fail()

    def fail(self, *_): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def narrow(room, n=600, size=16, late="", **words):
    data = classification()[1].dataset
    return Trainer(Room(room, late), DataLoader(TensorDataset(*data[:n]), size), **({"loss": "cross_entropy", "run": False, "quiet": True, "lr": 1e-3} | words))


@pytest.mark.parametrize("late", ["", "backward"])
@pytest.mark.parametrize("room", [1, 2, 3, 7, 64, 100, 511])
def test_the_largest_that_fits(room, late, monkeypatch):
    monkeypatch.setattr(finders, "_end_at", lambda inside, size, samples, *_: "all" if size == samples else "")  # as on CUDA
    trainer = narrow(room, late=late)
    was, mode = taken_apart(trainer), trainer.model.training
    found = find_batch_size(trainer, seconds=3)
    assert room - room // 15 <= found.largest <= room and found.suggestion <= max(1, 0.9 * found.largest) and "does not" in found.text
    assert taken_apart(trainer) == was and trainer.model.training == mode and trainer.model.layer.weight.grad is None
    assert all(size <= room for size in found.sizes) and found.suggestion >= 1


def test_not_even_one():
    with pytest.raises(ConfigError, match="not even one sample"): find_batch_size(narrow(0), seconds=1)


def test_it_fits_whole():
    found = find_batch_size(narrow(10**9, n=60), seconds=3)
    assert found.largest is None and found.sizes[-1] <= 60 and len(found.sizes) == len(found.speeds)
    assert find_batch_size(narrow(10**9, n=1), seconds=1).sizes == [1] and find_batch_size(narrow(9, n=2), seconds=1).sizes == [2]


def made_up(speeds, monkeypatch, free=math.inf, **words):
    monkeypatch.setattr(finders, "_speed", lambda inside, size, seconds: speeds.get(size))
    monkeypatch.setattr(finders, "_free", lambda: free)
    return find_batch_size(narrow(10**9, **words))


def test_the_smallest_with_nine_tenths_of_the_best(monkeypatch):
    found = made_up({2: 10, 4: 20, 8: 40, 16: 80, 32: 93, 64: 100, 128: 101, 256: 102, 512: 1e9}, monkeypatch)
    assert found.suggestion == 32 and found.sizes[-1] == 256 and "beyond 64 it gets no faster" in found.text
    assert found.beside == "from 16 to 32: an epoch has 19 batches, not 38, and lr is usually scaled: × 2 with sgd, × 1.4 with adam"
    found = made_up({2: 10, 4: 10, 8: 10, 16: 10, 32: 10, 64: 10, 128: 10}, monkeypatch)
    assert found.suggestion == 2 and found.beside.startswith("from 16 to 2: accumulate: 8 keeps updates as they are; else an epoch has 300 batches, not 38")
    assert made_up({size: size for size in (2, 4, 8, 16)}, monkeypatch, n=16).beside == "that is what it has"
    found = made_up({2: 10, 4: 20, 8: 40, 16: 80, 20: 85, 22: 90, 23: 91}, monkeypatch)
    assert found.largest == 23 and found.suggestion == 16 and "with a tenth to spare 20" in found.text


def test_it_stops_before_memory_ends(monkeypatch):
    monkeypatch.setattr(finders, "_free", lambda: 4 * (4 * 16 * 3 + 4))  # four times what 16 samples keep
    found = find_batch_size(narrow(10**9), seconds=5)
    assert found.sizes[-1] == 16 and "more than half of the memory that is free" in found.text


def test_it_stops_when_the_time_is_over():
    found = find_batch_size(narrow(10**9), seconds=0.0)
    assert found.sizes == [2] and "4 was not tried" in found.text


def test_batches_go_through_the_collate_of_the_loader():
    seen = []
    def collate(samples):
        seen.append(len(samples))
        return torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])
    found = find_batch_size(Trainer(torch.nn.Linear(6, 3), DataLoader(exact.Augmented(), 8, collate_fn=collate), loss="cross_entropy", run=False, quiet=True), seconds=1)
    assert {*found.sizes} <= {*seen}


def test_what_has_no_samples_says_so():
    for data in ([(exact.X[:8], exact.Y[:8])] * 3, DataLoader(exact.Stream(), 8)):
        trainer = Trainer(exact.net(), data, loss="cross_entropy", run=False, quiet=True, scheduler="constant")
        with pytest.raises(ConfigError, match="^train_loader  batches of another size need a DataLoader") as caught: find_batch_size(trainer)
        assert "\n" not in str(caught.value)


def test_other_errors_pass():
    class Odd(torch.nn.Module):
        def __init__(self): super().__init__(); self.layer = torch.nn.Linear(2, 3)
        def forward(self, x): raise ValueError("of my own")
    trainer = narrow(9)
    trainer.model.forward = Odd().forward
    with pytest.raises(ValueError, match="of my own"): find_batch_size(trainer)


# --- as it was ------------------------------------------------------------------------------------------------------------------------

def look(trainer):
    find_lr(trainer, steps=20)
    try: find_batch_size(trainer, seconds=0.05)
    except ConfigError as error: assert "need a DataLoader" in str(error)


@pytest.mark.parametrize("recipe", "accumulate workers dropout_norm bf16 iterable groups thaw averaged recomputed loss_arguments left_out curriculum everything".split())  # test_trial has them all
def test_a_training_that_is_searched_ends_like_one_that_is_not(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(exact.Noisy, "pause", 0)
    ends = []
    for searched in (False, True):
        inside = [at_step(7, look)] if searched and recipe not in MEANWHILE else []
        trainer = make(recipe, tmp_path/str(searched), callbacks=inside)
        try:
            if searched: look(trainer)
            for end in exact.ENDS.get(recipe, (None,)): trainer.train(end)
        finally: torch.use_deterministic_algorithms(False)
        ends.append((taken_apart(trainer), rows(tmp_path/str(searched))))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("search", [find_lr, find_batch_size])
def test_an_interrupt_in_the_middle_leaves_nothing(search):
    trainer = odd()
    trainer.train()
    was, calls, step = taken_apart(trainer), trainer.model.calls, trainer.training_step
    def interrupted(batch):
        if trainer.count == 16: raise KeyboardInterrupt
        return step(batch)
    trainer.training_step = interrupted
    with pytest.raises(KeyboardInterrupt): search(trainer)
    del trainer.training_step
    assert taken_apart(trainer) == was and trainer.model.calls == calls and trainer.count == 8
    trainer.train(2)
    assert trainer.step == 16


def test_no_thread_and_no_line_stays(capsys):
    before = threading.active_count()
    find_lr(trainer_of(quiet=False), steps=20)
    find_batch_size(trainer_of(quiet=False), seconds=0.2)
    assert threading.active_count() == before and capsys.readouterr().out == ""


# --- what it looks like ---------------------------------------------------------------------------------------------------------------

def test_rows_are_plain_and_small_and_show_the_same():
    for kind, found in ((Rates, find_lr(trainer_of())), (Sizes, find_batch_size(narrow(100), seconds=0.5))):
        row = json.loads(json.dumps(found.row(), allow_nan=False))
        assert row == found.row() and len(json.dumps(row)) < 3000 and shown(row) == found._repr_html_() and repr(kind(row)) == repr(found)
        assert "\n" not in found.text and 2 <= len(repr(found).splitlines()) <= 3 and "<svg" in shown(row) and found.picture()[:4] == b"\x89PNG"
        assert f"{found.suggestion:,}" in found.text or f"{found.suggestion:g}" in found.text.replace("e-", "e-0")
    assert "matplotlib" in sys.modules


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda():
    class Wide(torch.utils.data.Dataset):
        def __len__(self): return 10**6
        def __getitem__(self, i): return torch.full((1000,), float(i % 7)), i % 3
    model = torch.nn.Sequential(*(torch.nn.Linear(1000, 1000) for _ in range(8)), torch.nn.Linear(1000, 3))
    trainer = Trainer(model, DataLoader(Wide(), 32), loss="cross_entropy", run=False, quiet=True, device="cuda")
    torch.cuda.set_per_process_memory_fraction(2 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    try: found = find_batch_size(trainer, seconds=60)
    finally: torch.cuda.set_per_process_memory_fraction(1.0)
    assert found.largest and found.suggestion <= 0.9 * found.largest and find_lr(trainer, steps=20).losses
