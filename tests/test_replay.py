"""A step that was not finite: named, saved, done again to the bit; and nothing that failed is worse off for it."""
import errno
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainbook.replay  # noqa: F401  a module that is called like its function
from trainbook import Callback, Trainer, replay
from trainbook.cli import main
from trainbook.metrics import NonFinite
from trainbook.prove import compare_runs
from trainbook.run import Run
from trainbook.state import CheckpointError
from trainbook.stepfolder import check_step, read_step, steps

replaying = sys.modules["trainbook.replay"]
ROOT = Path(__file__).resolve().parent.parent
X = torch.randn(80, 6, generator=torch.Generator().manual_seed(3))
Y = torch.randn(80, generator=torch.Generator().manual_seed(4))
WORDS = {"loss": "mse", "quiet": True, "save_interval": "5 steps", "epochs": 3, "lr": 1e-2, "keep_last_n": None, "config": {"logging": {"every": "4 steps"}}}


class Ends(nn.Module):
    "Its last layer is whatever a test says, at the steps that it says."

    def __init__(self, end, dropout=0.0, act=torch.tanh):
        super().__init__()
        self.act = act
        self.body, self.drop, self.head = nn.Linear(6, 8), nn.Dropout(dropout), nn.Linear(8, 1)
        self.end = end

    def forward(self, x):
        return self.end(self.head(self.drop(self.act(self.body(x)))).squeeze(1))


def make(end=lambda out: out, x=X, kind=Trainer, dropout=0.0, act=torch.tanh, **words):
    torch.manual_seed(0)
    return kind(Ends(end, dropout, act), DataLoader(TensorDataset(x, Y), batch_size=8, shuffle=True), **(WORDS | words))


def fails(trainer):
    with pytest.raises(NonFinite) as told: trainer.train()
    return told.value


def stopped(step, **words):
    "The weights of a training that nobody disturbed, after so many steps."
    trainer = make(run=False, **words)
    trainer.listeners.of["step_end"].append(lambda one: one.stop() if one.step == step else None)
    trainer.train()
    assert trainer.step == step
    return trainer


def equal(a, b): return all(torch.equal(one, other) for one, other in zip(a.values(), b.values(), strict=True))


class At(Trainer):
    "What is planted is planted at a step."
    at, plant = 13, staticmethod(lambda loss: loss)

    def training_step(self, batch):
        loss = super().training_step(batch)
        return self.plant(loss) if self.step + 1 == self.at else loss


# --- what is named --------------------------------------------------------------------------------------------------------------------------

def by_data(out): return torch.log(out + 1.0)
def by_zero(out): return (out - out.detach()).abs().sqrt()
def by_weights(out): return out.exp().exp().exp()
def log_of_zero(outputs, targets): return (outputs - targets).pow(2).mean() + torch.log((outputs.detach() * 0).mean()).clamp(min=-1e9) * outputs.mean() * 0


SPIKE, MISSING = X.clone(), X.clone()
SPIKE[33] = SPIKE[33].abs() * 1e4
MISSING[33, 2] = math.nan


@pytest.mark.parametrize("words, expected", [
    ({"end": lambda out: torch.log(100 - out.abs()), "act": torch.abs, "x": SPIKE, "save_interval": "1 step"}, "log in <lambda> (tests/test_replay.py:"),
    ({"end": by_zero}, "the gradient of sqrt in by_zero (tests/test_replay.py:"),
    ({"end": by_weights, "lr": 3.0, "scheduler": "constant", "optimizer": "sgd"}, "exp in by_weights (tests/test_replay.py:"),
    ({"loss": lambda outputs, targets: (outputs * 0).log().mean()}, "log in <lambda> (tests/test_replay.py:"),
    ({"x": MISSING}, "the batch, step "),
], ids=["data", "backward", "weights", "loss", "input"])
def test_what_made_it_so_is_named(tmp_path, words, expected):
    trainer = make(save_dir=str(tmp_path/"r"), **words)
    error = fails(trainer)
    step, note = error.at.number, error.__notes__[0]
    assert note.startswith(f"first non-finite: {expected}") and f"step {step:,}, batch {error.at.batch} of epoch {error.at.epoch + 1}: " in note, error.__notes__
    assert str(error).startswith(f"step {step:,}  its gradient is not finite") and [row["text"] for row in trainer.run.story().of("message")] == error.__notes__
    if "x" in words and words["x"] is MISSING: assert note.split(": ", 2)[2].startswith("[0] has nan in sample ") and "number 33 of the dataset" in note
    assert error.__notes__[-1] in (tmp_path/"r"/"train.log").read_text() and trainer.run.status == "failed"


def test_a_module_and_a_bad_parameter_are_named(tmp_path):
    trainer = make(run=False)
    with torch.no_grad(): trainer.model.head.weight[0, 3] = math.nan
    error = fails(trainer)
    assert "first non-finite: the parameter head.weight, step 1, batch 1 of epoch 1" in error.__notes__[0]
    class Head(nn.Module):
        def forward(self, x): return x.sub(x.detach()).log()
    trainer = make(Head(), run=False)
    assert "log in Head.forward (tests/test_replay.py:" in fails(trainer).__notes__[0] and "module end, step 1" in trainer.error.__notes__[0]


@pytest.mark.parametrize("words", [{}, {"precision": "bf16"}, {"gradient_checkpointing": True}, {"ema": 0.9}, {"optimizer": "rmsprop"}, {"clip": 0.1}, {"accumulate": 2}], ids=str)
def test_it_is_named_whatever_the_options_are(tmp_path, words):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)
        def forward(self, x): return torch.log(self.layer(x) * 0 + x[:, 2:3].abs().mul(-1).add(1e3))
    torch.manual_seed(0)
    bad = X.clone()
    bad[33, 2] = 1e4
    model = nn.Sequential(nn.Sequential(Block(), nn.BatchNorm1d(6)), nn.Sequential(nn.Linear(6, 1)), nn.Flatten(0))
    trainer = Trainer(model, DataLoader(TensorDataset(bad, Y), batch_size=8, shuffle=True), save_dir=str(tmp_path/"r"), **(WORDS | {"save_interval": "1 step"} | words))
    error = fails(trainer)
    assert "first non-finite: log in Block.forward (tests/test_replay.py:" in error.__notes__[0] and "module 0.0, " in error.__notes__[0] and len(error.__notes__) == 1 + (error.at.number == 1), error.__notes__
    assert all(one.isfinite().all() for one in model.state_dict().values())
    numbers = trainer.train_loader.indices(error.at.epoch, int(error.__notes__[0].split("batch ")[1].split()[0]) - 1)
    assert 33 in numbers


# --- what is saved --------------------------------------------------------------------------------------------------------------------------

def bad_at(step, value=math.nan):
    class Bad(At):
        at, plant = step, staticmethod(lambda loss: loss * value)
    return Bad


@pytest.mark.parametrize("words", [{}, {"accumulate": 2}, {"ema": 0.9}, {"scheduler": "plateau"}], ids=str)
@pytest.mark.parametrize("step", [3, 11, 13])
def test_what_is_saved_is_to_the_bit_the_training_before_the_step(tmp_path, step, words):
    """11 is the first step of an epoch."""
    error = fails(make(kind=bad_at(step), dropout=0.3, save_dir=str(tmp_path/"r"), save_interval="2 steps", **({} if words.get("scheduler") is None else {"monitor": "train_loss"}), **{key: value for key, value in words.items()}))
    assert error.at.number == step and len(error.__notes__) == 1, error.__notes__
    saved, = (tmp_path/"r"/"train").glob("nonfinite-*")
    assert saved.name == f"nonfinite-{step:08d}" and sorted(one.suffix for one in saved.iterdir()) == [".json", *[".safetensors"] * (len(list(saved.iterdir())) - 1)]
    check_step(saved)
    state, plain = read_step(saved).state, stopped(step - 1, dropout=0.3, **({} if words.get("scheduler") is None else {"monitor": "train_loss"}), **words)
    untouched = plain.state_dict()
    assert equal(state["model"], untouched["model"]) and torch.equal(state["rng"]["torch"], untouched["rng"]["torch"]) and state["trainer"]["step"] == step - 1
    for one, other in zip(state["optimizer"]["state"].values(), untouched["optimizer"]["state"].values(), strict=True): assert equal(one, other)
    (_, batch), *more = state["batch"]
    epoch, first = divmod((step - 1) * words.get("accumulate", 1), 10) if words.get("accumulate", 1) == 1 else ((step - 1) // 5, (step - 1) % 5 * 2)
    assert torch.equal(batch[0], X[plain.train_loader.indices(epoch, first)]) and len(more) == words.get("accumulate", 1) - 1


def test_a_second_one_never_overwrites_and_one_cut_short_is_no_trace(tmp_path):
    trainer = make(kind=bad_at(13), save_dir=str(tmp_path/"r"))
    fails(trainer)
    before = {path: path.read_bytes() for path in (tmp_path/"r"/"train"/"nonfinite-00000013").iterdir()}
    trainer.resume_from_checkpoint()
    fails(trainer)
    assert sorted(path.name for path in (tmp_path/"r"/"train").glob("nonfinite-*")) == ["nonfinite-00000013", "nonfinite-00000013-2"]
    assert all(path.read_bytes() == text for path, text in before.items()) and not list((tmp_path/"r"/"train").glob(".tmp-*"))
    (tmp_path/"r"/"train"/".tmp-step-00000013-0123abcd"/"step-00000012").mkdir(parents=True)
    trainer.resume_from_checkpoint()
    At.at, trainer.at = 13, 10 ** 9
    trainer.train()
    assert not list((tmp_path/"r"/"train").glob(".tmp-*"))


def test_a_batch_of_objects_is_read_again(tmp_path):
    class Pair:
        def __init__(self, x, y): self.x, self.y = x, y
        def to(self, device): return self
    class Own(bad_at(13)):
        def training_step(self, batch): return super().training_step([batch.x, batch.y])
    made = lambda items: Pair(torch.stack([x for x, _ in items]), torch.stack([y for _, y in items]))
    torch.manual_seed(0)
    trainer = Own(Ends(lambda out: out), DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True, collate_fn=made), save_dir=str(tmp_path/"r"), **WORDS)
    assert "mul in Bad.<lambda>" in fails(trainer).__notes__[0]
    assert "batch" not in read_step(tmp_path/"r"/"train"/"nonfinite-00000013").state and math.isnan(replay(trainer).step()["loss"])


# --- exactly that step ------------------------------------------------------------------------------------------------------------------------

def test_only_the_random_numbers_of_that_step_find_it(tmp_path):
    """Dropout decides; from the checkpoint it is found, with others it often is not."""
    end = lambda out: torch.log(out * 0.1 + 0.085)
    trainer = make(end, dropout=0.5, save_dir=str(tmp_path/"r"), save_interval="1 step", lr=1e-4)
    error = fails(trainer)
    assert "log in <lambda>" in error.__notes__[0] and len(error.__notes__) == 1 and error.at.number > 1
    found = replay(trainer)
    assert found.exact and math.isnan(found.step()["loss"]) and math.isnan(found.step()["loss"])
    others = []
    for seed in range(12):
        found._stand()
        torch.manual_seed(seed)
        others.append(math.isfinite(float(trainer._take_step(found.window)[1]["loss"])))
    assert any(others)


def test_numbers_that_were_changed_on_the_way_are_changed_again(tmp_path):
    """A learning rate that was set between the checkpoint and the step: other weights without it."""
    class Sets(Callback):
        def step_end(self, trainer):
            if trainer.step == 11: trainer.set(lr=0.3)
    trainer = make(kind=bad_at(15), save_dir=str(tmp_path/"r"), save_interval="10 steps", callbacks=Sets())
    assert len(fails(trainer).__notes__) == 1 and trainer.config.training.lr == 0.3 and len(trainer.changed) == 1
    assert equal(read_step(tmp_path/"r"/"train"/"nonfinite-00000015").state["model"], trainer.model.state_dict())


def test_where_the_way_leads_elsewhere_the_weights_of_then_are_used(tmp_path):
    class Meddles(Callback):
        def step_end(self, trainer):
            with torch.no_grad(): trainer.model.head.bias.add_(0.01)
    trainer = make(kind=bad_at(13), save_dir=str(tmp_path/"r"), callbacks=Meddles())
    error = fails(trainer)
    assert "mul in Bad.<lambda>" in error.__notes__[0] and "led to other weights (a callback takes part" in error.__notes__[1]
    assert equal(read_step(tmp_path/"r"/"train"/"nonfinite-00000013").state["model"], before := {name: one.clone() for name, one in trainer.model.state_dict().items()})
    found = replay(trainer)
    assert not found.exact and equal(trainer.model.state_dict(), before)


@pytest.mark.parametrize("where", ["no run", "no checkpoint", "too far"])
def test_without_a_checkpoint_near_enough_it_is_said(tmp_path, monkeypatch, where):
    words = {"run": False} if where == "no run" else {"save_dir": str(tmp_path/"r"), "save_interval": 5 if where == "no checkpoint" else "5 steps"}
    if where == "too far": monkeypatch.setattr(replaying, "CHEAP", 0.0)
    trainer = make(kind=bad_at(13), dropout=0.3, **words)
    error = fails(trainer)
    said = "it is 2 steps behind its checkpoint; replay(trainer) does it exactly" if where == "too far" else "no checkpoint lies before it"
    assert "mul in Bad.<lambda>" in error.__notes__[0] and error.__notes__[1:] == [f"the weights are those of then, the random numbers are not: {said}"]
    assert equal(trainer.model.state_dict(), stopped(12, dropout=0.3).model.state_dict())
    if where == "too far": assert replay(trainer).exact
    else: assert not replay(trainer).exact and "mul in Bad.<lambda>" in replay(trainer).said[0]


# --- nothing is worse off -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words", [{}, {"ema": 0.9}, {"accumulate": 2}], ids=str)
def test_afterwards_all_is_as_without_it(tmp_path, monkeypatch, words):
    """Attributes, weights, generators; a resume with the cause mended ends as a training that never failed."""
    seen, real = [], replaying.postmortem
    def look(trainer):
        seen.append((trainer.step, trainer.epoch, trainer.batch, trainer.samples, trainer.torn, trainer.metrics, trainer.history.curve, [*heard.seen], torch.get_rng_state().tolist(), trainer.numbers.state_dict(),
                     {name: one.tolist() for name, one in trainer.model.state_dict().items()}, str(trainer.updates[""].optimizer.state_dict()["state"]), [dict(one) for one in trainer.updates[""].optimizer.state_dict()["param_groups"]], sorted(vars(trainer)), [one.requires_grad for one in trainer.model.parameters()]))
    def watched(trainer): look(trainer); real(trainer); look(trainer)
    monkeypatch.setattr(replaying, "postmortem", watched)
    trainer = make(kind=bad_at(13), dropout=0.3, save_dir=str(tmp_path/"with"), callbacks=(heard := Hears()), **words)
    assert "mul in Bad.<lambda>" in fails(trainer).__notes__[0] and len(seen) == 2
    for one, other in zip(*seen, strict=True): assert one == other
    assert 13 <= trainer.step <= 15 and heard.seen[-1] == "end"
    with pytest.raises(RuntimeError, match="met a gradient that was not finite; resume_from_checkpoint"): trainer.train()
    trainer.resume_from_checkpoint()
    trainer.at = 0
    trainer.train()
    whole = make(dropout=0.3, save_dir=str(tmp_path/"whole"), callbacks=Hears(), **words)
    whole.train()
    assert compare_runs(tmp_path/"with", tmp_path/"whole") == []


class Hears(Callback):
    def __init__(self): self.seen = []
    def step_end(self, trainer): self.seen.append(trainer.step)
    def eval_end(self, trainer): self.seen.append("eval")
    def saved(self, trainer): self.seen.append("saved")
    def fit_end(self, trainer): self.seen.append("end")


@pytest.mark.parametrize("late", [ValueError("surprise"), KeyboardInterrupt("interrupted"), SystemExit(3), MemoryError()], ids=lambda one: type(one).__name__)
def test_what_fails_in_it_never_hides_the_error(tmp_path, monkeypatch, late):
    def breaks(*words): raise late
    monkeypatch.setattr(replaying.Observer, "watch", breaks)
    trainer = make(kind=bad_at(13), save_dir=str(tmp_path/"r"))
    error = fails(trainer)
    assert error.__notes__ == [f"and no post-mortem could be made: {type(late).__name__}: {late}"] and str(error).startswith("step 13  its gradient")
    assert trainer.run.status == "failed" and trainer.torn == "met a gradient that was not finite" and 13 <= trainer.step <= 15
    assert equal(trainer.model.state_dict(), stopped(12).model.state_dict())


def test_a_full_disk_keeps_the_name_and_loses_the_folder(tmp_path, monkeypatch):
    def full(*words): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(replaying, "write_step", full)
    error = fails(make(torch.log, save_dir=str(tmp_path/"r"), save_interval="1 step"))
    assert error.__notes__[0].startswith("first non-finite: log in ") and error.__notes__[-1] == f"but step {error.at.number} could not be saved: [Errno 28] No space left on device"
    assert not any("post-mortem" in note for note in error.__notes__) and not [path for path in (tmp_path/"r/train").iterdir() if "nonfinite" in path.name or ".tmp" in path.name]


def test_an_interrupt_ends_the_replay_and_not_more(tmp_path):
    class Interrupted(bad_at(13)):
        def training_step(self, batch):
            if "again" in vars(self): os.kill(os.getpid(), signal.SIGINT)
            return super().training_step(batch)
    trainer = make(kind=Interrupted, save_dir=str(tmp_path/"r"))
    error = fails(trainer)
    assert error.__notes__ == ["and no post-mortem could be made: KeyboardInterrupt: interrupted"] and trainer.run.status == "failed"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_the_background_too(tmp_path):
    trainer = make(kind=bad_at(13), save_dir=str(tmp_path/"r"))
    trainer.train(background=True)
    with pytest.raises(NonFinite) as told: trainer.wait()
    assert "mul in Bad.<lambda>" in told.value.__notes__[0] and threading.active_count() >= 1
    assert told.value._render_traceback_()[1:] == told.value.__notes__


def test_a_step_that_is_finite_costs_nothing(monkeypatch):
    """The page is not even imported."""
    code = "import sys, torch; from trainbook import Trainer; Trainer(torch.nn.Linear(2, 1), [[torch.rand(4, 2), torch.rand(4, 1)]], loss='mse', run=False, quiet=True, epochs=2).train(); assert not {'trainbook.replay', 'trainbook.culprit'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


# --- several optimizers, steps that are left out, streams -----------------------------------------------------------------------------------------

def test_several_optimizers(tmp_path):
    class Two(Trainer):
        def training_step(self, batch):
            loss = self.loss(self.model(batch[0]), batch[1])
            self.backward(loss, "body"); self.update("body")
            second = self.loss(self.model(batch[0]), batch[1]) * (math.nan if self.step == 12 else 1)
            self.backward(second, "head"); self.update("head")
            return {"loss": loss, "second_loss": second}
    torch.manual_seed(0)
    model = Ends(lambda out: out)
    optimizers = {"body": torch.optim.Adam(model.body.parameters()), "head": torch.optim.Adam(model.head.parameters())}
    trainer = Two(model, DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True), optimizer=optimizers, save_dir=str(tmp_path/"r"), **WORDS)
    error = fails(trainer)
    assert error.__notes__[0].startswith("first non-finite: mul in Two.training_step (tests/test_replay.py:"), error.__notes__


@pytest.mark.parametrize("policy", ["skip", 1])
def test_steps_that_were_left_out_can_be_replayed(tmp_path, policy):
    trainer = make(x=MISSING, save_dir=str(tmp_path/"r"), nonfinite=policy, save_interval="1 step")
    if policy == "skip": trainer.train()
    else: assert "the batch, step " in fails(trainer).__notes__[0] and len(trainer.error.__notes__) == 1
    rows = [row["step"] for row in trainer.run.story().of("warning")]
    assert len(rows) == (3 if policy == "skip" else 2)
    for step in rows:
        found = replay(trainer, step=step)
        assert found.exact and found.number == step and "number 33 of the dataset" in found.said[0]
    assert replay(trainer, step=rows[0] + 1).culprit is None and "it is finite" in replay(trainer, step=rows[0] + 1).said[0]


def test_a_stream_that_cannot_be_set_back_is_said(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return iter(zip(X, Y))
    torch.manual_seed(0)
    trainer = bad_at(13)(Ends(lambda out: out), DataLoader(Stream(), batch_size=8), save_dir=str(tmp_path/"r"), **WORDS, scheduler="constant")
    assert "and no post-mortem could be made: CheckpointError: step 13 cannot be done again: " in fails(trainer).__notes__[0]


def test_what_is_shown(tmp_path):
    trainer = make(lambda out: torch.log(100 - out.abs()), x=SPIKE, act=torch.abs, save_dir=str(tmp_path/"r"), save_interval="1 step")
    fails(trainer)
    found = replay(trainer)
    text, page = repr(found), found._repr_html_()
    assert text.splitlines()[0] == found.said[0] and "body    Linear" in text and "[0]    float32" in text
    assert "<table>" in page and "&lt;lambda&gt;" in page and found.batch[0].shape == (8, 6) and 33 in trainer.train_loader.indices(trainer.epoch, trainer.batch)
    with pytest.raises(RuntimeError, match="stands before step .* again; resume_from_checkpoint"): trainer.train()
    trainer.resume_from_checkpoint()
    assert trainer.step == max(steps(tmp_path/"r"/"train"))
    with pytest.raises(CheckpointError, match="no checkpoint lies before step 1"): replay(trainer, step=1)


# --- from another process -------------------------------------------------------------------------------------------------------------------------

PROJECT = """
import os, signal, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Head(nn.Module):
    def forward(self, x):
        shifted = 20.0 + x.sum(1)
        return torch.log(shifted)

def net(): return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), Head())

def data():
    x = torch.rand(160, 3, generator=torch.Generator().manual_seed(0))
    x[101] *= 300
    return DataLoader(TensorDataset(x, torch.full((160,), 3.0)), batch_size=8, shuffle=True)

from trainbook import Callback
class Dies(Callback):
    def step_end(self, trainer):
        if trainer.step == 17 and not os.path.exists("died"):
            open("died", "w").close()
            trainer.record.manager.wait(); trainer.record.flush()
            os.kill(os.getpid(), signal.SIGKILL)

from trainbook import BaseTrainer
class Mine(BaseTrainer):
    def build_callbacks(self, config): return [Dies()]
"""
CONFIG = "model: {name: 'project:net'}\ndata: {name: 'project:data'}\nsystem: 'project:Mine'\ntraining: {loss: mse, epochs: 6, save_interval: EVERY, seed: 9, device: cpu}\nlogging: {every: 10 steps}\n"


def trainbook(folder, *words, stdin=""):
    home = folder/"home"
    return subprocess.run([sys.executable, "-m", "trainbook", *words], cwd=folder, capture_output=True, text=True, input=stdin, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(home)})


def project(folder, every="10 steps", died=True):
    (folder/"project.py").write_text(PROJECT)
    (folder/"c.yaml").write_text(CONFIG.replace("EVERY", every))
    if died: (folder/"died").touch()


WANTED = 'first non-finite: log in Head.forward (project.py:9), module 2, step 24, batch 4 of epoch 2: its input has -241; replay("r") shows it'


def test_a_run_is_replayed_in_another_process(tmp_path, monkeypatch, capsys):
    project(tmp_path)
    done = trainbook(tmp_path, "train", "c.yaml", "--save_dir", "r")
    assert done.returncode == 1 and done.stderr.rstrip().endswith(WANTED), done.stderr
    before = {path: path.read_bytes() for path in (tmp_path/"r").rglob("*") if path.is_file()}
    done = trainbook(tmp_path, "replay", "r")
    assert done.returncode == 0 and done.stdout.splitlines()[0] == WANTED and not done.stderr, (done.stdout, done.stderr)
    assert {path: path.read_bytes() for path in (tmp_path/"r").rglob("*") if path.is_file()} == before  # it only reads
    shutil.rmtree(tmp_path/"r"/"train"/"nonfinite-00000024")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["replay", "r", "--trust-code"]) == 0 and capsys.readouterr().out.splitlines()[0] == WANTED  # from the checkpoint
    assert main(["replay", "r", "--step", "23", "--trust-code"]) == 1
    assert capsys.readouterr().out.startswith("step 23, batch 3 of epoch 2: done again, with the same weights, batch and random numbers, it is finite")
    for words in (("nothing",), ("r", "--step", "x"), ()): assert main(["replay", *words]) == 2
    assert main(["replay", "r", "--step", "4000", "--trust-code"]) == 1 and "step 4,000 is not reached: step 24  its gradient is not finite" in capsys.readouterr().err


def test_a_debugger_opens_before_the_operation(tmp_path):
    project(tmp_path)
    trainbook(tmp_path, "train", "c.yaml", "--save_dir", "r")
    done = trainbook(tmp_path, "replay", "r", "--debug", stdin="p round(float(shifted.min()), 1)\np self.training\nq\n")
    assert done.returncode == 0 and "project.py(9)forward()" in done.stdout and "-> return torch.log(shifted)" in done.stdout and "-241.0" in done.stdout, done.stdout + done.stderr


def test_killed_elsewhere_and_resumed_it_is_the_same(tmp_path):
    project(tmp_path, died=False)
    assert trainbook(tmp_path, "train", "c.yaml", "--save_dir", "r").returncode == -signal.SIGKILL
    done = trainbook(tmp_path, "resume", "r")
    assert done.returncode == 1 and done.stderr.rstrip().endswith(WANTED), done.stderr
    (tmp_path/"whole").mkdir()
    project(tmp_path/"whole")
    trainbook(tmp_path/"whole", "train", "c.yaml", "--save_dir", "r")
    one, other = (read_step(folder/"r"/"train"/"nonfinite-00000024").state for folder in (tmp_path, tmp_path/"whole"))
    assert equal(one["model"], other["model"]) and torch.equal(one["rng"]["torch"], other["rng"]["torch"]) and torch.equal(one["batch"][0][1][0], other["batch"][0][1][0])


def test_before_the_first_checkpoint_a_config_begins_again(tmp_path):
    project(tmp_path, every="5 epochs")
    done = trainbook(tmp_path, "train", "c.yaml", "--save_dir", "r")
    assert done.stderr.rstrip().endswith("the weights are those of then, the random numbers are not: no checkpoint lies before it; trainbook replay r does it exactly"), done.stderr
    assert trainbook(tmp_path, "replay", "r").stdout.splitlines()[0] == WANTED


def test_a_run_of_objects_says_who_can_replay_it(tmp_path):
    trainer = make(kind=bad_at(13), save_dir=str(tmp_path/"r"))
    fails(trainer)
    with pytest.raises(Exception, match=r"made in its script or notebook; make the trainer there again, then replay\(trainer\)"): replay(tmp_path/"r")
    again = make(kind=bad_at(13), save_dir=str(tmp_path/"r"))  # the script, run again
    found = replay(again)
    assert found.exact and found.number == 13 and Run(tmp_path/"r").status == "failed" and textwrap.dedent(found.said[0]).startswith("first non-finite: mul in ")


def test_a_training_that_runs_is_not_replayed_and_one_that_is_probed_is(here, capsys):
    import torch

    import exact
    from trainbook import Trainer, replay
    from trainbook.metrics import NonFinite
    from trainbook.probes import clip

    class Logs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = exact.net()
        def forward(self, x):
            with torch.no_grad(): self.steps = getattr(self, "steps", 0)
            return (self.inner(x) - 100.0 * float(bool(x.isinf().any()))).log() if x.isinf().any() else self.inner(x)

    asked = []
    def ask(trainer):
        try: replay(trainer)
        except RuntimeError as error: asked.append(str(error))

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(exact.BROKEN, exact.Y), 8)
    trainer = Trainer(Logs(), data, loss="cross_entropy", epochs=2, save_dir="runs/probed", quiet=True, callbacks=[exact.at_step(1, ask)])
    clip(trainer)._first = 0
    with pytest.raises(NonFinite) as failed: trainer.train()
    assert "replay()" in asked[0] and any("first non-finite" in note or "batch" in note for note in failed.value.__notes__), failed.value.__notes__
    assert not any("no post-mortem" in note for note in failed.value.__notes__)
