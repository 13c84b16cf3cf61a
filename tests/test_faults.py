"""Each fault, injected, and what is promised for it. The numbers are those of the table on the page 30_checkpoint.

Elsewhere: 18, 20, 21, 38 in test_kill.py (processes that die), 41 in test_power_cut.py (every state of the disk that a power cut may leave),
32 in test_state.py (hostile headers), 35 there too (every dtype and layout), 44 in test_foreign.py (hostile pickles).
"""
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from trainbook.checkpoint import CheckpointManager
from trainbook.lock import LostOwnership, RunBusy
from trainbook.state import StateError
from trainbook.stepfolder import CheckpointError, Damaged, read_latest, read_step, steps

pytestmark = pytest.mark.filterwarnings("error")


def state(value: float, size: int = 2000) -> dict:
    "A state that tells by every number which step it is of."
    return {"model": {"w": torch.full((size,), float(value))}, "optimizer": {"m": torch.arange(size) * float(value), "n": int(value)}}


def is_whole(found, value: float, size: int = 2000) -> bool:
    wanted = state(value, size)
    return (found["step"] == value and torch.equal(found.state["model"]["w"], wanted["model"]["w"])
            and torch.equal(found.state["optimizer"]["m"], wanted["optimizer"]["m"]) and found.state["optimizer"]["n"] == value)


@pytest.fixture
def manager(tmp_path):
    "Two checkpoints, steps 1 and 2, and a manager that goes on."
    with CheckpointManager(tmp_path/"c", save_interval="1 step") as manager:
        for value in (1, 2): manager.save(state(value), value, metrics={"val_loss": value}, wait=True)
        yield manager


def file(manager, step, name="model.safetensors") -> Path: return manager.dir/f"step-{step:08d}"/name


# --- damage on the disk ---------------------------------------------------------------------------

def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def zero_tail(path):
    size = path.stat().st_size
    os.truncate(path, size // 2)
    os.truncate(path, size)


def edit(path): path.write_text(path.read_text().replace('"step": 2', '"step": 3'))
def edit_state(path): path.write_text(path.read_text().replace('"n": 2', '"n": 7'))
def edit_number(path): path.write_text(path.read_text().replace('"val_loss": 2', '"val_loss": 1'))
def link_to_a_copy(path): shutil.copy(path, path.parent.parent/"copy"); path.unlink(); path.symlink_to(path.parent.parent/"copy")


DAMAGE = {
    "1 a flipped bit in weights": ("model.safetensors", flip), "1 in the optimizer": ("optim.safetensors", flip), "1 in the manifest": ("manifest.json", flip),
    "2 truncated": ("optim.safetensors", lambda path: os.truncate(path, 100)), "2 empty": ("model.safetensors", lambda path: os.truncate(path, 0)),
    "3 a tail of zeros": ("model.safetensors", zero_tail), "4 a file is missing": ("optim.safetensors", os.unlink),
    "5 no manifest": ("manifest.json", os.unlink), **{f"5 manifest {text[:9]!r}": ("manifest.json", lambda path, text=text: path.write_bytes(text))
                                                       for text in (b"", b"{", b"\xff\xfe", b"[]", b'{"self":"x"}', b"[" * 100_000)},
    "6 edited step": ("manifest.json", edit), "6 edited state": ("manifest.json", edit_state), "6 edited metric": ("manifest.json", edit_number),
    "33 a link instead of a file": ("model.safetensors", link_to_a_copy), "33 of the manifest": ("manifest.json", link_to_a_copy),
}


@pytest.mark.parametrize("name, spoil", DAMAGE.values(), ids=DAMAGE)
def test_1_to_8_damage_gives_the_previous_one_with_a_warning_and_an_error_to_who_named_it(manager, name, spoil):
    assert is_whole(manager.load(), 2)
    spoil(file(manager, 2, name))
    with pytest.warns(UserWarning, match="went back to step 1: .*step-00000002"): found = manager.load()
    assert is_whole(found, 1)
    for named in (2, "step-00000002", file(manager, 2).parent):
        with pytest.raises(Damaged, match="step-00000002"): manager.load(named)
    with pytest.raises(Damaged): read_step(file(manager, 2).parent)


def test_7_all_damaged_is_an_error_never_a_fresh_start(manager):
    for step in (1, 2): flip(file(manager, step))
    with pytest.raises(CheckpointError, match="every checkpoint in .* is damaged: .*step-00000002.*step-00000001.*nothing is started anew"): manager.load()


def test_8_a_damaged_best_is_an_error_not_another_one(manager):
    flip(file(manager, 1))
    with pytest.raises(Damaged): manager.load("best")
    assert is_whole(manager.load(), 2)


# --- writing fails --------------------------------------------------------------------------------

def failing(monkeypatch, call, nth, number, when=lambda *args: True):
    "The nth call of an os function fails with this errno; the others work."
    real, count = getattr(os, call), [0]
    def fail(*args, **kwargs):
        if when(*args):
            count[0] += 1
            if count[0] == nth: raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)
    monkeypatch.setattr(os, call, fail)
    return count


FAILURES = {"9 no room at allocation": ("posix_fallocate", 2, errno.ENOSPC), "10 no room in a write": ("pwrite", 3, errno.ENOSPC), "10 no room for the manifest": ("write", 1, errno.ENOSPC),
            "11 EIO at fsync": ("fsync", 1, errno.EIO), "12 EIO at fsync of the manifest": ("fsync", 3, errno.EIO), "13 rename refused": ("rename", 1, errno.EACCES),
            "14 no quota for a folder": ("mkdir", 1, errno.EDQUOT), "9 no room for the second file": ("posix_fallocate", 1, errno.EDQUOT), "11 EIO at fsync of the folder": ("fsync", 4, errno.EIO)}


@pytest.mark.parametrize("call, nth, number", FAILURES.values(), ids=FAILURES)
def test_9_to_14_a_failed_save_leaves_the_old_ones_and_training_goes_on(manager, monkeypatch, call, nth, number):
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="checkpoint of step 3 was not written: .*; training goes on, older ones are intact"):
        count = failing(patch, call, nth, number)
        manager.save(state(3), 3, wait=True)
    assert count[0] >= nth
    assert is_whole(manager.load(), 2) and sorted(p.name for p in manager.dir.iterdir() if p.name.startswith(".tmp")) == []
    if call == "fsync" and nth == 1: assert count[0] == 1, "a failed fsync must not be tried again"
    manager.save(state(4), 4, wait=True)
    assert is_whole(manager.load(), 4)


def test_11_an_fsync_of_the_parent_that_fails_is_told_and_nothing_is_pruned_or_lost(manager, monkeypatch):
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="step 3 was not written"):
        failing(patch, "fsync", 5, errno.EIO)
        manager.save(state(3), 3, wait=True)
    assert is_whole(manager.load(), 3) and manager.steps == [1, 2, 3]
    manager.save(state(3), 3, final=True, wait=True)  # there already: no second write, and no quarrel
    manager.save(state(4), 4, wait=True)
    assert is_whole(manager.load(), 4)


def test_9_the_room_is_looked_at_before_a_byte_is_written_and_the_figures_are_told(manager, monkeypatch):
    real = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((4096, 4096, 10, 10, 300, *real(path)[5:])))
    monkeypatch.setattr(os, "pwrite", lambda *args: pytest.fail("a byte was written"))
    with pytest.warns(UserWarning, match=r"no room for a checkpoint: it takes 8 MB, 1.23 MB are free"): manager.save(state(3, 1_000_000), 3, wait=True)
    assert manager.steps == [1, 2]


def test_15_a_real_limit_on_the_size_of_files(tmp_path):
    code = f"""
import resource, signal, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_faults import CheckpointManager, state, read_latest, is_whole
manager = CheckpointManager({str(tmp_path/'c')!r}, save_interval="1 step")
manager.save(state(1), 1, wait=True)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
manager.save(state(2, 50_000), 2, wait=True)
assert is_whole(read_latest(manager.dir), 1); print("alive", manager.steps, [p.name for p in manager.dir.glob(".tmp*")])"""
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True)
    assert done.stdout == "alive [1] []\n" and "File too large" in done.stderr and "training goes on" in done.stderr, done


def test_16_the_third_failure_in_a_row_stops_and_a_success_between_forgives(manager, monkeypatch):
    broken = [False]
    real = os.pwrite
    def pwrite(*args):
        if broken[0]: raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)
    monkeypatch.setattr(os, "pwrite", pwrite)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(3, 9):
            broken[0] = step % 3 != 2  # two failures, a success
            manager.save(state(step), step, wait=True)
        broken[0] = True
        manager.save(state(9), 9)
        manager.save(state(10), 10)
        with pytest.raises(CheckpointError, match="3 saves in a row failed; the last, of step 11: .*No space left"): manager.save(state(11), 11); manager.wait()
    assert is_whole(manager.load(), 8)


def test_17_short_writes_are_completed(manager, monkeypatch):
    pwrite, write = os.pwrite, os.write
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:max(1, len(data) // 3)], at))
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:max(1, len(data) // 3)]))
    manager.save(state(3), 3, wait=True)
    assert is_whole(manager.load(), 3)


# --- two owners -----------------------------------------------------------------------------------

def test_22_a_second_process_is_refused_and_told_by_whom(manager):
    code = f"from trainbook.checkpoint import CheckpointManager\nCheckpointManager({str(manager.dir)!r}).save({{}}, 9)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"is in use by process {os.getpid()} on" in done.stderr and "RunBusy" in done.stderr
    manager.close()
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_22_a_second_manager_in_this_process_too_until_the_first_is_closed_or_gone(manager):
    second = CheckpointManager(manager.dir)
    with pytest.raises(RunBusy, match="in use in this process"): second.save({}, 3)
    assert is_whole(second.load(), 2)  # reading needs no lock
    manager.close()
    second.save(state(3), 3, wait=True)
    del second
    CheckpointManager(manager.dir).save(state(4), 4, wait=True)  # a notebook cell that is run again
    manager.save(state(5), 5, wait=True)  # and the first may go on after its close


def test_23_the_lock_is_free_at_once_when_its_owner_was_killed_though_its_child_lives(tmp_path):
    code = f"""
import os, time
from trainbook.checkpoint import CheckpointManager
manager = CheckpointManager({str(tmp_path/'c')!r}); manager.save({{}}, 1, wait=True)
child = os.fork()
if child == 0: time.sleep(60); os._exit(0)
print(child, flush=True); time.sleep(60)"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    owner.stdout.close()
    try: CheckpointManager(tmp_path/"c").save(state(2), 2, wait=True)
    finally: os.kill(child, signal.SIGKILL)
    assert steps(tmp_path/"c") == [1, 2]


def test_24_a_takeover_is_seen_at_the_commit(manager):
    (manager.dir/"owner.json").write_text(json.dumps({"token": "other", "pid": 1, "host": "elsewhere"}))
    manager.save(state(3), 3)
    with pytest.raises(LostOwnership, match="taken over by process 1 on elsewhere"): manager.wait()
    assert is_whole(read_latest(manager.dir), 2) and not list(manager.dir.glob(".tmp*"))


def test_24_a_forked_child_may_not_commit(manager):
    if (child := os.fork()) == 0:
        try: manager.save(state(3), 3, wait=True)
        except LostOwnership: os._exit(7)
        finally: os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert manager.steps == [1, 2]


# --- a state that changes, or cannot be kept ------------------------------------------------------

def slow(monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *args: (time.sleep(0.05), real(*args))[1])


def test_25_and_26_what_changes_during_a_save_does_not_leak_in(manager, monkeypatch):
    slow(monkeypatch)
    now, facts = state(3), {"metrics": {"val_loss": 3.0}, "metadata": {"tags": ["a"]}, "config": {"lr": [1]}}
    now["notes"] = {"list": [1], "tuple": ([1],)}
    manager.save(now, 3, **facts)
    now["model"]["w"].fill_(-1), now["optimizer"]["m"].zero_(), now["notes"]["list"].append(2), now["notes"]["tuple"][0].append(2)
    now["optimizer"]["n"] = 0
    facts["metrics"]["val_loss"] = 9, facts["metadata"]["tags"].append("b"), facts["config"]["lr"].append(2)
    found = manager.load()
    assert is_whole(found, 3) and found.state["notes"] == {"list": [1], "tuple": ([1],)}
    assert found["val_loss"] == 3.0 and found["metadata"]["tags"] == ["a"] and found["config"] == {"lr": [1]}


@pytest.mark.parametrize("bad, error, message", [
    ({"model": {"x": object()}}, StateError, "model.x  cannot be kept, found object"), ({"model": {"x": torch.zeros(2).to_sparse()}}, StateError, "model.x .*layout"),
    ({"callbacks": [1, {2, lambda: 0}]}, StateError, "callbacks.1"), (torch.zeros(2), StateError, "a state is a dict of parts"), ({1: {}}, StateError, "a state is a dict of parts")])
def test_27_what_cannot_be_kept_is_refused_at_the_call_with_its_path(manager, bad, error, message):
    with pytest.raises(error, match=message): manager.save(bad, 3)
    assert manager.steps == [1, 2]
    manager.save(state(3), 3, wait=True)


def test_27_a_tensor_among_the_facts_is_refused_and_a_nan_is_kept(manager):
    with pytest.raises(StateError, match="config.w  expected plain data, found a tensor"): manager.save(state(3), 3, config={"w": torch.ones(2)})
    manager.save({"model": {}, "x": [float("nan"), -float("inf")]}, 3, metrics={"val_loss": float("nan"), "acc": torch.tensor(0.5)}, wait=True)
    found = manager.load()
    assert found["val_loss"] != found["val_loss"] and found.state["x"][0] != found.state["x"][0] and found.state["x"][1] == -float("inf") and found["acc"] == 0.5
    assert manager.best == 1


# --- names, clocks, folders -----------------------------------------------------------------------

def test_28_a_committed_step_is_never_written_again(manager):
    before = file(manager, 2).stat().st_mtime_ns, file(manager, 2, "manifest.json").read_bytes()
    manager.save(state(2), 2, final=True, wait=True)
    with pytest.raises(CheckpointError, match="has step 2 already, with another state; save once in a step"): manager.save(state(7), 2)
    assert (file(manager, 2).stat().st_mtime_ns, file(manager, 2, "manifest.json").read_bytes()) == before
    manager.close()
    for earlier in (1, 2):
        with CheckpointManager(manager.dir) as another, pytest.raises(CheckpointError, match=f"has step {earlier} already, this would be step {earlier}; load it and go on"): another.save(state(7), earlier)
    with CheckpointManager(manager.dir) as another, pytest.raises(CheckpointError, match="has step 1 already, this would be step 0"): another.save(state(7), 0)
    assert is_whole(manager.load(1), 1) and is_whole(manager.load(2), 2)


def test_29_clocks_do_not_matter(manager):
    os.utime(file(manager, 1).parent, (4e9, 4e9))
    os.utime(file(manager, 2).parent, (1, 1))
    assert is_whole(manager.load(), 2)


def test_30_other_names_are_none_of_ours(manager):
    for name in ("step-99999999.bak", "step-abc", "xstep-00000009", "step-3", "step-000000009", "step-0000000٣", ".tmp-step-00000009-x", "damaged-step-00000009-x"): (manager.dir/name).mkdir()
    (manager.dir/"step-00000011").write_text("a file")
    (manager.dir/"step-00000012").symlink_to(file(manager, 1).parent)
    manager.close()
    with CheckpointManager(manager.dir, save_interval="1 step") as another:
        assert is_whole(another.load(), 2)
        another.save(state(3), 3, wait=True)
        assert another.steps == [1, 2, 3] and (manager.dir/".tmp-step-00000009-x").exists()


def resealed(path: Path, change) -> None:
    "Changes a manifest and gives it a fitting hash: what an attacker can do."
    manifest = json.loads(path.read_text())
    del manifest["self"]
    change(manifest)
    body = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in manifest.items())
    text = ("{\n" + body).encode()
    path.write_bytes(text + b',\n "self": "' + hashlib.sha256(text).hexdigest().encode() + b'"\n}\n')


HOSTILE = {"a path": lambda m: m["files"].update({"../secret.safetensors": {"bytes": 1, "sha256": "0"}}), "an absolute path": lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "sha256": "0"}}),
           "no files": lambda m: m.pop("files"), "files as a list": lambda m: m.update(files=[1]), "another step": lambda m: m.update(step=9), "no state": lambda m: m.pop("state"),
           "unknown tag": lambda m: m["state"].update(x={"$import": "os"}), "a tensor that is not there": lambda m: m["state"].update(x={"$tensor": "model.zz"}),
           "numpy objects": lambda m: m["state"].update(x={"$array": ["O", [1], {"$tensor": "model.w"}]}),
           "a huge shape": lambda m: m["state"].update(x={"$array": ["f8", [1 << 50], {"$tensor": "model.w"}]}), "a tensor named by a list": lambda m: m["state"].update(x={"$tensor": ["a"]})}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_31_and_32_a_hostile_manifest_with_a_right_hash_is_refused(manager, change):
    (manager.dir/"secret.safetensors").write_bytes(b"x")
    resealed(file(manager, 2, "manifest.json"), lambda m: None)
    assert is_whole(manager.load(2), 2)
    resealed(file(manager, 2, "manifest.json"), change)
    with pytest.raises(Damaged): manager.load(2)


def test_31_a_newer_version_is_said_to_be_one(manager):
    resealed(file(manager, 2, "manifest.json"), lambda m: m.update(version=2))
    with pytest.raises(CheckpointError, match="has version 2, expected 1; a newer trainbook wrote it: pip install -U trainbook"): manager.load()


def test_33_links_are_not_followed(manager, tmp_path, monkeypatch):
    victim = tmp_path/"victim"
    victim.write_text("keep")
    real = os.mkdir
    def plant(path, *args, **kwargs):
        real(path, *args, **kwargs)
        if ".tmp-step" in str(path): os.symlink(victim, Path(path)/"model.safetensors")
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="not written"):
        patch.setattr(os, "mkdir", plant)
        manager.save(state(3), 3, wait=True)
    assert victim.read_text() == "keep" and is_whole(manager.load(), 2)
    (tmp_path/"link").symlink_to(file(manager, 2).parent)
    with pytest.raises(CheckpointError, match="is a link; name the folder that it leads to"): read_step(tmp_path/"link")
    (manager.dir/"best").unlink()
    (manager.dir/"best").symlink_to(victim)
    victim.write_text("step-00000002")
    with pytest.raises(CheckpointError, match="best that names no step"): manager.load("best")


def test_34_a_folder_that_may_only_be_read():
    """For root everything is writable, so root becomes nobody for this."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        with CheckpointManager(Path(folder)/"c") as manager: manager.save(state(1), 1, wait=True)
        os.chmod(manager.dir, 0o555)
        if (child := os.fork()) == 0:
            try:
                if os.geteuid() == 0: os.seteuid(65534)
                assert is_whole(read_latest(manager.dir), 1)
                CheckpointManager(manager.dir).save(state(2), 2)
            except PermissionError as error: os._exit(7 if str(manager.dir) in str(error) else 8)
            finally: os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        os.chmod(manager.dir, 0o755)


def test_36_readers_during_pruning_always_get_a_whole_one(tmp_path):
    with CheckpointManager(tmp_path/"c", save_interval="1 step", keep_last_n=1) as manager:
        manager.save(state(1), 1, wait=True)
        wrong, count, over = [], [0], threading.Event()
        def read():
            while not over.is_set():
                try:
                    found = read_latest(manager.dir)
                    if not is_whole(found, found["step"]): wrong.append(found)
                    count[0] += 1
                except Exception as error: wrong.append(error)
        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers: reader.start()
        for step in range(2, 60): manager.save(state(step), step)
        manager.wait()
        over.set()
        for reader in readers: reader.join()
    assert not wrong and count[0] > 20


def test_36_a_step_that_is_pruned_between_listing_and_reading(manager, monkeypatch):
    import trainbook.stepfolder as stepfolder
    real = stepfolder.read_step
    def pruned_first(path, only=None):
        if path.name == "step-00000002": stepfolder.discard(path)
        return real(path, only)
    monkeypatch.setattr(stepfolder, "read_step", pruned_first)
    assert is_whole(read_latest(manager.dir), 1)  # and no warning: nothing is damaged


def test_39_out_of_memory_for_the_copy(manager, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(torch, "empty", lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError()))
        manager.save(state(3, 7), 3)
    assert is_whole(manager.load(), 2)
    manager.save(state(3), 3, wait=True)
    assert is_whole(manager.load(), 3)


@pytest.mark.parametrize("spoil", [flip, lambda path: os.truncate(path, 10)], ids=["flipped", "truncated"])
def test_40_training_that_comes_to_a_damaged_step_again_sets_it_aside(manager, spoil):
    manager.close()
    spoil(file(manager, 2))
    with CheckpointManager(manager.dir, save_interval="1 step") as another:
        with pytest.warns(UserWarning, match="went back to step 1"): assert is_whole(another.load(), 1)
        with pytest.warns(UserWarning, match="set aside as damaged-step-00000002"): another.save(state(2), 2, wait=True)
        assert is_whole(another.load(), 2) and len(list(manager.dir.glob("damaged-step-00000002-*"))) == 1


def test_40_a_damaged_step_beyond_is_out_of_the_way_before_an_earlier_one_is_saved(manager):
    manager.save(state(5), 5, wait=True)
    flip(file(manager, 5))
    with CheckpointManager(manager.dir, save_interval="1 step") as another:
        manager.close()
        with pytest.warns(UserWarning, match="set aside as damaged-step-00000005"): another.save(state(3), 3, wait=True)
        assert is_whole(another.load(), 3)
