"""Edges of a training, each of which was wrong once: signals, errors half-way, lengths that lie, clocks, generators and modules of other people."""
import math
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Subset, TensorDataset, default_collate

import exact
from test_trainer import BEGIN, PARTS, RESUME, Explodes, Gan, X, Y, adams, at_step, environment, gan, hears, line, loader, make, net, pair, raiser, same, weights
from trainbook import ConfigError, Run, checkpoint
from trainbook.data import KeyedLoader
from trainbook.device import move, tensors_in
from trainbook.events import Callback, CallbackError, Paused
from trainbook.ledger import read_rows
from trainbook.metrics import NonFinite
from trainbook.device import Waiting
from trainbook.stepfolder import steps
from trainbook.tensorfile import CheckpointError
from trainbook.trainer import Trainer

pytestmark = [pytest.mark.usefixtures("here"), pytest.mark.filterwarnings("error")]


def epochs_of(trainer) -> list[int]: return [row["step"] for row in trainer.run.story().of("epoch")]


def sends(*numbers: int): return lambda *_: [signal.raise_signal(number) for number in numbers]


def whole(*given, **words) -> Trainer:
    "One that nothing happens to."
    trainer = make(*given, **words)
    trainer.train()
    return trainer


# --- signals --------------------------------------------------------------------------------------------------------------------------

def test_a_signal_to_the_whole_group():
    """As Slurm, timeout and a closing terminal send it: the workers leave it to the trainer, which saves and goes."""
    code = BEGIN + """
here = lambda trainer: (print("here", flush=True), time.sleep(0.7))  # a worker that died of it would be noticed in here
make(net(drop=0.3), loader(num_workers=2), run=None, save_dir="r", callbacks=[at_step(7, here)]).train()
"""
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()) as child:
        assert child.stdout.readline() == "here\n"
        os.killpg(child.pid, signal.SIGTERM)  # not from the parent of the workers, whom they would just obey
        said = child.communicate(timeout=30)[1]
    assert child.returncode == 143 and Run("r").status == "paused" and steps("r/train")[-1] == 7, said
    assert same(weights(whole(net(drop=0.3), run=None, save_dir="r", config=RESUME)), weights(whole(net(drop=0.3))))


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_the_last_save(number, code, monkeypatch):
    """It ends the script, which would else go on; in a notebook Ctrl-C has come too late to mean anything."""
    made = lambda: make(run=None, callbacks=[hears(saved=lambda trainer: trainer.step == 10 and signal.raise_signal(number))])
    trainer = made()
    with pytest.raises(SystemExit) as told: trainer.train()
    assert told.value.code == code and trainer.run.status == "finished" and steps(trainer.run.folder/"train")[-1] == 10
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    trainer = made()
    ended = ""
    try: trainer.train()
    except Paused as error: ended = str(error)
    assert trainer.run.status == "finished" and ended == ("finished at step 10 (epoch 2)" if number == signal.SIGTERM else "")


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_sigterm_stops_at_once_with_its_code(first):
    trainer = make(run=None, callbacks=[at_step(3, sends(first, signal.SIGTERM))])
    with pytest.raises((SystemExit, KeyboardInterrupt)) as told: trainer.train()
    assert getattr(told.value, "code", None) == 143 and trainer.step == 3


def test_a_signal_on_a_full_disk():
    """What could not be saved is an error, not a pause; with room again the same trainer goes on exactly."""
    def fill(trainer): trainer.record.manager.wait(); patch.setattr(checkpoint, "write_step", raiser(OSError(28, "No space left on device"))); signal.raise_signal(signal.SIGTERM)
    trainer = make(net(drop=0.3), run=None, save_interval=1, callbacks=[at_step(7, fill)])
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="step 7 was not written"), pytest.raises((CheckpointError, SystemExit)) as told: trainer.train()
    assert "the checkpoint of step 7 could not be written" in line(told) and trainer.run.status == "failed" and steps(trainer.run.folder/"train") == [5]
    trainer.train()
    assert same(weights(trainer), weights(whole(net(drop=0.3)))) and epochs_of(trainer) == [5, 10]


# --- sources --------------------------------------------------------------------------------------------------------------------------

class Again(IterableDataset):
    "Starts over whenever it is read, and says some length."
    def __init__(self, says: int = 40): self.says = says
    def __len__(self): return self.says
    def __iter__(self): return zip(X, Y)


@pytest.mark.parametrize("same_process", [True, False])
def test_a_source_that_starts_over_begins_its_epoch_anew(same_process):
    """All of the epoch is trained and nothing else is in its mean: with a rate of 0 all epochs measure the same."""
    made = lambda: make(data=DataLoader(Again(), 8), run=None, save_dir="r", config=RESUME, epochs=3, lr=0.0, weight_decay=0.0, callbacks=[at_step(7, lambda trainer: trainer.stop())])
    trainer = made()
    trainer.train()
    assert (trainer.step, trainer.batch) == (7, 2)
    if not same_process: trainer = made()
    trainer.train()
    assert (trainer.step, trainer.epoch, trainer.batch, trainer.run.status) == (17, 3, 0, "finished") and epochs_of(trainer) == [5, 12, 17]
    assert trainer.history["train_loss"] == pytest.approx([trainer.history["train_loss"][0]] * 3, abs=1e-6)


@pytest.mark.parametrize("same_process", [True, False])
def test_an_epoch_that_was_given_up_in_its_evaluation_is_not_trained_again(same_process):
    sent = []
    class Told(Trainer):
        def validation_step(self, batch):
            if not sent: sent.append(signal.raise_signal(signal.SIGINT))
            return super().validation_step(batch)
    made = lambda: make(data=DataLoader(Again(), 8), val=PARTS, kind=Told, run=None, save_dir="r", config=RESUME)
    trainer = made()
    with pytest.raises(SystemExit): trainer.train()
    assert (trainer.step, trainer.epoch, trainer.batch) == (5, 0, 5)
    if not same_process: trainer = made()
    trainer.train()
    assert (trainer.step, trainer.epoch) == (10, 2) and epochs_of(trainer) == [5, 10]
    assert same(weights(trainer), weights(whole(data=DataLoader(Again(), 8), val=PARTS)))


@pytest.mark.parametrize("says", [24, 32, 48])
def test_a_length_that_is_not_what_comes(says):
    """Whole epochs are whole, whatever len says: 5 batches come each time."""
    trainer = whole(data=DataLoader(Again(says), 8), val=PARTS, epochs=3)
    assert (trainer.step, trainer.epoch, trainer.batch) == (15, 3, 0) and len(trainer.history["val_loss"]) == 3


def test_a_length_that_is_not_what_comes_and_a_stop_there():
    class Lies(BatchSampler):
        def __len__(self): return 4
    made = lambda: make(data=DataLoader(TensorDataset(X, Y), batch_sampler=Lies(RandomSampler(range(40)), 8, False)), epochs=3, callbacks=[at_step(4, lambda trainer: trainer.stop())])
    trainer = made()
    for _ in range(2): trainer.train()
    assert trainer.step == 15


class Jitters:
    "Draws from generators of its own, as NumPy's documentation teaches."
    def __init__(self): self.a, self.b, self.c, self.d = numpy.random.default_rng(0), numpy.random.RandomState(0), random.Random(0), torch.Generator().manual_seed(0)
    def __call__(self, x): return x + float(self.a.normal()) + float(self.b.normal()) + self.c.gauss(0, 1) + torch.randn((), generator=self.d)


class Jittered(Jitters, Dataset):
    def __len__(self): return 40
    def __getitem__(self, i): return self(torch.zeros(())), Y[i]


class Transformed(Dataset):
    def __init__(self): self.image_transform = Jitters()
    def __len__(self): return 40
    def __getitem__(self, i): return self.image_transform(torch.zeros(())), Y[i]


class Collates(Jitters):
    def __call__(self, samples): return default_collate([(super(Collates, self).__call__(x), y) for x, y in samples])


OWN = {"dataset": lambda **more: loader_of(Jittered(), **more), "transform": lambda **more: loader_of(Transformed(), **more), "within": lambda **more: loader_of(Subset(Transformed(), range(40)), **more),
       "collate": lambda **more: loader_of(TensorDataset(torch.zeros(40), Y), collate_fn=Collates(), **more)}
def loader_of(data, **more) -> DataLoader: return DataLoader(data, 8, shuffle=True, **more)


@pytest.mark.parametrize("per, workers", [("batch", 0), ("batch", 2), ("sample", 0)])
@pytest.mark.parametrize("where", OWN)
def test_generators_of_ones_own_are_keyed(where, per, workers):
    """A batch is a function of seed, epoch and number, whatever was drawn before, in whichever process; no two draws are one."""
    drawn = lambda batches, *at: [x for _, (x, _) in batches.batches(*at)]
    one, two = KeyedLoader(OWN[where](), per=per), KeyedLoader(OWN[where](num_workers=workers), per=per)
    wanted = [*drawn(one, 0), *drawn(one, 1)]
    assert one.exact == two.exact == "" and torch.cat(wanted).unique().numel() == 80
    assert same(drawn(two, 1, 2), wanted[7:]) and same(drawn(two, 0), wanted[:5])


# --- streams, and what looks at them --------------------------------------------------------------------------------------------------

class Stream(exact.Stream):
    def __len__(self): return self.n


def stream(kind=Stream) -> DataLoader: return DataLoader(kind(40), 8)


@pytest.mark.parametrize("words", [{}, {"monitor": "val_loss"}], ids=["given up", "looked at"])
def test_a_look_at_a_validation_stream_does_not_move_it(words):
    """An evaluation that is given up begins anew where it began; so does the first one after a monitor was looked for."""
    class Told(Trainer):
        made = 0
        def validation_step(self, batch):
            self.made += 1
            if self.made == 3 and not words: signal.raise_signal(signal.SIGINT)
            return super().validation_step(batch)
    wanted, trainer = whole(val=stream()), make(val=stream(), kind=Told, run=None, **words)
    if not words:
        with pytest.raises(SystemExit): trainer.train()
    trainer.train()
    assert trainer.history["val_loss"] == wanted.history["val_loss"] and len(wanted.history) == 2


def test_validation_streams_of_unknown_length():
    """A monitor is looked for in them; several optimizers may have one."""
    trainer, model = whole(val=stream(exact.Stream), monitor="val_loss"), pair()
    assert trainer.history["val_loss"] == whole(val=stream()).history["val_loss"]
    class Validated(Gan):
        def validation_step(self, batch): return {"fooled": self.model["judge"](self.model["make"](batch[0])).mean()}
    assert len(whole(model, val=stream(exact.Stream), kind=Validated, optimizer=adams(model)).history["val_fooled"]) == 2


def test_a_look_at_the_training_stream_does_not_move_it():
    """evaluate() and predict() on what is being trained on, by either of its names."""
    data, told = stream(), []
    def look(trainer): told.extend([trainer.evaluate(data)["test_loss"], len(trainer.predict(data)), len(trainer.predict(trainer.train_loader))])
    made = lambda data, *callbacks: whole(net(drop=0.3), data, epochs=3, scheduler="constant", callbacks=callbacks)
    wanted, trainer = made(stream()), made(data, at_step(3, look), at_step(5, look), at_step(9, look))
    assert (trainer.step, trainer.samples) == (wanted.step, wanted.samples) == (15, 120) and same(weights(trainer), weights(wanted))
    assert trainer.history["train_loss"] == wanted.history["train_loss"] and len(told) == 9


def test_one_stream_to_train_and_to_validate():
    data = stream()
    trainer = whole(data=data, val=data, epochs=3, scheduler="constant", eval_every="2 steps", callbacks=[at_step(30, lambda trainer: trainer.stop())])
    assert trainer.step == 15 and same(weights(trainer), weights(whole(data=stream(), epochs=3, scheduler="constant")))


# --- errors half-way ------------------------------------------------------------------------------------------------------------------

class Tallies(Callback):
    "Has a state: how often it heard of what."
    def __init__(self): self.heard = {}
    def state_dict(self): return dict(self.heard)
    def load_state_dict(self, state): self.heard = dict(state)
for _event in ("step_end", "eval_end", "epoch_end"): setattr(Tallies, _event, lambda self, trainer, event=_event: self.heard.update({event: self.heard.get(event, 0) + 1}))


@pytest.mark.parametrize("keeps", [True, False], ids=["state", "none"])
@pytest.mark.parametrize("work, name", [(raiser(ValueError("a plot")), "CallbackError"), (sends(signal.SIGINT, signal.SIGINT), "KeyboardInterrupt")], ids=["error", "Ctrl-C twice"])
@pytest.mark.parametrize("event, step", [("step_end", 8), ("eval_end", 10), ("epoch_end", 10)])
def test_what_was_half_told(event, step, work, name, keeps, capsys):
    """Where callbacks keep a state it is not saved, a new life goes on from before; in memory it goes on, and says what that is worth."""
    def made(*callbacks):
        tallies = Tallies()
        return tallies, make(net(drop=0.3), val=PARTS, run=None, save_dir="r", config=RESUME, epochs=3, save_interval=1, callbacks=[*callbacks, *[tallies] * keeps])
    wanted = whole(net(drop=0.3), val=PARTS, epochs=3)
    _, trainer = made(hears(**{event: lambda trainer: trainer.step == step and work()}))
    with pytest.raises((CallbackError, KeyboardInterrupt)): trainer.train()
    assert trainer.step == step and steps("r/train")[-1] == (5 if keeps else step) and trainer.run.status == "failed"
    tallies, again = made()
    again.train()
    assert same(weights(again), weights(wanted)) and epochs_of(again) == [5, 10, 15]
    assert tallies.heard == ({"step_end": 15, "eval_end": 3, "epoch_end": 3} if keeps else {})
    trainer.listeners.of[event].pop(0)
    trainer.console.quiet = False
    trainer.train()
    note = f"note: after {name} in step {step} it goes on from whole weights, but no longer bit for bit"
    assert (note in capsys.readouterr().out) == keeps == bool(trainer.shaken) and trainer.epoch == 3


@pytest.mark.parametrize("made, seam", [(lambda **words: make(net(drop=0.3), **words), "_take_step"), (gan, "update")], ids=["one optimizer", "several"])
def test_an_update_that_was_not_counted_is_not_made_again(made, seam):
    """An error right after it, as torch raises it anywhere when a worker is gone: memory is torn, the last checkpoint stays."""
    def dies(*given):
        found = update(*given)
        if trainer.step == 6: raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed")
        return found
    wanted, trainer = made(epochs=2), made(epochs=2, run=None, save_interval=1)
    wanted.train()
    update = getattr(trainer, seam)
    setattr(trainer, seam, dies)
    with pytest.raises(RuntimeError, match="worker"): trainer.train()
    assert trainer.torn and steps(trainer.run.folder/"train") == [5] and trainer.run.status == "failed"
    delattr(trainer, seam)
    with pytest.raises(RuntimeError, match="resume_from_checkpoint") as told: trainer.train()
    assert line(told) and trainer.step == 6
    trainer.resume_from_checkpoint().train()
    assert same(weights(trainer), weights(wanted)) and trainer.step == 10


def test_an_error_before_the_weights_are_touched_tears_nothing():
    """As any other error in a step."""
    class Astray(Trainer):
        astray = True
        def training_step(self, batch): return torch.zeros((), requires_grad=True) * 1 if self.astray and self.step == 3 else super().training_step(batch)
    trainer = make(kind=Astray)
    with pytest.raises(ConfigError, match="reached no parameter"): trainer.train()
    trainer.astray = False
    assert not trainer.torn and trainer.shaken
    trainer.train()
    assert trainer.step == 10


def test_a_monitor_that_says_not_of_what():
    """Before the first step."""
    trainer = make(val=PARTS, run=None, monitor="acc", monitor_mode="max")
    with pytest.raises(ConfigError, match="acc says not of what; write val_acc or train_acc") as told: trainer.train()
    assert line(told) and trainer.step == 0


def test_a_monitor_that_fails_at_the_end_of_an_epoch_loses_no_row():
    """The next life, with the right one, begins with the end of that epoch."""
    heard = []
    made = lambda monitor: make(run=None, save_dir="r", config=RESUME, monitor=monitor, monitor_mode="min", callbacks=[hears(epoch_end=lambda trainer: heard.append(trainer.epoch))])
    trainer = made("train_lost")
    with pytest.raises(ConfigError, match="train_lost is not measured, did you mean train_loss"): trainer.train()
    assert (trainer.step, trainer.epoch, trainer.batch) == (5, 0, 5) and not heard
    trainer = made("train_loss")
    trainer.train()
    assert epochs_of(trainer) == [5, 10] and heard == [1, 2] and trainer.step == 10


# --- when it takes effect -------------------------------------------------------------------------------------------------------------

def test_set_in_a_callback_takes_effect_at_the_next_step():
    """However fast steps are: never when a clock says."""
    rates = []
    trainer = make(run=None, scheduler="constant", config={"logging": {"every": "100 steps"}}, callbacks=[
        hears(step_end=lambda trainer: rates.append(trainer.updates[""].lr)), at_step(2, lambda trainer: trainer.set(lr=1e-3)), at_step(8, lambda trainer: trainer.set(lr=1e-4))])
    trainer.train()
    assert rates == [1e-2] * 2 + [1e-3] * 6 + [1e-4] * 2
    assert [(row["step"], row["values"]) for row in trainer.run.story().of("control")] == [(2, {"training.lr": 1e-3}), (8, {"training.lr": 1e-4})]


def test_set_after_a_save_that_was_asked_for_takes_effect_at_the_next_step():
    def ask(trainer): trainer.run.tell("save"); trainer.next_look = 0
    trainer = make(run=None, scheduler="constant", save_interval=None, config={"logging": {"every": "100 steps"}}, callbacks=[
        at_step(1, ask), hears(saved=lambda trainer: trainer.step < 3 and trainer.set(lr=1e-3))])
    trainer.train()
    assert [row["step"] for row in trainer.run.story().of("control")][:2] == [1, 2] and next(iter(trainer.run.story().of("checkpoint")))["step"] == 1


def test_an_evaluation_that_was_asked_for_decides_nothing():
    """It would not be asked for again after a resume: the same weights, rows and best as without it; people are told."""
    def run(asked: bool) -> tuple:
        heard = []
        def ask(trainer): trainer.run.tell("evaluate"); trainer.next_look = 0
        trainer = make(val=PARTS, run=None, scheduler="plateau", plateau_patience=0, early_stopping=True, patience=2, config={"logging": {"every": "3 steps"}},
                       callbacks=[*[at_step(step, ask) for step in (2, 4, 5, 7) if asked], hears(eval_end=lambda trainer: heard.append(trainer.step))])
        trainer.train()
        told = [row for row in trainer.run.story().of("message") if "asked for: val_loss" in row["text"]]
        state = trainer.state_dict()
        rows = [{key: value for key, value in row.items() if key not in ("time", "seconds")} for row in trainer.run.story().of("step", "eval", "epoch")]
        return len(told), (heard, rows, state["trainer"]["best"], state["trainer"]["schedule"], state["trainer"]["patience"], weights(trainer))
    (none, plain), (four, steered) = run(False), run(True)
    assert (none, four) == (0, 4) and plain[:5] == steered[:5] and all(map(torch.equal, plain[5], steered[5]))


def timed(monkeypatch, *work, **words) -> tuple[list[float], Trainer]:
    "A training of one second, in which each step takes a quarter; at most 12 steps."
    clock = [0.0]
    for module in ("trainer", "events"):
        monkeypatch.setattr(f"trainbook.{module}.time", SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter, sleep=time.sleep))
    def tick(trainer):
        clock[0] += 0.25
        if trainer.step == 12: trainer.stop()
    return clock, make(epochs="1 s", scheduler="constant", callbacks=[hears(step_end=tick), *work], **words)


@pytest.mark.parametrize("run", [None, False])
def test_a_change_does_not_wind_up_the_clock(run, monkeypatch):
    _, trainer = timed(monkeypatch, hears(step_end=lambda trainer: trainer.set(lr=1e-2 / trainer.step)), run=run)
    trainer.train()
    assert trainer.step == 4 and trainer.updates[""].lr == 1e-2 / 3


def test_a_resume_goes_on_with_the_clock(monkeypatch):
    """What it took in earlier lives counts, the time between them does not."""
    for made in range(2):
        clock, trainer = timed(monkeypatch, at_step(3, lambda trainer: trainer.stop()), run=None, save_dir="r", config=RESUME)
        clock[0] += 100
        trainer.train()
        assert trainer.step == 3 + made


def test_the_same_trainer_goes_on_with_the_clock(monkeypatch):
    """Likewise between two calls, and after the end there is nothing left."""
    clock, trainer = timed(monkeypatch, at_step(3, lambda trainer: trainer.stop()))
    for step in (3, 4, 4):
        trainer.train()
        clock[0] += 100
        assert trainer.step == step


def rows_of(trainer) -> list[tuple]: return [(row["event"], row["step"]) for row in read_rows(trainer.run.folder)[0] if row["event"] in ("step", "eval", "epoch")]


def arrive_late(self, take_off=Waiting._take_off):
    "As on CUDA: numbers that nobody waits for are still on their way."
    there = len(self._flying)
    take_off(self)
    self._flying[there:] = [(*one[:2], SimpleNamespace(query=lambda: False, synchronize=lambda: None)) for one in self._flying[there:]]


def test_rows_are_in_the_order_of_their_steps_however_late_numbers_arrive(monkeypatch):
    found = []
    for _ in range(2):
        trainer = whole(val=PARTS, run=None, eval_every="3 steps", config={"logging": {"every": "2 steps"}})
        found.append((rows_of(trainer), trainer.history.curve))
        monkeypatch.setattr(Waiting, "_take_off", arrive_late)
    assert found[0] == found[1] and [step for _, step in found[0][0]] == [2, 3, 4, 5, 6, 6, 8, 9, 10, 10, 10]


def test_after_a_gradient_that_is_not_finite_nothing_is_evaluated_however_late_it_arrives(monkeypatch):
    monkeypatch.setattr(Explodes, "value", math.nan)  # step 7
    for _ in range(2):
        heard = []
        trainer = make(val=PARTS, kind=Explodes, eval_every="4 steps", config={"logging": {"every": "100 steps"}}, callbacks=[hears(eval_end=lambda trainer: heard.append(trainer.step))])  # noqa: B023
        with pytest.raises(NonFinite, match="^step 7 "): trainer.train()
        assert heard == [4] and trainer.evaluated == 4
        monkeypatch.setattr(Waiting, "_take_off", arrive_late)


def test_the_line_of_an_evaluation_between_epochs(capsys):
    """Where training ends by steps they are all that is said."""
    trainer = whole(val=PARTS, run=None, quiet=False, epochs="9 steps", eval_every="4 steps")
    said = [one for one in capsys.readouterr().out.splitlines() if "val_loss" in one and not one.startswith("epoch")]
    wanted = dict(zip(*trainer.history.curve["val_loss"]))
    assert [one.split()[:2] for one in said] == [["step", "4"], ["step", "8"], ["step", "9"]] and all(f"val_loss {wanted[step]:.4f}" in one for one, step in zip(said, (4, 8, 9)))
    assert "best" in said[0]


def test_betas_are_followed_on_a_resume():
    """As lr and weight_decay are."""
    made = lambda **words: whole(run=None, save_dir="r", config=RESUME, scheduler="constant", **words)
    made(betas=(0.9, 0.999))
    trainer = made(betas=(0.5, 0.9), epochs=3)
    assert trainer.step == 15 and [*trainer.config.training.betas] == [*trainer.updates[""].optimizer.param_groups[0]["betas"]] == [0.5, 0.9]


# --- what a person's own objects keep -------------------------------------------------------------------------------------------------

class Normed(nn.Module):
    "A loss that learns, and draws."
    def __init__(self): super().__init__(); self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.3)
    def forward(self, outputs, targets): return F.cross_entropy(self.drop(self.norm(outputs)), targets)


def test_an_evaluation_leaves_a_loss_as_it_was():
    """It is in the mode of evaluation meanwhile, and else in that of training, however it was given."""
    one, two = whole(val=PARTS, loss=Normed()), whole(loss=Normed().eval())
    assert one.loss.norm.num_batches_tracked == two.loss.norm.num_batches_tracked == 10 and one.loss.training and two.loss.training
    assert same([*one.loss.state_dict().values()], [*two.loss.state_dict().values()]) and same(weights(one), weights(two))
    assert one.evaluate() == one.evaluate() == {key: value for key, value in one.metrics.items() if key.startswith("val_")}


def test_a_part_that_was_frozen_in_evaluation_mode_stays_so():
    """A model that is in that mode as a whole, as one that was loaded, is trained."""
    for frozen in (True, False):
        model = nn.Sequential(nn.BatchNorm1d(6), net())
        (model[0] if frozen else model).eval()
        whole(model, val=PARTS)
        assert model[0].num_batches_tracked == (0 if frozen else 10) and model[0].training != frozen and model[1].training


def test_predict_has_no_limit():
    """A limit is for epochs and evaluations."""
    shown = []
    class Seen(Trainer):
        def validation_step(self, batch): shown.append(1); return super().validation_step(batch)
    trainer = whole(kind=Seen, limit=2)
    assert trainer.step == 4 and trainer.predict(loader()).shape == (40, 3)
    trainer.evaluate(loader())
    assert len(shown) == 2


def test_several_optimizers_need_a_validation_step_for_validation():
    """Said at once; with one it is trained and measured."""
    with pytest.raises(ConfigError, match="^val_loader  with several optimizers write validation_step") as told: gan(val=PARTS)
    assert line(told)
    class Validated(Gan):
        def validation_step(self, batch): return {"fooled": self.model["judge"](self.model["make"](batch[0])).mean()}
    model = pair()
    assert len(whole(model, val=PARTS, kind=Validated, optimizer=adams(model)).history["val_fooled"]) == 2


class Collects:
    "A metric that computes whatever it is told to."
    def __init__(self, found): self.found = found
    def update(self, outputs, targets): ...
    def compute(self): return self.found
    def reset(self): ...


def test_what_a_collecting_metric_computes():
    """Several numbers by name are as many metrics; what is none is an error that names it."""
    trainer = whole(val=PARTS, metrics={"many": Collects({"f1": torch.tensor(0.5), "auc": 0.25}), "one": Collects(torch.ones(1))})
    assert {"val_f1": 0.5, "val_auc": 0.25, "val_one": 1.0}.items() <= trainer.metrics.items() and "val_many" not in trainer.metrics
    for odd, name in ((Collects(torch.ones(2)), "odd"), (Collects({"f2": "high"}), "f2")):
        with pytest.raises(ConfigError, match=rf"^metrics  {name}  its compute\(\) gave .*, expected one number") as told: make(val=PARTS, metrics={"odd": odd}).train()
        assert line(told)


def test_a_given_optimizer_can_be_stepped_by_hand_afterwards():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, fused=True)
    whole(model, optimizer=optimizer, clip=1e-3)
    assert optimizer.grad_scale is optimizer.found_inf is None
    before, optimizer.param_groups[0]["lr"] = weights(model), 0.1
    for one in model.parameters(): one.grad = torch.ones_like(one)
    optimizer.step()
    assert all(torch.allclose(old - new, torch.tensor(0.1), atol=1e-6) for old, new in zip(before, weights(model)))


class Graph:
    "Knows how to move itself, as those of torch_geometric do."
    def __init__(self, x, edges): self.x, self.edges, self.name = x, edges, "g"
    def to(self, device, **_): return Graph(self.x.to(device), self.edges)


def test_what_moves_itself():
    """A PackedSequence leaves its sizes on the CPU; what an object keeps can be seen where its memory must be held."""
    packed = move({"x": [pack_sequence([torch.ones(3), torch.ones(2)]), 1]}, torch.device("meta"))["x"][0]
    assert packed.data.is_meta and not packed.batch_sizes.is_meta and packed.batch_sizes.tolist() == [2, 2, 1]
    graph = Graph(X, [Y, {"w": X}])
    assert [*tensors_in([graph, Y])] == [Y] and [id(one) for one in tensors_in({"g": [graph]}, hidden=True)] == [id(X), id(Y), id(X)]
    assert move([graph], torch.device("meta"))[0].x.is_meta
