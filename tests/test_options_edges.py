"""Where options meet: intervals over phases, bad steps and running statistics, best weights and what comes after them, spellings."""
import math
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from trainbook.config import Config
from trainbook.metrics import NonFinite
from trainbook.source import ConfigError
from trainbook.trainer import Trainer

_G = torch.Generator().manual_seed(0)
X = torch.randn(200, 8, generator=_G)
Y = (X.sum(1) > 0).long()


def net(norm=False) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), *[torch.nn.BatchNorm1d(16)] * norm, torch.nn.ReLU(), torch.nn.Linear(16, 2))


def data(size=20, inputs=X): return DataLoader(TensorDataset(inputs[:160], Y[:160]), size, shuffle=True)
def val(): return DataLoader(TensorDataset(X[160:], Y[160:]), 40)


def make(model=None, train=None, validation=None, **words) -> Trainer:
    return Trainer(model or net(), data() if train is None else train, val() if validation is None else validation, **{"run": False, "quiet": True, "loss": "cross_entropy", "epochs": 3, "lr": 1e-2} | words)


def evaluated(trainer) -> list[int]: return trainer.history.curve["val_loss"][0]


# --- intervals over the phases of a curriculum --------------------------------------------------------------------------------------------

def test_intervals_in_steps_are_counted_from_the_first_step_of_all():
    """Phases of 15 to 40 steps, none as long as the interval: it passes all the same, and so do rows and checkpoints."""
    trainer = make(train=data(4), epochs=6, eval_every="100 steps", curriculum={i: list(range(60 + 20 * i)) for i in range(6)}, config={"logging": {"every": "10 steps"}})
    trainer.train()
    assert evaluated(trainer) == [100, 165] and trainer.history.curve["loss"][0] == list(range(10, 165, 10))


def test_intervals_in_epochs_are_counted_over_the_phases():
    """Every one and a half epochs is after 1.5, 3, 4.5 epochs, of whatever length each of them is."""
    trainer = make(train=data(4), epochs=5, eval_every=1.5, curriculum={0: list(range(40)), 1: list(range(80)), 2: "all"})
    trainer.train()
    assert evaluated(trainer) == [10 + 10, 10 + 20 + 40, 10 + 20 + 40 + 40 + 20, 150]


# --- steps that are left out ------------------------------------------------------------------------------------------------------------

BROKEN = X.clone()
BROKEN[33] = math.nan


@pytest.mark.parametrize("words", [{}, {"accumulate": 3}, {"optimizer": "rmsprop"}, {"gradient_checkpointing": True}], ids=str)
def test_running_statistics_are_those_before_a_bad_step(words):
    """The bad step leaves nothing behind in them, the next one counts; the evaluation is finite."""
    seen, deep = [], torch.nn.Sequential(net(True), torch.nn.Linear(2, 2))
    class Seeing(Trainer):
        def training_step(self, batch):
            if self.batch % words.get("accumulate", 1) == 0 and (not seen or seen[-1][0] != self.step): seen.append((self.step, [one.clone() for one in deep.buffers()]))
            return super().training_step(batch)
    trainer = Seeing(deep, data(inputs=BROKEN), val(), run=False, quiet=True, loss="cross_entropy", epochs=3, nonfinite="skip", **words)
    trainer.train()
    still = [step for (step, before), (_, after) in zip(seen, seen[1:]) if all(map(torch.equal, before, after))]
    assert len(still) in (2, 3) and trainer.numbers.skipped == 3  # after the last one nothing is seen
    assert all(one.isfinite().all() for one in deep.buffers()) and all(math.isfinite(value) for value in trainer.history["val_loss"])


@pytest.mark.parametrize("optimizers", [False, True])
def test_the_weights_are_those_before_it_and_so_are_running_statistics(optimizers):
    class Own(Trainer):
        def training_step(self, batch):
            loss = self.loss(self.model(batch[0]), batch[1])
            self.backward(loss, "one"); self.update("one")
            return {"loss": loss}
        def validation_step(self, batch): return {"loss": self.loss(self.model(batch[0]), batch[1])}
    model = net(True)
    more = {"optimizer": {"one": torch.optim.Adam(model.parameters())}} if optimizers else {}
    trainer = (Own if optimizers else Trainer)(model, data(inputs=BROKEN), val(), run=False, quiet=True, loss="cross_entropy", epochs=3, **more)
    with pytest.raises(NonFinite, match="the weights are those before it"): trainer.train()
    assert all(one.isfinite().all() for one in model.state_dict().values())


# --- best weights, and what comes after them ----------------------------------------------------------------------------------------------

def at_best(folder, **words):
    "Ended with its best weights, which are those of an epoch before the last."
    trainer = make(run=None, save_dir=str(folder), lr=0.5, scheduler="constant", epochs=6, monitor="val_loss", restore_best=True, keep_last_n=None, save_interval=1, **words)
    trainer.train()
    assert 0 < trainer.best["step"] < trainer.step
    return trainer


def test_after_the_best_weights_the_end_is_said(tmp_path, capsys):
    trainer = at_best(tmp_path/"r")
    before, trainer.console.quiet = [one.clone() for one in trainer.model.parameters()], False
    for again in (trainer.train, trainer.train_epoch, lambda: trainer.train(num_epochs=6), trainer.save_checkpoint): again()
    assert capsys.readouterr().out.count("is the end, and the weights are the best ones; to go on, resume_from_checkpoint()") == 4
    assert trainer.step == 48 and all(map(torch.equal, before, trainer.model.parameters())) and len(trainer.history) == 6


@pytest.mark.parametrize("more", [{"num_epochs": 8}, {"lr": 1e-3}], ids=str)
def test_more_after_the_best_weights_is_refused_before_anything_changes(more, tmp_path):
    trainer = at_best(tmp_path/"r")
    kept = trainer.config.to_dict()
    with pytest.raises(RuntimeError, match=r"has ended with its best weights; resume_from_checkpoint\(\), then train\(num_epochs=…\)$"): trainer.train(**more)
    assert trainer.config.to_dict() == kept and trainer.plan.total == 48
    trainer.resume_from_checkpoint()
    trainer.train(num_epochs=8)
    straight = make(run=None, save_dir=str(tmp_path/"s"), lr=0.5, scheduler="constant", epochs=8, monitor="val_loss", keep_last_n=None, save_interval=1)
    straight.train()
    last = trainer.resume_from_checkpoint("latest")
    assert last.step == 64 and all(map(torch.equal, last.model.parameters(), straight.model.parameters()))


def test_a_file_of_the_best_weights_has_the_rest_of_that_checkpoint(tmp_path):
    trainer = at_best(tmp_path/"r", ema=0.5)
    best = trainer.best["step"]
    trainer.save_checkpoint(tmp_path/"m.pth")
    found = torch.load(tmp_path/"m.pth", weights_only=False)
    assert found["step"] == best and found["epoch"] == best / 8 and found["val_loss"] == trainer.best["value"]
    assert all(torch.equal(one, found["model_state_dict"][name]) for name, one in trainer.model.state_dict().items())
    ends = []
    for place in (tmp_path/"m.pth", tmp_path/"r"):
        again = make(run=False, lr=0.5, scheduler="constant", epochs=6, monitor="val_loss", ema=0.5)
        again.resume_from_checkpoint(place if place.suffix else f"{place}@best")
        assert again.step == best
        again.train()
        ends.append([one.clone() for one in again.model.parameters()])
    assert all(map(torch.equal, *ends))


# --- early stopping, and a second call --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scheduler", ["constant", "cosine"])
@pytest.mark.parametrize("die_at, more, end, stops", [(20, 6, 40, [None, 6]), (24, 6, 40, [None, 6]), (25, 4, 32, [None]), (29, 6, 40, [None, 6]), (32, 4, 32, [None]), (40, 6, 40, [None, 6])])
def test_a_script_that_went_on_after_early_stopping_is_run_again(die_at, more, end, stops, scheduler, tmp_path):
    """Killed in its second call, or before or right after the first one ended: it ends as one that was not killed."""
    import shutil
    from trainbook.events import Callback
    class Copies(Callback):
        def step_end(self, trainer):
            if trainer.step == die_at: trainer.record.manager.wait(); trainer.record.flush(); shutil.copytree(trainer.run.folder, tmp_path/"killed", ignore=shutil.ignore_patterns(".lock", "owner.json"))
    def script(folder, callbacks=()):
        trainer = make(run=None, save_dir=str(folder), config={"run": {"on_existing": "resume"}}, callbacks=callbacks, lr=1e-9, scheduler=scheduler, epochs=9, early_stopping=True, patience=2,
                       monitor="val_acc", save_interval="2 steps")
        trainer.train()
        trainer.train(num_epochs=more)
        return trainer
    whole, again = script(tmp_path/"whole", [Copies()]), script(tmp_path/"killed")
    kept = [one.state_dict() for one in (whole, again)]
    assert again.step == whole.step == end and whole.stops == stops
    assert kept[0]["trainer"].keys() == kept[1]["trainer"].keys() and {key for key in kept[0]["trainer"] if kept[0]["trainer"][key] != kept[1]["trainer"][key]} <= {"shaken", "callbacks"}
    assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))
    assert [row["epoch"] for row in again.run.story().of("epoch")] == [row["epoch"] for row in whole.run.story().of("epoch")]
    assert script(tmp_path/"killed").step == whole.step  # once more, after its end


# --- what is said -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("policy", ["skip", 5])
def test_steps_that_are_left_out_are_said_and_counted(policy, capsys):
    """At the first, in the line and the row of each epoch that had some, and at the end."""
    trainer = make(train=data(inputs=BROKEN), nonfinite=policy, quiet=False)
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert sum("its gradient is not finite: " in line and line.endswith("it is left out, and so are others like it") for line in lines) == 1
    assert ["left_out 1" in line for line in lines if line.startswith("epoch ")] == [True] * 3 and trainer.history["left_out"] == [1, 1, 1]
    assert lines[-1] == "3 of 24 steps were left out: their gradients were not finite"
    other = make(quiet=False, nonfinite=policy)
    other.train()
    assert "left" not in capsys.readouterr().out


def test_the_count_of_an_epoch_survives():
    """Saved in the middle of an epoch, after its bad step."""
    class Breaks(Trainer):
        def training_step(self, batch): return super().training_step(batch) * (math.nan if self.step in (2, 9, 10) else 1)
    words = {"run": False, "quiet": True, "loss": "cross_entropy", "epochs": 2, "nonfinite": "skip"}
    first, again = (Breaks(net(), data(), **words) for _ in range(2))
    first.listeners.of["step_end"].append(lambda trainer: trainer.stop() if trainer.step == 12 else None)
    first.train()
    again.load_state_dict(first.state_dict())
    again.train()
    assert first.history["left_out"] == [1] and again.history["left_out"] == [2]


class Stream(IterableDataset):
    def __iter__(self): return iter(zip(X[:160], Y[:160]))


@pytest.mark.parametrize("train", [data, lambda: DataLoader(Stream(), 20)], ids=["length", "no length"])
def test_an_epoch_has_one_line(train, capsys):
    """With its validation, the last one too; and the rows have the number of the epoch that ended."""
    trainer = make(train=train(), epochs=5, eval_every=2, scheduler="constant", quiet=False, early_stopping=True, patience=2, lr=0.0)
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert [line[:9] for line in lines if line.startswith("epoch ")] == [f"epoch {i}/5" for i in range(1, 6)]
    assert ["val_loss" in line for line in lines if line.startswith("epoch ")] == [False, True, False, True, True]
    assert [line for line in lines if line.startswith("step ")] == ["step 40 (epoch 5)  val_loss has not improved for 2 evaluations; this is the end"]
    assert evaluated(trainer) == [16, 32, 40] and trainer.history[-1]["val_loss"] == trainer.metrics["val_loss"]


def test_no_warning_where_a_validation_is_to_come(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(run=None, save_dir=str(tmp_path/"r"), epochs=4, monitor="val_acc", eval_every=2, save_interval=1).train()


# --- what cannot be, and how things are called ----------------------------------------------------------------------------------------

MASK = [i >= 80 for i in range(160)]
REFUSED = {
    "a list of loaders": (lambda: make(validation=[val(), val()]), 'val_loader  several loaders go by name, found a list; give {"near": loader'),
    "a function of two": (lambda: make(curriculum={0: lambda a, b: a}), "curriculum  0: its function asks for a, b; it is given the dataset, or nothing"),
    "a function without a return": (lambda: make(curriculum={0: "all", 1: lambda: None}), "curriculum  1: its function returned None; return indices, a dataset or a loader"),
    "a mask of another length": (lambda: make(curriculum={0: MASK[1:]}), "curriculum  0: is a mask for 159 samples, the dataset has 160"),
    "an empty mask": (lambda: make(curriculum={0: [False] * 160}), "curriculum  0: has no sample"),
    "one thing twice": (lambda: make(groups=[{"match": "0.*", "lr": 1e-3, "learning_rate": 1e-4}]), "groups  0.*: match, lr, learning_rate say one thing twice")}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_said_before_training(name):
    attempt, said = REFUSED[name]
    with pytest.raises(ConfigError) as error: attempt()
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("mask", [MASK, torch.tensor(MASK), torch.tensor(MASK).numpy(), list(torch.tensor(MASK).numpy()), lambda dataset: MASK], ids=["list", "tensor", "array", "numpy", "function"])
def test_a_mask_is_a_curriculum(mask):
    trainer, indices = make(curriculum={0: mask, 2: "all"}), make(curriculum={0: range(80, 160), 2: "all"})
    assert trainer.plan.total == 4 + 4 + 8
    for one in (trainer, indices): one.train()
    assert all(map(torch.equal, trainer.model.parameters(), indices.model.parameters()))


@pytest.mark.parametrize("first, then, said", [({"freeze": ["0.*"]}, {}, "freeze was another there"), ({}, {"groups": [{"match": "0.*", "lr": 1e-3}]}, "groups was another there"),
                                               ({"no_decay": True}, {"freeze": ["0.*"]}, "no_decay and freeze was another there"), ({}, {"model": torch.nn.Sequential(torch.nn.Linear(8, 2, bias=False))}, "is the model the same?")], ids=str)
def test_other_groups_than_in_the_checkpoint_are_named(first, then, said):
    with pytest.raises(ConfigError, match=r"optimizer  has groups of \[[\d, ]+\] parameters, the checkpoint of \[[\d, ]+\]; ") as error:
        make(**then).load_state_dict(make(**first).state_dict())
    assert said in str(error.value)


def test_groups_and_schedules_in_the_spellings_of_others():
    trainer = make(groups=[{"match": "0.*", "learning_rate": 1e-3, "wd": 0.5}])
    assert [(group["lr"], group["weight_decay"]) for group in trainer.updates[""].optimizer.param_groups] == [(1e-3, 0.5), (1e-2, 0.01)]
    trainer.train()
    for name, kind in {"one-cycle": "onecycle", "OneCycleLR": "onecycle", "CosineAnnealingLR": "cosine", "MultiStepLR": "multistep", "LinearLR": "linear", "StepLR": "step", "PolynomialLR": "polynomial"}.items():
        assert Config.from_dict({"scheduler": name}).training.scheduler == kind


def test_the_bar_of_a_whole_epoch_is_drawn_full():
    """In each epoch, before its line takes the place; however fast the last batches were."""
    from test_options_lines import SCRIPT, on_a_screen
    parts = [part for part in on_a_screen(SCRIPT.format(more="run=False"), 100).split("\x1b[2K")]
    for epoch in (1, 2):
        full = [i for i, part in enumerate(parts) if part.startswith(f"Epoch {epoch}/2: 100%|") and "| 40/40 [" in part]
        line = [i for i, part in enumerate(parts) if part.startswith(f"epoch {epoch}/2")]
        assert full and len(line) == 1 and full[-1] < line[0]


@pytest.mark.parametrize("name, said", [("EarlyStopping", r"early_stopping=True, patience=10"), ("ModelCheckpoint", "save_interval=1, keep_last_n=3")])
def test_what_others_have_as_a_class_is_a_keyword(name, said):
    import trainbook
    with pytest.raises(ImportError, match=said): exec(f"from trainbook import {name}")
    with pytest.raises(ImportError, match=said): getattr(trainbook, name)
    assert not hasattr(trainbook, "EarlyStoping")
    import re
    given = re.search(r"Trainer\((.*)\)", str(pytest.raises(ImportError, getattr, trainbook, name).value))[1]
    assert eval(f"make(**dict({given}))").config.training.monitor == "val_loss"


def test_ending_by_the_clock_says_why():
    with pytest.raises(ConfigError, match="which neither a clock nor a loader without a length tells"): Trainer(net(), data(), epochs="10 min", run=False)
    trainer = Trainer(net(), data(), epochs="1 min", scheduler="constant", run=False, quiet=True)
    assert trainer.plot_schedule(total=100)._repr_png_()[:4] == b"\x89PNG"


def test_a_plateau_at_its_floor_is_silent(capsys):
    class Same(Trainer):
        def validation_step(self, batch): return {"loss": 1.0}
    Same(net(), data(), val(), scheduler="plateau", plateau_patience=0, lr=1e-2, min_lr=1e-3, epochs=6, run=False, loss="cross_entropy").train()
    assert capsys.readouterr().out.count("the learning rate is lowered") == 1


def test_what_becomes_of_torchs_schedulers_is_theirs():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ConfigError, match="after_end  hold is for schedules by name"):
        Trainer(model, data(), optimizer=optimizer, scheduler=(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "epoch"), after_end="hold", run=False)


def test_foreach_where_there_is_no_fused_step():
    assert "RMSprop, foreach" in Trainer(net(), data(), optimizer="rmsprop", run=False, quiet=True).summary()
