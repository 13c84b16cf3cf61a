"""Launched runs: real processes, which real signals, a dying parent and a closed terminal do not reach; told, stopped, gone on with; and how a launch fails."""
import importlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import trainbook.cells as cells
from trainbook import registry
from trainbook.cells import module
from trainbook.cli import main
from trainbook.config import Config
from trainbook.ledger import read_rows
from trainbook.lock import Lock, RunBusy, holder
from trainbook.run import Run, RunError, runs
from trainbook.source import ConfigError
from trainbook.trust import NotTrusted

launch, launches = importlib.import_module("trainbook.launch").launch, importlib.import_module("trainbook.launch")

ROOT = Path(__file__).resolve().parent.parent
PROJECT = '''
import os, signal, time
import torch
from torch.utils.data import Dataset, TensorDataset

class Points(Dataset):
    read = 0
    def __init__(self, count, pause, seed=1):
        self.pause, self.x = pause, torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
        self.y = (self.x[:, 0] * self.x[:, 1] > 0).long()
    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        Points.read += 1
        if os.environ.get("DIE") == str(Points.read): os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.pause)
        return self.x[i] + 0.1 * torch.randn(2), self.y[i]

def net(width=8, arms=2): return torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(width, arms))
def data(count=64, pause=0.0): return {"train": Points(count, pause), "val": TensorDataset(torch.randn(16, 2, generator=torch.Generator().manual_seed(2)), torch.arange(16) % 2)}
def killed(): os.kill(os.getpid(), signal.SIGKILL)
def broken():
    raise ValueError("no such column")
'''
CONFIG = '''
run: {name: far}
model: {name: "project:net"}
data: {name: "project:data"}
training: {lr: 1e-2, epochs: 2, batch_size: 8, save_interval: 3 steps, loss: cross_entropy}
logging: {every: 2 steps}
'''
STAGES = CONFIG + '''
stages:
  - name: coarse
  - {name: fine, init_from: coarse, model: {arms: 3}, allow: ["3.*"]}
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder with a project and a config; whatever trains there still is ended."
    (tmp_path/"project.py").write_text(PROJECT)
    (tmp_path/"far.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path/"home"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(registry, "_BUILDERS", {kind: {} for kind in registry.KINDS})
    for name in ("_CELLS", "_BROUGHT"): monkeypatch.setattr(cells, name, {})
    before = set(sys.modules)
    yield tmp_path
    for run in [*runs(tmp_path/"runs"), *runs(tmp_path)]:
        if (who := holder(run.folder)) and who["pid"] != os.getpid(): os.kill(who["pid"], signal.SIGKILL)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith((str(tmp_path), str(cells._session()))): del sys.modules[name]


def until(happens, seconds=60.0):
    end = time.monotonic() + seconds
    while not (found := happens()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return found


def steps(run: Run) -> list[int]: return [row["step"] for row in run.story().of("step")]
def ended(run: Run): until(lambda: run.status not in ("running", "new") and holder(run.folder) is None); return run.status
def told(run: Run, command: str): return any(row["command"] == command for row in run.story().of("control"))


# --- it outlives --------------------------------------------------------------------------------------------------------------------------

PARENT = '''
import signal, sys, time
signal.signal(signal.SIGHUP, lambda *_: print("hung up", flush=True))
from trainbook import launch
run = launch("far.yaml", data={"pause": 0.005}, epochs=10_000)
print(run.folder, flush=True)
while True:
    try: time.sleep(60)
    except KeyboardInterrupt: print("interrupted", flush=True)
'''


def test_it_outlives_the_stop_button_the_terminal_and_the_kernel(here):
    """And one can watch it, tell it, stop it from another process; nobody else may train it meanwhile."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, start_new_session=True)
    try:
        run = Run(parent.stdout.readline().strip())
        pid = holder(run.folder)["pid"]
        assert run.status == "running" and run.left() == ["train"] and run.info["cwd"] == os.readlink(f"/proc/{pid}/cwd") == str(here)
        about = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        assert about[1] == str(parent.pid) and about[3] == str(pid) and about[4] == "0"  # of the parent; a session of its own, without a terminal
        files = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
        assert {os.readlink(f"/proc/{pid}/fd/{n}") for n in (0, 1, 2)} == {"/dev/null", str(here/run.folder/"launch.log")}
        assert not [name for name in files if name.startswith(("/dev/pts", "/dev/tty"))] and os.readlink(f"/proc/{parent.pid}/fd/1") not in files and os.readlink(f"/proc/{parent.pid}/fd/0") not in files
        for number, word in ((signal.SIGINT, "interrupted"), (signal.SIGHUP, "hung up")):
            os.killpg(parent.pid, number)
            assert parent.stdout.readline().strip() == word
        os.killpg(parent.pid, signal.SIGKILL)
        assert parent.communicate(timeout=10)[0] == ""  # the pipe ends with the parent: nobody else has it
    finally: parent.kill()
    seen = len(steps(run))
    until(lambda: len(steps(run)) > seen + 2)
    assert holder(run.folder)["pid"] == pid and not run.story().rows[-1]["event"] == "end"
    assert f"by process {pid}" in repr(launches.Launched(run.folder))
    with pytest.raises(RunBusy, match=f"is in use by process {pid} on "): launch(run.folder)
    def stands_still(): seen = len(steps(run)); time.sleep(0.2); return len(steps(run)) == seen
    run.tell("pause"); until(lambda: told(run, "pause")); until(stands_still)  # once it has saved
    assert run.status == "running"
    assert main(["tell", str(run.folder), "resume"]) == 0 == main(["tell", str(run.folder), "set", "lr=1e-4"]) == main(["watch", str(run.folder), "--once"])
    until(lambda: told(run, "set"))
    assert main(["tell", str(run.folder), "stop"]) == 0 and ended(run) == "stopped"
    assert "epoch" in (run.folder/"launch.log").read_text() and holder(run.folder) is None
    until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text())


# --- it is a run like any other -----------------------------------------------------------------------------------------------------------

def test_all_stages_killed_gone_on_with_and_the_same_bits(here, monkeypatch, capsys):
    """No zombie is left; a run that is finished says so."""
    from test_stages import came_to
    from trainbook.stages import train_stages
    Path("far.yaml").write_text(STAGES)
    monkeypatch.setenv("DIE", "170")  # in the second stage
    run = launch("far.yaml", save_dir="far", weight_decay=0.02)
    monkeypatch.delenv("DIE")
    straight = train_stages("far.yaml", save_dir="straight", weight_decay=0.02, quiet=True)
    assert ended(run) == "interrupted" and run.left() == ["fine"]
    run = launch(run)
    assert ended(run) == "finished" and run.config.training.weight_decay == 0.02
    pids = [row["pid"] for row in read_rows(run.folder)[0] if "pid" in row]
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 10)  # who trained it has been asked how it ended
    assert came_to(run.folder) == came_to(straight.folder)
    capsys.readouterr()
    again = launch("far")
    assert "far has finished. To go on" in capsys.readouterr().out and again == run and "trainbook show far" in repr(again)


NET = "import torch, helpers\nfrom trainbook.registry import register\n@register('model')\ndef cell_net(width=4):\n    return torch.nn.Sequential(*helpers.layers(width){})\n"


def test_the_code_of_a_notebook_goes_along(here, capsys, tmp_path_factory):
    """A cell; a module that it imports from a folder that was put on sys.path; one that registers a plain name. A cell that is mended is what the run goes on with."""
    far, further = tmp_path_factory.mktemp("far"), tmp_path_factory.mktemp("further")
    (further/"helpers.py").write_text("import torch\ndef layers(width): return torch.nn.Linear(2, width), torch.nn.Linear(width, 2)\n")
    (far/"plain.py").write_text("import project\nfrom trainbook.registry import register\n@register('data')\ndef plain_data(count=64): return project.data(count)['train']\n")
    sys.path[:0] = [str(far), str(further)]
    import plain  # noqa: F401
    module("nets", NET.format(", torch.nn.Flatten(5)"))  # fails at the first batch
    run = launch({"model": {"name": "cell_net"}, "data": {"name": "plain_data"}, "training": {"epochs": 2, "batch_size": 8, "loss": "cross_entropy"}, "save_dir": "r"})
    assert ended(run) == "failed" and "IndexError: Dimension out of range" in repr(run) and str(cells._session()) not in (run.folder/"launch.log").read_text()
    assert os.listdir(run.folder/"code") == ["nets.py"] and Run("r").info["code"]["names"] == {"plain:plain_data": "data"}
    capsys.readouterr()
    module("nets", NET.format(""))
    run = launch(Run("r"))
    assert "r goes on with the cells of this session: nets" in capsys.readouterr().out and ended(run) == "finished", (run.folder/"launch.log").read_text()


# --- how it fails -------------------------------------------------------------------------------------------------------------------------

def failure(words) -> str:
    with pytest.raises(RunError) as error: launch("far.yaml", **words)
    return str(error.value)


def test_a_launch_that_fails_is_one_line_and_leaves_no_run(here, capsys):
    Path("results").mkdir(); Path("results/notes.txt").write_text("mine")
    words = [{"model": {"wdith": 3}}, {"data": {"name": "project:broken"}, "save_dir": "results"}, {"data": {"name": "project:killed"}, "save_dir": "gone"}]
    with ThreadPoolExecutor(3) as pool: said = list(pool.map(failure, words))
    assert said[0] == "keyword  model.wdith  unknown argument of project:net, did you mean width?"
    assert said[1] == "ValueError: no such column" and 'project.py", line' in capsys.readouterr().err
    assert said[2] == "gone  was ended by signal 9 (Killed) before it began"
    assert not runs("runs") and os.listdir("runs") == [] and not Path("gone").exists() and os.listdir("results") == ["notes.txt"]
    assert not any("\n" in line for line in said)


class Slow:
    "A process that takes its time, and may end."
    pid, returncode = 4711, None
    def __init__(self, then=None): self.then = then
    def poll(self):
        if self.then: self.then()
        return self.returncode


def test_what_is_wrong_here_is_told_here(here, monkeypatch):
    """Nothing is started, and no run is made."""
    monkeypatch.setattr(launches, "_start", lambda *words: pytest.fail("started"))
    for config, words, error in (("far.yaml", {"lr": "fast"}, ConfigError), ("gone.yaml", {}, ConfigError), ("gone", {}, RunError), (here, {}, RunError)):
        with pytest.raises(error): launch(config, **words)
    Path("two.yaml").write_text(STAGES)
    with pytest.raises(ConfigError, match=r"stage  fine is one of several, and a launch trains them all"): launch(Config.from_yaml("two.yaml").stage("fine"))
    assert not runs("runs")


def test_a_start_that_is_not_possible_leaves_no_run(here, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/python")
    with pytest.raises(FileNotFoundError): launch("far.yaml")
    assert os.listdir("runs") == []


def test_one_that_takes_long_is_left_alone(here, monkeypatch, capsys):
    """After the limit, and when the person who waits has enough; a run that may begin still is not taken away."""
    monkeypatch.setattr(launches, "_PATIENCE", 0.1)
    monkeypatch.setattr(launches, "_start", lambda *words: Slow())
    run = launch("far.yaml")
    assert run.status == "new" and f"{run.folder} has not begun after 0 s; it goes on" in capsys.readouterr().out
    def enough(): raise KeyboardInterrupt
    monkeypatch.setattr(launches, "_start", lambda *words: Slow(enough))
    with pytest.raises(KeyboardInterrupt): launch("far.yaml", save_dir="r")
    assert "r begins without us, in process 4711; to end it: kill 4711" in capsys.readouterr().err and Run("r").status == "new"


def test_a_config_with_another_word_for_a_run_that_is_there(here, monkeypatch):
    "on_existing: resume goes on, unless the config says something else now."
    begun = []
    monkeypatch.setattr(launches, "_start", lambda run, words: begun.append((run.folder, words)) or Slow())
    monkeypatch.setattr(launches, "_PATIENCE", 0.0)
    run = launch("far.yaml", save_dir="r", run={"on_existing": "resume"})
    assert launch("far.yaml", save_dir="r", on_existing="resume") == run == launch("r", allow_drift=True, learning_rate=1e-4, data={"count": 3})
    with pytest.raises(ConfigError, match=r"save_dir  r is a run already, with another training.lr; to go on with it, with changes: launch\(\"r\", lr=…\)"): launch("far.yaml", save_dir="r", lr=1, on_existing="resume")
    assert begun == [(Path("r"), []), (Path("r"), []), (Path("r"), ["--allow-drift", "learning_rate=0.0001", "data={count: 3}"])]
    assert launch("far.yaml", save_dir="r").folder == Path("r-2")


def test_a_run_from_elsewhere_is_asked_about(here, monkeypatch):
    monkeypatch.setattr(launches, "_start", lambda *words: pytest.fail("started"))
    run = Run.create(Config.from_dict({"model": {"name": "os:system"}}))
    with pytest.raises(NotTrusted, match="names os:system, which would run as code here"): launch(run)
    with Lock(run.folder), pytest.raises(RunBusy, match="in use in this process"): launch(run)


def test_nothing_of_another_run_gets_into_a_run_that_goes_on(here, monkeypatch):
    """Nor is a file of its code that this session does not have asked about again."""
    monkeypatch.setattr(launches, "_start", lambda *words: Slow()); monkeypatch.setattr(launches, "_PATIENCE", 0.0)
    module("nets", "width = 1"); module("rows", "count = 1")
    run = launch("far.yaml", save_dir="r")
    cells._BROUGHT["rows"] = "count = 'of another run'"; del cells._CELLS["rows"]
    module("nets", "width = 2")
    launch(run)
    assert {path.name: path.read_text() for path in (run.folder/"code").iterdir()} == {"nets.py": "width = 2", "rows.py": "count = 1"}
    launch(run)  # NotTrusted if that were unknown


@pytest.mark.parametrize("first", ["import trainbook.launch", "from trainbook.launch import Launched", "pass"])
def test_the_function_and_its_module_have_one_name(first):
    code = f"{first}\nfrom trainbook import launch\nimport sys\nassert 'torch' not in sys.modules\ntry: launch('gone')\nexcept Exception as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout.startswith("there is no run gone"), done
