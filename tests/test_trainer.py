"""A trainer as people use it: what it needs, what it takes, what it shows, and what it says when something is wrong."""
import copy
import fcntl
import math
import os
import pickle
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from trainbook import ConfigError, Run, load_checkpoint, load_model
from trainbook.data import KeyedLoader
from trainbook.device import seed_everything
from trainbook.events import EVENTS, Callback, CallbackError
from trainbook.lock import RunBusy
from trainbook.metrics import NonFinite
from trainbook.registry import register
from trainbook.stepfolder import steps
from trainbook.tensorfile import CheckpointError
from trainbook.trainer import Trainer

pytestmark = [pytest.mark.usefixtures("here"), pytest.mark.filterwarnings("error")]
_G = torch.Generator().manual_seed(0)
X, Y, R = torch.randn(40, 6, generator=_G), torch.randint(0, 3, (40,), generator=_G), torch.randn(40, 1, generator=_G)
RESUME = {"run": {"on_existing": "resume"}}


def net(out: int = 3, drop: float = 0.0) -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), *[nn.Dropout(drop)] * bool(drop), nn.Linear(8, out))


def loader(*tensors, size: int = 8, **more) -> DataLoader: return DataLoader(TensorDataset(*tensors or (X, Y)), size, **{"shuffle": True} | more)


def make(model=None, data=None, val=None, kind=Trainer, **words) -> Trainer:
    "A quiet trainer that writes nothing, unless it is asked to."
    return kind(model or net(), loader() if data is None else data, val, **{"run": False, "quiet": True, "epochs": 2, "lr": 1e-2} | words)


def weights(one) -> list[torch.Tensor]: return [value.clone() for value in getattr(one, "model", one).state_dict().values()]
def same(one: list, two: list) -> bool: return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two))


def line(told) -> str:
    "The message of an error, which is one line."
    assert str(told.value) and "\n" not in str(told.value), str(told.value)
    return str(told.value)


def hears(**events) -> Callback:
    "A callback with these methods."
    return type("Hears", (Callback,), {name: lambda self, trainer, work=work: work(trainer) for name, work in events.items()})()


def at_step(step: int, work) -> Callback: return hears(step_end=lambda trainer: work(trainer) if trainer.step == step else None)


def raiser(error: BaseException):
    def work(*_): raise error
    return work


# --- only a model and a loader --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("out, targets, name", [(3, Y, "cross_entropy"), (1, R, "mse"), (3, F.one_hot(Y, 3).float(), "mse")])
def test_the_loss_is_told_from_the_first_batch(out, targets, name, capsys):
    """From dtype and shape; said once, written into the config, not said again after a resume; and it is that loss."""
    made = lambda: Trainer(net(out), loader(X, targets), loader(X, targets), epochs=2, save_dir="r", config=RESUME)
    trainer = made()
    trainer.train()
    trainer.train(num_epochs=3)
    made().train(num_epochs=4)
    assert capsys.readouterr().out.count(f"loss: {name}, told from the first batch") == 1
    assert trainer.run.config.training.loss == trainer.config.training.loss == name
    assert f"loss: {name}" in (trainer.run.folder/"config.yaml").read_text()
    wanted = getattr(F, name.replace("mse", "mse_loss"))(trainer.predict(TensorDataset(X, targets)), targets)
    assert trainer.evaluate()["val_loss"] == pytest.approx(wanted.item(), abs=1e-6)


class Own(nn.Module):
    "Returns its own loss, in one of the usual forms."
    def __init__(self, form): super().__init__(); self.form, self.inner = form, net()

    def forward(self, x, labels):
        logits = self.inner(x)
        loss = F.cross_entropy(logits, labels)
        return {"dict": {"loss": loss, "logits": logits}, "attribute": SimpleNamespace(loss=loss), "tuple": (loss, logits), "number": loss}[self.form]


def named(**columns) -> DataLoader: return DataLoader([dict(zip(columns, row)) for row in zip(*columns.values())], 8)




@pytest.mark.parametrize("form", ["dict", "attribute", "number", "tuple"])
def test_a_model_that_returns_its_own_loss(form):
    """It is that loss, in training and in evaluation."""
    trainer = make(Own(form), named(x=X, labels=Y), named(x=X, labels=Y))
    before = weights(trainer)
    trainer.train()
    assert trainer.config.training.loss == "own" and not same(before, weights(trainer))
    assert trainer.evaluate()["val_loss"] == pytest.approx(F.cross_entropy(trainer.model.inner(X), Y).item(), abs=1e-6)


@pytest.mark.parametrize("words", [{}, {"monitor": "val_loss"}], ids=str)
@pytest.mark.parametrize("form", ["dict", "attribute", pytest.param("number")])
def test_a_models_own_loss_is_seen_by_an_evaluation_that_comes_first(form, words):
    trainer = make(Own(form), named(x=X, labels=Y), named(x=X, labels=Y), **words)
    if not words: assert trainer.evaluate()["val_loss"] == pytest.approx(F.cross_entropy(trainer.model.inner(X), Y).item(), abs=1e-6)
    trainer.train()
    assert trainer.epoch == 2


@pytest.mark.parametrize("out, tensors, choices", [(1, (X, R.squeeze(1)), ("squeeze", "unsqueeze")), (1, (X, Y % 2), ("bce_with_logits", "mse")), (3, (X, Y.int()), ("long()",)),
                                                   (3, (X,), ("cross_entropy", "mse", "calculate_loss")), (6, (X, Y[:, None].expand(-1, 2)), ("cross_entropy", "mse"))])
def test_what_is_ambiguous_is_an_error_with_the_choices(out, tensors, choices):
    trainer = make(net(out), loader(*tensors))
    before = weights(trainer)
    with pytest.raises(ConfigError, match="^loss  ") as told: trainer.train()
    assert all(choice in line(told) for choice in choices) and same(before, weights(trainer)) and trainer.step == 0
    assert trainer.config.training.loss is None


def test_a_loss_by_name_with_arguments(capsys):
    """In a config or as a keyword, a name or a function, and then nothing is said of it; a wrong argument or name is."""
    wanted = nn.CrossEntropyLoss(weight=torch.tensor([1., 2, 3]), label_smoothing=0.1)
    said = {"name": "cross_entropy", "weight": [1, 2, 3], "label_smoothing": 0.1}
    for words in ({"loss": wanted}, {"loss": said}, {"config": {"training": {"loss": said}}}, {"loss": lambda outputs, targets: wanted(outputs, targets)}, {"criterion": said}):
        trainer = make(quiet=False, **words)
        trainer.train()
        assert "loss:" not in capsys.readouterr().out
        first = weights(trainer) if "loss" in words and words["loss"] is wanted else first  # noqa: F821
        assert same(first, weights(trainer))
    plain = make()
    plain.train()
    assert not same(first, weights(plain))
    for slip, says in (({"name": "cross_entropy", "lable_smoothing": 0.1}, "label_smoothing"), ("cros_entropy", "cross_entropy"), ({"smoothing": 1}, "without a name")):
        with pytest.raises(ConfigError, match=says) as told: make(loss=slip)
        line(told)


# --- batches and loaders --------------------------------------------------------------------------------------------------------------

class Named(nn.Module):
    "Takes its inputs by name."
    def __init__(self): super().__init__(); self.inner = net()
    def forward(self, x, mask=None): return self.inner(x if mask is None else x * mask)


PARTS = [(X[i:i + 8], Y[i:i + 8]) for i in range(0, 40, 8)]
FORMS = {"tuple": lambda x, y: (x, y), "list": lambda x, y: [x, y], "dict": lambda x, y: {"x": x, "labels": y}, "dict with more": lambda x, y: {"id": ["a"] * 8, "x": x, "target": y, "n": None},
         "nested": lambda x, y: ({"x": x, "mask": None}, y), "three": lambda x, y: (x, torch.ones(6), y)}


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_any_usual_form(form):
    """They train the model all in the same way."""
    plain = make(Named(), PARTS, PARTS)
    plain.train()
    trainer = make(Named(), [FORMS[form](x, y) for x, y in PARTS], [FORMS[form](x, y) for x, y in PARTS])
    trainer.train()
    assert same(weights(trainer), weights(plain)) and trainer.metrics == plain.metrics and "val_acc" in trainer.metrics


def test_lists_of_odd_things_reach_training_step_as_they_are():
    """Strings, None, pictures of many sizes, nested; for as many samples as the list is long."""
    class Odd(Trainer):
        def training_step(self, batch):
            seen.append(batch)
            return self.model(batch[1][0]["x"].float()).mean()
    class Samples(Dataset):
        def __len__(self): return 7
        def __getitem__(self, i): return [f"s{i}", {"x": X[:1 + i % 3, :6], "none": None, "ragged": [[1], [2, 3]][i % 2]}]
    for workers in (0, 2):
        seen = []
        trainer = make(data=DataLoader(Samples(), 3, collate_fn=lambda samples: [list(part) for part in zip(*samples)], num_workers=workers), kind=Odd)  # noqa: B023
        trainer.train(num_epochs=1)
        assert [batch[0] for batch in seen] == [["s0", "s1", "s2"], ["s3", "s4", "s5"], ["s6"]] and seen[0][1][2]["none"] is None
        assert seen[0][1][1]["ragged"] == [2, 3] and [part["x"].shape[0] for part in seen[0][1]] == [1, 2, 3]


def test_a_dataset_is_loaded_as_the_config_says():
    """Batches of batch_size, shuffled anew each epoch; the validation set in its order."""
    class Seen(Trainer):
        def training_step(self, batch): seen.extend([batch[1]] * self.model.training); return super().training_step(batch)
        def validation_step(self, batch): shown.append(batch[0]); return super().validation_step(batch)
    seen, shown = [], []
    data = TensorDataset(X, torch.arange(40))
    make(net(40), data, data, kind=Seen, batch_size=16, val_batch_size=32, epochs=2).train()
    assert [len(one) for one in seen] == [16, 16, 8] * 2 and [len(one) for one in shown] == [32, 8] * 2
    one, two = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert sorted(one.tolist()) == sorted(two.tolist()) == list(range(40)) and not torch.equal(one, two) and not torch.equal(one, torch.arange(40))
    assert torch.equal(torch.cat(shown[:2]), X)


def test_a_generator_is_used_up():
    """One clear error after the first epoch, which is kept; with a schedule that needs an end, before anything."""
    with pytest.raises(ConfigError, match="which neither a clock nor a loader without a length tells; say epochs: \"5000 steps\"") as told: make(data=(part for part in PARTS))
    line(told)
    trainer = make(data=(part for part in PARTS), run=None, scheduler="constant")
    with pytest.raises(ConfigError, match="used up; wrap it in a list") as told: trainer.train()
    line(told)
    assert trainer.epoch == 1 and trainer.run.status == "failed" and steps(trainer.run.folder/"train") == [5]
    trainer = make(val=(part for part in PARTS), run=None)
    with pytest.raises(ConfigError, match="used up; wrap it in a list") as told: trainer.train()
    line(told)
    assert trainer.run.status == "failed" and steps(trainer.run.folder/"train")[-1] == 10


class Stream(IterableDataset):
    def __iter__(self): yield from zip(X, Y)


def test_a_loader_whose_length_is_unknown(capsys):
    """Trains for epochs at a constant rate, or for steps with any; that a resume is not exact is said once, before training."""
    trainer = make(data=DataLoader(Stream(), 8), scheduler="constant", quiet=False)
    trainer.train()
    assert (trainer.step, trainer.epoch) == (10, 2)
    out = capsys.readouterr().out.splitlines()
    assert "not exact" in out[0] and len([one for one in out if "not exact" in one]) == 1
    trainer = make(data=DataLoader(Stream(), 8), scheduler="cosine", epochs="7 steps")
    trainer.train()
    assert (trainer.step, trainer.epoch, trainer.batch) == (7, 1, 2) and trainer.updates[""].optimizer.param_groups[0]["lr"] < 1e-3
    with pytest.raises(ConfigError, match="say steps"): make(data=DataLoader(Stream(), 8), scheduler="constant", eval_every=0.5)


def test_a_keyed_loader_is_taken_as_it_is():
    wanted, trainer = make(), make(data=KeyedLoader(loader()))
    for one in (wanted, trainer): one.train()
    assert same(weights(wanted), weights(trainer)) and isinstance(trainer.train_loader, KeyedLoader)
    other = make(data=KeyedLoader(loader(), seed=7))
    other.train()
    assert not same(weights(wanted), weights(other))
    assert trainer.predict(trainer.train_loader).shape == (40, 3)


@pytest.mark.parametrize("words, epochs, reached", [({"limit": 2}, 2, (4, 2)), ({"limit": 200}, 2, (10, 2)), ({"accumulate": 100}, 2, (2, 2)), ({"accumulate": 3}, 2, (4, 2)), ({"limit": 4, "accumulate": 3}, 2, (4, 2)),
                                                    ({"batch": 1}, 1, (40, 1)), ({"batch": 1000}, 3, (3, 3))], ids=str)
def test_short_and_long_epochs(words, epochs, reached):
    """Windows end with the epoch, a limit counts batches of training and of evaluation."""
    shown, words = [], dict(words)
    class Seen(Trainer):
        def validation_step(self, batch): shown.append(1); return super().validation_step(batch)
    trainer = make(data=loader(size=words.pop("batch", 8)), val=PARTS, kind=Seen, epochs=epochs, **words)
    trainer.train()
    assert (trainer.step, trainer.epoch) == reached and len(shown) == epochs * min(5, words.get("limit", 5))


# --- seams ----------------------------------------------------------------------------------------------------------------------------

class Calculates(Trainer):
    def calculate_loss(self, outputs, targets): return F.cross_entropy(outputs, targets, label_smoothing=0.2)


class StepsLoss(Trainer):
    def training_step(self, batch): return F.cross_entropy(self.model(batch[0]), batch[1], label_smoothing=0.2)


class StepsDict(StepsLoss):
    def training_step(self, batch): return {"loss": super().training_step(batch), "spread": self.model(batch[0]).std(), "plain": 2}


@pytest.mark.parametrize("kind", [Calculates, StepsLoss, StepsDict])
def test_seams_of_a_system(kind):
    """A loss of one's own at any depth trains the same, and is what the validation measures."""
    wanted, trainer = make(val=PARTS, loss=lambda outputs, targets: F.cross_entropy(outputs, targets, label_smoothing=0.2)), make(val=PARTS, kind=kind)
    for one in (wanted, trainer): one.train()
    assert same(weights(wanted), weights(trainer)) and trainer.metrics["val_loss"] == wanted.metrics["val_loss"]
    if kind is StepsDict: assert trainer.metrics["train_plain"] == trainer.metrics["val_plain"] == 2 and len(trainer.history["train_spread"]) == 2 and "spread" in trainer.history.curve


@pytest.mark.parametrize("name", ["lr", "step", "epoch", "event", "stage", "time"])
def test_numbers_to_log_do_not_take_the_place_of_the_rows_own(name):
    """They are refused by name, or both are kept."""
    class Logs(Trainer):
        def training_step(self, batch): return {"loss": super().training_step(batch), name: 1.5}
    trainer = make(kind=Logs, run=None, config={"logging": {"every": "1 step"}})
    try: trainer.train()
    except ConfigError as error: assert f"training_step  {name}  " in str(error); return
    rows = [*trainer.run.story().of("step")]
    assert [row["step"] for row in rows] == [*range(1, 11)] and all(row["stage"] == "train" and row["time"] > 1e9 and row["lr"] < 1 for row in rows)


def test_validation_step_is_what_an_evaluation_measures():
    class Validates(Trainer):
        def validation_step(self, batch):
            assert not self.model.training and not torch.is_grad_enabled()
            return {"hits": (self.model(batch[0]).argmax(1) == batch[1]).float().mean(), "n": len(batch[1])}
    trainer = make(net(drop=0.5), val=PARTS, kind=Validates, monitor="val_hits", monitor_mode="max")
    trainer.train()
    assert trainer.best["name"] == "val_hits" and trainer.evaluate() == {key: value for key, value in trainer.metrics.items() if key.startswith("val_")}
    assert trainer.evaluate(PARTS).keys() == {"test_hits", "test_n"} and trainer.model.training


class Centers(nn.Module):
    "A loss that learns."
    def __init__(self): super().__init__(); self.scale = nn.Parameter(torch.ones(3))
    def forward(self, outputs, targets): return F.cross_entropy(outputs * self.scale, targets)


def test_a_loss_with_parameters_is_trained_and_restored():
    """A run that was cut in two ends as one in a piece."""
    made = lambda **words: make(loss=Centers(), run=None, epochs=4, scheduler="constant", **words)
    whole, first, second = made(), made(save_dir="cut"), made(save_dir="cut", config=RESUME)
    whole.train()
    first.train(num_epochs=2)
    assert not torch.equal(first.loss.scale, torch.ones(3))
    second.train()
    assert torch.equal(second.loss.scale, whole.loss.scale) and same(weights(second), weights(whole)) and not torch.equal(first.loss.scale, whole.loss.scale)


@pytest.mark.parametrize("metrics, names", [("accuracy", {"val_acc"}), ({"top": lambda o, t: (o.argmax(1) == t).float().mean()}, {"val_top"}), (None, {"val_acc"})])
def test_metrics(metrics, names):
    """By name, as functions; accuracy by itself where targets are classes. Means weigh samples, not batches."""
    trainer = make(val=[(X[:30], Y[:30]), (X[30:], Y[30:])], metrics=metrics)
    trainer.train()
    assert {*trainer.metrics} - {"val_loss", "train_loss"} == names
    assert trainer.metrics[names.pop()] == pytest.approx((trainer.predict([(X, Y)]).argmax(1) == Y).float().mean().item())


class Trace(Callback):
    def __init__(self): self.heard = []
for _event in EVENTS: setattr(Trace, _event, lambda self, trainer, event=_event: self.heard.append(f"{event} {trainer.step}"))


def test_the_seven_events_in_order():
    trace = Trace()
    trainer = make(data=PARTS[:2], val=PARTS, run=None, callbacks=[trace, hears(step_end=lambda trainer: trace.heard.append("second"))], save_interval=1)
    trainer.train()
    wanted = """fit_start 0 epoch_start 0 step_end 1 second step_end 2 second eval_end 2 epoch_end 2 saved 2
                epoch_start 2 step_end 3 second step_end 4 second eval_end 4 epoch_end 4 saved 4 fit_end 4"""
    assert " ".join(trace.heard) == " ".join(wanted.split())
    trace.heard.clear()
    trainer.train()
    assert trace.heard == ["fit_start 4", "fit_end 4"]  # a finished one


def test_the_epoch_by_hand():
    """Each call is one epoch and leaves a run that can be gone on with; after the end it does nothing."""
    trace = Trace()
    trainer = make(data=PARTS[:1], run=None, callbacks=[trace])
    told = []
    for _ in range(3):
        trainer.train_epoch()
        told.append((trainer.epoch, trainer.done, trainer.run.status))
    assert told == [(1, False, "paused"), (2, True, "finished"), (2, True, "finished")] and [one for one in trace.heard if one.startswith("step")] == ["step_end 1", "step_end 2"]


@pytest.mark.parametrize("slip, meant", [("on_epoch_end", "epoch_end"), ("epoch_ends", "epoch_end"), ("setp_end", "step_end"), ("on_train_begin", "fit_start"), ("on_validation_end", "eval_end"), ("on_save_checkpoint", "saved")])
def test_a_misspelt_method_is_refused(slip, meant):
    with pytest.raises(TypeError, match=rf"Mine.{slip}  .*did you mean {meant}\?") as told: type("Mine", (Callback,), {slip: lambda self, trainer: None})
    line(told)
    with pytest.raises(TypeError, match="write def step_end"): type("Mine", (Callback,), {"step_end": lambda self: None})
    type("Mine", (Callback,), {"helper": lambda self: None, "_on_epoch_end": 1})
    for odd in (Callback, print):
        with pytest.raises(TypeError, match="^callbacks  expected"): make(callbacks=[odd])


@pytest.mark.parametrize("event", EVENTS)
def test_an_exception_names_callback_and_event(event):
    """In one line, with the cause attached; the handlers of signals are those of before."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    trainer = make(val=PARTS, run=None, save_interval=1, callbacks=[Callback(), hears(**{event: raiser(ValueError("no such thing"))})])
    with pytest.raises(CallbackError, match=rf"Hears\.{event} raised ValueError: no such thing  \(step \d+\)") as told: trainer.train()
    line(told)
    assert isinstance(told.value.__cause__, ValueError) and handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert trainer.run.status == ("finished" if event == "fit_end" else "failed")


def test_an_exception_of_many_lines_in_a_callback_is_told_in_one():
    with pytest.raises(CallbackError) as told: make(callbacks=[at_step(1, raiser(ValueError("two\nlines")))]).train()
    line(told)


def test_after_a_callback_raised_training_goes_on_exactly():
    """What was reached is saved, the run failed; a second life ends as one that nothing happened to."""
    made = lambda *callbacks, **words: make(net(drop=0.3), val=PARTS, run=None, callbacks=callbacks, epochs=3, **words)
    whole, broken = made(), made(at_step(8, raiser(KeyError("x"))), save_dir="r")
    whole.train()
    with pytest.raises(CallbackError): broken.train()
    assert Run("r").status == "failed" and steps("r/train")[-1] == 8 and "KeyError" in [*Run("r").story().of("end")][-1]["error"]
    again = made(save_dir="r", config=RESUME)
    again.train()
    assert same(weights(again), weights(whole)) and again.history["train_loss"] == whole.history["train_loss"] and again.run.status == "finished"
    broken.listeners.of["step_end"].clear()  # and so does the same one, in a notebook: as a branch, for the run has gone further
    broken.train()
    assert same(weights(broken), weights(whole)) and broken.run.folder != again.run.folder


def test_evaluating_the_training_loader_in_a_callback():
    """Gives numbers, and training does not notice, whatever is drawn in there; so it is with predict()."""
    class Draws(Trainer):
        def validation_step(self, batch): torch.rand(3); return super().validation_step(batch)
    data, told = loader(), []
    def look(trainer):
        told.append((trainer.evaluate(data), trainer.predict(data), F.cross_entropy(trainer.model.eval()(X), Y).item()))
        trainer.model.train()
    whole, trainer = make(net(drop=0.3)), make(net(drop=0.3), data, kind=Draws, callbacks=[at_step(3, look), at_step(7, look)])
    for one in (whole, trainer): one.train()
    assert same(weights(trainer), weights(whole)) and len(told) == 2
    for measured, outputs, wanted in told: assert measured["test_loss"] == pytest.approx(wanted, abs=1e-6) and outputs.shape == (40, 3)


# --- predict --------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("data", [loader(), loader(size=7), loader(num_workers=2), TensorDataset(X, Y), PARTS, loader(X), (part for part in PARTS), loader(size=1000)], ids=lambda data: type(data).__name__)
def test_predict_in_the_order_of_the_dataset(data):
    trainer = make(net(drop=0.5))
    trainer.train()
    found = trainer.predict(data)
    assert torch.allclose(found, trainer.model.eval()(X), atol=1e-6) and not found.requires_grad


def test_predict_drops_only_what_the_loader_drops_and_keeps_other_forms():
    trainer = make(net(drop=0.5))
    found = trainer.predict(loader(size=7, drop_last=True))
    assert found.shape == (35, 3) and torch.allclose(found, trainer.model.eval()(X)[:35], atol=1e-6)
    found = make(Own("dict"), named(x=X, labels=Y)).predict(named(x=X, labels=Y))
    assert len(found) == 5 and found[0].keys() == {"loss", "logits"} and found[4]["logits"].shape == (8, 3)


# --- several optimizers ---------------------------------------------------------------------------------------------------------------



def pair(drop: float = 0.2) -> nn.ModuleDict: return nn.ModuleDict({"make": net(6, drop), "judge": net(1, drop)})


def adams(model) -> dict: return {"make": torch.optim.Adam(model["make"].parameters(), 1e-2), "judge": torch.optim.Adam(model["judge"].parameters(), 3e-2, betas=(0.5, 0.9))}


def said_to_be(scores, true: bool): return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, float(true)))


class Gan(Trainer):
    "Nothing is detached: who may learn is said by name."
    leftovers = 0

    def training_step(self, batch):
        real, judge = batch[0], self.model["judge"]
        made = self.model["make"](torch.randn(len(real), 6))
        loss = said_to_be(judge(real), True) + said_to_be(judge(made), False)
        self.backward(loss, "judge")
        assert all(one.grad is None for one in self.model["make"].parameters())
        self.update("judge")
        fooled = said_to_be(judge(made), True)
        self.backward(fooled, "make")
        self.leftovers += sum(one.grad is not None for one in judge.parameters())
        self.update("make")
        return {"loss": loss.detach() + fooled.detach(), "fooled": fooled.detach()}


def gan(**words) -> Trainer:
    torch.manual_seed(7)
    model = pair()
    return make(model, kind=Gan, optimizer=adams(model), **{"scheduler": "constant", "epochs": 4} | words)


def gan_by_hand(model, epochs: int) -> None:
    optimizers, batches = adams(model), KeyedLoader(loader())
    seed_everything(42)
    for epoch in range(epochs):
        for _, (real, _) in batches.batches(epoch):
            made = model["make"](torch.randn(len(real), 6))
            for name, loss in (("judge", lambda: said_to_be(model["judge"](real), True) + said_to_be(model["judge"](made.detach()), False)), ("make", lambda: said_to_be(model["judge"](made), True))):  # noqa: B023
                wanted = list(model[name].parameters())
                for one, grad in zip(wanted, torch.autograd.grad(loss(), wanted)): one.grad = grad
                optimizers[name].step()
                for one in wanted: one.grad = None


def test_a_gan_is_trained_as_by_hand():
    """Bit for bit: what one network's loss does to the other is never seen; norms are logged, the schedule moves both."""
    trainer, wanted = gan(), pair()
    trainer.train()
    gan_by_hand(wanted, 4)
    assert same(weights(trainer), weights(wanted)) and trainer.leftovers == 0 and trainer.step == 20
    assert {"grad_norm_make", "grad_norm_judge", "fooled"} <= trainer.history.curve.keys() and len(trainer.history["train_fooled"]) == 4
    falling = gan(scheduler="cosine")
    falling.train()
    assert [update.optimizer.param_groups[0]["lr"] < 1e-3 for update in falling.updates.values()] == [True, True]


def test_a_gan_is_resumed_exactly():
    whole, first, second = gan(run=None), gan(run=None, save_dir="r"), gan(run=None, save_dir="r", config=RESUME)
    whole.train()
    first.train(num_epochs="13 steps")
    second.train()
    assert second.run.folder == Path("r").absolute() and same(weights(second), weights(whole)) and not same(weights(first), weights(whole))
    for name in ("make", "judge"):
        one, two = (trainer.updates[name].optimizer.state_dict()["state"] for trainer in (second, whole))
        assert all(same([*map(torch.as_tensor, one[key].values())], [*map(torch.as_tensor, two[key].values())]) for key in two)
    with pytest.raises(ConfigError, match="accumulate") as told: gan(accumulate=2)
    line(told)


def test_a_gan_with_frozen_layers():
    class Half(Trainer):
        def training_step(self, batch):
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            self.backward(loss, "a")
            return loss
    model = net()
    model[0].requires_grad_(False)
    make(model, kind=Half, optimizer={"a": torch.optim.Adam(model.parameters())}).train()


def test_precision_counts_with_several_optimizers_too():
    class Seen(Trainer):
        def training_step(self, batch):
            kinds.append(self.model(batch[0]).dtype)
            return self.model(batch[0]).float().mean()
    kinds, model = [], net()
    make(model, kind=Seen, optimizer={"a": torch.optim.Adam(model.parameters())}, precision="bf16").train()
    assert set(kinds) == {torch.bfloat16}


def test_several_optimizers_need_a_training_step():
    model = net()
    with pytest.raises(ConfigError, match="training_step") as told: make(model, optimizer={"a": torch.optim.Adam(model.parameters())}).train()
    line(told)


# --- what a person sees ---------------------------------------------------------------------------------------------------------------

def without_times(text: str) -> list[str]: return [re.sub(r"\d+\.\d s", "? s", re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", "", one)) for one in text.splitlines()]


def test_lines_on_the_screen_and_in_the_log(capsys):
    """One per epoch, with train loss, validation loss and metrics; train.log holds the same."""
    trainer = make(val=PARTS, run=None, quiet=False, epochs=3)
    history = trainer.train()
    out = capsys.readouterr().out
    assert without_times(out) == without_times((trainer.run.folder/"train.log").read_text())
    epochs = [one for one in out.splitlines() if one.startswith("epoch")]
    assert len(epochs) == 3
    for number, one in enumerate(epochs, 1):
        values = history[number - 1]
        assert re.fullmatch(rf"epoch {number}/3  train_loss {values['train_loss']:.4f}  val_loss {values['val_loss']:.4f}  val_acc {values['val_acc']:.4f}  lr \S+  \d\.\d s  best", one), one


def test_history_is_a_picture_and_a_table():
    trainer = make(val=PARTS, epochs=3)
    history = trainer.train()
    assert history._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n" and history is trainer.history
    head, *rows = repr(history).splitlines()
    assert head.split()[:2] == ["epoch", "step"] and {"train_loss", "val_loss", "val_acc"} <= {*head.split()} and [row.split()[:2] for row in rows] == [["1", "5"], ["2", "10"], ["3", "15"]] and str(history) == repr(history)
    assert [axes.get_xlabel() for axes in history.figure().axes] == ["step", "step"] and len(history["val_loss"]) == 3 and history["val_loss"][-1] == trainer.metrics["val_loss"]
    with pytest.raises(KeyError, match="no val_los; it has .*val_loss"): history["val_los"]
    empty = make().history
    assert empty._repr_png_() is None and repr(empty) == "History: no whole epoch yet"


def test_the_loop_with_its_listeners(capsys):
    class Mine(Callback):
        def step_end(self, trainer): ...
        def saved(self, trainer): ...
    trainer = make(callbacks=[Mine()])
    trainer.loop()
    lines = [one.strip() for one in capsys.readouterr().out.splitlines()]
    assert [one for one in lines if "Mine" in one] == ["step_end                         ← Mine", "saved                            ← Mine", "saved                                ← Mine"]
    assert [one.split()[0] for one in lines if one.split()[0] in EVENTS] == ["fit_start", "epoch_start", "step_end", "eval_end", "saved", "eval_end", "epoch_end", "saved", "fit_end"]


BEGIN = f"""import sys, time, torch, warnings
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_trainer import *
"""
SLOW = BEGIN + """
class Slow(nn.Module):
    def __init__(self): super().__init__(); self.inner = net()
    def forward(self, x): time.sleep(0.08); return self.inner(x)
class Talks(Trainer):
    def training_step(self, batch): loss = super().training_step(batch); return {"loss": loss, **{name: loss.detach() for name in NAMES}}
trainer = make(Slow(), PARTS * 2, PARTS * 2, kind=Talks, run=None, save_dir="r", quiet=False, config={"logging": {"every": "1 step"}})
trainer.train()
trainer.evaluate(PARTS * 2)
trainer.predict(PARTS * 2)
print("the end")
"""


def environment() -> dict:
    kept = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    return kept | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "PYTHONWARNINGS": "error", "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))}


class Terminal:
    "A program that believes to have a terminal of so many columns, and what it wrote there."

    def __init__(self, code: str, columns: int, where: Path):
        where.mkdir(exist_ok=True)
        (where/"script.py").write_text(code)
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.chdir(where)
            os.execve(sys.executable, [sys.executable, "script.py"], environment())
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        self.wrote, self.where = b"", where

    def read(self, until: bytes | None = None) -> bytes:
        while until is None or until not in self.wrote:
            try: piece = os.read(self.fd, 65536)
            except OSError: break  # it is over
            if not piece: break
            self.wrote += piece
        return self.wrote

    def press(self, key: bytes) -> None: os.write(self.fd, key)

    def end(self) -> int:
        self.read()
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def screen(text: str, columns: int) -> list[str]:
    "What is to be seen in the end: \\r, \\n, erased lines, and the wrap at the right edge."
    rows, x = [[]], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\r\n\x1b]", text):
        if part == "\r": x = 0
        elif part == "\n": rows.append([])
        elif part == "\x1b[2K": rows[-1] = []
        elif part == "\x1b[K": del rows[-1][x:]
        elif part[0] == "\x1b": assert part[-1] == "m", f"{part!r} is not known here"
        else:
            if x == columns: rows.append([]); x = 0
            rows[-1] += [" "] * (x + 1 - len(rows[-1]))
            rows[-1][x] = part
            x += 1
    return [text for row in rows if (text := "".join(row).rstrip())]


def test_the_screen_can_be_read():
    assert screen("abc\r\x1b[2Kd\r\nefghi\rx", 4) == ["d", "efgh", "x"] and screen("abcd\r\nef\rg", 4) == ["abcd", "gf"] and screen("abcd\x1b[2K\ref", 4) == ["ef"]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    "A slow training in terminals of 80 and 60 columns, with short and with long lines, and with its output in a file; all at once."
    root = tmp_path_factory.mktemp("shown")
    words = {(80, "short"): [], (60, "short"): [], (80, "long"): ["another_number_with_a_long_name", "and_yet_another_one"]}
    terminals = {key: Terminal(f"NAMES = {names}\n{SLOW}", key[0], root/"-".join(map(str, key))) for key, names in words.items()}
    with open(root/"out", "wb") as out: filed = subprocess.run([sys.executable, "-c", f"NAMES = []\n{SLOW}"], cwd=root, stdout=out, stderr=subprocess.STDOUT, env=environment(), timeout=60)
    assert filed.returncode == 0, (root/"out").read_text()
    for terminal in terminals.values(): assert terminal.end() == 0, terminal.wrote.decode()
    return {key: (terminal.wrote.decode(), terminal.where/"r"/"train.log") for key, terminal in terminals.items()} | {"file": ((root/"out").read_text(), root/"r"/"train.log")}




@pytest.mark.parametrize("columns, lines", [(80, "short"), pytest.param(60, "short"), pytest.param(80, "long")])
def test_bars_leave_nothing_behind(shown, columns, lines):
    """In a terminal the lines are all that is left of training, evaluation and prediction."""
    wrote, log = shown[columns, lines]
    told = [re.sub(r"^\S+ \S+  ", "", one) for one in log.read_text().splitlines()]
    assert sum(one.startswith("epoch") for one in told) == 2 and wrote.count("%") > 10 and re.search(r"evaluating: +\d+%\|[█▏▎▍▌▋▊▉ ]*\| \d+/10 ", wrote) and "predicting" in wrote  # there were bars
    assert screen(wrote, columns) == screen("\r\n".join([*told, "the end"]), columns)


def test_no_bars_in_a_file(shown):
    """Nothing but the lines."""
    out, log = shown["file"]
    assert without_times(out) == [*without_times(log.read_text()), "the end"] and "\r" not in out


# --- cells that are run again ---------------------------------------------------------------------------------------------------------

def files(folder) -> dict: return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("words", [{}, {"save_dir": "mine"}], ids=str)
def test_the_same_cell_twice(words, capfd):
    """A new run each time, said where; the first is not touched."""
    cell = lambda: make(run=None, **words)
    first = cell()
    first.train()
    before = files(first.run.folder)
    second = cell()
    second.train()
    assert second.run.folder != first.run.folder and files(first.run.folder) == before and same(weights(first), weights(second))
    if words: assert f"mine is a run already; this one is {second.run.folder.name}" in capfd.readouterr().err
    assert first.run.status == second.run.status == "finished" and second.run.parent is None


def program(code: str, *arguments: str, **words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", BEGIN + code, *arguments], capture_output=True, text=True, env=environment(), timeout=60, **words)


def test_a_folder_killed_before_its_first_save():
    """It is begun anew where it lies, or another one is made; both end as if nothing had been."""
    done = program("make(net(drop=0.3), run=None, save_dir='r', callbacks=[at_step(3, lambda trainer: os.kill(os.getpid(), signal.SIGKILL))]).train()")
    assert done.returncode == -signal.SIGKILL and Run("r").status == "interrupted" and not steps("r/train")
    whole = make(net(drop=0.3))
    whole.train()
    for config, folder in (({}, "r-2"), (RESUME, "r")):
        trainer = make(net(drop=0.3), run=None, save_dir="r", config=config)
        trainer.train()
        assert trainer.run.folder == Path(folder).absolute() and trainer.run.status == "finished" and same(weights(trainer), weights(whole))
    rows = [row["step"] for row in Run("r").story().of("step")]
    assert rows == sorted({*rows}) and [row["step"] for row in Run("r").story().of("epoch")] == [5, 10]


def test_a_finished_one_does_nothing_and_says_so(capsys):
    trainer = make(run=None, val=PARTS)
    history = trainer.train()
    before, rows = weights(trainer), repr(history)
    trainer.console.quiet = False
    assert repr(trainer.train()) == rows and same(before, weights(trainer)) and trainer.run.status == "finished"
    assert "step 10 (epoch 2) is the end; to go on, train(num_epochs=…)" in capsys.readouterr().out
    again = make(run=None, save_dir=trainer.run.folder, config=RESUME)
    again.train()
    assert again.step == 10 and same(before, weights(again))


def test_num_epochs_is_for_that_call():
    trainer = make(epochs=4)
    trainer.train(num_epochs=1)
    assert trainer.epoch == 1
    trainer.train()
    assert trainer.epoch == 4


@pytest.mark.parametrize("value, says", [(0, "more than nothing"), (-1, "duration"), ("soon", "duration"), (math.nan, "duration")])
def test_num_epochs_that_cannot_be(value, says):
    trainer = make()
    with pytest.raises(ConfigError, match=says) as told: trainer.train(num_epochs=value)
    assert "epochs" in line(told) and trainer.step == 0
    trainer.train()
    assert trainer.epoch == 2


def test_a_run_that_was_deleted_between_two_calls():
    """People tidy up; what the trainer holds in memory can be trained on."""
    trainer = make(run=None)
    trainer.train()
    shutil.rmtree("runs")
    trainer.train(num_epochs=3)
    assert trainer.epoch == 3 and trainer.run.folder.exists()


@pytest.mark.parametrize("when", ["between", "during"])
def test_the_current_folder_changes(when, tmp_path):
    """%cd in a notebook: the run stays where it is, and all of it is written."""
    def go(_=None): (tmp_path/"sub").mkdir(); os.chdir(tmp_path/"sub")
    trainer = make(run=None, callbacks=[at_step(2, go)] if when == "during" else [])
    trainer.train(num_epochs=1)
    if when == "between": go()
    trainer.train(num_epochs=2)
    assert not os.listdir(tmp_path/"sub") and trainer.run.status == "finished" and len(os.listdir(tmp_path/"runs")) == 1
    (log,) = tmp_path.rglob("train.log")
    assert log.read_text().count("  epoch ") == 2


@pytest.mark.parametrize("change", [lambda model: model.__setitem__(2, nn.Linear(8, 3)), lambda model: model.append(nn.Linear(3, 3)), lambda model: model[0].requires_grad_(True)], ids=["a new head", "one more layer", "unfrozen"])
def test_a_model_that_was_changed_between_two_calls(change, capsys):
    """Its new parameters are trained, or it is said that they are not."""
    model = net()
    model[0].requires_grad_(False)
    trainer = make(model, quiet=False)
    trainer.train()
    change(model)
    before, _ = {name: one.clone() for name, one in model.named_parameters()}, capsys.readouterr()
    try: trainer.train(num_epochs=4)
    except ConfigError as error:
        assert "make a new Trainer" in str(error)
        return
    still = [name for name, one in model.named_parameters() if one.requires_grad and torch.equal(one, before[name])]
    assert not still or any(name in capsys.readouterr().out for name in still)


def embedded() -> tuple: return nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(24, 3)), loader((X.abs() * 3).long() % 10, Y)


@pytest.mark.parametrize("how", [pytest.param(lambda: {"model": net().double(), "data": loader(X.double(), Y)}, id="double"),
                                 pytest.param(lambda: dict(zip(("model", "data"), embedded()), optimizer="sgd", weight_decay=0), id="sparse"),
                                 pytest.param(lambda: {"model": net().bfloat16(), "data": loader(X.bfloat16(), Y)}, id="bfloat16"), pytest.param(lambda: {"model": nn.Sequential(nn.LazyLinear(8), nn.LazyLinear(3))}, id="lazy")])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_numbers_of_any_kind(how, clip):
    trainer = make(**how(), clip=clip)
    trainer.train()
    assert trainer.epoch == 2 and trainer.history["train_loss"][1] < trainer.history["train_loss"][0]


def test_after_an_error_in_a_step(capsys):
    """With the slip mended it goes on in memory, and says that this is not bit for bit; from the last checkpoint it is."""
    class Slips(Trainer):
        slip = True
        def training_step(self, batch):
            loss = super().training_step(batch)
            if self.step == 6 and self.slip: raise ValueError("a slip")
            return loss
    whole, trainer = make(net(drop=0.3)), make(net(drop=0.3), kind=Slips, run=None, save_interval=1)
    whole.train()
    with pytest.raises(ValueError, match="a slip"): trainer.train()
    assert trainer.step == 6 and trainer.run.status == "failed"
    trainer.slip = False
    again = make(net(drop=0.3), run=None, config=RESUME, save_dir=str(trainer.run.folder)).resume_from_checkpoint()
    assert again.step == 5  # what is not exact is not saved over what is
    again.train()
    assert same(weights(again), weights(whole))
    trainer.console.quiet = False
    trainer.train()
    assert "note: after ValueError in step 7 it goes on from whole weights, but no longer bit for bit" in capsys.readouterr().out
    assert trainer.step == 10 and not same(weights(trainer), weights(whole)) and trainer.state_dict()["trainer"]["shaken"]


def test_after_an_error_in_the_data_training_goes_on_exactly():
    """What was reached is saved; with the sample mended the same trainer, or a new one, comes to the same end."""
    class Holes(Dataset):
        reads, holes = 0, True
        def __len__(self): return 40
        def __getitem__(self, i):
            self.reads += 1
            if self.holes and self.reads > 60: raise OSError("a hole")
            return X[i], Y[i]
    data, whole = Holes(), make(net(drop=0.3))
    trainer = make(net(drop=0.3), DataLoader(data, 8, shuffle=True), run=None, save_dir="r")
    whole.train()
    with pytest.raises(OSError, match="a hole"): trainer.train()
    assert trainer.step == 7 and steps("r/train") == [7] and trainer.run.status == "failed"
    data.holes = False
    for one in (make(net(drop=0.3), loader()).resume_from_checkpoint("r@7"), trainer):
        one.train()
        assert same(weights(one), weights(whole))


@pytest.mark.parametrize("name", ["train_loader", "val_loader"])
def test_another_loader_between_two_calls(name):
    trainer = make(val=PARTS)
    trainer.train()
    setattr(trainer, name, loader(size=8))
    trainer.train(num_epochs=3)
    assert trainer.epoch == 3


def test_a_number_that_changes_nothing_is_said(capsys):
    """A config's batch_size beside a finished loader, whose batches have another."""
    make(data=loader(size=8), batch_size=16, quiet=False).train()
    assert "train_loader makes batches of 8; batch_size: 16 (keyword) is for datasets" in capsys.readouterr().out


def test_frozen_between_two_calls():
    """What is frozen stays; if nothing is left, that is an error and the trainer is as it was."""
    trainer = make(epochs=1)
    trainer.train()
    trainer.model[0].requires_grad_(False)
    before = weights(trainer)
    trainer.train(num_epochs=2)
    assert same(before[:2], weights(trainer)[:2]) and not same(before[2:], weights(trainer)[2:])
    trainer.model.requires_grad_(False)
    before = weights(trainer)
    with pytest.raises(ConfigError, match="no gradient") as told: trainer.train(num_epochs=3)
    assert line(told) and trainer.step == 10 and same(before, weights(trainer))
    trainer.model.requires_grad_(True)
    trainer.train(num_epochs=3)
    assert trainer.epoch == 3


def test_two_trainers_of_one_model():
    """In turn: one after the other on the same weights, each with its own place and optimizer."""
    model = net()
    one, two = make(model, run=None, epochs=6), make(model, run=None, epochs=6, lr=1e-3)
    for number in (1, 2, 3):
        one.train(num_epochs=number)
        before = weights(model)
        two.train(num_epochs=number)
        assert not same(before, weights(model)) and one.epoch == two.epoch == number
    assert one.run.folder != two.run.folder and same(weights(one), weights(two))


@pytest.mark.parametrize("copied", [pytest.param(copy.deepcopy, id="deepcopy"), pytest.param(lambda trainer: pickle.loads(pickle.dumps(trainer)), id="pickle")])
def test_a_copy_of_a_trainer(copied):
    """Goes on by itself; the first one is not touched, and comes to the same end in a run of its own."""
    torch.optim.Adam(net().parameters())  # somebody else used that class before
    trainer = make(net(drop=0.3), val=PARTS, run=None, epochs=4, scheduler="constant")
    trainer.train(num_epochs=2)
    other, before = copied(trainer), weights(trainer)
    other.train(num_epochs=4)
    assert same(weights(trainer), before) and trainer.epoch == 2 and other.epoch == 4
    trainer.train(num_epochs=4)
    assert same(weights(trainer), weights(other)) and trainer.run.folder != other.run.folder


def test_training_in_a_thread():
    """No signal handlers there, and the same end; Run.tell reaches it."""
    whole, trainer, ended = make(net(drop=0.3)), make(net(drop=0.3), run=None), []
    whole.train()
    def work():
        try: trainer.train()
        except BaseException as error: ended.append(error)
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert not ended and same(weights(trainer), weights(whole)) and trainer.run.status == "finished" and signal.getsignal(signal.SIGINT) is before


def test_the_cell_again_while_it_trains_in_a_thread():
    """It is busy; the training in the thread does not notice."""
    trainer, ended, inside, go_on = make(run=None, callbacks=[at_step(3, lambda trainer: (inside.set(), go_on.wait(10)))]), [], threading.Event(), threading.Event()
    def work():
        try: trainer.train()
        except BaseException as error: ended.append(error)
    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(10)
    try:
        with pytest.raises(RuntimeError) as told: trainer.train_epoch()
    finally:
        go_on.set()
        thread.join(30)
    assert not ended and trainer.epoch == 2 and trainer.run.status == "finished" and line(told)


def test_train_inside_its_own_callback_is_refused():
    trainer = make(run=None, callbacks=[at_step(3, lambda trainer: trainer.train())])
    with pytest.raises(CallbackError, match="step_end"): trainer.train()
    assert trainer.step == 3


def test_going_back_inside_a_callback_does_not_overwrite_what_was_reached():
    went = []
    def back(trainer):
        if trainer.epoch != 2 or went: return
        trainer.record.manager.wait()
        went.append(trainer.resume_from_checkpoint("epoch 1"))
    trainer = make(run=None, callbacks=[hears(epoch_end=back)], save_interval=1, epochs=3)
    try: trainer.train()
    except CallbackError: return  # that is an answer, too
    numbers = [row["step"] for row in trainer.run.story().of("epoch")]
    assert numbers == sorted({*numbers})


# --- checkpoints ----------------------------------------------------------------------------------------------------------------------

class Counts(Callback):
    "Has a state."
    def __init__(self): self.n = 0
    def step_end(self, trainer): self.n += 1
    def state_dict(self): return {"n": self.n}
    def load_state_dict(self, state): self.n = state["n"]


@pytest.mark.parametrize("how", [pytest.param("file"), "state_dict"])
def test_all_of_it_elsewhere_and_back(how):
    """save_checkpoint("x.pth"), or state_dict() without any run: gone on from in another trainer, the end is the same, mid-epoch too."""
    made = lambda: make(net(drop=0.3), val=PARTS, epochs=4, scheduler="constant", callbacks=[Counts()])
    whole, first, second = made(), made(), made()
    whole.train()
    first.train(num_epochs="7 steps")
    if how == "file":
        first.save_checkpoint("x.pth")
        assert second.resume_from_checkpoint("x.pth") is second
    else: second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert (second.step, second.epoch, second.batch) == (7, 1, 2) and same(weights(second), weights(first))
    second.train()
    assert same(weights(second), weights(whole)) and second.listeners.callbacks[0].n == 20 and second.metrics == whole.metrics and not list(Path().rglob("run.json"))


def test_weights_in_a_plain_file():
    """A .safetensors file has the weights alone; a file of another form or in a folder that is not there is refused."""
    first, second = make(), make(quiet=False)
    first.train()
    first.save_checkpoint("x.safetensors")
    second.resume_from_checkpoint("x.safetensors")
    assert same(weights(first), weights(second)) and second.step == 0
    for odd in ("x", "x.txt", "no/x.pth"):
        with pytest.raises(CheckpointError, match="ends in|make it first") as told: first.save_checkpoint(odd)
        line(told)


def test_the_state_of_a_trainer_that_has_not_begun():
    one, two, three = (make(net(drop=0.3)) for _ in range(3))
    one.train()
    two.load_state_dict(copy.deepcopy(three.state_dict()))
    two.train()
    assert same(weights(one), weights(two))


def test_a_state_is_a_value():
    """Given to another trainer, it is not shared."""
    first, second = make(), make(epochs=4)
    first.train()
    moments = [one["exp_avg"].clone() for one in first.updates[""].optimizer.state_dict()["state"].values()]
    second.load_state_dict(first.state_dict())
    second.train()
    assert same(moments, [one["exp_avg"] for one in first.updates[""].optimizer.state_dict()["state"].values()])


@pytest.mark.parametrize("name, step", [("results/saved_models", 35), ("results/saved_models@best", None), ("results/saved_models/epoch_5.pth", 25), ("epoch 3", 15), ("latest", 35), ("best", None), ("results/saved_models/train@10", 10)])
def test_resume_by_any_name(name, step, capfd):
    """Goes to that step; from one that is not the latest, train() opens a branch and comes to the same end."""
    made = lambda: Trainer(net(drop=0.3), loader(), PARTS, quiet=True, checkpoint_dir="results/saved_models", optimizer_type="adamw", learning_rate=0.05, save_frequency=1, keep_last=None, num_epochs=7, monitor="val_acc")
    first = made()
    first.train()
    trainer = made().resume_from_checkpoint(name)
    step = first.best["step"] if step is None else step
    assert trainer.step == step and len(trainer.history) == step // 5 and first.best["step"] < 35
    trainer.train()
    assert trainer.epoch == 7 and same(weights(trainer), weights(first)) and repr(trainer.history["val_loss"]) == repr(first.history["val_loss"])
    assert (trainer.run.folder == first.run.folder) == (step == 35) and (step == 35 or trainer.run.parent["step"] == step)


def test_names_that_mean_no_checkpoint():
    trainer = make()
    for name in ("latest", "nowhere", "nope.pth", "epoch 3", "runs/x@best", ""):
        with pytest.raises(CheckpointError) as told: trainer.resume_from_checkpoint(name)
        assert line(told) and trainer.step == 0


def foreign(optimizer: str = "AdamW", epoch: int = 1) -> list[torch.Tensor]:
    "A checkpoint as others write it; its weights."
    model = net()
    one = getattr(torch.optim, optimizer)(model.parameters(), lr=3e-2)
    F.cross_entropy(model(X), Y).backward()
    one.step()
    torch.save({"model": model.state_dict(), "optimizer": one.state_dict(), "epoch": epoch}, "theirs.pth")
    return weights(model)


def test_a_foreign_file_is_taken_over(capsys):
    """Weights, optimizer and epoch; what begins anew is said."""
    wanted = foreign()
    trainer = make(epochs=4, quiet=False).resume_from_checkpoint("theirs.pth")
    assert same(weights(trainer), wanted) and (trainer.epoch, trainer.step) == (1, 5)
    assert "theirs.pth is another program's: weights and optimizer taken over, to go on at step 5 (epoch 1); the order of the data and random numbers begin anew" in capsys.readouterr().out
    assert trainer.updates[""].optimizer.state_dict()["state"][0]["exp_avg"].any()
    torch.save(net().state_dict(), "bare.pth")
    trainer = make().resume_from_checkpoint("bare.pth")
    trainer.train()
    assert trainer.epoch == 2


def test_a_foreign_optimizer_of_another_kind_is_not_taken_over(capsys):
    wanted = foreign("SGD")
    trainer = make(epochs=3, quiet=False).resume_from_checkpoint("theirs.pth")
    assert same(weights(trainer), wanted) and "its optimizer does not fit: no " in capsys.readouterr().out
    trainer.train()


@pytest.mark.parametrize("words", [{}, {"clip": 0.1}], ids=str)
def test_a_foreign_file_is_trained_on(words):
    foreign()
    trainer = make(epochs=4, **words).resume_from_checkpoint("theirs.pth")
    trainer.train()
    assert (trainer.epoch, trainer.step) == (4, 20)


def test_a_checkpoint_of_an_optimizer_object_goes_on_by_its_name():
    model = net()
    make(model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), run=None, save_dir="r", clip=0.1).train()
    trainer = make(epochs=4, clip=0.1).resume_from_checkpoint("r")
    trainer.train()
    assert trainer.epoch == 4


def test_a_checkpoint_of_a_name_goes_on_with_an_optimizer_object():
    made = lambda model, **words: make(model, run=None, save_dir="r", clip=0.1, config=RESUME, scheduler="constant", **words)
    made(net()).train()
    model = net()
    trainer = made(model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), epochs=4)
    trainer.train()
    whole = make(clip=0.1, epochs=4, scheduler="constant")
    whole.train()
    assert trainer.epoch == 4 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(weights(trainer), weights(whole)))


@pytest.mark.parametrize("name", ["x.pth", "theirs.pth"])
def test_what_was_resumed_from_is_what_is_trained(name):
    """Also where the run that save_dir names has gone further."""
    made = lambda **words: make(run=None, save_dir="r", epochs=4, config=RESUME, **words)
    first = made()
    first.train(num_epochs=1)
    first.save_checkpoint("x.pth")
    first.train(num_epochs=3)
    foreign()
    began = []
    trainer = made(callbacks=[hears(fit_start=lambda trainer: began.append((trainer.step, weights(trainer))))]).resume_from_checkpoint(name)
    wanted = (trainer.step, weights(trainer))
    trainer.train()
    assert began[0][0] == wanted[0] == 5 and same(began[0][1], wanted[1])


@pytest.mark.parametrize("words, says", [({"optimizer": "sgd"}, "is SGD, the checkpoint has AdamW"), ({"optimizer": "adam"}, "is Adam, the checkpoint has AdamW"), ({"loss": Centers()}, "groups of .5. parameters, the checkpoint of .4."), ({"data": loader(size=10)}, "batch_size")])
def test_a_resume_that_cannot_be_changes_nothing(words, says):
    make(run=None, save_dir="r").train()
    trainer = make(**words)
    before = weights(trainer)
    with pytest.raises((ConfigError, CheckpointError), match=says) as told: trainer.resume_from_checkpoint("r")
    assert line(told) and same(before, weights(trainer)) and (trainer.step, trainer.epoch, trainer.best, len(trainer.history)) == (0, 0, {}, 0)
    trainer.train()
    assert trainer.epoch == 2


def test_the_states_of_callbacks_are_not_lost_when_their_order_changes(capsys):
    make(run=None, save_dir="r", callbacks=[Counts()]).train()
    trainer = make(quiet=False, callbacks=[Callback(), Counts()]).resume_from_checkpoint("r")
    assert trainer.listeners.callbacks[1].n == 10 or "Counts" in capsys.readouterr().out


@register("model", "tiny-of-test-trainer")
def tiny(width: int = 8, drop: float = 0.5) -> nn.Module: return nn.Sequential(nn.Linear(6, width), nn.Dropout(drop), nn.Linear(width, 3))


def test_three_lines_to_inference():
    """The best weights of a registered model, built from its config, ready to be used."""
    trainer = Trainer("tiny-of-test-trainer", loader(), PARTS, config={"model": {"width": 5}}, checkpoint_dir="results/saved_models", optimizer_type="adamw", learning_rate=0.5, num_epochs=6, quiet=True, scheduler="constant")
    trainer.train()
    model, best = load_model("results/saved_models@best"), load_checkpoint("results/saved_models@best", quiet=True)
    assert not model.training and model[0].out_features == 5 and best["step"] == trainer.best["step"] < trainer.step
    assert same(weights(model), [*best["model_state_dict"].values()]) and not same(weights(model), weights(trainer))
    assert F.cross_entropy(model(X), Y).item() == pytest.approx(trainer.best["value"], abs=1e-6)


@pytest.mark.parametrize("words", [{}, {"run": None}], ids=["without a run", "before the first step"])
def test_save_checkpoint_saves_or_says_why_not(words, capsys):
    trainer = make(quiet=False, **words)
    if not words: trainer.train()
    capsys.readouterr()
    try: trainer.save_checkpoint()
    except (ConfigError, CheckpointError): return
    assert list(Path().rglob("step-*")) or "no checkpoint" in capsys.readouterr().out


def test_without_a_run_nothing_is_written():
    trainer = make(val=PARTS, callbacks=[Trace()], epochs=2, save_interval="1 step")
    trainer.train()
    trainer.train_epoch(); trainer.evaluate(PARTS); trainer.predict(PARTS); trainer.state_dict(); trainer.train(num_epochs=3)
    with pytest.raises(CheckpointError): trainer.resume_from_checkpoint()
    with pytest.raises(CallbackError): make(callbacks=[at_step(1, raiser(OSError("x")))]).train()
    assert not os.listdir(".") and trainer.run is None and len(trainer.history) == 3 and "saved" not in " ".join(trainer.listeners.callbacks[0].heard)


# --- bad input ------------------------------------------------------------------------------------------------------------------------

def no_grad(outputs, targets): return F.cross_entropy(outputs.detach(), targets)
def on_meta(x, y): return [(x, y.to("meta"))] * 3


_ANY = (ConfigError, CallbackError, TypeError, NonFinite)
BAD = {  # what is wrong → (how it is made, the type of the error, what it names)
    "no batches": (lambda: make(data=[]), ConfigError, "found none: the list is empty"),
    "no whole batch": (lambda: make(data=loader(size=64, drop_last=True)), ConfigError, "40 samples make no batch of 64; use a smaller batch_size"),
    "no samples": (lambda: make(data=DataLoader(TensorDataset(X[:0], Y[:0]), 8)), ConfigError, "the dataset is empty"),
    "no validation batches": (lambda: make(val=[]), ConfigError, "found none"),
    "no loader": (lambda: make(data=X), ConfigError, "found Tensor; accepted are a DataLoader"),
    "a vector": (lambda: make(loss=nn.CrossEntropyLoss(reduction="none")), ConfigError, r"expected one number, found shape \(8,\); take its mean"),
    "a number of Python": (lambda: make(loss=lambda o, t: F.cross_entropy(o, t).item()), ConfigError, "expected a tensor, found float"),
    "no grad": (lambda: make(loss=no_grad), ConfigError, "no gradient, so nothing would be learned; .*detach"),
    "no loss in the dict": (lambda: make(kind=type("T", (Trainer,), {"training_step": lambda self, batch: {"lost": 1}})), ConfigError, "found a dict with lost"),
    "a tensor to log": (lambda: make(kind=type("T", (Trainer,), {"training_step": lambda self, batch: {"loss": self.model(batch[0]).mean(), "out": self.model(batch[0])}})), ConfigError, r"out  expected one number to be logged, found \(8, 3\) float32"),
    "targets elsewhere": (lambda: make(data=on_meta(*PARTS[0])), ConfigError, r"a tensor \(8,\) is on meta, the model on cpu; return CPU tensors"),
    "everything frozen": (lambda: make(net().requires_grad_(False)), ConfigError, "nothing to train: .*set requires_grad"),
    "no parameters": (lambda: make(nn.Flatten()), ConfigError, "nothing to train"),
    "another's optimizer": (lambda: make(optimizer=torch.optim.SGD(net().parameters(), lr=1e-2)), ConfigError, "reached no parameter of this optimizer"),
    "a monitor of nothing": (lambda: make(val=PARTS, monitor="val_psnr"), ConfigError, "val_psnr is not measured; measured are val_loss, val_acc"),
    "a slip in the monitor": (lambda: make(val=PARTS, monitor="val_los"), ConfigError, "val_los is not measured, did you mean val_loss"),
    "a monitor without a val_loader": (lambda: make(monitor="val_loss"), ConfigError, "needs a val_loader"),
    "a monitor of training": (lambda: make(val=PARTS, monitor="train_auc"), ConfigError, "train_auc is not measured; .*train_loss"),
    "no way up or down": (lambda: make(val=PARTS, metrics={"q": lambda o, t: o.mean()}, monitor="val_q"), ConfigError, "cannot tell whether less or more"),
    "a slip": (lambda: make(leraning_rate=1), ConfigError, "did you mean learning_rate"),
    "another slip": (lambda: make(epoch=1), ConfigError, "did you mean epochs"),
    "no cuda": (lambda: make(device="cuda"), ConfigError, "cuda is not there: .*; write device: auto"),
    "no such device": (lambda: make(device="cdua"), ConfigError, "did you mean cuda"),
    "fp16 on a CPU": (lambda: make(precision="fp16"), ConfigError, "write bf16 or fp32"),
    "no such metric": (lambda: make(metrics="acuracy"), ConfigError, "did you mean accuracy"),
    "no such optimizer": (lambda: make(optimizer="adm"), ConfigError, "did you mean adam"),
    "a class for an optimizer": (lambda: make(optimizer=torch.optim.Adam), ConfigError, "expected a name or a torch optimizer"),
    "no such model": (lambda: make("tiny-of-test-trainr"), ConfigError, "did you mean tiny-of-test-trainer"),
    "two rates": (lambda: make((model := net()), optimizer=torch.optim.SGD(model.parameters(), lr=0.5)), ConfigError, "is 0.01, and the optimizer that was given has 0.5"),
    "evaluate what": (lambda: make().evaluate(), ConfigError, "needs a loader"),
    **{f"{key} is not built": (lambda key=key, value=value: make(**{key: value}), ConfigError, f"{key}  is not built yet") for key, value in
       {"distributed": True, "tensorboard": True}.items()},
    "an empty dataset": (lambda: make(data=TensorDataset(X[:0], Y[:0])), _ANY, "empty"),
    "no loader at all": (lambda: Trainer(net(), None, run=False, quiet=True), _ANY, "found None"),
    "a model for a loader": (lambda: make(data=net()), _ANY, "found Sequential"),
    "validation targets elsewhere": (lambda: make(val=on_meta(*PARTS[0])), _ANY, "is on meta"),
    "a metric of many numbers": (lambda: make(val=PARTS, metrics={"many": lambda o, t: o.mean(0)}), _ANY, "many"),
    "a metric of nothing": (lambda: make(val=PARTS, metrics={"nothing": lambda o, t: None}), _ANY, "nothing"),
    "a metric that raises": (lambda: make(val=PARTS, metrics={"broken": raiser(KeyError("x"))}), _ANY, "broken"),
    "a number for metrics": (lambda: make(metrics=3), _ANY, "metrics"),
    "a float of NumPy to log": (lambda: make(kind=type("T", (Trainer,), {"training_step": lambda self, batch: {"loss": self.model(batch[0]).mean() / 0, "n": numpy.float32(1)}})), _ANY, "its gradient is not finite"),
    "something else to log, later": (lambda: make(kind=type("T", (Trainer,), {"training_step": lambda self, batch: {"loss": self.model(batch[0]).mean(), "out": self.model(batch[0]) if self.step > 2 else 1}})), _ANY, "out  expected"),
    "an optimizer with a closure": (lambda: make(optimizer="lbfgs"), _ANY, "LBFGS computes the loss several times"),
    "no optimizers": (lambda: make(optimizer={}), _ANY, "optimizer"),
    "a slip in another word": (lambda: make(callback=[]), _ANY, "did you mean callbacks"),
    "a mode without a monitor": (lambda: make(run=None, monitor_mode="max"), _ANY, "monitor_mode  max needs a monitor"),
    "a plateau of nothing": (lambda: make(scheduler="plateau"), ConfigError, "plateau hears of no validation; give a val_loader"),
    "milestones beyond the end": (lambda: make(scheduler="multistep", milestones=[9]), ConfigError, "milestones"),
    "a floor above the rate": (lambda: make(min_lr=1), ConfigError, "min_lr")}
@pytest.mark.parametrize("name, how, kind, says", [(name, *case) for name, case in BAD.items()], ids=lambda one: one if isinstance(one, str) and " " in one else "")
def test_bad_input(name, how, kind, says):
    """One line that names the cause and the fix; no weight was touched by it."""
    made = []
    with pytest.raises(kind, match=says) as told:
        made.append(how())
        before = weights(made[0])
        made[0].train()
    assert line(told) and (not made or made[0].step >= 5 or same(before, weights(made[0])))


class Explodes(Trainer):
    at, value = 6, math.nan

    def training_step(self, batch):
        loss = super().training_step(batch)
        return loss * self.value if self.step == self.at and self.model.training else loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "rmsprop"])
@pytest.mark.parametrize("every", ["1 step", "1000 steps"])
def test_a_gradient_that_is_not_finite(optimizer, every, value):
    """NonFinite says where; the weights are those before that step, however late it is noticed; from a checkpoint it goes on."""
    kept = {}
    trainer = make(kind=Explodes, run=None, optimizer=optimizer, save_interval=1, config={"logging": {"every": every}}, callbacks=[hears(step_end=lambda trainer: kept.update({trainer.step: weights(trainer)}))])
    Explodes.value = value
    with pytest.raises(NonFinite, match=r"step 7  its gradient is not finite: .*epoch 2, batch 2\); the weights are those before it\. Try a lower lr, .*nonfinite: skip") as told: trainer.train()
    assert line(told) and same(weights(trainer), kept[6]) and trainer.step == max(kept) == (7 if every == "1 step" else 10) and trainer.run.status == "failed"
    assert steps(trainer.run.folder/"train") == [5] and [row["step"] for row in trainer.run.story().of("warning")] == [7]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "rmsprop"])
def test_steps_that_are_not_finite_can_be_left_out(optimizer):
    """The bad step changes nothing, the next ones do; its numbers are in no mean; a warning tells of it."""
    kept, Explodes.value = {}, math.nan
    trainer = make(kind=Explodes, run=None, optimizer=optimizer, nonfinite="skip", callbacks=[hears(step_end=lambda trainer: kept.update({trainer.step: weights(trainer)}))])
    trainer.train()
    assert same(kept[6], kept[7]) and not same(kept[7], kept[8]) and (trainer.step, trainer.epoch, trainer.run.status) == (10, 2, "finished")
    assert [row["step"] for row in trainer.run.story().of("warning")] == [7] and all(value == value for value in trainer.history["train_loss"]) and all(one.isfinite().all() for one in weights(trainer))


# --- a full disk, other processes, signals --------------------------------------------------------------------------------------------

FULL = """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
warnings.simplefilter("always")
def big(): torch.manual_seed(7); return nn.Sequential(nn.Linear(6, 3000), nn.Tanh(), nn.Linear(3000, 3))
def limit(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
full = at_step(FROM, lambda trainer: (trainer.record.manager.wait(), limit(60_000)))
made = lambda *callbacks, **words: make(big(), val=PARTS, run=None, epochs=4, save_interval=INTERVAL, callbacks=callbacks, **words)
whole = made()
whole.train()
trainer = made(full, save_dir="r")
try: trainer.train()
except CheckpointError as error: print(str(error).count(chr(10)), trainer.step, trainer.run.status, error)
print(steps("r/train"))
limit(resource.RLIM_INFINITY)
trainer.save_checkpoint("rescued.pth")
trainer.train()
print(same(weights(trainer), weights(whole)), trainer.run.folder, trainer.run.status, steps("r/train")[-1])
rows = [row["step"] for row in Run("r").story().of("epoch")]
print(rows)
"""


@pytest.mark.parametrize("begin, interval, says", [(6, '"2 steps"', r"0 1\d failed 3 saves in a row failed; the last, of step 10: .*"), (16, 'None', r"0 20 \w+ the checkpoint of step 20 could not be written, the one before it is whole; .*save_checkpoint\(\"/another/disk/model\.pth\"\)")])
def test_a_full_disk(begin, interval, says):
    """The real thing: said, the last whole checkpoint stays, and with room again the same trainer goes on to the same end."""
    done = program(f"FROM, INTERVAL = {begin}, {interval}\n{FULL}")
    assert done.returncode == 0, done.stderr
    error, there, end, rows = done.stdout.splitlines()
    assert re.fullmatch(says, error) and "training goes on" in done.stderr, error
    assert there == str({6: [2, 4, 5], 16: [10, 15]}[begin])
    assert end == f"True {Path.cwd()}/r finished 20" and rows == "[5, 10, 15, 20]"


def test_a_run_that_another_trainer_writes():
    """In this process or in another one: RunBusy in one line; neither trainer is touched by it, and later it can."""
    told = []
    other = make(run=None, save_dir="r", config=RESUME)
    def try_it(trainer):
        before = weights(other)
        with pytest.raises(RunBusy, match="/r  is in use in this process; ") as busy: other.train()
        told.append((line(busy), other.step, other.run, same(before, weights(other))))
    trainer, whole = make(net(drop=0.3), run=None, save_dir="r", callbacks=[at_step(7, try_it)]), make(net(drop=0.3))
    for one in (trainer, whole): one.train()
    assert same(weights(trainer), weights(whole)) and trainer.run.status == "finished" and told[0][1:] == (0, None, True)
    child = subprocess.Popen([sys.executable, "-c", BEGIN + "make(run=None, save_dir='q', callbacks=[at_step(3, lambda trainer: (print('here', flush=True), sys.stdin.readline()))]).train(); print('done')"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    with child:
        assert child.stdout.readline() == "here\n"
        other = make(run=None, save_dir="q", config=RESUME)
        with pytest.raises(RunBusy, match=f"is in use by process {child.pid} on .*; wait for it, or end it") as busy: other.train()
        assert line(busy) and other.step == 0 and Run("q").status == "running"
        child.stdin.write("\n"); child.stdin.flush()
        assert child.stdout.readline() == "done\n"
    other.train(num_epochs=3)
    assert other.epoch == 3 and other.run.folder == Path("q").absolute()


def test_keys_and_signals_in_a_terminal(tmp_path):
    """Ctrl-C while it trains: 130; SIGTERM in a long evaluation: 143; both within seconds, saved, paused, and gone on from exactly."""
    slow = BEGIN + """
class Slow(Trainer):
    def training_step(self, batch): time.sleep(0.05); return super().training_step(batch)
    def validation_step(self, batch): time.sleep(0.5); return super().validation_step(batch)
make(net(drop=0.3), val=PARTS * 20, kind=Slow, run=None, save_dir="r", quiet=False, epochs=2, eval_every=EVERY, callbacks=[at_step(WHEN, lambda trainer: print("HERE", flush=True))]).train()
"""
    whole = make(net(drop=0.3))
    whole.train()
    one, two = (Terminal(f"EVERY, WHEN = {values}\n{slow}", 100, tmp_path/str(number)) for number, values in enumerate(("None, 3", "1, 5")))
    for terminal, end, code in ((one, lambda: one.press(b"\x03"), 130), (two, lambda: (time.sleep(0.3), os.kill(two.pid, signal.SIGTERM)), 143)):
        assert b"HERE" in terminal.read(b"HERE"), terminal.wrote
        began = time.monotonic()
        end()
        assert terminal.end() == code and time.monotonic() - began < 5, terminal.wrote
        folder, (step,) = terminal.where/"r", steps(terminal.where/"r"/"train")
        assert f"paused at step {step} (epoch" in terminal.wrote.decode() and Run(folder).status == "paused" and (3 <= step < 10 if code == 130 else step == 5), terminal.wrote
        again = make(net(drop=0.3), run=None, save_dir=str(folder), config=RESUME)
        again.train()
        assert same(weights(again), weights(whole)) and again.run.status == "finished"
