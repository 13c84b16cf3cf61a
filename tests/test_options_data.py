"""What of the data is used from which epoch on, several validation loaders, and which metric decides."""
import math
import re

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from exact import DATA, VAL, X, Y, net
from trainbook import console
from trainbook.config import Config
from trainbook.console import Bar
from trainbook.data import KeyedLoader
from trainbook.events import Callback
from trainbook.load import load_checkpoint
from trainbook.run import Run
from trainbook.source import ConfigError
from trainbook.tensorfile import CheckpointError
from trainbook.trainer import Trainer

ROWS = TensorDataset(X, Y, torch.arange(len(X)))  # 100; each knows its number
WORDS = {"run": False, "quiet": True, "lr": 1e-2, "epochs": 4, "loss": "cross_entropy"}


class Seeing(Trainer):
    "Knows which samples each epoch had."
    def training_step(self, batch):
        x, y, number = batch
        seen = self.__dict__.setdefault("seen", {})
        seen.setdefault(self.epoch, []).extend(number.tolist())
        return self.loss(self.model(x), y)


def hardness(sample): return float(-sample[2])
def easy(): return range(90, 100)
def of_its_own(): return DataLoader(torch.utils.data.Subset(ROWS, range(60, 100)), 20)
def without_batches(): return torch.utils.data.Subset(ROWS, range(60, 100))


EASY = set(range(90, 100))
FORMS = {
    "a share, by a function": {"difficulty": hardness, 0: 0.1, 1: 0.4, 3: "all"},
    "a share, by a name": {"difficulty": f"{__name__}:hardness", 0: 0.1, 1: 0.4, 3: 1},
    "a share, by numbers": {"difficulty": [-n for n in range(100)], 0: 0.1, 1: 0.4, 3: None},
    "indices": {0: range(90, 100), 1: torch.arange(60, 100), 3: "all"},
    "functions": {0: easy, 1: of_its_own, 3: lambda dataset: range(len(dataset))},
    "names": {"0": f"{__name__}:easy", "1": f"{__name__}:without_batches", "3": "all"}}


@pytest.mark.parametrize("data", [ROWS, DataLoader(ROWS, 8, shuffle=True), DataLoader(ROWS, 8, shuffle=True, num_workers=2)], ids=["dataset", "loader", "workers"])
@pytest.mark.parametrize("form", FORMS)
def test_a_curriculum(form, data):
    """Each epoch has the samples of its phase, once, in an order of its own; the end is known from the beginning."""
    trainer = Seeing(net(), data, curriculum=FORMS[form], batch_size=8, **WORDS)
    total = trainer.plan.total
    trainer.train()
    seen = trainer.seen
    assert [set(seen[epoch]) for epoch in range(4)] == [EASY, set(range(60, 100)), set(range(60, 100)), set(range(100))]
    assert all(len(one) == len(set(one)) for one in seen.values()) and total == trainer.step
    assert "functions" == form or seen[1] != seen[2]  # its loader is not shuffled


def test_a_curriculum_from_a_file(tmp_path):
    """As it would be written; it is part of the run's config, and of a resume that is asked nothing."""
    (tmp_path/"c.yaml").write_text(f"training:\n  epochs: 4\n  batch_size: 8\n  loss: cross_entropy\n  curriculum:\n    difficulty: {__name__}:hardness\n    0: 0.1\n    2: all\n")
    config = Config.from_yaml(tmp_path/"c.yaml")
    trainer = Seeing(net(), ROWS, quiet=True, save_dir=str(tmp_path/"r"), config=config)
    trainer.train(num_epochs=1)
    again = Seeing(net(), ROWS, quiet=True, config=Config.from_yaml(trainer.run.folder/"config.yaml")).resume_from_checkpoint(trainer.run.folder)
    again.train(num_epochs=4)
    assert [len(set(again.seen[epoch])) for epoch in (1, 2, 3)] == [10, 100, 100] and again.step == 2 + 2 + 13 + 13


def test_schedules_follow_a_curriculum(monkeypatch):
    """A cosine ends where training ends; what counts epochs counts these epochs; so do evaluations."""
    class Rates(Callback):
        def __init__(self): self.seen, self.evaluated = [], []
        def step_end(self, trainer): self.seen.append(trainer.updates[""].lr)
        def eval_end(self, trainer): self.evaluated.append(trainer.step)
    def rates(**words):
        seen = Rates()
        Seeing(net(), DataLoader(ROWS, 10), DataLoader(VAL, 10), curriculum={0: range(20), 2: "all"}, callbacks=[seen], metrics={"n": lambda outputs, targets: 0.0},
               **(WORDS | {"epochs": 4} | words)).train()
        return seen
    monkeypatch.setattr(Seeing, "validation_step", lambda self, batch: {"loss": self.loss(self.model(batch[0]), batch[1])})
    found = rates(scheduler="cosine", eval_every=0.5)
    assert len(found.seen) == 24 and found.seen == pytest.approx([1e-2 * (1 + math.cos(math.pi * step / 24)) / 2 for step in range(24)])
    assert found.evaluated == [1, 2, 3, 4, 9, 14, 19, 24]
    assert rates(scheduler="step", step_size=1, gamma=0.5).seen == pytest.approx([1e-2] * 2 + [5e-3] * 2 + [2.5e-3] * 10 + [1.25e-3] * 10)
    assert rates(scheduler="multistep", milestones=[1, 3], gamma=0.5).seen == pytest.approx([1e-2] * 2 + [5e-3] * 12 + [2.5e-3] * 10)
    assert rates(warmup=2, scheduler="constant").seen[:5] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2])


def test_training_on_with_a_curriculum():
    trainer = Seeing(net(), DataLoader(ROWS, 10), curriculum={0: range(20), 2: "all"}, **(WORDS | {"epochs": 3, "scheduler": "constant"}))
    trainer.train(num_epochs=1)
    assert trainer.step == 2
    trainer.train()
    trainer.train(num_epochs=5)
    assert trainer.step == 4 + 30 and len(set(trainer.seen[4])) == 100


def test_a_phase_is_told(capsys):
    trainer = Seeing(net(), DataLoader(ROWS, 10), curriculum={0: range(20), 2: "all"}, **(WORDS | {"quiet": False}))
    trainer.train()
    assert capsys.readouterr().out.count("curriculum: from epoch 3 on 100 samples") == 1


@pytest.mark.parametrize("curriculum, said", [
    ({20: "all"}, "begin with 0"), ({0: 0.5}, "needs a difficulty"), ({0: -1, "difficulty": hardness}, "expected a share above 0, at most 1, found -1"),
    ({0: "all", 2: 2, "difficulty": hardness}, "2: expected a share above 0, at most 1, found 2"), ([0.5, 1], "expected {0: what the first epoch has, 20: …}, found list"), ({0: .5, "0": .25, "difficulty": hardness}, "has an epoch twice"),
    ({0: [100]}, "indices up to 100"), ({0: []}, "has no sample"), ({"easy": 1, 0: "all"}, "easy: expected difficulty"), ({"1.5": 1, 0: "all"}, "1.5: expected"),
    ({0: "esay"}, "not registered"), ({0: 0.5, "difficulty": [1, 2]}, "2 numbers, the dataset 100"), ({0: 0.5, "difficulty": lambda sample: math.nan}, "sample 0 is NaN")], ids=lambda words: str(words).split(" at 0x")[0])
def test_a_curriculum_that_cannot_be(curriculum, said):
    with pytest.raises(ConfigError, match=said) as found: Trainer(net(), ROWS, curriculum=curriculum, **WORDS)
    assert len(str(found.value).splitlines()) == 1


def test_a_sampler_of_ones_own_has_a_curriculum_of_loaders():
    weighted = DataLoader(ROWS, 10, sampler=torch.utils.data.WeightedRandomSampler([1.] * 100, 100))
    with pytest.raises(ConfigError, match="WeightedRandomSampler; give a function that returns a loader"): Seeing(net(), weighted, curriculum={0: [1, 2]}, **WORDS)
    trainer = Seeing(net(), weighted, curriculum={0: easy_loader, 2: "all"}, **WORDS)
    trainer.train()
    assert set(trainer.seen[1]) == EASY and len(trainer.seen[3]) == 100


class Noisy(torch.utils.data.Dataset):
    "Its samples are drawn by generators of its own, and so is how difficult they are."
    def __init__(self, seeds=(None, None)): self.rng, self.torchs = numpy.random.default_rng(seeds[0]), torch.Generator().manual_seed(seeds[1] or torch.seed() % 2**32)
    def __len__(self): return 100
    def __getitem__(self, i): return X[i] + self.rng.normal() + torch.randn((), generator=self.torchs), Y[i], i


def noise(sample): return float(sample[0].sum())


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_difficult_is_the_same_in_every_life(wrapped):
    """Also where the dataset draws by generators of its own, which stay where they were."""
    chosen = []
    for _ in range(2):
        data = Noisy()
        before = data.rng.bit_generator.state, data.torchs.get_state().tolist()
        trainer = Seeing(net(), DataLoader(torch.utils.data.Subset(data, range(100)) if wrapped else data, 10, shuffle=True), curriculum={0: 0.5, 1: "all", "difficulty": noise}, **WORDS)
        chosen.append(trainer.train_loader.source.dataset.indices)
        assert (data.rng.bit_generator.state, data.torchs.get_state().tolist()) == before
    assert chosen[0] == chosen[1] and len(chosen[0]) == 50


def test_other_samples_of_the_same_number_are_refused():
    """A resume is told which were chosen; unless drift is allowed."""
    made = lambda first: Seeing(net(), DataLoader(ROWS, 10), curriculum={0: range(first, first + 20), 2: "all"}, **WORDS)
    trainer = made(0)
    trainer.train_epoch()
    with pytest.raises(CheckpointError, match=r"cannot go on exactly: chosen  was [0-9a-f]{8}, is [0-9a-f]{8}\. Same data"): made(1).load_state_dict(trainer.state_dict())
    made(1).load_state_dict(trainer.state_dict(), allow_drift=True)
    made(0).load_state_dict(trainer.state_dict())


@pytest.mark.parametrize("quiet", [False, True])
def test_what_is_difficult_is_found_out_under_a_bar(quiet, monkeypatch):
    """Which says what it counts, and of how many; nothing where it shall be quiet."""
    seen = []
    class Watched(Bar):
        def __init__(self, *given, **words):
            super().__init__(*given, **words)
            self._can = True
        def _write(self, text, there): seen.append(text)
    monkeypatch.setattr(console, "Bar", Watched)
    monkeypatch.setattr(console.time, "perf_counter", iter(range(10**6)).__next__)  # a second passes at each look
    Seeing(net(), ROWS, curriculum={0: 0.5, 1: "all", "difficulty": hardness}, **(WORDS | {"quiet": quiet}))
    drawn = [text for text in seen if "it/s" in text or "s/it" in text]
    assert not drawn if quiet else len(drawn) > 90 and re.search(r"how difficult each sample is:  50%\|.*\| 50/100 ", "".join(drawn))


def test_a_phase_has_the_seed_of_its_loader():
    """One that was given keeps its own; each phase follows it."""
    orders = []
    for seed in (7, 8, 7):
        trainer = Seeing(net(), KeyedLoader(DataLoader(ROWS, 10, shuffle=True), seed=seed), curriculum={0: range(20), 1: "all"}, **WORDS)
        trainer.train_epoch()
        orders.append(trainer.seen[0])
        assert {one.seed for one in trainer._phases.values()} == {seed}
    assert orders[0] == orders[2] != orders[1]


def easy_loader(): return DataLoader(torch.utils.data.Subset(ROWS, range(90, 100)), 5)


# --- several validation loaders -----------------------------------------------------------------------------------------------------------

def test_several_validation_loaders(tmp_path):
    """Each by its name, in the rows, for the monitor, on request; the first one's loss decides where nobody says."""
    loaders = {"real": DataLoader(VAL, 10), "drawn": DataLoader(TensorDataset(X[20:50] * 2, Y[20:50]), 10)}
    trainer = Trainer(net(), DataLoader(DATA, 10), loaders, save_dir=str(tmp_path/"r"), **{key: one for key, one in WORDS.items() if key != "run"})
    trainer.train()
    assert [*trainer.val_loader] == ["real", "drawn"] and trainer.best["name"] == "val_real_loss"
    rows = list(Run(tmp_path/"r").story().of("eval"))
    assert {"val_real_loss", "val_real_acc", "val_drawn_loss", "val_drawn_acc"} <= set(rows[-1])
    now = trainer.evaluate()
    assert now == {name: pytest.approx(rows[-1][name]) for name in now} and len(now) == 4
    alone = trainer.evaluate(loaders["drawn"])
    assert alone["test_loss"] == pytest.approx(now["val_drawn_loss"])
    assert trainer.evaluate({"a": loaders["real"], "b": loaders["drawn"]}).keys() == {"test_a_loss", "test_a_acc", "test_b_loss", "test_b_acc"}
    best = load_checkpoint(tmp_path/"r@best", quiet=True)
    assert best["step"] == trainer.best["step"]


def test_a_monitor_among_several():
    loaders = {"real": DataLoader(VAL, 10), "drawn": DataLoader(VAL, 20)}
    words = WORDS | {"monitor": "val_drawn_acc", "early_stopping": True, "patience": 1, "epochs": 30}
    trainer = Trainer(net(), DataLoader(DATA, 10), loaders, **words)
    trainer.train()
    assert trainer.best["name"] == "val_drawn_acc" and trainer.epoch < 30
    with pytest.raises(ConfigError, match="val_acc is not measured, did you mean val_"): Trainer(net(), DataLoader(DATA, 10), loaders, **(words | {"monitor": "val_acc"})).train()


@pytest.mark.parametrize("loaders, said", [({"a b": DataLoader(VAL, 10)}, "'a b' is no name"), ({"a": 3}, "found int"), ({"": DataLoader(VAL, 10), "b": DataLoader(VAL, 10)}, "'' is no name")], ids=["name", "number", "none"])
def test_validation_loaders_that_cannot_be(loaders, said):
    with pytest.raises(ConfigError, match=said): Trainer(net(), DataLoader(DATA, 10), loaders, **WORDS)


# --- which metric decides -----------------------------------------------------------------------------------------------------------------

class Told(Trainer):
    "Measures what it is told to."
    told = ()
    def validation_step(self, batch): return {name: values[self.epoch] for name, values in self.told.items()}


def told(folder=None, data=True, **words) -> Told:
    place = {"save_dir": str(folder), "config": {"run": {"on_existing": "resume"}}} if folder else {"run": False}
    return Told(net(), DataLoader(DATA, 10), DataLoader(VAL, 20) if data else None, **({key: one for key, one in WORDS.items() if key != "run"} | place | words))


def test_the_training_loss_is_no_bar_for_the_validation(monkeypatch):
    """The loss of epoch 1 is small beside those of the validations that begin with epoch 2; those improve."""
    monkeypatch.setattr(Told, "told", {"loss": [9, 9, 9, 8, 8, 7, 7, 6]})
    trainer = told(eval_every=2, early_stopping=True, patience=1, epochs=8)
    trainer.train()
    assert trainer.epoch == 8 and trainer.best["name"] == "val_loss" and trainer.best["value"] == 6
    for words, name in (({"eval_every": 2}, None), ({"eval_every": None}, "train_loss"), ({"eval_every": 1}, "val_loss"), ({"eval_every": 2, "monitor": "train_loss"}, "train_loss")):
        trainer = told(**words)
        trainer.train_epoch()
        assert trainer.best.get("name") == name


def test_another_monitor_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(Told, "told", {"loss": [1, 1, 1, 1, 1, 1], "acc": [.1, .2, .3, .4, .5, .6]})
    words = {"early_stopping": True, "patience": 2, "scheduler": "plateau", "plateau_patience": 1}
    told(tmp_path/"r", epochs=2, **words).train()
    again = told(tmp_path/"r", epochs=6, monitor="val_acc", **words)
    again.train()
    assert again.epoch == 6 and not again.stopped_early and again.updates[""].lr == 1e-2 and again.best["value"] == .6


def test_the_best_of_training_comes_back(tmp_path):
    """With a monitor of the training each best is saved, and comes back."""
    trainer = told(tmp_path/"r", data=False, monitor="train_loss", restore_best=True, lr=0.5, epochs=6, scheduler="constant")
    trainer.train()
    losses = trainer.history["train_loss"]
    assert trainer.best["step"] == 10 * (1 + losses.index(min(losses))) and re.search("has ended with its best weights", trainer.torn)


def test_a_checkpoint_of_an_earlier_version(monkeypatch):
    """Which knew neither schedules with a memory nor patience, averages, sessions that count their seconds."""
    first = told(epochs=2, scheduler="constant")
    monkeypatch.setattr(Told, "told", {"loss": [3, 2, 1]})
    first.train()
    state = first.state_dict()
    for key in ("schedule", "patience", "averaged", "spent", "ends", "stopped_early", "judged", "groups"): state["trainer"].pop(key, None)
    again = told(epochs=3, scheduler="constant")
    again.load_state_dict(state)
    again.train()
    straight = told(epochs=3, scheduler="constant")
    straight.train()
    assert again.step == 30 and all(map(torch.equal, again.model.parameters(), straight.model.parameters()))
