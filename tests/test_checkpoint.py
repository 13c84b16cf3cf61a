"""What the manager keeps, what it calls best, how a checkpoint is named, what is in it, and the verbs of the command line."""
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from trainbook import Config, ConfigError, Run
from trainbook.checkpoint import CheckpointManager, import_checkpoint
from trainbook.cli import main
from trainbook.foreign import export_checkpoint
from trainbook.load import listing, load_checkpoint, load_model, read_word, select
from trainbook.metrics import direction
from trainbook.stepfolder import CheckpointError, check_step, read_step, steps


class Settings:
    "What a script may have put into its checkpoint."


def state(value=0.0): return {"model": {"w": torch.full((3,), float(value))}}


def train(manager, first, last, per_epoch=10, loss=lambda epoch: 1 / epoch, **more):
    "A save at the end of each epoch."
    for epoch in range(first, last + 1):
        manager.save(state(epoch), per_epoch * epoch, epoch, {"loss": 9.0, "val_loss": loss(epoch)}, **more)
    manager.wait()


# --- what stays -----------------------------------------------------------------------------------

STAYS = [  # arguments, losses by epoch, epochs that stay after 12
    (dict(save_interval=5, keep_last_n=3), lambda e: 1 / e, [5, 10, 11, 12]),
    (dict(save_interval=5, keep_last_n=1), lambda e: 1 / e, [10, 11, 12]),
    (dict(save_interval=5, keep_last_n=1), lambda e: abs(e - 3), [3, 10, 11, 12]),
    (dict(save_interval=1, keep_last_n=3), lambda e: abs(e - 3), [3, 10, 11, 12]),
    (dict(save_interval=1, keep_last_n=None), lambda e: 1 / e, list(range(1, 13))),
    (dict(save_interval=None, keep_last_n=3), lambda e: 1 / e, [11, 12]),
    (dict(save_interval=5, keep_last_n=1, keep_every=4), lambda e: 1 / e, [4, 8, 10, 11, 12]),
    (dict(save_interval="20 steps", keep_last_n=2), lambda e: 1 / e, [10, 11, 12]),
    (dict(save_interval="30 steps", keep_last_n=2), lambda e: e, [1, 9, 11, 12]),
    (dict(save_interval="25 steps", keep_last_n=2), lambda e: 1 / e, [8, 10, 11, 12]),  # the first save after each multiple
    (dict(save_interval=2.5, keep_last_n=2), lambda e: 1 / e, [8, 10, 11, 12]),
    (dict(save_interval="1 hour", keep_last_n=2), lambda e: 1 / e, [11, 12]),
    (dict(save_interval="0.000001 s", keep_last_n=4), lambda e: 1 / e, [9, 10, 11, 12]),
]


@pytest.mark.parametrize("arguments, loss, stays", STAYS, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_what_stays(here, arguments, loss, stays):
    with CheckpointManager("c", **arguments) as manager: train(manager, 1, 12, loss=loss)
    assert [step // 10 for step in manager.steps] == stays
    for step in manager.steps: assert torch.equal(manager.load(step)["model_state_dict"]["w"], torch.full((3,), step / 10))


@pytest.mark.parametrize("arguments, loss, stays", STAYS[:9], ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_what_stays_is_the_same_after_a_life_in_between(here, arguments, loss, stays):
    for first, last in ((1, 2), (3, 7), (8, 12)):
        with CheckpointManager("c", **arguments) as manager: train(manager, first, last, loss=loss)
    assert [step // 10 for step in manager.steps] == stays


def test_who_never_says_an_epoch_has_each_save_counted(here):
    with CheckpointManager("c", keep_last_n=3) as manager:
        for step in range(1, 9): manager.save(state(step), step)
        with pytest.raises(CheckpointError, match="due  the interval is in epochs and no epoch was told"): manager.due(9)
    assert manager.steps == [6, 7, 8]


def test_due_between_epochs_and_after_a_resume(here):
    with CheckpointManager("c", save_interval="200 steps") as manager:
        told = []
        for step in range(1, 1001):
            if manager.due(step): told.append(step); manager.save(state(step), step)
    assert told == [200, 400, 600, 800, 1000]
    with CheckpointManager("c", save_interval="200 steps") as manager:
        assert [step for step in range(1001, 1300) if manager.due(step)][:1] == [1200]
    with CheckpointManager("c", save_interval=0.5) as manager: assert manager.due(1001, 0.5) and not manager.due(1001, 0.4)
    with CheckpointManager("c", save_interval="0.05 s") as manager:
        assert not manager.due(1001)
        time.sleep(0.06)
        assert manager.due(1001)
    assert not CheckpointManager("c", save_interval=None).due(10 ** 6, 10 ** 6)


def test_one_that_a_branch_started_from_stays_as_long_as_the_branch(here):
    parent = Run.create(Config.from_dict({"run": {"name": "parent"}}))
    with CheckpointManager(parent.folder/"train", save_interval=None) as manager:
        train(manager, 1, 3, loss=lambda e: 1.0 / e)
        child = Run.create(Config.from_dict({"run": {"name": "child"}}), parent=(parent, "train", 20))
        elsewhere = Run.create(Config.from_dict({"save_dir": "far/away"}), parent=(parent, "other stage", 30))
        train(manager, 4, 8)
        assert manager.steps == [20, 70, 80]
        child.remove()
        train(manager, 9, 9)
        assert manager.steps == [80, 90] and elsewhere.folder.exists()


# --- what is best ---------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, told, best", [
    ({}, [{"loss": 3}, {"loss": 1}, {"loss": 2}], 2), ({}, [{"train_loss": 3}, {"train_loss": 1}, {"train_loss": 2}], 2),
    ({}, [{"loss": 1, "val_loss": 5}, {"loss": 9, "val_loss": 4}, {"loss": 0.1}], 2),  # no evaluation in the third
    ({}, [{"loss": 0.1}, {"loss": 9, "val_loss": 4}, {"val_loss": 5}], 2),  # a training loss never competes
    ({}, [{"val_loss": float("nan")}, {"val_loss": float("inf")}, {"val_loss": 5}, {"val_loss": float("nan")}], 3),
    ({}, [{"val_loss": 2}, {"val_loss": 2}], 1), ({}, [{"val_loss": float("nan")}], None), ({}, [{}, {}], None),
    ({"metric": "acc"}, [{"acc": 0.1}, {"acc": 0.9}, {"acc": 0.5}], 2), ({"metric": "loss", "metric_mode": "max"}, [{"loss": 1}, {"loss": 3}, {"loss": 2}], 2),
    ({"metric": "sharpness", "metric_mode": "min"}, [{"sharpness": 3}, {"sharpness": 1}], 2),  ({"metric": "acc"}, [{}, {"acc": float("nan")}], None), ({}, [{"loss": 1, "val/loss": 5}, {"loss": 9, "val/loss": 4}], 2),
    ({}, [{"train_loss": 1, "valid_loss": 5}, {"train_loss": 9, "valid_loss": 4}], 2), ({}, [{"loss": 1, "eval_loss": 3}, {"loss": 0, "eval_loss": 4}], 1)])
def test_best(here, arguments, told, best):
    with CheckpointManager("c", save_interval=1, keep_last_n=None, **arguments) as manager:
        for step, metrics in enumerate(told, 1): manager.save(state(), step, step, metrics, wait=True)
        assert manager.best == best
    with CheckpointManager("c", save_interval=1, keep_last_n=None, **arguments) as manager:  # the next life knows it
        manager.save(state(), 9, 9, {}, wait=True)
        assert manager.best == best
    if best: assert re.fullmatch(rf"step-0000000{best} \S+ \S+\n", Path("c/best").read_text())
    else:
        with pytest.raises(CheckpointError, match="c  has no best; it has step"): manager.load("best")


def test_a_resumed_run_does_not_forget_its_best(here):
    """Defect (f) of the original: a fresh, infinite best metric overwrote the best file after every resume."""
    with CheckpointManager("c", save_interval=None) as manager: train(manager, 1, 3, loss=lambda e: {1: 5, 2: 1, 3: 4}[e])
    with CheckpointManager("c", save_interval=None) as manager: train(manager, 4, 6, loss=lambda e: 3)
    assert manager.best == 20 and 20 in manager.steps


def test_metrics_at_the_second_save_of_one_step_count(here):
    with CheckpointManager("c", save_interval="10 steps", keep_last_n=1) as manager:
        train(manager, 1, 1)
        manager.save(state(2), 20)
        manager.save(state(2), 20, 2, {"val_loss": 0.01}, final=True, wait=True)
        train(manager, 3, 6)
        assert manager.best == 20 and manager.load("final")["step"] == 20
    with CheckpointManager("c", save_interval="10 steps", keep_last_n=1) as manager:
        train(manager, 7, 9)
        assert manager.best == 20 and manager.steps == [20, 80, 90]


@pytest.mark.parametrize("name, less", [("val_loss", True), ("train/loss", True), ("wer", True), ("mean_km", True), ("acc", False), ("val_f1", False), ("Recall@5", False),
                                        ("mIoU", False), ("val.map", False), ("top1", False), ("R@20", False)])
def test_direction(name, less): assert direction(name) == ("min" if less else "max")


@pytest.mark.parametrize("wrong, message", [
    (dict(save_interval="5 bananas"), "save_interval  expected a duration"), (dict(save_interval=0), "save_interval  expected a duration of more than nothing"),
    (dict(save_interval=-1), "save_interval  expected a duration"), (dict(keep_last_n=0), "keep_last_n  expected a whole number from 1 on"), (dict(keep_last_n=2.5), "keep_last_n"),
    (dict(keep_last_n=True), "keep_last_n"), (dict(metric="sharpness"), "metric sharpness  cannot tell whether less or more of it is better; say metric_mode"),
    (dict(metric_mode="up"), "metric_mode  expected min or max, found 'up'"), (dict(export={"bst": "a.pth"}), "export  bst  expected best, latest or final, did you mean best"),
    (dict(export={"best": "../a.pth"}), "export  best  expected a file name that ends in"), (dict(export={"best": "a.txt"}), "export  best"), (dict(export={"best": 3}), "export  best")])
def test_wrong_arguments_are_refused_before_anything_is_made(here, wrong, message):
    with pytest.raises(ConfigError, match=message): CheckpointManager("c", **wrong)
    assert not Path("c").exists()


@pytest.mark.parametrize("step", [-1, 1.5, "3", None, True])
def test_a_step_is_a_whole_number(here, step):
    with pytest.raises(CheckpointError, match="step  expected a whole number"): CheckpointManager("c").save({}, step)


# --- what is in it --------------------------------------------------------------------------------

def test_the_familiar_keys(here):
    config = Config.from_dict({"lr": 1e-3, "model": {"name": "net", "width": 4}})
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=9)
    model(torch.ones(1, 4)).sum().backward(); optimizer.step(); scheduler.step()
    run = Run.create(Config.from_dict({"save_dir": "r"}))
    with CheckpointManager(run.folder/"structural") as manager:
        manager.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "early_stopping": {"bad": 2}}, 120, 12,
                     {"loss": 0.284, "val_loss": 0.123}, config=config, model_config={"width": 4}, metadata={"note": "x"}, code="pkg.net:Net")
        found = manager.load()
    assert found["version"] == 1 and found["epoch"] == 12 and found["step"] == 120 and found["metric"] == 0.123 and found["loss"] == 0.284 and found["val_loss"] == 0.123
    assert found["metadata"] == {"stage": "structural", "run": "r", "run_id": run.id, "parent": None, "note": "x"} and found["model_config"] == {"width": 4}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", found["timestamp"]) and Config.from_dict(found["config"]) == config
    assert found["code"]["module"] == "pkg.net:Net" and found["code"]["versions"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__ in str(found["code"]) and "git" in found["code"]
    assert found["early_stopping"] == {"bad": 2} and found.state["scheduler"] == found["scheduler_state_dict"] == scheduler.state_dict()
    fresh = torch.nn.Linear(4, 2)
    fresh.load_state_dict(found["model_state_dict"])
    torch.optim.AdamW(fresh.parameters()).load_state_dict(found["optimizer_state_dict"])
    with pytest.raises(KeyError, match="has no 'val_los'; it has loss, val_loss, model_state_dict"): found["val_los"]
    assert set(manager.load(only=["early_stopping", "model"]).state) == {"early_stopping", "model"}
    with pytest.raises(CheckpointError, match="has no rng; it has model, optimizer"): manager.load(only=["rng"])


def test_anybody_reads_the_weights(here):
    from safetensors.torch import load_file
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    with CheckpointManager("c") as manager: manager.save({"model": model.state_dict()}, 1, wait=True)
    torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).load_state_dict(load_file("c/step-00000001/model.safetensors"))


def test_tied_weights_an_average_and_several_optimizers(here):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    optimizers = {"g": torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), "d": torch.optim.Adam(model.parameters())}
    with CheckpointManager("c") as manager:
        manager.save({"model": model.state_dict(), "ema": model.state_dict(), "optimizers": {name: one.state_dict() for name, one in optimizers.items()}, "optimizer": {}}, 1, wait=True)
        found = manager.load()
    assert found.state["model"]["a.weight"] is found.state["model"]["b.weight"] is found.state["ema"]["a.weight"]
    assert found.state["optimizers"] == {name: one.state_dict() for name, one in optimizers.items()} and "optimizers" in found


def test_going_on_from_a_checkpoint_is_going_on(here):
    """A hand-written loop that is cut and continued equals one that was not, to the bit."""
    def loop(epochs, manager):
        torch.manual_seed(7)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        first = 1
        if manager.latest:
            found = manager.load()
            model.load_state_dict(found["model_state_dict"]); optimizer.load_state_dict(found["optimizer_state_dict"]); torch.set_rng_state(found.state["rng"])
            first = found["epoch"] + 1
        for epoch in range(first, epochs + 1):
            loss = model(torch.randn(16, 4)).square().mean()
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            manager.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, epoch, epoch, {"loss": loss.item()})
        manager.close()
        return model.state_dict()
    whole = loop(6, CheckpointManager("whole"))
    loop(3, CheckpointManager("cut"))
    cut = loop(6, CheckpointManager("cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole) and CheckpointManager("whole").load("best")["step"] == CheckpointManager("cut").load("best")["step"]


def test_the_log_is_on_the_disk_before_the_checkpoint_and_its_position_is_known(here):
    run = Run.create(Config.from_dict({"save_dir": "r"}))
    with run.write() as ledger, CheckpointManager(run.folder/"train", ledger=ledger) as manager:
        ledger.start("train")
        ledger.log("step", 1, loss=0.5)
        manager.save(state(), 1, wait=True)
        position = manager.load()["position"]
        assert (run.folder/"events.jsonl").read_bytes()[:position].endswith(b"\n") and b'"loss": 0.5' in (run.folder/"events.jsonl").read_bytes()[:position]
        assert not (run.folder/"train"/".lock").exists()  # the run's lock is enough
        (run.folder/"owner.json").write_text("{}")
        manager.save(state(), 2)
        with pytest.raises(RuntimeError, match="taken over"): manager.wait()
        assert manager.steps == [1]


# --- exports --------------------------------------------------------------------------------------

def test_exports_follow_best_latest_and_final(here):
    with CheckpointManager("c", save_interval=None, export={"best": "best_model.pth", "latest": "checkpoint_latest.pth", "final": "final.safetensors"}) as manager:
        train(manager, 1, 5, loss=lambda e: abs(e - 3), model_config={"w": 3})
        manager.save(state(5), 50, 5, final=True)
    best, latest = (torch.load(f"c/{name}", weights_only=True) for name in ("best_model.pth", "checkpoint_latest.pth"))
    assert best["epoch"] == 3 and best["val_loss"] == 0 and best["model_state_dict"]["w"].tolist() == [3] * 3 and best["model_config"] == {"w": 3} and latest["epoch"] == 5
    from safetensors.torch import load_file
    assert load_file("c/final.safetensors")["w"].tolist() == [5] * 3
    assert not select("c/best_model.pth").ours and load_checkpoint("c/best_model.pth", quiet=True)["epoch"] == 3  # a real file wins
    assert CheckpointManager("c").load("best_model.pth").notes  # there too
    for row in listing("c"): check_step(row["path"])


def test_an_export_of_the_next_life_is_mended_and_a_file_of_somebody_else_is_left_alone(here):
    with CheckpointManager("c", export={"best": "best.pth"}) as manager: train(manager, 1, 2)
    Path("c/best.pth").unlink()
    with CheckpointManager("c", export={"best": "best.pth"}) as manager: train(manager, 3, 3, loss=lambda e: 9)
    assert torch.load("c/best.pth", weights_only=True)["epoch"] == 2
    Path("d").mkdir()
    Path("d/best.pth").write_text("mine")
    with CheckpointManager("d", export={"best": "best.pth"}) as manager, pytest.raises(CheckpointError, match="d/best.pth is there already and is not ours"): manager.save({}, 1)
    assert Path("d/best.pth").read_text() == "mine"


def test_an_exported_state_loads_with_weights_only_whatever_is_in_it(here):
    import numpy
    odd = {"numpy": numpy.float32(0.5), "array": numpy.arange(4.0), "set": {1, 2}, "complex": 1 + 2j, "tuple": (1, (2.0,)), "bytes": b"x", 3: None, "inf": float("inf"), "bf16": torch.ones(2, dtype=torch.bfloat16)}
    with CheckpointManager("c", export={"latest": "all.pth"}) as manager: manager.save({"model": {"w": torch.ones(2)}, "callbacks": odd}, 1, metrics={"loss": numpy.float64(0.5)}, wait=True)
    found = torch.load("c/all.pth", weights_only=True)
    assert found["callbacks"]["set"] == [1, 2] and found["callbacks"]["array"].tolist() == [0, 1, 2, 3] and found["loss"] == 0.5 and found["callbacks"][3] is None


def test_an_export_that_fails_leaves_the_old_one(here, monkeypatch):
    with CheckpointManager("c") as manager: train(manager, 1, 2)
    export_checkpoint(manager.load(10), "a.pth")
    with pytest.raises(CheckpointError, match="a.pth exists already; choose another name"): export_checkpoint(manager.load(20), "a.pth")
    monkeypatch.setattr(os, "rename", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError): export_checkpoint(manager.load(20), "a.pth", replace=True)
    assert torch.load("a.pth", weights_only=True)["epoch"] == 1 and not list(Path(".").glob(".tmp*"))
    with pytest.raises(CheckpointError, match="expected a name that ends in .pth, .pt"): export_checkpoint(manager.load(20), "a.txt")


# --- names ----------------------------------------------------------------------------------------

@pytest.fixture
def two_stages(here):
    "runs/demo with stages structural and dense; epochs 1 to 12, best is 3."
    run = Run.create(Config.from_dict({"save_dir": "runs/demo", "stages": [{"name": "structural"}, {"name": "dense"}]}))
    for stage in ("structural", "dense"):
        with CheckpointManager(run.folder/stage, save_interval=5, keep_last_n=3) as manager:
            train(manager, 1, 12, loss=lambda e: abs(e - 3))
            manager.save(state(12), 120, final=True)
    return run


NAMES = {"demo": "dense 12", "demo@best": "dense 3", "demo/structural": "structural 12", "demo/structural@best": "structural 3", "demo/structural@50": "structural 5", "demo@epoch 10": "dense 10",
         "demo@final": "dense 12", "runs/demo": "dense 12", "runs/demo/structural": "structural 12", "runs/demo/structural/step-00000050": "structural 5", "runs/demo/structural/best": "structural 3",
         "runs/demo/structural/checkpoint_latest.pth": "structural 12", "runs/demo/dense/checkpoint_best.pth": "dense 3", "runs/demo/epoch_5.pth": "dense 5", "runs/demo/checkpoint_epoch_10.tar": "dense 10",
         "runs/demo/checkpoint_epoch5.pth": "dense 5", "runs/demo/checkpoint_final.tar": "dense 12", "runs/demo/latest.pth": "dense 12", "runs/demo/best.pth": "dense 3", "runs/demo/best_model.pth": "dense 3",
         "runs/demo/best_structural.pth": "structural 3", "demo@checkpoint_best.pth": "dense 3", "demo/structural@epoch_5": "structural 5", "./runs/demo/dense": "dense 12", " demo@best ": "dense 3"}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_people_type(two_stages, capsys, name):
    stage, epoch = NAMES[name].split()
    found = load_checkpoint(name)
    assert found.path.parts[-2] == stage and found["epoch"] == int(epoch)
    said = capsys.readouterr().err
    assert str(found.path) in said and f"epoch {epoch}" in said or name == str(found.path)


@pytest.mark.parametrize("name", [name for name in NAMES if Path(name).suffix and "@" not in name])
def test_a_real_file_of_that_name_always_wins(two_stages, name):
    torch.save({"model_state_dict": {"w": torch.ones(3)}, "epoch": 77}, name)
    assert load_checkpoint(name)["epoch"] == 77


@pytest.mark.parametrize("name, message", [("demo@worst", "worst is no checkpoint's name; accepted are"), ("demo/dens", "no stage dens, did you mean dense"), ("dem", "no run dem, did you mean demo"), ("", "no checkpoint was named"),
                                           ("demo@20", "has no step 20; it has step 30"), ("runs/demo/best_structurl.pth", "no stage structurl, did you mean structural"), ("nowhere/latest.pth", "no run nowhere"),
                                           ("demo@", "nothing is no checkpoint's name"), ("demo@epoch 4", "has no epoch 4"), ("/etc/passwd", "not known"), ("../../x", "no file here")])
def test_names_that_mean_nothing_say_what_there_is(two_stages, name, message):
    with pytest.raises(CheckpointError, match=message): load_checkpoint(name)


def test_names_in_a_folder(two_stages):
    manager = CheckpointManager(two_stages.folder/"structural")
    for which, epoch in (("latest", 12), ("best", 3), (50, 5), ("50", 5), ("epoch 5", 5), ("epoch_5.pth", 5), ("step-00000050", 5), ("final", 12), ("checkpoint_latest.pth", 12)): assert manager.load(which)["epoch"] == epoch
    Path("latest").write_text("something else in the current folder")
    assert manager.load("latest")["epoch"] == 12
    with pytest.raises(CheckpointError, match="there is no checkpoint in .*nothing"): CheckpointManager("nothing").load()
    assert CheckpointManager("nothing").latest is None and not Path("nothing").exists()


def test_words_never_mean_two_things():
    for text in ("latest_best.pth", "best_epoch_5.pth", "model.pth", "best_of_the_rest_x.pth", "", "step", "best/..", "e5"): assert read_word(text) is None, text


def test_no_name_ever_crashes(two_stages):
    """Random names made of the pieces that names are made of: found, or one clear error."""
    rng = random.Random(0)
    pieces = ["demo", "/", "@", "best", "latest", "_", "epoch", "5", ".pth", "..", "structural", " ", "step-", "00000050", "-1", "runs", "é", "\0" * 0, "~", "*", "\n"]
    for _ in range(1500):
        name = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 7)))
        try: select(name)
        except CheckpointError as error: assert str(error)


# --- import ---------------------------------------------------------------------------------------

def test_import_and_on(here):
    torch.save({"epoch": 7, "model_state_dict": {"module.w": torch.ones(3)}, "optimizer_state_dict": {"state": {}, "param_groups": []}, "loss": 0.5, "config": {"lr": 0.1}}, "old.pth")
    found = import_checkpoint("old.pth", "new")
    manager = CheckpointManager("new")
    assert manager.load()["epoch"] == 7 and manager.load("best")["loss"] == 0.5 and list(manager.load()["model_state_dict"]) == ["w"] and manager.load()["config"] == {"lr": 0.1}
    assert manager.load()["metadata"]["imported"] == "old.pth" and any("module." in note for note in found.notes)
    with pytest.raises(CheckpointError, match="new has checkpoints already"): import_checkpoint("old.pth", "new")


def test_a_model_is_three_lines_away(here, monkeypatch):
    Path("mine.py").write_text("import torch\nclass Net(torch.nn.Linear):\n    def __init__(self, width): super().__init__(width, 2)\n")
    monkeypatch.syspath_prepend(".")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(here/"home"))
    with CheckpointManager("c") as manager: manager.save({"model": torch.nn.Linear(3, 2).state_dict()}, 1, config=Config.from_dict({"model": {"name": "mine:Net", "width": 3}}), wait=True)
    with pytest.raises(RuntimeError, match="mine:Net.*trust_code=True"): load_model("c")
    assert "mine" not in sys.modules
    assert load_model("c", trust_code=True)(torch.zeros(1, 3)).shape == (1, 2) and not load_model("c").training  # remembered
    with CheckpointManager("d") as manager: manager.save({"model": {}}, 1, wait=True)
    with pytest.raises(CheckpointError, match="has no config to build the model from"): load_model("d")


# --- the command line -----------------------------------------------------------------------------

def shell(capsys, *words) -> tuple[int, str, str]:
    code = main(["checkpoint", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_ls_show_verify(two_stages, capsys):
    code, out, _ = shell(capsys, "ls")
    assert code == 0 and out == shell(capsys, "ls", "demo")[1] and len(out.splitlines()) == 1 + 2 * len(steps("runs/demo/dense"))
    assert re.search(r"runs/demo/dense/step-00000030 +3 +loss 9  val_loss 0 .* best\n", out) and re.search(r"step-00000120 +12 .*final, latest\n", out)
    code, out, _ = shell(capsys, "show", "demo/structural@best")
    assert code == 0 and out.startswith("runs/demo/structural/step-00000030  step 30  epoch 3") and "stage  structural of run demo" in out and "model (1 tensor)" in out
    code, out, _ = shell(capsys, "verify", "demo")
    assert code == 0 and out.count("every byte as written") == 2 * len(steps("runs/demo/dense"))
    data = bytearray(Path("runs/demo/dense/step-00000050/model.safetensors").read_bytes())
    data[-1] ^= 1
    Path("runs/demo/dense/step-00000050/model.safetensors").write_bytes(data)
    Path("runs/demo/structural/step-00000050/model.safetensors").unlink()
    code, out, err = shell(capsys, "verify", "demo")
    assert code == 1 and len(err.splitlines()) == 2 and "sha256 differs" in err and "is missing" in err
    assert "DAMAGED: model.safetensors is missing" in shell(capsys, "ls", "demo/structural")[1]
    assert shell(capsys, "verify", "demo/dense@best")[0] == 0 and shell(capsys, "verify", "demo/dense@epoch 5")[0] == 1


def test_export_import_compare(two_stages, capsys):
    assert shell(capsys, "export", "demo@epoch 5", "five.pth")[0] == 0 and torch.load("five.pth", weights_only=True)["epoch"] == 5
    code, out, err = shell(capsys, "export", "demo@epoch 5", "five.pth")
    assert code == 1 and err.endswith("five.pth exists already; choose another name, or move it away\n")
    assert shell(capsys, "export", "demo@best", "three.safetensors")[0] == 0
    assert shell(capsys, "import", "five.pth")[1].startswith("five.pth → five-imported: model") and CheckpointManager("five-imported").load()["epoch"] == 5
    code, out, _ = shell(capsys, "compare", "demo@best", "five.pth")
    assert code == 0 and re.search(r"epoch +3 +5\n", out) and re.search(r"w +0.667 +\(3,\)", out)
    assert "all 1 in both are equal" in shell(capsys, "compare", "five.pth", "demo@epoch_5")[1]
    settings = Settings()
    settings.lr = 0.5
    torch.save({"model": {"w": torch.ones(3)}, "config": settings}, "wants.pth")
    code, out, err = shell(capsys, "import", "wants.pth")
    name = re.search(r"--allow (\S+)", err)[1]
    assert code == 1 and name.endswith("Settings") and len(err.splitlines()) == 1
    assert shell(capsys, "import", "wants.pth", "there", "--allow", name)[0] == 0 and CheckpointManager("there").load()["config"] == {"lr": 0.5}


@pytest.mark.parametrize("words, code, message", [("ls nowhere", 1, "no run nowhere"), ("show demo@worst", 1, "worst is no checkpoint's name"), ("show", 2, "expected a checkpoint"), ("verify", 2, "expected a checkpoint or a run"),
                                                  ("export demo", 2, "expected a file name"), ("export demo a.txt", 1, "expected a name that ends in"), ("import nofile.pth", 1, "nofile.pth"), ("compare demo", 2, "expected a second"),
                                                  ("lss", 2, "did you mean ls"), ("", 2, "expected one of"), ("ls demo extra", 2, "does not understand extra")])
def test_mistakes_are_one_line_each(two_stages, capsys, words, code, message):
    found, _, err = shell(capsys, *words.split())
    assert found == code and message in err and len(err.splitlines()) == 1, err


def test_a_warning_is_one_line_too(two_stages, capsys):
    Path("runs/demo/dense/step-00000120/manifest.json").write_text("{")
    code, out, err = shell(capsys, "export", "demo", "x.pth")
    assert code == 0 and err.splitlines()[0].startswith("warning: went back to step 110: runs/demo/dense/step-00000120") and torch.load("x.pth", weights_only=True)["epoch"] == 11


# --- costs ----------------------------------------------------------------------------------------

def test_a_save_takes_one_copy_and_the_next_takes_no_new_memory(here):
    with CheckpointManager("c", save_interval="1 step") as manager:
        big = {"model": {"w": torch.zeros(1 << 20)}}
        manager.save(big, 1, wait=True)
        first = manager._copies.buffers["model.safetensors"]["w"].data_ptr()
        assert first != big["model"]["w"].data_ptr()
        manager.save(big, 2, wait=True)
        assert manager._copies.buffers["model.safetensors"]["w"].data_ptr() == first


def test_save_returns_before_the_disk_is_done(here, monkeypatch):
    gate = threading.Event()
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *args: (gate.wait(10), real(*args))[1])
    with CheckpointManager("c") as manager:
        manager.save(state(1), 1)
        assert manager.steps == []
        gate.set()
        manager.wait()
        assert manager.steps == [1]
    assert read_step("c/step-00000001")["step"] == 1 and json.loads(Path("c/step-00000001/manifest.json").read_text())["version"] == 1


def test_nothing_of_torch_is_loaded_for_words_about_configs():
    code = "import sys, trainbook.cli; trainbook.cli.main(['runs']); trainbook.cli.main(['show', 'x']); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
