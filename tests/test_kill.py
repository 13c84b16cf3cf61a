"""Real signals to real processes, at any instant of a save and before and inside each of its system calls: the last whole checkpoint loads."""
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from disk import EXPORT, open_seen, same, state

from trainbook import checkpoint, foreign
from trainbook.checkpoint import CheckpointManager
from trainbook.load import load_checkpoint
from trainbook.lock import Lock, holder
from trainbook.stepfolder import read_latest


LARGE = 1 << 18  # 3 MB


def manage(folder: Path, **more) -> CheckpointManager: return CheckpointManager(folder, save_interval="1 step", keep_last_n=1, **more)


def left_over(folder: Path) -> list[str]: return sorted(name for name in os.listdir(folder) if name.startswith((".tmp-", ".trash-")))


def fork(work) -> int:
    "A process that does this work and nothing else; its number."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 counts torch's threads, which the child does not use
        if child := os.fork(): return child
    try:
        torch.set_num_threads(1)
        work()
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
    finally: os._exit(1)


def ended(child: int) -> int: return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check_after(folder: Path, at_least: int, at_most: int, size: int = 16) -> int:
    "latest and best are whole and right, nobody holds the lock, and training goes on in a swept folder; the step that was there."
    found = read_latest(folder)  # a warning that it went back past damage would be an error here
    step = found.facts["step"]
    assert at_least <= step <= at_most and same(found.state, step)
    best = load_checkpoint("best", within=folder, quiet=True)
    assert best.facts["step"] in (at_least, step) and same(best.state, best.facts["step"])
    assert holder(folder) is None
    Lock(folder).release()
    with manage(folder) as manager:
        manager.save(state(step + 1, size), step + 1, metrics={"val_loss": 1 / (step + 1)}, wait=True)
        assert not [name for name in left_over(folder) if "-step-" in name]
        assert same(manager.load().state, step + 1) and same(manager.load("best").state, step + 1)
        assert manager.steps == [step, step + 1]
    return step


# --- at any instant -------------------------------------------------------------------------------------------------------------------

def train(folder: Path, tell: int) -> None:
    "Goes on from what is there and saves for ever; tells when a save begins and when it is over."
    with manage(folder) as manager:
        step = manager.latest or 0
        assert not step or same(manager.load().state, step)
        while True:
            step += 1
            os.write(tell, b"begun %d %d\n" % (step, time.monotonic_ns()))
            manager.save(state(step, LARGE), step, metrics={"val_loss": 1 / step}, wait=True)
            os.write(tell, b"over %d %d\n" % (step, time.monotonic_ns()))


def kill_inside(folder: Path, fraction: float) -> tuple[int, int, bool]:
    "Kills a trainer at this fraction of its fourth save: the last step that was over, the last that was begun, and was it inside a save?"
    read, write = os.pipe()
    child = fork(lambda: train(folder, write))
    os.close(write)
    words = []
    with open(read) as told:
        while len(words) < 7: words.append(told.readline().split())
        times = [int(word[2]) for word in words]
        time.sleep(fraction * statistics.median((times[3] - times[2], times[5] - times[4])) / 1e9)
        os.kill(child, signal.SIGKILL)
        words += [line.split() for line in told]
    assert ended(child) == -signal.SIGKILL
    last = lambda kind: max(int(word[1]) for word in words if word[0] == kind)
    return last("over"), last("begun"), words[-1][0] == "begun"


def kills(folder: Path, number: int) -> None:
    "That many kills, spread over the whole of a save, in one folder that goes on and on."
    rng, inside, torn, new = random.Random(0), 0, 0, 0
    for n in rng.sample(range(number), number):
        over, begun, within = kill_inside(folder, (n + rng.random()) / number)
        inside, torn = inside + within, torn + any(name.startswith(".tmp-step-") for name in left_over(folder))
        new += check_after(folder, over, begun, LARGE) == begun
    print(f"{number} kills, {inside} inside a save, {torn} left a part of a checkpoint, {new} came after the commit")
    assert inside >= number * 0.8 and torn >= number * 0.2


def test_kills_at_any_instant_of_a_save(tmp_path): kills(tmp_path/"main", 16)


@pytest.mark.soak
def test_many_kills_at_any_instant_of_a_save(tmp_path): kills(tmp_path/"main", 100)


# --- at every call --------------------------------------------------------------------------------------------------------------------

CALLS = ("open", "mkdir", "posix_fallocate", "pwrite", "write", "fsync", "rename", "unlink", "rmdir")


@pytest.fixture
def before(tmp_path):
    "A folder after two saves; the third prunes, and moves best, final and the exported files."
    with manage(tmp_path/"before", export=EXPORT) as manager:
        for step in (1, 2): manager.save(state(step), step, metrics={"val_loss": 1 / step}, wait=True)
    return tmp_path/"before"


def life(folder: Path, die_at: int = 0, torn: bool = False, by: signal.Signals = signal.SIGKILL) -> int:
    "A process that makes the third save and is killed before its n-th call, or in the middle of it; its exit code. `calls` gets their names."
    def mortal(name: str, real):
        def call(*words, **more):
            if name == "open" and not words[1] & os.O_CREAT: return real(*words, **more)
            made.append(f"{name} {words[0]}")
            if len(made) == die_at:
                if torn and name in ("write", "pwrite"): real(words[0], bytes(words[1])[:len(words[1]) // 2], *words[2:])
                if torn and name == "posix_fallocate": real(*words[:2], words[2] // 2)
                os.kill(os.getpid(), by)
            return real(*words, **more)
        return call
    def work():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        foreign.open, checkpoint.git_state = open_seen, lambda: None
        for name in CALLS: setattr(os, name, mortal(name, getattr(os, name)))
        with manage(folder, export=EXPORT) as manager: manager.save(state(3), 3, metrics={"val_loss": 1 / 3}, final=True, wait=True)
        (folder/"calls").write_text("\n".join(made))
    made: list[str] = []
    return ended(fork(work))


def exported(folder: Path) -> set[int]:
    "The steps that the exported files hold, each of them whole."
    best, weights = torch.load(folder/"best_model.pth", weights_only=True), safetensors.torch.load_file(folder/"weights.safetensors")
    assert same({"model": best["model_state_dict"], "optimizer": best["optimizer_state_dict"]}, best["step"])
    assert weights["w"].shape == (16,) and len(weights["w"].unique()) == 1
    return {best["step"], int(weights["w"][0])}


@pytest.mark.parametrize("torn, by", [(False, signal.SIGKILL), (True, signal.SIGKILL), (True, signal.SIGTERM)], ids=["before", "halfway", "SIGTERM"])
def test_a_kill_at_every_call(before, tmp_path, torn, by):
    """Old until the rename, new from then on; nothing else is ever seen."""
    assert life(shutil.copytree(before, tmp_path/"unhurt")) == 0
    calls = (tmp_path/"unhurt"/"calls").read_text().splitlines()
    commit, = [n for n, call in enumerate(calls, 1) if call.startswith("rename") and ".tmp-step-" in call]
    print(f"{len(calls)} calls, the commit is number {commit}")
    assert {call.split()[0] for call in calls} == set(CALLS) and len(calls) > 50
    for n in range(1, len(calls) + 1):
        folder = shutil.copytree(before, tmp_path/str(n))
        assert life(folder, n, torn, by) == -by, calls[n - 1]
        assert exported(folder) <= {2, 3}, calls[n - 1]
        assert check_after(folder, 2, 3) == (2 if n <= commit else 3), calls[n - 1]


def test_nothing_is_left_over_after_a_kill(before, tmp_path):
    assert life(shutil.copytree(before, tmp_path/"unhurt")) == 0
    for n, call in enumerate((tmp_path/"unhurt"/"calls").read_text().splitlines(), 1):
        folder = shutil.copytree(before, tmp_path/str(n))
        life(folder, n, torn=True)
        check_after(folder, 2, 3)
        assert left_over(folder) == [], call


# --- ends of a process ----------------------------------------------------------------------------------------------------------------

def program(folder: Path, body: str) -> subprocess.CompletedProcess:
    "A program of its own that saved step 1; from then on each fsync takes a while."
    begin = f"""
import os, sys, time
from trainbook.checkpoint import CheckpointManager
from trainbook.lock import LostOwnership, holder
sys.path.insert(0, {os.path.dirname(__file__)!r})
from disk import state
manager = CheckpointManager({str(folder)!r}, save_interval="1 step")
manager.save(state(1), 1, metrics={{"val_loss": 1}}, wait=True)
fsync = os.fsync
def slow(fd): time.sleep(0.05); fsync(fd)
os.fsync = slow
manager.save(state(2), 2, metrics={{"val_loss": 0.5}})
assert manager.latest == 1  # the save is on its way
"""
    return subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", begin + body], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("body, code", [("", 0), ("raise ValueError('no more')", 1), ("sys.exit(3)", 3), ("del manager", 0)])
def test_a_program_that_ends_finishes_its_save(body, code, tmp_path):
    """No wait(), no close(): the interpreter waits for the writer, and the exit code is the program's own."""
    done = program(tmp_path/"main", body)
    assert done.returncode == code and "checkpoint" not in done.stderr, done.stderr
    assert check_after(tmp_path/"main", 2, 2) == 2


@pytest.mark.parametrize("child", ["sys.exit(7)", """
try: manager.save(state(9), 9, wait=True)
except LostOwnership: manager.close(); sys.exit(7)
"""], ids=["exits", "saves"])
def test_a_fork_in_the_middle_of_a_save(child, tmp_path):
    """The parent's save, lock and folder are none of the child's: it may not save, and its exit, with all that Python does then, harms nothing."""
    indented = "\n".join("    " + line for line in child.strip().splitlines())
    done = program(tmp_path/"main", f"""
if (child := os.fork()) == 0:
{indented}
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert holder(manager.dir)["pid"] == os.getpid()
manager.wait()
assert manager.latest == 2
manager.save(state(3), 3, metrics={{"val_loss": 0.3}}, wait=True)
""")
    assert done.returncode == 0, done.stderr
    assert check_after(tmp_path/"main", 3, 3) == 3


def test_a_terminated_program_leaves_old_or_new(tmp_path):
    """SIGTERM with nobody to handle it, while the writer is at work."""
    done = program(tmp_path/"main", "import signal; time.sleep(0.03); os.kill(os.getpid(), signal.SIGTERM)")
    assert done.returncode == -signal.SIGTERM and any("-step-" in name for name in left_over(tmp_path/"main"))
    assert check_after(tmp_path/"main", 1, 1) == 1
