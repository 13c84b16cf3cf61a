"""What people, disks and strangers do to a manager: interrupts, threads that do not start, copies, slips in a call, odd folders."""
import copy
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy
import pytest
import torch
from test_faults import failing, is_whole, resealed, state

from trainbook import Config, ConfigError, Run
from trainbook.checkpoint import CheckpointManager
from trainbook.foreign import export_checkpoint
from trainbook.load import listing, load_checkpoint, load_model, read_word
from trainbook.registry import register
from trainbook.state import CheckpointError, StateError
from trainbook.stepfolder import Damaged, apart, check_step, manifest_text, read_latest, read_step, steps, write_step
from trainbook.weights import load_weights

pytestmark = pytest.mark.filterwarnings("error")
RUN = [sys.executable, "-W", "default", "-c"]
BEGIN = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_faults import *\n"


@pytest.fixture
def manager(here):
    with CheckpointManager("c", save_interval="1 step") as manager:
        manager.save(state(1), 1, metrics={"val_loss": 1}, wait=True)
        yield manager


# --- interrupts -----------------------------------------------------------------------------------

def slow_disk(monkeypatch, seconds):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *words: (time.sleep(seconds), real(*words))[1])


@pytest.mark.parametrize("waiting", ["save", "wait", "load", "close"])
def test_ctrl_c_while_waiting_mixes_nothing(manager, monkeypatch, waiting):
    """An interrupted Thread.join believes that the thread is over: the next save would fill buffers that are still being written."""
    slow_disk(monkeypatch, 0.1)
    manager.save(state(2), 2)
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt): {"save": lambda: manager.save(state(3), 3), "wait": manager.wait, "load": manager.load, "close": manager.close}[waiting]()
    manager.save(state(4), 4, wait=True)
    assert is_whole(manager.load(2), 2) and is_whole(manager.load(4), 4) and manager.steps[-2:] == [2, 4]


def test_ctrl_c_and_the_end_of_the_script_still_finish_the_save(here):
    code = BEGIN + """
real = os.pwrite
os.pwrite = lambda *words: (time.sleep(0.2), real(*words))[1]
manager = CheckpointManager("c"); manager.save(state(1), 1)
threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
try: manager.wait()
except KeyboardInterrupt: print("interrupted")"""
    done = subprocess.run([*RUN, code], capture_output=True, text=True)
    assert done.stdout == "interrupted\n" and done.returncode == 0 and is_whole(read_latest("c"), 1)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("can't start new thread")], ids=["Ctrl-C", "no more threads"])
def test_a_thread_that_does_not_start_jams_nothing(manager, monkeypatch, error):
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(error))
        manager.save(state(2), 2)
    manager.save(state(3), 3, wait=True)
    assert is_whole(manager.load(), 3)


@pytest.mark.parametrize("spoil, said", [("(manager.dir/'owner.json').write_text('{}')", "was taken over by another process"), ("os.rename = lambda *words: 1/0", "division by zero"),
                                         ("os.pwrite = lambda *words: os.close(-1)", "Bad file descriptor")])
def test_a_last_save_that_fails_says_so_though_nobody_waits(here, spoil, said):
    code = BEGIN + f"manager = CheckpointManager('c'); manager.save(state(1), 1, wait=True)\n{spoil}\nmanager.save(state(2), 2)"
    done = subprocess.run([*RUN, code], capture_output=True, text=True)
    assert said in done.stderr and "not written" in done.stderr and steps("c") == [1]


def test_warnings_that_are_errors_are_raised_by_the_next_wait(manager, monkeypatch):
    failing(monkeypatch, "pwrite", 1, 28)
    manager.save(state(2), 2)
    with pytest.raises(UserWarning, match="step 2 was not written"): manager.wait()
    manager.save(state(3), 3, wait=True)


def test_what_went_wrong_first_is_what_counts(here):
    with pytest.raises(ZeroDivisionError), pytest.warns(UserWarning, match="taken over"), CheckpointManager("c") as manager:
        manager.save(state(1), 1, wait=True)
        (manager.dir/"owner.json").write_text("{}")
        manager.save(state(2), 2)
        1 / 0


def test_a_manager_is_not_copied(manager):
    for attempt in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"): attempt(manager)


# --- slips in a call ------------------------------------------------------------------------------

def test_the_guides_own_names_for_the_parts_are_understood(manager):
    manager.save({"model_state_dict": {"w": torch.ones(2)}, "optimizer_state_dict": {"m": 1}}, 2, wait=True)
    assert manager.load(only="model")["model_state_dict"]["w"].tolist() == [1, 1] and set(manager.load().state) == {"model", "optimizer"}
    with pytest.raises(StateError, match="model and model_state_dict, which are the same part"): manager.save({"model": {}, "model_state_dict": {}}, 3)


@pytest.mark.parametrize("words, error, message", [
    (dict(state=torch.nn.Linear(2, 2).state_dict()), StateError, 'found bare weights; write {"model": model.state_dict()}'), (dict(metrics=0.5), ConfigError, "metrics  expected numbers by name, found 0.5"),
    (dict(metrics={"acc": torch.ones(2)}), ConfigError, "metrics  acc  expected one number, found shape"), (dict(epoch="5"), CheckpointError, "epoch  expected a number, found '5'"),
    (dict(epoch=float("inf")), CheckpointError, "epoch  expected a number"), (dict(step=10 ** 18), StateError, "step  expected a number from 0 to"), (dict(state={"x": 10 ** 5000}), StateError, "the state cannot be kept: "),
    (dict(state={"model": {"__metadata__": torch.ones(2)}}), StateError, "__metadata__  is a name that safetensors keeps"), (dict(state={"x": numpy.longdouble(1)}), StateError, "x  cannot be kept, found longdouble"),
    (dict(state={"x": type("Mine", (dict,), {})(a=1)}), StateError, "x  cannot be kept, found Mine; make it a dict"), (dict(state={"model": {"x": torch.nn.LazyLinear(2).weight}}), StateError, "model.x  cannot be kept, found an uninitialised"),
    (dict(config={"w": torch.ones(2)}), StateError, "config.w  expected plain data"), (dict(metadata=[1]), TypeError, "mapping")])
def test_slips_are_refused_at_the_call(manager, words, error, message):
    with pytest.raises(error, match=re.escape(message)): manager.save(**{"state": state(2), "step": 2, **words})
    assert manager.steps == [1]
    manager.save(state(2), numpy.int64(2), numpy.float32(1), {"acc": numpy.float32(0.5)}, wait=True)
    assert is_whole(manager.load(), 2)


def test_what_is_too_long_to_be_read_is_refused_at_the_call(manager, monkeypatch):
    import trainbook.stepfolder as stepfolder
    monkeypatch.setattr(stepfolder, "_LONGEST_MANIFEST", 20_000)
    with pytest.raises(StateError, match="MB of it are no tensors; make tensors of what is big"): manager.save({"x": b"x" * 20_000}, 2)


def test_a_metric_never_takes_the_place_of_the_weights(manager):
    manager.save(state(2), 2, metrics={"model_state_dict": 0.5, "epoch": 7}, epoch=3, wait=True)
    assert isinstance(manager.load()["model_state_dict"], dict) and manager.load()["epoch"] == 3


def test_constructor_slips(here):
    for words, message in ((dict(metric_mode="max"), "metric_mode  max needs a metric"), (dict(export="best"), "export  expected {best: best_model.pth}"), (dict(export={"best": "a.pth", "latest": "a.pth"}), "two under one name")):
        with pytest.raises(ConfigError, match=message): CheckpointManager("c", **words)


def test_a_named_metric_that_never_comes_is_mentioned_once(here):
    with CheckpointManager("c", metric="val_auc") as manager:
        with pytest.warns(UserWarning, match=r"metric val_auc  is not among those told \(auc, loss\)") as told: manager.save(state(1), 1, metrics={"auc": 1, "loss": 2}, wait=True)
        manager.save(state(2), 2, metrics={"auc": 1}, wait=True)
    assert len(told) == 1


# --- what is kept ---------------------------------------------------------------------------------

def test_the_final_one_is_never_pruned(here):
    with CheckpointManager("c", save_interval=None) as manager:
        manager.save(state(1), 1, final=True)
        for step in range(2, 6): manager.save(state(step), step)
    assert manager.steps == [1, 4, 5] and is_whole(manager.load("final"), 1)


def test_none_keeps_all(here):
    for name, interval in (("a", None), ("b", "1000 steps"), ("c", 5)):
        with CheckpointManager(name, save_interval=interval, keep_last_n=None) as manager:
            for step in range(1, 7): manager.save(state(step), step, 1)
        assert manager.steps == [1, 2, 3, 4, 5, 6]


def test_intervals_of_time(here):
    with CheckpointManager("c", save_interval="0.15 s", keep_last_n=9) as manager:
        told = []
        for step in range(1, 40):
            time.sleep(0.02)
            if manager.due(step): manager.save(state(step), step); told.append(step)
        assert 3 <= len(told) <= 6
    assert manager.steps == told, "the first of a life counts too"
    assert all(row["why"][-1] == "interval" for row in listing("c"))


def test_a_failed_save_does_not_use_up_its_interval(here, monkeypatch):
    with CheckpointManager("c", save_interval=None, keep_every=5) as manager:
        for epoch in range(1, 12):
            with monkeypatch.context() as patch:
                if epoch == 5:
                    failing(patch, "pwrite", 1, 28)
                    with pytest.warns(UserWarning, match="not written"): manager.save(state(epoch), epoch, epoch, wait=True)
                else: manager.save(state(epoch), epoch, epoch, wait=True)
        assert manager.steps == [6, 10, 11]
    with CheckpointManager("d", save_interval="10 steps") as manager:
        with monkeypatch.context() as patch, pytest.warns(UserWarning, match="not written"):
            failing(patch, "pwrite", 1, 28)
            assert manager.due(10)
            manager.save(state(10), 10, wait=True)
        assert not manager.due(11) and manager.due(20), "and is not tried again at every step"


def test_a_branch_point_stays_when_all_runs_were_moved(here):
    parent = Run.create(Config.from_dict({"save_dir": "runs/parent"}))
    with CheckpointManager(parent.folder/"train", keep_last_n=1) as manager:
        for step in (10, 20, 30): manager.save(state(step), step, 1)
    Run.create(Config.from_dict({"save_dir": "runs/child"}), parent=(parent, "train", 20))
    shutil.move("runs", "moved")
    with CheckpointManager("moved/parent/train", keep_last_n=1) as manager:
        for step in (40, 50, 60): manager.save(state(step), step, 1)
    assert 20 in manager.steps


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b'{"folder": 3}', b'{"folder": "/"}', b'{"folder": "/", "stage": "train", "step": "x"}'])
def test_notes_of_branches_that_are_none_are_passed_over(here, note):
    run = Run.create(Config.from_dict({"save_dir": "r"}))
    (run.folder/"branches").mkdir()
    (run.folder/"branches"/"x").write_bytes(note)
    os.mkfifo(run.folder/"branches"/"pipe")
    with CheckpointManager(run.folder/"train") as manager: manager.save(state(1), 1, wait=True)
    assert listing(run.folder/"train") and not run.children()


def test_an_export_that_fails_is_a_warning_and_pruning_goes_on(here):
    with CheckpointManager("c", save_interval="1 step", keep_last_n=1, export={"latest": "l.pth"}) as manager:
        manager.save(state(1), 1, wait=True)
        os.unlink("c/l.pth")
        os.makedirs("c/l.pth/full")
        for step in range(2, 6):
            with pytest.warns(UserWarning, match=f"after the checkpoint of step {step}: .*l.pth"): manager.save(state(step), step, wait=True)
        assert manager.steps == [4, 5]


def test_final_at_a_saved_step_with_a_full_disk_is_a_warning(manager, monkeypatch):
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="after the checkpoint of step 1: .*No space left"):
        failing(patch, "write", 1, 28)
        manager.save(state(1), 1, final=True, wait=True)
    manager.save(state(1), 1, final=True, wait=True)
    assert is_whole(manager.load("final"), 1)


# --- strangers ------------------------------------------------------------------------------------

def test_pipes_in_place_of_files_are_refused_at_once(manager):
    manager.save(state(2), 2, wait=True)
    weights = manager.dir/"step-00000002"/"model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    resealed(manager.dir/"step-00000002"/"manifest.json", lambda m: m["files"]["model.safetensors"].update(bytes=0))
    with pytest.warns(UserWarning, match="went back to step 1"): assert is_whole(manager.load(), 1)
    with pytest.raises(Damaged): check_step(weights.parent)
    manager.close()
    for name in ("best", "final", "exports.json", "owner.json"):
        (manager.dir/name).unlink(missing_ok=True)
        os.mkfifo(manager.dir/name)
    with pytest.warns(UserWarning, match="set aside"): manager.save(state(2), 2, wait=True)
    assert is_whole(manager.load(), 2)


def test_a_folder_in_place_of_the_manifest_is_damage(manager):
    manager.save(state(2), 2, wait=True)
    (manager.dir/"step-00000002"/"manifest.json").unlink()
    (manager.dir/"step-00000002"/"manifest.json").mkdir()
    with pytest.warns(UserWarning, match="went back to step 1"): assert is_whole(manager.load(), 1)
    assert [bool(row["damage"]) for row in listing(manager.dir)] == [False, True]


@pytest.mark.parametrize("facts", [{"epoch": {"$import": "os"}}, {"metadata": {"$tensor": "x"}}, {"epoch": {}}, {"epoch": True}, {"timestamp": 5}, {"metrics": [1]}, {"metrics": {"a": 1, "$b": 2}, "kept": [3]}, {"code": 5}, {"metadata": [1]}, {"state": [1]}])
def test_facts_of_the_wrong_kind_are_damage(manager, facts, capsys):
    manager.save(state(2), 2, wait=True)
    resealed(manager.dir/"step-00000002"/"manifest.json", lambda m: m.update(facts))
    with pytest.warns(UserWarning, match="went back to step 1"): assert is_whole(manager.load(), 1)
    assert listing(manager.dir)[1]["damage"]
    with pytest.raises(CheckpointError, match="has no epoch 3"): manager.load("epoch 3")
    manager.close()
    with CheckpointManager("c") as another, pytest.warns(UserWarning, match="set aside"): another.save(state(2), 2, wait=True)


def test_facts_that_are_absent_are_no_damage(manager):
    tree, files = apart(state(2))
    write_step(manager.dir, 2, manifest_text(2, {}, tree), files)
    manager.close()
    with CheckpointManager("c", save_interval="1 step") as another: another.save(state(3), 3, wait=True)
    assert is_whole(another.load(2), 2)


def test_a_sound_one_that_does_not_fit_into_memory_is_not_called_damaged(here):
    code = BEGIN + """
manager = CheckpointManager("c"); manager.save(state(1), 1, wait=True); manager.save(state(2, 30_000_000), 2, wait=True); manager.close()
del manager
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 50_000_000,) * 2)
try: read_latest("c")
except MemoryError as error: print(error)"""
    done = subprocess.run([*RUN, "import resource\n" + code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert re.search(r"step-00000002/\w+.safetensors  \S+ takes 0.\d+ GB of memory, which are not free here", done.stdout), done


# --- types that come back -------------------------------------------------------------------------

def test_counters_and_default_dicts_stay_what_they_are(manager):
    kept = {"counter": Counter("hello"), "default": defaultdict(list, a=[1]), "none": defaultdict(None, {2: 3}), "ordered": OrderedDict(b=1)}
    manager.save({"callbacks": kept}, 2, wait=True)
    found = manager.load().state["callbacks"]
    assert found == kept and [type(value) for value in found.values()] == [type(value) for value in kept.values()] and found["default"]["new"] == [] and found["counter"].most_common(1) == [("l", 2)]
    export_checkpoint(manager.load(), "plain.pth")
    assert torch.load("plain.pth", weights_only=True)["callbacks"] == {name: dict(value) for name, value in kept.items()}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    manager.save({"scheduler": scheduler.state_dict()}, 3, wait=True)
    scheduler.load_state_dict(manager.load()["scheduler_state_dict"])
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler.step(7)


class Migrating(torch.nn.Module):
    "Doubles its weight when a state of an older version is loaded."
    _version = 2
    def __init__(self): super().__init__(); self.weight = torch.nn.Parameter(torch.ones(1))
    def _load_from_state_dict(self, state, prefix, about, *more):
        if about.get("version") != 2: state[prefix + "weight"] = state[prefix + "weight"] * 2
        super()._load_from_state_dict(state, prefix, about, *more)


def test_the_versions_of_modules_come_back(manager):
    manager.save({"model": Migrating().state_dict()}, 2, wait=True)
    fresh = Migrating()
    fresh.load_state_dict(manager.load()["model_state_dict"])
    assert fresh.weight.item() == 1
    export_checkpoint(manager.load(), "plain.pth")
    fresh.load_state_dict(torch.load("plain.pth", weights_only=True)["model_state_dict"])
    assert fresh.weight.item() == 1


def test_our_own_checkpoint_of_a_wrapped_model_goes_back(here):
    @register("model", "wrapped_line")
    def wrapped_line(width): return torch.nn.Linear(width, 1)
    net = torch.nn.Linear(3, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its own
        compiled = torch.compile(net)
    for step, weights in ((1, torch.nn.DataParallel(net).state_dict()), (2, compiled.state_dict())):
        with CheckpointManager("c", save_interval="1 step") as manager: manager.save({"model": weights}, step, config={"model": {"name": "wrapped_line", "width": 3}}, wait=True)
        assert torch.equal(load_model("c").weight, net.weight)
    load_weights(torch.nn.Linear(3, 1), {"module." + name: value for name, value in net.state_dict().items()}, rename={"module": ""})


# --- names ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, word", [("checkpoint-400", ("step", 400, "")), ("ckpt_400.pt", ("step", 400, "")), ("epoch=4-step=400.ckpt", ("step", 400, "")), ("epoch 4.5", ("epoch", 4.5, "")), ("Dense_epoch_5.pth", ("epoch", 5, "Dense")),
                                        ("best_Dense.pth", ("best", 0, "Dense")), ("EPOCH_5.pth", ("epoch", 5, ""))])
def test_more_names_from_fingers(text, word): assert read_word(text) == word


def test_a_name_that_begins_with_a_space_is_a_name(manager):
    torch.save({"model": {"w": torch.ones(2)}}, " odd.pth")
    assert load_checkpoint(" odd.pth", quiet=True).state["model"] and is_whole(load_checkpoint(" c ", quiet=True), 1)


def test_only_some_parts_of_a_foreign_file(manager):
    torch.save({"model": {"w": torch.ones(2)}, "optimizer": {"state": {}, "param_groups": [{"lr": 1}]}}, "x.pth")
    assert set(load_checkpoint("x.pth", only="model", quiet=True).state) == {"model"}
    with pytest.raises(CheckpointError, match="has no rng; it has model, optimizer"): load_checkpoint("x.pth", only=["rng"])


def test_a_listing_while_training_prunes(here):
    with CheckpointManager("c", save_interval="1 step", keep_last_n=1) as manager:
        manager.save(state(1), 1, wait=True)
        over, wrong = threading.Event(), []
        def look():
            while not over.is_set():
                try: listing("c")
                except Exception as error: wrong.append(error)
        looker = threading.Thread(target=look)
        looker.start()
        for step in range(2, 60): manager.save(state(step), step)
        over.set()
        looker.join()
    assert not wrong, wrong[0]


def test_the_current_folder_may_change(manager, monkeypatch, tmp_path):
    (tmp_path/"else").mkdir()
    monkeypatch.chdir(tmp_path/"else")
    manager.save(state(2), 2, wait=True)
    assert is_whole(manager.load(), 2) and is_whole(read_step(tmp_path/"c"/"step-00000002"), 2) and json.loads((tmp_path/"c"/"owner.json").read_text())["pid"] == os.getpid()


@pytest.mark.skipif(sys.platform != "linux", reason="a priority belongs to a thread only there")
def test_the_writer_gives_way_and_the_training_does_not(manager, monkeypatch):
    nice, real = [], os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *words: (nice.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())), real(*words))[1])
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    manager.save(state(2), 2, wait=True)
    assert set(nice) == {min(19, mine + 5)} and os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == mine
