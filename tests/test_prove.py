"""Two runs compared bit by bit, and trainings in processes of their own that are killed, resumed and compared: what is equal, what is not, what fails."""
import os
import random
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch

from trainbook import prove as module
from trainbook.checkpoint import CheckpointManager
from trainbook.config import Config
from trainbook.prove import Difference, compare_runs, prove
from trainbook.run import Run
from trainbook.source import ConfigError

pytestmark = pytest.mark.usefixtures("here")


def quiet(text: str) -> None: pass


# --- two runs -------------------------------------------------------------------------------------------------------------------------

def state() -> dict:
    "Something of everything that a trainer keeps."
    weight = torch.arange(12.0).reshape(3, 4)
    return {"model": {"layer.weight": weight, "half": torch.ones(2, dtype=torch.bfloat16), "none": torch.zeros(0, 3), "scale": torch.tensor(float("nan"))},
            "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": weight / 3}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]},
            "rng": {"torch": torch.arange(8, dtype=torch.uint8), "python": [3, torch.arange(5), None]},
            "trainer": {"step": 4, "batch": 4, "loader": {"at": 32}, "callbacks": {"Count": {"seen": numpy.arange(3)}}, "best": {"value": 0.0}}}


def made(name: str, change=lambda state, rows: None, stages=("first", "dense"), upto=4, best=2) -> Path:
    "A run with some stages, in the last of which something is changed."
    run = Run.create(Config.from_dict({"save_dir": name}))
    with run.write() as ledger:
        for stage in stages:
            kept, rows = state(), [{"event": "step", "step": n, "loss": 1 / n, "bad": float("nan")} for n in range(1, upto + 1)]
            rows.append({"event": "epoch", "step": upto, "epoch": 1, "seconds": time.time()})
            if stage == stages[-1]: change(kept, rows)
            ledger.start(stage)
            for row in rows: ledger.log(row.pop("event"), row.pop("step"), **row)
            with CheckpointManager(run.folder/stage, ledger=ledger, metric="loss") as manager:
                for step in (2, upto): manager.save(kept, step, metrics={"loss": 0.1 if step == best else 0.5}, wait=True)
        ledger.end("finished")
    return run.folder


def test_equal_but_for_the_clock():
    a = made("a")
    time.sleep(0.01)
    assert compare_runs(a, made("b")) == [] == compare_runs(str(a), "a")


def bits(state, rows): state["model"]["layer.weight"][1:, 2] += 0.5
def lowest_bit(state, rows): state["model"]["layer.weight"].view(torch.int32)[2, 3] ^= 1
def zero(state, rows): state["trainer"]["best"]["value"] = -0.0
def nan(state, rows): state["model"]["scale"].view(torch.int32).bitwise_xor_(1)
def half(state, rows): state["model"]["half"][1] = 1.0078125
def dtype(state, rows): state["model"]["none"] = torch.zeros(0, 4)
def extra(state, rows): state["model"]["new.weight"] = torch.zeros(2)
def moment(state, rows): state["optimizer"]["state"][0]["exp_avg"][0, 1] = 7
def count(state, rows): state["optimizer"]["state"][0]["step"] += 1
def beta(state, rows): state["optimizer"]["param_groups"][0]["betas"] = (0.9, 0.99)
def python(state, rows): state["rng"]["python"][1][3] = 9
def place(state, rows): state["trainer"]["loader"]["at"] = 24
def callback(state, rows): state["trainer"]["callbacks"]["Count"]["seen"][2] = 5
def value(state, rows): rows[2]["loss"] = 0.25
def lost(state, rows): del rows[1]
def more(state, rows): rows.append({"event": "eval", "step": 4, "val_loss": 1.0})


@pytest.mark.parametrize("change, item, what", [
    (bits, "weights", "dense step 4: model_state_dict layer.weight differs in 2 of 12 numbers, first at [1, 2]: 6.0 / 6.5"),
    (lowest_bit, "weights", "dense step 4: model_state_dict layer.weight differs in 1 of 12 numbers, first at [2, 3]: 11.0 / 11.000001"),
    (zero, "state", "dense step 4: trainer best.value is 0.0 / -0.0"),
    (nan, "weights", "dense step 4: model_state_dict scale is nan / nan"),
    (half, "weights", "dense step 4: model_state_dict half differs in 1 of 2 numbers, first at [1]: 1.0 / 1.0078125"),
    (dtype, "weights", "dense step 4: model_state_dict none is float32 (0, 3) / float32 (0, 4)"),
    (extra, "weights", "dense step 4: model_state_dict new.weight is (not there) / float32 (2,)"),
    (moment, "optimizer", "dense step 4: optimizer_state_dict state.0.exp_avg differs in 1 of 12 numbers, first at [0, 1]: 0.33333334 / 7.0"),
    (count, "optimizer", "dense step 4: optimizer_state_dict state.0.step is 3.0 / 4.0"),
    (beta, "optimizer", "dense step 4: optimizer_state_dict param_groups.0.betas.1 is 0.999 / 0.99"),
    (python, "RNG", "dense step 4: rng python.1 differs in 1 of 5 numbers, first at [3]: 3 / 9"),
    (place, "loader", "dense step 4: trainer loader.at is 32 / 24"),
    (callback, "state", "dense step 4: trainer callbacks.Count.seen differs in 1 of 3 numbers, first at [2]: 2 / 5"),
    (value, "log", "dense step 3: loss in the log's step row is 0.3333333333333333 / 0.25"),
    (lost, "log", "dense step 2: the next row of the log is step at 2 / step at 3"),
    (more, "log", "dense step 4: the next row of the log is (not there) / eval at 4")], ids=lambda one: getattr(one, "__name__", ""))
def test_a_planted_fault_is_found_by_its_name(change, item, what):
    found = compare_runs(made("a"), made("b", change))
    assert [(one.item, repr(one)) for one in found] == [(item, what)]


def test_the_first_of_each_item_in_an_order_that_helps():
    def everywhere(state, rows):
        for change in (value, place, count, beta, extra, bits, python, callback): change(state, rows)
    found = compare_runs(made("a"), made("b", everywhere))
    assert [one.item for one in found] == ["weights", "optimizer", "RNG", "loader", "state", "log"] and "layer.weight" in found[0].what


def test_other_ends_stages_and_best():
    a = made("a")
    assert [one.what for one in compare_runs(a, made("b", upto=3))] == ["the last checkpoint is of step 4 / 3", "the next row of the log is step at 4 / epoch at 3"] * 2
    assert compare_runs(a, made("c", stages=["first"])) == [Difference("dense", 0, "log", "the stage is only in a")]
    assert [one.what for one in compare_runs(a, made("d", best=4))][0] == "the best step is 2 / 4"


def test_a_damaged_checkpoint_is_a_difference():
    a, b = made("a"), made("b")
    data = bytearray((b/"dense"/"step-00000004"/"model.safetensors").read_bytes())
    data[-1] ^= 1
    (b/"dense"/"step-00000004"/"model.safetensors").write_bytes(data)
    assert [(one.stage, one.item) for one in compare_runs(a, b)] == [("dense", "checkpoint")] and "sha256 differs" in compare_runs(a, b)[0].what


def test_arrays_that_a_stage_wrote():
    a, b = made("a"), made("b")
    for run in (a, b):
        (run/"dense"/"features").mkdir()
        numpy.savez(run/"dense"/"features"/"0001.npz", x=numpy.arange(5))
        time.sleep(0.01)
    (b/"dense"/"notes.txt").write_text(time.ctime())
    assert compare_runs(a, b) == []
    numpy.savez(b/"dense"/"features"/"0001.npz", x=numpy.arange(5)[::-1])
    assert compare_runs(a, b) == [Difference("dense", 4, "files", "features/0001.npz is not the same")]
    os.remove(b/"dense"/"features"/"0001.npz")
    assert compare_runs(a, b) == [Difference("dense", 4, "files", "features/0001.npz is only in a")]


# --- processes ------------------------------------------------------------------------------------------------------------------------

# two extractions, of 25 files each, that go on where they were; without torch, so that a life begins in no time
TOY = '''
import os, sys, time
from pathlib import Path
import numpy
from trainbook.config import Config
from trainbook.run import Run

folder, faults = Path(sys.argv[1]), sys.argv[2:]
goes_on = (folder/"run.json").exists()
if goes_on and "refuses" in faults: raise SystemExit("this one\\ncannot go on")
if goes_on and "hangs" in faults: print("waiting for a lock"); time.sleep(60)
run = Run(folder) if goes_on else Run.create(Config.from_dict({"save_dir": str(folder)}))
with run.write() as ledger:
    begun = {row["stage"] for row in run.story().rows}
    for stage in ("extract", "index"):
        if stage == "extract" and "index" in begun: continue
        (folder/stage).mkdir(exist_ok=True)
        done = len([*(folder/stage).glob("[!.]*.npy")])
        if stage in begun: ledger.resume(stage, done, ledger.position)
        else: ledger.start(stage)
        lives = 0
        for n in range(done + 1, 26):
            time.sleep(0.01)
            lives += 1
            ledger.log("step", n, value=lives if "counts" in faults else n, seconds=time.time())
            ledger.flush()
            data = numpy.frombuffer(os.urandom(8), "u1") if "urandom" in faults and n == 20 else numpy.full(8, n, "u1")
            numpy.save(folder/stage/".tmp.npy", data)
            os.rename(folder/stage/".tmp.npy", folder/stage/f"{n:04}.npy")
            if "saves" in faults and n % 10 == 0:  # what a save looks like from outside
                ledger.log("checkpoint", n)
                saving = folder/stage/f".tmp-step-{os.getpid()}-{n}"
                saving.mkdir()
                time.sleep(0.1)
                saving.rmdir()
    ledger.end("finished")
'''


@pytest.fixture
def toy(here):
    (here/"toy.py").write_text(TOY)
    return lambda *faults: {"train": ["PYTHON", "toy.py", "FOLDER", *faults], "resume": ["PYTHON", "toy.py", "FOLDER", *faults], "say": quiet}


def left() -> list[str]: return [path.name for path in Path().glob("prove-*")]


def test_equal_under_ten_kills_in_two_stages(toy):
    told = []
    proof = prove(kills=10, **{**toy(), "say": told.append})
    assert proof.equal and len(proof.kills) == 10 and proof.ends == {"extract": 25, "index": 25}, proof
    assert {one.stage for one in proof.kills} == {"extract", "index"} and not left()
    assert told[0].startswith("reference: extract step 25, index step 25 after ") and [text[:10] for text in told if text.startswith("kill")] == [f"kill {n} of "[:10] for n in range(1, 11)]
    assert "proved: 10 kills" in str(proof) and len(str(proof).splitlines()) == 12 and "the same bits" in told[-1]


def test_every_third_kill_strikes_into_a_save(toy):
    proof = prove(kills=4, **toy("saves"))
    assert proof.equal and proof.kills[2].in_save and "inside a save" in str(proof).splitlines()[3], proof
    assert proof.kills[2].step in (9, 10, 19, 20) and proof.kills[2].went_on, proof


def test_what_a_life_forgets_is_found_and_told_from_what_is_never_the_same(toy):
    proof = prove(kills=2, **toy("counts"))
    assert not proof.equal and proof.repeats and {one.item for one in proof.differences} == {"log"}
    assert "value in the log's step row is" in str(proof) and "no state_dict() holds" in str(proof) and [proof.folder.name] == left()
    assert compare_runs(proof.folder/"reference", proof.folder/f"copy-{proof.kills[-1].copy}") == proof.differences


def test_what_is_never_the_same(toy):
    proof = prove(kills=1, **toy("urandom"))
    assert not proof.equal and proof.repeats is False and repr(proof.differences[0]) == "extract step 0: 0020.npy is not the same"
    assert "it differs without a kill as well" in str(proof)


def test_a_resume_that_fails_is_shown_with_its_last_lines(toy):
    proof = prove(kills=2, **toy("refuses"))
    assert not proof.equal and len(proof.kills) == 1
    assert "copy-1-resume-to-kill-2 ended with exit code 1; the last that it said:\n    this one\n    cannot go on\n" in str(proof)
    assert (proof.folder/"copy-1-resume-to-kill-2.txt").read_text() == "this one\ncannot go on\n"


def test_a_resume_that_hangs_is_ended_and_shown(toy):
    began = time.monotonic()
    proof = prove(kills=1, limit=2, **toy("hangs"))
    assert "copy-1-resume-to-its-end hangs: neither a row nor a word for 2 s; the last that it said:\n    waiting for a lock" in str(proof)
    assert time.monotonic() - began < 30 and not proof.equal


@pytest.mark.parametrize("code, said", [
    ("print('no'); raise SystemExit(3)", "reference ended with exit code 3; the last that it said:\n    no\n"),
    ("import os; os.kill(os.getpid(), 9)", "reference ended with SIGKILL, which did not come from here, and said nothing"),
    ("print('\\x1b[31m')", "reference ended well, but there is no run in its folder")])
def test_a_reference_that_fails(here, code, said):
    proof = prove(train=["PYTHON", "-c", code], say=quiet)
    assert not proof.equal and not proof.kills and said in str(proof) and "\x1b" not in str(proof) and left()


def test_nothing_is_left_alive(here):
    code = "import os, subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); open('pids', 'w').write(f'{os.getpid()} {child.pid}'); time.sleep(60)"
    assert "hangs" in prove(train=["PYTHON", "-c", code], limit=1, say=quiet).failure
    for pid in map(int, Path("pids").read_text().split()):
        stat = Path(f"/proc/{pid}/stat")
        for _ in range(100):
            if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z": break
            time.sleep(0.05)
        else: raise AssertionError(f"{pid} lives")


def test_interrupted_it_leaves_nothing(toy):
    def stop(text): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): prove(kills=1, **{**toy(), "say": stop})
    assert not left()


def test_a_training_that_is_over_too_soon_proves_nothing(monkeypatch):
    monkeypatch.setattr(module._Trial, "_live", lambda self, name, *words: made(self.folder/name) and None)
    proof = prove(kills=2, say=quiet)
    assert not proof.equal and "0 of 2 kills came before the training was over" in str(proof)
    with pytest.raises(ConfigError, match="kills  found 0"): prove(kills=0)


def test_the_commands_of_the_command_line(monkeypatch):
    started = []
    def start(words, **how): started.append(words); raise OSError
    monkeypatch.setattr(module.subprocess, "Popen", start)
    with pytest.raises(OSError): prove("my.yaml")
    assert started[0][:6] == [sys.executable, "-m", "trainbook", "train", "--config", "my.yaml"] and started[0][7].endswith("/reference") and not left()


def test_moments_are_spread_and_the_same_for_a_seed():
    course = module._Course(Run(made("a")).story())
    course.rows[0]["time"], course.rows[-1]["time"] = 0.0, 100.0
    moments = course.moments(20, random.Random(3))
    assert moments == course.moments(20, random.Random(3)) != course.moments(20, random.Random(4)) and [int(one // 5) for one in moments] == [*range(20)]


# --- the trainer ----------------------------------------------------------------------------------------------------------------------

TRAINING = '''
import random, sys, time, numpy, torch
from torch.utils.data import Dataset, TensorDataset
from trainbook import Callback, Trainer

class Points(Dataset):
    def __len__(self): return 400
    def __getitem__(self, i): return torch.full((4,), i / 400) + 0.1 * float(numpy.random.randn()) + 0.1 * torch.rand(4), i % 3

class Slow(Callback):
    def step_end(self, trainer): time.sleep(0.004)

class Draws(Callback):
    "Once in a life, which is once too often in a life that goes on."
    def fit_start(self, trainer):
        if trainer.step: random.random()

torch.manual_seed(0)
data, draws = (TensorDataset(torch.rand(400, 4), torch.arange(400) % 3), [Draws()]) if "draws" in sys.argv else (Points(), [])

model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(16, 3))
Trainer(model, data, loss="cross_entropy", batch_size=8, epochs=4, lr=1e-2, save_interval="40 steps", save_dir=sys.argv[1], quiet=True,
        callbacks=[Slow(), *draws], config={"run": {"on_existing": "resume"}}).train()
'''


@pytest.fixture
def training(here):
    (here/"own.py").write_text(TRAINING)
    return lambda *faults: {"train": ["PYTHON", "own.py", "FOLDER", *faults], "resume": ["PYTHON", "own.py", "FOLDER", *faults], "say": quiet}


def test_a_training_under_kills_of_which_one_is_aimed_at_a_save(training):
    proof = prove(kills=3, **training())
    assert proof.equal and len(proof.kills) == 3 and proof.ends == {"train": 200} and {one.went_on for one in proof.kills} - {"train step 0"}, proof


def test_a_generator_that_moved_in_a_resume(training):
    proof = prove(kills=1, **training("draws"))
    assert [one.item for one in proof.differences] == ["RNG"] and proof.repeats and "train step 200: rng python" in str(proof), proof
