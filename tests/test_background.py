"""A training in a thread: the same training, free cells, mistakes where they are made, wishes that reach it, nothing lost at the end of the process."""
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_trainer import PARTS, hears, loader, make, net, raiser, same, weights

from trainbook import Run
from trainbook.curves import Curves
from trainbook.events import Paused
from trainbook.lock import RunBusy
from trainbook.source import ConfigError
from trainbook.stepfolder import steps

pytestmark = [pytest.mark.usefixtures("here"), pytest.mark.filterwarnings("error")]


def slowly(**words):
    "A training whose steps take a moment."
    return make(net(drop=0.3), run=None, epochs=20, callbacks=[hears(step_end=lambda trainer: time.sleep(0.01))], **words)


def until(holds, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_training(workers):
    made = lambda: make(net(drop=0.3), loader(size=8, num_workers=workers), PARTS, run=None, epochs=4)
    front, back = made(), made()
    front.train()
    assert back.train(background=True) is None
    history = back.wait()
    assert same(weights(front), weights(back)) and history["train_loss"] == front.history["train_loss"] and back.run.status == "finished"
    rows = [[{key: value for key, value in row.items() if key not in ("time", "pid", "seconds")} for row in one.run.story().rows] for one in (front, back)]
    assert rows[0] == rows[1]


def test_its_cells_are_free_and_it_is_one_training():
    trainer = slowly(save_dir="r", val=PARTS)
    began = time.monotonic()
    trainer.train(background=True)
    assert time.monotonic() - began < 2 and trainer.run.status == "running" and threading.current_thread() is threading.main_thread()
    until(lambda: trainer.step > 0)
    for work in (trainer.train, trainer.evaluate, lambda: trainer.train(background=True), trainer.save_checkpoint, lambda: trainer.predict(loader())):
        with pytest.raises(RuntimeError, match="it trains in another thread, at step"): work()
    with pytest.raises(RunBusy): slowly(save_dir="r", config={"run": {"on_existing": "resume"}}).train()
    trainer.stop()
    trainer.wait()
    assert trainer.run.status == "stopped" and 0 < trainer.step < 100


def test_it_is_steered_through_its_run():
    trainer = slowly()
    trainer.train(background=True)
    trainer.run.tell("pause")
    until(lambda: any(row["event"] == "control" for row in trainer.run.story().rows))
    paused_at = trainer.step
    trainer.run.tell("set", lr=5e-3)
    time.sleep(0.3)
    until(lambda: steps(trainer.run.folder/"train")[-1] == paused_at)
    assert trainer.step == paused_at
    trainer.run.tell("resume")
    until(lambda: trainer.step > paused_at and trainer.config.training.lr == 5e-3)
    trainer.run.tell("stop")
    trainer.wait()
    assert [row["command"] for row in trainer.run.story().of("control")] == ["pause", "set", "resume", "stop"] or trainer.run.status == "stopped"


def test_a_mistake_is_an_error_where_it_is_made(capsys):
    with pytest.raises(ConfigError, match="nothing to train"): make(net().requires_grad_(False), epochs=1).train(background=True)
    trainer = make(run=None, callbacks=[hears(fit_start=raiser(ValueError("at once")))])
    with pytest.raises(RuntimeError, match="at once"): trainer.train(background=True)
    assert capsys.readouterr().err == ""
    trainer = slowly()
    with pytest.raises(RuntimeError, match="nothing was begun"): trainer.wait()
    trainer.listeners.of["step_end"].append(lambda trainer: trainer.step == 5 and raiser(ValueError("later"))())
    trainer.train(background=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="later"): trainer.wait()
    assert "in the background: CallbackError:" in capsys.readouterr().err and trainer.run.status == "failed"
    trainer.listeners.of["step_end"].pop()
    assert len(trainer.train()) == 20  # and goes on


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_of_the_waiting_is_one_of_the_training(number, code, monkeypatch, capfd):
    straight = make(net(drop=0.3), run=None, epochs=20)
    straight.train()
    trainer = slowly()
    trainer.train(background=True)
    threading.Timer(0.2, lambda: os.kill(os.getpid(), number)).start()
    with pytest.raises(SystemExit) as told: trainer.wait()
    assert told.value.code == code and trainer.run.status == "paused" and 0 < trainer.step < 100
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    trainer.train(background=True)
    threading.Timer(0.2, lambda: os.kill(os.getpid(), number)).start()
    with pytest.raises(Paused, match="train.. goes on from there"): trainer.wait()
    trainer.train(background=True)
    trainer.wait()
    assert same(weights(straight), weights(trainer))
    assert "finishing the step" in capfd.readouterr().err


SCRIPT = """
import sys, time, threading
sys.path.insert(0, {tests!r})
from test_background import slowly
trainer = slowly(save_dir="r")
trainer.train(background=True)
{then}
"""


@pytest.mark.parametrize("then, number, code, status", [("", 0, 0, "finished"), ("trainer.wait()", 0, 0, "finished"), ("trainer.wait()", signal.SIGTERM, 143, "paused"),
                                                        ("trainer.wait()", signal.SIGKILL, -9, "interrupted")])
def test_a_script(then, number, code, status):
    tests = Path(__file__).resolve().parent
    script = subprocess.Popen([sys.executable, "-c", SCRIPT.format(tests=str(tests), then=then)], env={**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"})
    if number:
        until(lambda: Path("r/events.jsonl").exists() and Run("r").progress()["step"] > 0)
        script.send_signal(number)
    assert script.wait(60) == code and Run("r").status == status


def test_a_stage_that_only_computes(tmp_path):
    from trainbook.registry import forget, register
    from trainbook.stages import create_trainer, train_stages
    register("model", "behind_net")(lambda: net())
    register("data", "behind_rows")(lambda: {"train": loader().dataset, "val": loader().dataset})
    try:
        config = {"model": {"name": "behind_net"}, "data": {"name": "behind_rows"}, "training": {"epochs": 1, "loss": "cross_entropy"}, "run": {"name": "r"},
                  "stages": [{"name": "one"}, {"name": "two", "kind": "evaluate", "init_from": "one"}]}
        run = train_stages(config, only=["one"], quiet=True)
        two = create_trainer(run.config.stage("two"), run, quiet=True)
        two.train(background=True)
        assert two.wait()["val_loss"] > 0 and torch.is_grad_enabled()
    finally: forget(__name__)


def test_an_interrupt_of_the_call_is_one_of_the_training(monkeypatch, capfd):
    straight = make(net(drop=0.3), run=None, epochs=20)
    straight.train()
    trainer = slowly()
    trainer.listeners.of["fit_start"].append(lambda trainer: time.sleep(0.5))
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(Paused, match="train.. goes on from there"): trainer.train(background=True)
    assert trainer.run.status == "paused" and trainer.step < 3
    with pytest.raises(Paused): trainer.wait()
    trainer.train(background=True)
    trainer.wait()
    assert same(weights(straight), weights(trainer)) and "finishing the step" in capfd.readouterr().err


def test_a_pause_is_no_time_of_training():
    """Neither for an end that is told by the clock, nor for who reads the log."""
    trainer = make(run=None, epochs="1 s", scheduler="constant", callbacks=[hears(step_end=lambda trainer: time.sleep(0.02))], log_every=1)
    trainer.train(background=True)
    until(lambda: trainer.step > 3)
    trainer.run.tell("pause")
    until(lambda: [*trainer.run.story().of("control")])
    time.sleep(1.5)
    paused_at = trainer.step
    trainer.run.tell("resume")
    trainer.wait()
    assert trainer.step > paused_at + 5 and 1 <= trainer.seconds < 1.4
    assert 0.8 < Curves(trainer.run.folder).progress().seconds < 1.4


class Faulty(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): raise ValueError("a broken file")


def test_a_look_that_fails_fails_nothing_else():
    trainer = slowly(val=torch.utils.data.DataLoader(Faulty()), eval_every=1000)
    trainer.train(background=True)
    until(lambda: trainer.step > 2)
    trainer.run.tell("evaluate")
    until(lambda: "not evaluated: ValueError: a broken file" in (trainer.run.folder/"train.log").read_text())
    trainer.run.tell("stop")
    trainer.wait()
    assert trainer.run.status == "stopped" and trainer.model.training
