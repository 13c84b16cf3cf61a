"""Stages from a config: one run, hand-over of weights, extraction, going on after a kill anywhere, branches; by functions and by the command line."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from trainbook import onward, stages
from trainbook.cli import main
from trainbook.config import Config
from trainbook.events import Callback
from trainbook.ledger import Ledger
from trainbook.load import load_checkpoint
from trainbook.lock import Lock, RunBusy
from trainbook.run import Run, RunError, runs
from trainbook.source import ConfigError
from trainbook.onward import branch, changes_since, resume, resume_or_begin, trained
from trainbook.stages import BaseTrainer, create_trainer, stage_state, train_stages
from trainbook.state import split
from trainbook.tensorfile import CheckpointError
from trainbook.weights import WeightsError

PROJECT = '''
import os, signal, time
import numpy, torch
from torch.utils.data import Dataset, TensorDataset

def due(what, count={}):
    "Dies by SIGKILL at the moment that DIE names, as coarse:30."
    count[what] = count.get(what, 0) + 1
    if os.environ.get("DIE") == f"{what}:{count[what]}": os.kill(os.getpid(), int(os.environ.get("BY", signal.SIGKILL)))

class Net(torch.nn.Module):
    def __init__(self, hidden=8, arms=2):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(2, hidden), torch.nn.ReLU(), torch.nn.Dropout(0.1))
        self.head = torch.nn.Linear(hidden, arms)
    def forward(self, x):
        if not self.training and not torch.is_grad_enabled(): due("look")
        return self.head(self.body(x))

def points(count, seed):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, generator=random)
    return x, (x[:, 0] * x[:, 1] > 0).long()

class Points(Dataset):
    def __init__(self, count, seed, part, pause): (self.x, self.y), self.part, self.pause = points(count, seed), part, pause
    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        due(self.part)
        time.sleep(self.pause)
        return self.x[i] + 0.1 * torch.randn(2), self.y[i]

def data(part="coarse", count=160, pause=0.0): return {"train": Points(int(os.environ.get("COUNT", count)), 1, part, pause), "val": TensorDataset(*points(64, 2))}
def all_points(count=160): return TensorDataset(*points(count, 1))
class Kept(TensorDataset):
    def __getitem__(self, i):
        due("head")
        return super().__getitem__(i)
def from_file(path, pause=0.0): return {"train": Kept(*[torch.tensor(numpy.load(path)[name]) for name in ("outputs", "targets")])}
'''
CONFIG = '''
run: {name: two}
model: {name: "project:Net"}
data: {name: "project:data"}
training: {lr: 1e-2, epochs: 3, batch_size: 16, save_interval: 7 steps, loss: cross_entropy}
logging: {every: 3 steps}
stages:
  - name: coarse
  - name: features
    kind: extract
    init_from: coarse
    data: {name: "project:all_points"}
  - name: fine
    init_from: coarse
    model: {arms: 3}
    data: {part: fine}
    allow: ["head.*"]
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path/"project.py").write_text(PROJECT)
    (tmp_path/"two.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("project",): sys.modules.pop(name, None)
    yield tmp_path
    sys.modules.pop("project", None)


def command(*words, die="", cwd=None, **more) -> subprocess.CompletedProcess:
    "trainbook …, in a process of its own."
    root = Path(__file__).resolve().parent.parent
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{Path.cwd()}", "OMP_NUM_THREADS": "1", "DIE": die}
    return subprocess.run([sys.executable, "-m", "trainbook", *map(str, words)], capture_output=True, text=True, env=env, cwd=cwd, timeout=120, **more)


def start(*words, **more) -> subprocess.Popen:
    root = Path(__file__).resolve().parent.parent
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{Path.cwd()}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "trainbook", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, **more)


def came_to(folder: Path, stages=("coarse", "fine")) -> dict:
    "All that a run came to, to be compared: each stage's last state bit by bit, the file of the extraction, the rows."
    found = {}
    for stage in stages:
        checkpoint = load_checkpoint(folder/stage, quiet=True)
        tree, tensors = split({name: value for name, value in checkpoint.state.items()})
        found[stage] = json.dumps(tree, sort_keys=True, default=str), {name: (one.dtype, one.numpy(force=True).tobytes()) for name, one in tensors.items()}
    if (folder/"features").is_dir(): found["features"] = (folder/"features/output.npz").read_bytes()
    rows = Run(folder).story().of("step", "eval", "epoch")
    found["rows"] = [{key: value for key, value in row.items() if key not in ("time", "seconds")} for row in rows]
    return found


# --- one stage ----------------------------------------------------------------------------------------------------------------------------

class Dense(BaseTrainer):
    of_stage = "fine"
    def build_data(self, config):
        import project
        return TensorDataset(*project.points(48, 5)), TensorDataset(*project.points(48, 6))
    def build_loss(self, config): return torch.nn.functional.cross_entropy
    def build_metrics(self, config): return {"half": lambda outputs, targets: 0.5}


def test_a_system_is_a_subclass(here):
    """Its parts, a stage of its own, weights from a file, keywords, a loader given late."""
    coarse = train_stages("two.yaml", only=["coarse"], quiet=True)
    trainer = Dense("two.yaml", init_from=coarse.folder/"coarse", quiet=True, learning_rate=3e-3, num_epochs=2)
    assert trainer.stage == "fine" and trainer.config.training.lr == 3e-3 and torch.equal(trainer.model.body[0].weight, load_checkpoint(f"{coarse.folder}@best", quiet=True)["model_state_dict"]["body.0.weight"])
    trainer.train(DataLoader(TensorDataset(torch.randn(40, 2), torch.randint(0, 3, (40,))), 10), num_epochs=1)
    assert trainer.step == 4 and trainer.metrics["val_half"] == 0.5 and trainer.run.config.stage("fine").training.lr == 3e-3


def test_the_first_weights_are_those_of_the_seed(here):
    made = [create_trainer(Config.from_yaml("two.yaml").stage("coarse"), quiet=True, seed=seed).model.head.weight for seed in (1, 1, 2)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    before = torch.get_rng_state()
    create_trainer(Config.from_yaml("two.yaml").stage("coarse"), quiet=True)
    assert torch.equal(before, torch.get_rng_state())


def test_which_stage(here):
    with pytest.raises(ConfigError, match="which one\\? say stage=… \\(coarse, features, fine\\)"): BaseTrainer("two.yaml")
    with pytest.raises(ConfigError, match="no stage corse, did you mean coarse"): train_stages("two.yaml", only=["corse"])


def test_a_loop_over_the_stages_writes_one_run(here):
    config = Config.from_yaml("two.yaml")
    for stage in config.stages: create_trainer(stage, quiet=True).train()
    (run,) = runs("runs")
    assert [stage_state(run, name) for name in config.stage_names] == ["finished"] * 3 and run.config.stage_names == config.stage_names
    for stage in config.stages[:1]: create_trainer(stage, quiet=True).train()  # once more is another run
    assert len(runs("runs")) == 2


@pytest.mark.parametrize("words", ({"save_dir": "r"}, {}), ids=("folder", "session"))
def test_the_loop_run_again_goes_on_where_it_was_stopped(here, words):
    class Stops(Callback):
        def epoch_end(self, trainer):
            if trainer.stage == "fine": trainer.stop()
    config = Config.from_yaml("two.yaml").merge({"run": {"root": ".", "on_existing": "resume"}} | words)
    for callbacks in ([Stops()], [], []):  # the third time all of it is there
        for stage in config.stages: create_trainer(stage, quiet=True, callbacks=callbacks).train()
        (run,) = runs(".")
        assert stage_state(run, "fine") == ("begun" if callbacks else "finished") and load_checkpoint(run.folder/"fine")["step"] == (10 if callbacks else 30)
    assert len(list(run.story().of("start"))) == 3


def test_commands_of_two_stages_share_a_folder(here):
    for stage in ("coarse", "fine"): assert command("train", "two.yaml", "--stage", stage, "--save_dir", "both").returncode == 0
    assert stage_state(Run("both"), "coarse") == stage_state(Run("both"), "fine") == "finished" and stage_state(Run("both"), "features") == "new"
    said = command("resume", "both")
    assert said.returncode == 0 and "both has finished what was asked for; features too: trainbook train both/config.yaml --stage features --save_dir both" in said.stdout
    assert command(*said.stdout.split("too: trainbook ")[1].splitlines()[0].split()).returncode == 0 and stage_state(Run("both"), "features") == "finished"  # the hint is good

    with pytest.raises(CheckpointError, match="stage coarse has no checkpoint in both-2"): train_stages(small(save_dir="both"), only=["fine"], quiet=True)  # begun anew is another run,
    assert not Path("both-2").exists()  # which is not, if it cannot begin
    assert train_stages(small(save_dir="both", init_from="both/coarse@best"), only=["fine"], quiet=True).folder == Path("both-2")


# --- what a stage begins with ---------------------------------------------------------------------------------------------------------------

@pytest.fixture
def trained_coarse(here): return train_stages("two.yaml", only=["coarse"], quiet=True)


def begins(run=None, **words) -> BaseTrainer:
    return create_trainer(Config.from_yaml("two.yaml").stage("fine").merge(words), run, quiet=True)


@pytest.mark.parametrize("word, which", [("coarse", "best"), ("coarse@latest", "latest"), ("best_coarse.pth", "best")])
def test_a_stage_of_the_same_run(trained_coarse, word, which):
    trainer = begins(trained_coarse, init_from=word)
    assert Path(trainer.begins) == load_checkpoint(which, within=trained_coarse.folder/"coarse", quiet=True).path


def test_other_places_to_begin(trained_coarse):
    whole = load_checkpoint(f"{trained_coarse.folder}/coarse@best", quiet=True)
    torch.save({"model": whole["model_state_dict"], "epoch": 3}, "old.pth")
    for word in (f"{trained_coarse.folder}/coarse@best", f"{trained_coarse.name}@best", "old.pth"):
        assert torch.equal(begins(init_from=word).model.body[0].weight, whole["model_state_dict"]["body.0.weight"])


def test_optimizer_part_and_names(trained_coarse):
    """keep takes the optimizer too; into loads one part; rename tells other names."""
    same = create_trainer(Config.from_yaml("two.yaml").stage("coarse").merge({"init_from": f"{trained_coarse.folder}/coarse@best", "keep": ["model", "optimizer"]}), quiet=True)
    assert same.updates[""].optimizer.state and same.updates[""].lr == 1e-2
    body = {name.removeprefix("body."): one for name, one in same.model.state_dict().items() if name.startswith("body.")}
    torch.save({"encoder": body}, "part.pth")
    torch.save({f"trunk.{name}": one for name, one in body.items()}, "named.pth")
    assert torch.equal(begins(init_from="part.pth", into="body", allow=[]).model.body[0].weight, same.model.body[0].weight)
    assert torch.equal(begins(init_from="named.pth", rename={"trunk": "body"}).model.body[0].weight, same.model.body[0].weight)


def test_a_file_that_may_be_missing(here, capsys):
    with pytest.raises(CheckpointError, match="init_from  gone.pth"): begins(init_from="gone.pth")
    trainer = create_trainer(Config.from_yaml("two.yaml").stage("fine").merge({"init_from": "gone.pth", "optional": True}))
    assert "NOTE: there is no gone.pth; fine begins with weights of its own" in capsys.readouterr().out and trainer.begins == ""
    Path("bad.pth").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError): begins(init_from="bad.pth", optional=True)  # a damaged one is not missing


def test_a_stage_that_was_not_trained(here):
    with pytest.raises(CheckpointError, match="stage coarse has not been trained in this run; train it first, or begin with RUN/coarse@best"): begins()
    with pytest.raises(ConfigError, match="init_from  is missing: what shall features compute with"):
        create_trainer(Config.from_yaml("two.yaml").stage("features").merge({"init_from": None}))


def test_a_forgotten_head_is_said_before_anything_is_trained(here):
    Path("two.yaml").write_text(CONFIG.replace('    allow: ["head.*"]\n', ""))
    with pytest.raises(WeightsError, match=r"head.weight +shape +\(2, 8\) in the file, \(3, 8\) in the model"): train_stages("two.yaml", quiet=True)
    assert not runs("runs")


# --- an extraction --------------------------------------------------------------------------------------------------------------------------

def test_the_next_stage_reads_what_an_extraction_wrote(here):
    Path("two.yaml").write_text(CONFIG.split("  - name: fine")[0] + '''
  - name: head
    model: {name: "torch.nn:Linear", in_features: 2, out_features: 2}
    data: {name: "project:from_file", path: "${stages.features.output}"}
''')
    run = train_stages("two.yaml", quiet=True)
    with numpy.load(run.folder/"features/output.npz") as file: assert file["outputs"].shape == (160, 2) and file["targets"].shape == (160,)
    assert stage_state(run, "head") == "finished" and run.config.stage("head")["data.path"] == "${stages.features.output}"  # in the file it stays a name
    with pytest.raises(ConfigError, match="is not there yet"): create_trainer(Config.from_yaml("two.yaml").stage("head"), quiet=True)


# --- killed anywhere ------------------------------------------------------------------------------------------------------------------------

KILLS = ["coarse:5", "coarse:300", "look:3", "look:15", "fine:1", "fine:170", "fine:130", "look:3"]


def test_killed_in_each_stage(here):
    """One life after the other is killed: before the first checkpoint, in the first stage, in its evaluation, in the extraction, in the last stage. Each goes on by the run's name."""
    assert command("train", "two.yaml", "--save_dir", "straight").returncode == 0
    for i, die in enumerate(KILLS):
        died = command(*(["resume", "killed"] if i else ["train", "two.yaml", "--save_dir", "killed"]), die=die)
        assert died.returncode == -signal.SIGKILL, (die, died.stderr[-300:])
    lives = [row["stage"] for row in Run("killed").story("start").rows]
    assert {"coarse", "features", "fine"} == {*lives} and lives.count("fine") >= 3, lives
    last = command("resume", "killed")
    assert last.returncode == 0, last.stderr
    assert came_to(here/"killed") == came_to(here/"straight")


def test_killed_in_an_extraction_it_keeps_what_it_wrote(here):
    assert command("train", "two.yaml", "--save_dir", "killed", "--stage", "coarse").returncode == 0
    data = ["data.count=4000"]
    Path("two.yaml").write_text(CONFIG.replace("all_points\"}", "all_points\", count: 4000}"))
    killed = command("train", "two.yaml", "--save_dir", "killed", "--stage", "features", die="look:180")
    assert killed.returncode == -signal.SIGKILL, (killed.returncode, killed.stderr, data)
    assert json.loads((here/"killed/features/extraction.json").read_text())["splits"][""]["batches"] == 150
    assert command("resume", "killed").returncode == 0
    with numpy.load("killed/features/output.npz") as file: assert len(file["outputs"]) == 4000


# --- going on -------------------------------------------------------------------------------------------------------------------------------

def test_from_another_folder_after_the_config_was_edited(here, tmp_path_factory):
    assert command("train", "two.yaml", "--save_dir", "straight", "--stage", "coarse").returncode == 0
    assert command("train", "two.yaml", "--save_dir", "killed", "--stage", "coarse", die="coarse:300").returncode == -signal.SIGKILL
    Path("two.yaml").write_text(CONFIG.replace("lr: 1e-2", "lr: 1.0"))
    said = command("resume", here/"killed", cwd=tmp_path_factory.mktemp("elsewhere"))
    assert said.returncode == 0 and "two.yaml has changed; the run goes on with" in said.stdout, said
    assert torch.equal(*(load_checkpoint(here/name, quiet=True)["model_state_dict"]["head.weight"] for name in ("straight", "killed")))


def test_other_data_is_refused(here, monkeypatch):
    assert command("train", "two.yaml", "--save_dir", "r", "--stage", "coarse", die="coarse:300").returncode == -signal.SIGKILL
    monkeypatch.setenv("COUNT", "128")
    refused = command("resume", "r")
    assert refused.returncode == 1 and "samples  was 160, is 128" in refused.stderr and "--allow-drift" in refused.stderr
    assert command("resume", "r", "--allow-drift").returncode == 0 and stage_state(Run("r"), "coarse") == "finished"


def test_numbers_that_change_on_the_way(here):
    assert command("train", "two.yaml", "--save_dir", "r", "--stage", "coarse", die="coarse:300").returncode == -signal.SIGKILL
    refused = command("resume", "r", "--lr", "1e-3", "--batch_size", "8")
    assert refused.returncode == 2 and "training.batch_size  cannot be changed while training" in refused.stderr and "trainbook branch r --allow-drift --set training.batch_size=8 --set training.lr=0.001" in refused.stderr
    assert command(*refused.stderr.split("trainbook ")[-1].split()).returncode == 0  # the hint is good as it stands
    done = command("resume", "r", "--lr", "1e-3")
    assert done.returncode == 0 and load_checkpoint("r", quiet=True)["config"]["training"]["lr"] == 1e-3, done.stderr


def test_a_command_that_is_started_again_goes_on(here):
    words = ("train", "two.yaml", "--save_dir", "r", "run.on_existing=resume")
    assert command(*words, die="coarse:300").returncode == -signal.SIGKILL
    assert command(*words, die="fine:50").returncode == -signal.SIGKILL
    assert command(*words).returncode == 0
    assert command("train", "two.yaml", "--save_dir", "straight").returncode == 0
    assert came_to(here/"r") == came_to(here/"straight") and not Path("r-2").exists()


def test_a_finished_run_says_so(trained_coarse, capsys):
    resume(trained_coarse.folder)
    said = capsys.readouterr().out
    assert "has finished what was asked for; features too" in said


# --- branches -------------------------------------------------------------------------------------------------------------------------------

def test_a_branch(here, trained_coarse):
    """From a step in the middle, with changes; the old future stays, the lineage is known, the stages behind it follow."""
    before = sorted(path.name for path in (trained_coarse.folder/"coarse").iterdir())
    child = branch(f"{trained_coarse.folder}/coarse@21", ["training.lr=1e-4"], "lower-lr", quiet=True)
    assert child.parent["name"] == trained_coarse.name and child.parent["step"] == 21 and child.name.startswith("lower-lr")
    assert [stage_state(child, name) for name in ("coarse", "features", "fine")] == ["finished"] * 3 and child.config.training.lr == 1e-4
    assert before == sorted(path.name for path in (trained_coarse.folder/"coarse").iterdir()) and Run(trained_coarse.folder).children() == [child]
    first = next(child.story().of("step", stage="coarse"))
    assert first["step"] == 24 and first["lr"] < 1e-4


def test_from_the_newest_checkpoint_a_branch_is_a_branch(trained_coarse):
    child = branch(f"{trained_coarse.folder}@latest", ["training.epochs=4"], quiet=True)
    assert child.folder != trained_coarse.folder and load_checkpoint(child.folder/"coarse", quiet=True)["step"] == 40


def test_a_checkpoint_that_is_not_the_newest_is_gone_on_with_in_a_branch(here):
    assert command("train", "two.yaml", "--save_dir", "r", "--stage", "coarse", die="coarse:300").returncode == -signal.SIGKILL
    assert command("resume", "r/coarse@7").returncode == 0
    (child,) = Run("r").children()
    assert child.parent["step"] == 7 and stage_state(Run("r"), "coarse") == "begun"
    assert command("resume", "r/coarse@latest").returncode == 0 and stage_state(Run("r"), "coarse") == "finished"


# --- the command line -----------------------------------------------------------------------------------------------------------------------

def test_what_was_trained_is_measured_and_used(trained_coarse):
    for words, said in ((("evaluate", f"{trained_coarse.name}@best"), "val_loss"), (("evaluate", trained_coarse.folder, "--split", "train"), "train_loss")):
        done = command(*words)
        assert done.returncode == 0 and said in done.stdout, done
    wrong = command("evaluate", trained_coarse.folder, "--split", "tset")
    assert wrong.returncode == 2 and "no split tset" in wrong.stderr
    assert command("predict", f"{trained_coarse.folder}@best", "out.safetensors", "--split", "val").returncode == 0 and Path("out.safetensors").exists()
    assert trained(trained_coarse.folder).begins.endswith("step-00000030")


def test_stopped_by_signals_it_is_saved_and_says_so(here):
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = start("train", "two.yaml", "--save_dir", f"r{code}", "--stage", "coarse", "data.pause=0.03")
        while not Path(f"r{code}/events.jsonl").exists() or b'"step"' not in Path(f"r{code}/events.jsonl").read_bytes(): time.sleep(0.05)
        second = command("resume", f"r{code}")  # who is second is told who is first
        assert second.returncode == 1 and f"in use by process {process.pid}" in second.stderr
        process.send_signal(number)
        said = process.communicate(timeout=30)[0]
        assert process.returncode == code and "paused at step" in said and Run(f"r{code}").status == "paused", said
        assert command("resume", f"r{code}").returncode == 0


def test_what_is_told_is_heard(here):
    process = start("train", "two.yaml", "--save_dir", "r", "--stage", "coarse", "data.pause=0.005", "epochs=30")
    while not Path("r/events.jsonl").exists() or b'"step"' not in Path("r/events.jsonl").read_bytes(): time.sleep(0.05)
    watch = start("watch", "r")
    for words in (("set", "training.lr=5e-3"), ("save",), ("stop",)): assert command("tell", "r", *words).returncode == 0
    process.communicate(timeout=60)
    said = watch.communicate(timeout=60)[0]
    assert process.returncode == 0 and Run("r").status == "stopped" and load_checkpoint("r", quiet=True)["config"]["training"]["lr"] == 5e-3
    assert "control  set" in said and "end  stopped" in said, said
    assert command("tell", "r", "stpo").returncode == 2


LINES = [  # of the guides; only the program's name is ours
    "train --config two.yaml --stage coarse", "train --config two.yaml --run-all-stages", "train --config two.yaml --stage coarse --epochs 1 --lr 1e-2 --batch_size 32",
    "train --config two.yaml --stage coarse --save_dir sweeps/lr_1e-3 --lr 1e-3", "train two.yaml -stage coarse -epochs 1", "train two.yaml --stage coarse --learning-rate 5e-4 -clip_grad 5.0 -warmup_steps 10 -scheduler step"]


@pytest.mark.parametrize("line", LINES)
def test_shell_lines_of_the_guides(here, line):
    done = command(*line.split())
    assert done.returncode == 0, done.stderr
    told, run = line.replace("=", " ").split(), runs("sweeps" if "sweeps" in line else "runs")[0]
    training = run.config.stage("coarse").training
    for flag, key, value in (("lr", "lr", 1e-2), ("learning-rate", "lr", 5e-4), ("epochs", "epochs", 1), ("batch_size", "batch_size", 32),
                             ("clip_grad", "clip", 5.0), ("warmup_steps", "warmup", "10 steps"), ("scheduler", "scheduler", "step")):
        if f"--{flag}" in told or f"-{flag}" in told:
            at = told[max(told.index(word) for word in (f"--{flag}", f"-{flag}") if word in told) + 1]
            assert training[key] == value or str(training[key]) == at or float(at) == training[key], (flag, training[key])
    asked = {row["stage"] for row in run.story("start").rows}
    assert asked == ({"coarse", "features", "fine"} if "--run-all-stages" in told else {"coarse"})


FLAT = {"frame_encoder_checkpoint": "encoder.pth", "use_weighted_loss": "true", "hand_weight": "2.0", "face_weight": "1.5", "d_global": "16", "seq_len": "6", "freeze_frame_encoder": "true"}


def test_a_system_takes_the_flat_flags_of_guide_003(here):
    """What a system declares in its defaults is a flag of its own, and reaches its builders with its type; one that it does not know gets the name that was meant."""
    Path("signs.py").write_text('''
import json, torch
import project
from trainbook import BaseTrainer

def encoder(d_global=8, freeze_frame_encoder=False, frame_encoder_checkpoint=None, **words):
    json.dump({"d_global": d_global, "freeze": freeze_frame_encoder, "from": frame_encoder_checkpoint, **words}, open("told.json", "w"))
    return project.Net(d_global)

class Signs(BaseTrainer):
    defaults = {"model": {"name": "signs:encoder", "d_global": 8, "freeze_frame_encoder": False, "frame_encoder_checkpoint": None, "use_weighted_loss": False,
                          "hand_weight": 1.0, "face_weight": 1.0, "seq_len": 4}, "data": {"name": "project:data"}, "training": {"loss": "cross_entropy", "batch_size": 16}}
''')
    words = [part for key, value in FLAT.items() for part in (f"--{key}", value)]
    done = command("train", "-model", "signs:Signs", *words, "--epochs", "1", "--lr", "1e-4", "--save_dir", "s")
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("told.json").read_text()) == {"d_global": 16, "freeze": True, "from": "encoder.pth", "use_weighted_loss": True, "hand_weight": 2.0, "face_weight": 1.5, "seq_len": 6}
    slip = command("train", "-model", "signs:Signs", "--hand_wieght", "2.0", "--save_dir", "t")
    assert slip.returncode == 2 and "hand_weight" in slip.stderr and not Path("t").exists(), slip.stderr


def test_begin_or_resume(here):
    """--init_from begins anew with weights; --resume and --resume_from go on where system, model and data are the same, and begin with the weights that fit where they are not."""
    assert command("train", "two.yaml", "--stage", "coarse", "--save_dir", "checkpoints").returncode == 0
    done = command("train", "--config", "two.yaml", "--stage", "fine", "--init_from", "checkpoints/coarse@best", "--save_dir", "fine")
    assert done.returncode == 0 and "fine begins with" in done.stdout, done.stderr
    assert command("train", "two.yaml", "--stage", "coarse", "--save_dir", "killed", die="coarse:300").returncode == -signal.SIGKILL
    again = command("train", "--resume", "killed/coarse@latest")
    assert again.returncode == 0 and stage_state(Run("killed"), "coarse") == "finished"
    other = command("train", "--config", "two.yaml", "--stage", "coarse", "--resume_from", "checkpoints/coarse@best", "model.arms=5", "--save_dir", "other")
    assert other.returncode == 0 and "is of another training (model.arms); its weights are what this one begins with" in other.stdout and "head.weight" in other.stdout, other


def test_a_system_by_its_name(here):
    """It brings its config; flat flags are arguments of its model and data; the run knows how to go on."""
    Path("graphs.py").write_text('''
from trainbook import BaseTrainer
class Sttran(BaseTrainer):
    defaults = {"model": {"name": "project:Net", "hidden": 8, "arms": 2}, "data": {"name": "graphs:data", "mode": "sgdet", "data_path": "x"}, "training": {"epochs": 2, "loss": "cross_entropy"}}
def data(mode, data_path):
    import project
    assert mode == "predcls" and data_path == "data/action_genome"
    return project.data()
''')
    done = command(*"train -model graphs:Sttran -mode predcls -data_path data/action_genome -lr 1e-4 -epochs 1 -hidden 12 -save_path output/sttran".split())
    assert done.returncode == 0, done.stderr
    run = Run("output/sttran")
    assert run.config.system == "graphs:Sttran" and run.config["model.hidden"] == 12 and run.config.training.lr == 1e-4
    assert "has finished" in command("resume", "output/sttran").stdout
    wrong = command(*"train -model graphs:Sttran -moode predcls".split())
    assert wrong.returncode == 2 and "did you mean mode" in wrong.stderr, wrong


@pytest.mark.parametrize("words, said", [("train", "expected a config file"), ("train gone.yaml", "gone.yaml"), ("train two.yaml --lrr 1", "did you mean"), ("train two.yaml --stage corse", "did you mean coarse"),
                                         ("resume gone", "gone"), ("branch", "expected a checkpoint"), ("tell gone stop", "there is no run gone"), ("train two.yaml --epochs ten", "epochs"),
                                         ("evaluate gone@best", "gone")])
def test_mistakes_are_one_line(here, words, said):
    done = command(*words.split())
    assert done.returncode in (1, 2) and said in done.stderr and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1, done


# --- what an attack has found -------------------------------------------------------------------------------------------------------------

PIPE = CONFIG.split("  - name: fine")[0] + """
  - name: head
    model: {name: "torch.nn:Linear", in_features: 2, out_features: 2}
    data: {name: "project:from_file", path: "${stages.features.output}"}
"""


def dies(do, die: str) -> None:
    "A life in a fork of this process that SIGKILL ends at the moment that `die` names."
    child = os.fork()
    if not child:
        os.environ["DIE"] = die
        if "project" in sys.modules: sys.modules["project"].due.__defaults__[0].clear()
        try: do()
        finally: os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def small(**more) -> Config: return Config.from_yaml("two.yaml").merge({"training": {"epochs": 1}} | more)


def weights(folder, part="head.weight") -> torch.Tensor: return load_checkpoint(folder, quiet=True)["model_state_dict"][part]


def test_1_killed_in_a_stage_that_reads_an_extraction(here):
    Path("two.yaml").write_text(PIPE)
    straight = train_stages(small(save_dir="straight"), quiet=True)
    dies(lambda: train_stages(small(save_dir="r"), quiet=True), "head:150")
    assert stage_state(Run("r"), "head") == "begun" and Run("r").status == "interrupted"
    resume("r", quiet=True)
    assert stage_state(Run("r"), "head") == "finished" and torch.equal(weights("r/head", "weight"), weights(straight.folder/"head", "weight"))
    assert stage_state(branch("r/head@7", quiet=True), "head") == "finished"
    more = Config.from_yaml("two.yaml").merge({"save_dir": "s"})
    dies(lambda: train_stages(more, quiet=True), "head:300")
    assert resume_or_begin(more, "s/head@latest", quiet=True) == Run("s") and stage_state(Run("s"), "head") == "finished"


def test_2_a_stage_that_evaluates(here):
    Path("two.yaml").write_text(CONFIG.split("  - name: features")[0] + "  - {name: look, kind: evaluate, init_from: coarse}\n")
    run = train_stages(small(), quiet=True)
    assert "val_loss" in json.loads((run.folder/"look/metrics.json").read_text()) and stage_state(run, "look") == "finished"


class Mine(BaseTrainer):
    "A system of a script; the loss is its own."
    defaults = {"model": {"name": "project:Net"}, "data": {"name": "project:data"}, "training": {"lr": 1e-2, "epochs": 1, "batch_size": 16, "loss": "cross_entropy"}}
    def calculate_loss(self, outputs, targets): return torch.nn.functional.cross_entropy(outputs, targets, label_smoothing=0.5)


def test_3_a_resume_trains_the_system_that_began(here):
    straight = Mine(save_dir="straight", save_interval="3 steps", quiet=True)
    straight.train()
    dies(lambda: Mine(save_dir="r", save_interval="3 steps", quiet=True).train(), "coarse:100")
    assert Run("r").config.system == f"{__name__}:Mine"
    resume("r", quiet=True)
    assert torch.equal(weights("r"), straight.model.head.weight)


def test_3_what_cannot_be_imported_is_refused_and_said(here):
    class Local(Mine): ...
    local = lambda: Local(save_dir="r", quiet=True, on_existing="resume", save_interval="3 steps")
    dies(lambda: local().train(), "coarse:100")
    with pytest.raises(RunError, match=r"r  train was trained with class .*Local, which cannot be imported; run its script again"): resume("r", quiet=True)
    local().train()
    assert Run("r").status == "finished"
    for do in (lambda: trained("r"), lambda: branch("r@3", quiet=True)):
        with pytest.raises(RunError, match="cannot be imported"): do()
    dies(lambda: Mine(save_dir="c", callbacks=[Callback()], quiet=True).train(), "coarse:100")
    with pytest.raises(RunError, match="c  train was trained with callback Callback"): resume("c", quiet=True)


def test_4_a_system_brings_its_config(here):
    trainer = Mine(batch_size=32, learning_rate=3e-5, save_dir="kw", quiet=True)
    trainer.train(num_epochs=2)
    assert trainer.config.training.batch_size == 32 and trainer.config.training.lr == 3e-5 and trainer.epoch == 2


def test_5_a_branch_sees_the_stages_of_a_parent_elsewhere(here):
    run = train_stages(small(save_dir="deep/r"), only=["coarse", "fine"], quiet=True)
    child = branch(f"{run.folder}/fine@7", quiet=True)
    assert child.ancestors() == [run] and stage_state(child, "fine") == "finished"
    os.rename("deep", "gone")
    assert not child.ancestors()


def test_5_an_error_leaves_no_child(here):
    run = train_stages(small(save_dir="r"), only=["coarse"], quiet=True)
    with pytest.raises(WeightsError): branch("r/coarse@7", ["model.arms=4"], quiet=True)
    assert not run.children() and not runs("runs") and not list((run.folder/"branches").iterdir())


def test_6_a_resume_of_an_earlier_stage_leaves_later_ones(here):
    dies(lambda: train_stages(small(save_dir="r"), only=["coarse"], quiet=True), "coarse:100")
    fine = train_stages(small(save_dir="r", init_from=None, allow=[]), only=["fine"], quiet=True)
    assert fine == Run("r") and fine.status == "interrupted"  # coarse was asked for
    before = weights("r/fine")
    resume("r", quiet=True)  # 16: what was interrupted earlier is gone on with
    assert [stage_state(fine, name) for name in ("coarse", "features", "fine")] == ["finished", "new", "finished"]
    assert torch.equal(before, weights("r/fine")) and [row["stage"] for row in fine.story().of("start")] == ["coarse", "fine"] and fine.status == "finished"


def test_7_a_checkpoint_of_another_stage_is_what_one_begins_with(here, capsys):
    train_stages(small(save_dir="sa"), only=["coarse"], quiet=True)
    Path("two.yaml").write_text(CONFIG.split("  - name: features")[0] + "  - name: again\n")
    run = resume_or_begin(small(save_dir="sb"), "sa/coarse@best", ["again"])
    assert run.folder == Path("sb") and stage_state(run, "again") == "finished" and "is of another training (stage coarse)" in capsys.readouterr().out


def test_7_other_words_of_a_resume_are_changes_or_refused(here):
    small = lambda **more: Config.from_yaml("two.yaml").merge(more)
    dies(lambda: train_stages(small(save_dir="r"), only=["coarse"], quiet=True), "coarse:300")
    with pytest.raises(ConfigError, match="save_dir  r/coarse@latest is of the same training, which goes on in r"): resume_or_begin(small(save_dir="x"), "r/coarse@latest", ["coarse"])
    with pytest.raises(ConfigError, match="batch_size  cannot be changed"): resume_or_begin(small(batch_size=8), "r/coarse@latest", ["coarse"])
    resume_or_begin(small(learning_rate=1e-3), "r/coarse@latest", ["coarse"], quiet=True)
    assert load_checkpoint("r", quiet=True)["config"]["training"]["lr"] == 1e-3 and not Path("x").exists()


def test_8_nothing_is_told_to_a_run_that_another_trains(here):
    dies(lambda: train_stages(small(save_dir="r"), only=["coarse"], quiet=True), "coarse:100")
    with Lock("r"), pytest.raises(RunBusy): resume("r", ["lr=1e-5"], quiet=True)
    assert not os.listdir("r/inbox")


def test_8_a_change_reaches_the_stage_that_it_names(here):
    dies(lambda: train_stages(small(save_dir="r", init_from=None), only=["coarse", "fine"], quiet=True), "coarse:100")
    resume("r", ["stages.fine.training.lr=1e-4", "training.weight_decay=0.1"], quiet=True)
    coarse, fine = (load_checkpoint(f"r/{name}", quiet=True)["config"]["training"] for name in ("coarse", "fine"))
    assert (coarse["lr"], fine["lr"]) == (1e-2, 1e-4) and coarse["weight_decay"] == fine["weight_decay"] == 0.1
    with pytest.raises(ConfigError, match="has finished; what a run is made of stays"): resume("r", ["lr=1"], quiet=True)


def test_8_of_what_has_finished_nothing_changes(here):
    dies(lambda: train_stages(small(save_dir="r", init_from=None), only=["coarse", "fine"], quiet=True), "fine:100")
    with pytest.raises(ConfigError, match="coarse has finished"): resume("r", ["stages.coarse.training.lr=1"], quiet=True)


@pytest.mark.parametrize("word, said", [("coarsse", "did you mean coarse"), ("gone.pth", "init_from  gone.pth"), ("old.pth", "head.weight")])
def test_9_what_a_stage_begins_with_is_looked_up_before_any_is_trained(here, word, said):
    import project
    torch.save({"model": project.Net(arms=5).state_dict()}, "old.pth")
    Path("two.yaml").write_text(CONFIG.replace("  - name: fine\n    init_from: coarse", f"  - name: fine\n    init_from: {word}").replace('    allow: ["head.*"]\n', ""))
    with pytest.raises((CheckpointError, WeightsError), match=said): train_stages(small(), quiet=True)
    assert not runs("runs")


def test_10_between_two_stages_the_run_is_held_and_runs(here, monkeypatch):
    seen, made = [], stages.create_trainer
    def between(config, run, **words):
        if config.stage_name == "features":
            child = os.fork()
            if not child:
                try: resume("r", quiet=True)
                except RunBusy: os._exit(7)
                finally: os._exit(1)
            seen.extend([Run("r").status, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])])
            if os.environ.get("DIE"): os.kill(os.getpid(), signal.SIGKILL)
        return made(config, run, **words)
    monkeypatch.setattr(stages, "create_trainer", between)
    dies(lambda: train_stages(small(save_dir="r"), quiet=True), "between")
    assert Run("r").status == "interrupted" and Run("r").left() == ["features", "fine"]
    resume("r", quiet=True)
    assert seen == ["running", 7] and Run("r").status == "finished"


def test_11_an_extraction_goes_on_where_its_run_was_moved_to(here, capsys):
    train_stages(small(save_dir="a/r"), only=["coarse"], quiet=True)
    Path("two.yaml").write_text(CONFIG.replace("all_points\"}", "all_points\", count: 4000}"))
    dies(lambda: train_stages(small(save_dir="a/r"), only=["features"], quiet=True), "look:180")
    os.rename("a", "b")
    Path("c").mkdir()
    os.chdir("c")
    resume("../b/r", quiet=True)
    assert "begins anew" not in capsys.readouterr().err and Run("../b/r").status == "finished"


def test_12_a_stage_is_in_the_config_before_it_has_begun(here, monkeypatch):
    train_stages(small(save_dir="r"), only=["coarse"], quiet=True)
    monkeypatch.setattr(Ledger, "start", lambda self, stage, **facts: os.kill(os.getpid(), signal.SIGKILL))
    dies(lambda: train_stages(small(save_dir="r", learning_rate=3e-4), only=["fine"], quiet=True), "start")
    config = Run("r").config
    assert config.stage("fine").training.lr == 3e-4 and config.stage("coarse").training.lr == 1e-2 and stage_state(Run("r"), "fine") == "new"


def test_13_what_a_started_again_command_says_holds(here):
    words = {"save_dir": "r", "run": {"on_existing": "resume"}}
    small = lambda **more: Config.from_yaml("two.yaml").merge(more)
    dies(lambda: train_stages(small(**words), only=["coarse"], quiet=True), "coarse:300")
    dies(lambda: train_stages(small(**words, learning_rate=1e-3), only=["coarse"], quiet=True), "coarse:40")
    assert Run("r").config.stage("coarse").training.lr == 1e-3 and Run("r").config.stage("fine").training.lr == 1e-2
    resume("r", quiet=True)
    assert load_checkpoint("r", quiet=True)["config"]["training"]["lr"] == 1e-3


def test_14_code_that_nobody_agreed_to_is_one_line(here, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(here/"home"))
    train_stages(small(save_dir="r"), only=["coarse"], quiet=True)
    (here/"r/code").mkdir()
    (here/"r/code/notes.py").write_text("x = 1")
    for words in ("resume r", "branch r@7", "evaluate r", "predict r out.npz --split val", "train --resume r"):
        assert main(words.split()) == 2, words
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert main("evaluate r --trust-code".split()) == 0


def test_15_another_torch_is_refused(here, monkeypatch):
    Path("base.yaml").write_text(CONFIG)
    Path("two.yaml").write_text("extends: base.yaml\n")
    dies(lambda: train_stages(small(save_dir="r"), only=["coarse"], quiet=True), "coarse:100")
    Path("base.yaml").write_text(CONFIG.replace("1e-2", "1.0"))
    assert any(line.startswith("base.yaml has changed") for line in changes_since(Run("r")))
    monkeypatch.setattr(onward, "versions", lambda: {"torch": "9.9"})
    with pytest.raises(CheckpointError, match="torch was .*, is 9.9.*--allow-drift"): resume("r", quiet=True)
    assert resume("r", quiet=True, allow_drift=True).status == "finished"


def test_17_a_start_that_fails_leaves_no_run(here):
    with pytest.raises(ConfigError): train_stages(small(save_dir="r", model={"arms": 2, "armz": 3}), only=["coarse"], quiet=True)
    assert not Path("r").exists()
    assert train_stages(small(save_dir="r"), only=["coarse"], quiet=True).folder == Path("r")


def test_18_a_folder_in_which_somebody_trains_is_refused(here):
    run = train_stages(small(save_dir="r"), only=["coarse"], quiet=True)
    with Lock(run.folder), pytest.raises(RunBusy, match=f"r  is in use by process {os.getpid()}"): train_stages(small(save_dir="r"), only=["coarse"], quiet=True)
    assert not Path("r-2").exists()


@pytest.mark.parametrize("keep", [[], ["optimizer"]])
def test_19_weights_are_always_kept(trained_coarse, keep):
    with pytest.raises(ConfigError, match=r"keep  expected \[model\]"): begins(trained_coarse, keep=keep)


class Two(Mine):
    def build_optimizer(self, model, config): return {name: torch.optim.SGD(part.parameters(), lr=0.1) for name, part in (("body", model.body), ("head", model.head))}
    def training_step(self, batch): ...
    def validation_step(self, batch): return {}


class Wide(Mine):
    def __init__(self, *words, **more):
        self.hidden = 8
        super().__init__(*words, **more)
    def build_model(self, config):
        import project
        return project.Net(self.hidden, config.model.arguments.get("arms", 2))


def test_19_several_optimizers_and_a_system_with_an_init(trained_coarse):
    with pytest.raises(ConfigError, match="keep  train has several optimizers"): Two(init_from=f"{trained_coarse.folder}/coarse@best", keep=["model", "optimizer"], quiet=True)
    assert train_stages(small(system=f"{__name__}:Wide"), only=["coarse", "fine"], quiet=True).status == "finished"


def test_20_a_file_of_that_name_is_the_file(trained_coarse):
    import project
    net = project.Net(arms=2)
    torch.save({"model": net.state_dict()}, "best.pth")
    assert torch.equal(begins(trained_coarse, init_from="best.pth").model.body[0].weight, net.body[0].weight)


def test_21_names_of_children(here):
    train_stages(small(save_dir="my runs (2)", run={"name": None}), only=["coarse"], quiet=True)
    assert branch("my runs (2)/coarse@7", quiet=True).name.startswith("my-runs-2-branch-")
    assert resume("my runs (2)/coarse@7", quiet=True).name.startswith("my-runs-2-2")


def test_22_what_a_stage_begins_with_is_a_word(here, capsys):
    assert main("train two.yaml --stage fine --init_from 3".split()) == 1 and "init_from  3" in capsys.readouterr().err


def test_23_slips_about_stages(here, capsys):
    run = train_stages(small(), only=["coarse"], quiet=True)
    features = create_trainer(small().stage("features"), run, quiet=True)
    features.train(DataLoader(TensorDataset(torch.randn(40, 2), torch.zeros(40)), 10))
    with numpy.load(run.folder/"features/output.npz") as file: assert len(file["outputs"]) == 40
    with pytest.raises(ConfigError, match="no stage fien, did you mean fine"): BaseTrainer("two.yaml", stage="fien")
    with pytest.raises(ConfigError, match="has no stage fine; it has train"): Mine(stage="fine")
    assert main("train two.yaml --stage fine --run-all-stages".split()) == 2 and main("train --lr 1e-2 two.yaml".split()) == 2
    assert "as the first word, or behind --config" in capsys.readouterr().err


def test_24_mistakes_are_said_where_they_are(here, capsys):
    assert main("train -model project:Net".split()) == 2 and "project:Net is no BaseTrainer" in capsys.readouterr().err
    Path("loses.py").write_text("def lost(): return open('no.csv')\n")
    Path("lost.yaml").write_text('model: {name: "project:Net"}\ndata: {name: "loses:lost"}\n')
    assert main("train lost.yaml".split()) == 1
    assert re.search(r"no.csv' \(.*loses.py:\d+\)$", capsys.readouterr().err.strip())
    Path("bad.yaml").write_text("training: {lrr: 1}")
    assert main("prove bad.yaml".split()) == 2 and not list(here.glob("prove-*"))
    torch.save({"model": {}}, "best.pth")
    assert main("evaluate best.pth".split()) == 2 and "lies in no run" in capsys.readouterr().err


def test_25_a_prediction_leaves_its_file_alone(here):
    run = train_stages(small(save_dir="r"), only=["coarse"], quiet=True)
    trainer = trained(run.folder)
    trainer.write_outputs({"val": trainer.splits["val"]}, "p.npz")
    assert [path.name for path in here.iterdir() if "p.npz" in path.name] == ["p.npz"]


def test_25_a_run_without_a_checkpoint_is_gone_on_with(here):
    dies(lambda: train_stages(small(save_dir="early"), only=["coarse"], quiet=True), "coarse:5")
    assert resume_or_begin(small(), "early", ["coarse"], quiet=True) == Run("early") and Run("early").status == "finished"


def test_25_a_loss_that_is_told_from_the_first_batch_stays_with_its_stage(here):
    Path("two.yaml").write_text(CONFIG.replace(", loss: cross_entropy", ""))
    train_stages(small(save_dir="r", learning_rate=2e-2), only=["coarse"], quiet=True)
    train_stages(small(save_dir="r"), only=["fine"], quiet=True)
    coarse, features, fine = (one.training for one in Run("r").config.stages)
    assert (coarse.loss, features.loss, fine.loss) == ("cross_entropy", None, "cross_entropy") and (coarse.lr, fine.lr) == (2e-2, 1e-2)


# --- what a second attack has found -------------------------------------------------------------------------------------------------------

def of_features(kind: str = "extract", **more) -> Config: return small(save_dir="r", **more).merge({"kind": kind}, "features")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("kind", ["extract", "evaluate"])
def test_a_stage_that_computes_hears_signals(here, monkeypatch, kind, number, code):
    """After the batch it ends in order; an extraction keeps what it has written."""
    train_stages(of_features(kind), only=["coarse"], quiet=True)
    sys.modules["project"].due.__defaults__[0].clear()
    monkeypatch.setenv("DIE", "look:3")
    monkeypatch.setenv("BY", str(int(number)))
    with pytest.raises(SystemExit) as left: train_stages(of_features(kind), only=["features"], quiet=True)
    assert left.value.code == code and Run("r").status == "paused"
    if kind == "extract": assert json.loads(Path("r/features/extraction.json").read_text())["splits"][""]["batches"] == 3
    resume("r", quiet=True)
    assert Run("r").status == "finished"


@pytest.mark.parametrize("kind", ["extract", "evaluate"])
def test_a_stage_that_computes_hears_what_it_is_told(here, monkeypatch, capsys, kind):
    run = train_stages(of_features(kind), only=["coarse"], quiet=True)
    told = iter([("set", {"lr": 1e-3}), ("evaluate", {}), ("save", {}), ("pause", {}), ("stop", {})])
    def look(what):
        for command, values in [next(told, ())] if what == "look" else []: run.tell(command, **values)
    monkeypatch.setattr(sys.modules["project"], "due", look)
    monkeypatch.setattr("trainbook.events.time.sleep", lambda seconds: run.tell("resume"))  # somebody answers the pause
    train_stages(of_features(kind), only=["features"])
    said = capsys.readouterr().out
    assert "set is for a stage that trains, not for features" in said and "paused at batch 4 of features" in said and run.status == "stopped", said
    monkeypatch.setattr(sys.modules["project"], "due", lambda what: None)
    resume("r", quiet=True)
    assert run.status == "finished"


def test_what_is_told_between_two_stages_is_heard(here, monkeypatch):
    made = stages.create_trainer
    def between(config, run, **words):
        if config.stage_name == "features": run.tell("stop")
        return made(config, run, **words)
    monkeypatch.setattr(stages, "create_trainer", between)
    run = train_stages(of_features(), quiet=True)
    assert run.status == "stopped" and run.left() == ["features", "fine"]


@pytest.mark.parametrize("words", [{}, {"save_dir": "r"}])
def test_a_loop_that_was_interrupted_goes_on(here, monkeypatch, words):
    """A cell that is run again, and says on_existing: resume; with a save_dir also in another process."""
    config = small(run={"on_existing": "resume"}, **words)
    def cell(config=config):
        for stage in config.stages: create_trainer(stage, quiet=True).train()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for stage in config.stages:
            trainer = create_trainer(stage, quiet=True)
            if stage.stage_name == "fine": patch.setattr(sys.modules["project"].Points, "__getitem__", lambda self, i: (_ for _ in ()).throw(KeyboardInterrupt))
            trainer.train()
    cell(small(run={"on_existing": "resume"}, **words) if words else config)
    (run,) = runs("." if words else "runs")
    assert run.status == "finished" and [row["stage"] for row in run.story().of("start")] == config.stage_names


def test_a_trainer_that_computes_shows_itself(trained_coarse):
    told = trained(trained_coarse.folder)
    assert "computes with Net of" in repr(told) and "body.0" in told.summary(9)


def test_a_branch_tries_its_hand_overs_first(trained_coarse):
    with pytest.raises(WeightsError): branch(f"{trained_coarse.folder}/coarse@latest", ["stages.fine.model.hidden=16"], quiet=True)
    assert runs("runs") == [trained_coarse]


def test_a_branch_without_a_checkpoint_goes_on_from_its_parents(here):
    run, more = train_stages("two.yaml", only=["coarse"], save_dir="r", quiet=True), ["training.epochs=4"]
    straight = branch("r/coarse@latest", more, "straight", quiet=True)
    for name, moved in (("killed", False), ("lost", True)):
        dies(lambda name=name: branch("r/coarse@latest", more, name, quiet=True), "coarse:40")
        (child,) = [one for one in runs(".") if one.name.startswith(name)]
        assert stage_state(child, "coarse") == "begun" and not list(child.folder.glob("coarse/step-*"))
        if moved:
            os.renames("r", "else/where")  # beside it, it would be found
            with pytest.raises(CheckpointError, match="has no checkpoint of its own yet, and r, which it branched from, is not where it was"): resume(child, quiet=True)
        else:
            resume(child, quiet=True)
            assert all(torch.equal(weights(child.folder/stage), weights(straight.folder/stage)) for stage in ("coarse", "fine"))
    assert load_checkpoint("else/where/coarse", quiet=True)["step"] == 30 and Run("else/where") == run


def test_a_branch_that_was_killed_before_its_first_row_begins_where_it_branched(here, monkeypatch):
    train_stages(small(save_dir="r", init_from=None, allow=[]), only=["coarse", "fine"], quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "start", lambda self, stage, **facts: os.kill(os.getpid(), signal.SIGKILL))
        dies(lambda: branch("r/fine@7", quiet=True), "start")
    (child,) = [one for one in runs(".") if one.parent]
    resume(child, quiet=True)
    assert [stage_state(child, name) for name in child.config.stage_names] == ["new", "new", "finished"]


def test_what_the_data_of_a_stage_take_is_known_before_any_is_trained(here):
    with pytest.raises(ConfigError, match="data.paus  unknown argument of project:data, did you mean pause"): train_stages(small().merge({"data": {"paus": 1}}, "fine"), quiet=True)
    assert not runs("runs")


@pytest.mark.parametrize("stage, said", [({"data": {"count": "${stages.coarse.output}"}}, "reads what coarse has not, its kind is train"), ({"init_from": "features"}, "reads what features has not, its kind is extract"),
                                         ({"kind": "extract", "init_from": None}, "what shall fine compute with"), ({"kind": "extract", "output": "b.pt"}, "ends in .npz or .safetensors")])
def test_what_a_stage_reads_and_writes_is_known_before_any_is_trained(here, stage, said):
    whole = small().to_dict()
    whole["stages"][2] |= stage
    with pytest.raises(ConfigError, match=said): train_stages(whole, quiet=True)
    assert not runs("runs")


def test_an_optimizer_of_another_model_or_kind_is_not_kept(trained_coarse):
    keep = {"keep": ["model", "optimizer"], "training": {"epochs": 1}}
    with pytest.raises(ConfigError, match="keep  the optimizer does not fit: that of .*: exp_avg of shape \\(2, 8\\) for a weight of \\(3, 8\\); keep: \\[model\\]"): begins(trained_coarse, **keep)
    same = Config.from_yaml("two.yaml").merge({"model": {"arms": 2}}, "fine")
    with pytest.raises(ConfigError, match="no dampening, momentum, nesterov, as SGD has"): create_trainer(same.stage("fine").merge(keep | {"training": {"optimizer": "sgd"}}), trained_coarse, quiet=True)
    with pytest.raises(ConfigError, match="the optimizer does not fit: head.weight"): train_stages(small().merge(keep, "fine"), quiet=True)
    assert runs("runs") == [trained_coarse]


def test_a_stage_is_named_by_the_file_of_its_best(here):
    """As a guide's config does; and a word that names no checkpoint is found before any stage is trained."""
    run = train_stages(small().merge({"init_from": "best_coarse.pth"}, "fine"), only=["coarse", "fine"], quiet=True)
    assert next(run.story().of("start", stage="fine"))["init_from"].endswith("coarse/step-00000010")
    with pytest.raises(CheckpointError, match="coarse@worst: worst is no checkpoint's name"): train_stages(small().merge({"init_from": "coarse@worst"}, "fine"), quiet=True)
    assert runs("runs") == [run]


ODD = [("code", one) for one in ([1], 5, None, {"names": [1]}, {"names": {"a": 5}}, {"folders": 5}, {"folders": ["/etc"]}, {"folders": {"/etc": {"passwd": 3}}}, {"names": {"os:system": "x"}})] + [
    ("stages", [1, [2]]), ("stages", "coarse"), ("by_hand", 5), ("by_hand", [5])]


@pytest.mark.parametrize("key, value", ODD)
def test_a_malformed_row_is_no_traceback(here, key, value, capsys):
    train_stages(small(save_dir="r"), only=["coarse"], quiet=True)
    rows = [json.loads(line) for line in Path("r/events.jsonl").read_text().splitlines()]
    Path("r/events.jsonl").write_text("".join(json.dumps(row | ({key: value} if row["event"] == "start" else {})) + "\n" for row in rows))
    for line in ("show r", "runs .", "watch r --once", "evaluate r", "branch r@7", "resume r"):
        code = main(line.split())
        assert code == 0 or len(capsys.readouterr().err.splitlines()) == 1, line
        assert "os:system" not in str(value) or code == 2 or line.split()[0] in ("show", "runs", "watch"), line


def test_a_stage_that_the_config_has_lost_is_said(here):
    dies(lambda: train_stages(small(save_dir="r"), only=["coarse"], quiet=True), "coarse:50")
    Path("r/config.yaml").write_text(Path("r/config.yaml").read_text().split("stages:")[0])
    with pytest.raises(RunError, match="has no stage coarse, which the run is to train"): resume("r", quiet=True)


@pytest.mark.parametrize("key, value", [("parent", 5), ("parent", {"id": "x"}), ("git", []), ("git", {"commit": 5}), ("versions", None), ("command", 3), ("found", 1), ("id", 5), ("created", 5)])
def test_a_malformed_run_is_no_traceback(here, key, value, capsys):
    run = train_stages(small(save_dir="r"), only=["coarse"], quiet=True)
    Path("r/run.json").write_text(json.dumps(run.info | {key: value}))
    for line in ("show r", "resume r"):
        assert main(line.split()) == 2 and "r/run.json is damaged, or not ours" in capsys.readouterr().err
    assert main(["runs", "."]) == 0


# --- whose code it is ---------------------------------------------------------------------------------------------------------------------

def elsewhere(*words, cwd, **env) -> subprocess.CompletedProcess:
    "trainbook …, in another folder, where nothing but trainbook is on the path."
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run([sys.executable, "-m", "trainbook", *map(str, words)], capture_output=True, text=True, env=env, cwd=cwd, timeout=120)


@pytest.fixture
def killed(here):
    "A run of one's own, killed in its first stage."
    assert command("train", "two.yaml", "--save_dir", "killed", "--stage", "coarse", die="coarse:300").returncode == -signal.SIGKILL
    return here/"killed"


def test_the_code_is_found_from_any_folder(killed, tmp_path_factory):
    said = elsewhere("resume", killed, cwd=tmp_path_factory.mktemp("elsewhere"))
    assert said.returncode == 0 and stage_state(Run(killed), "coarse") == "finished", said


def test_a_registered_name_is_found_by_its_home(here, tmp_path_factory):
    Path("project.py").write_text(PROJECT + "\nfrom trainbook.registry import register\nregister('model', 'plain_net')(Net)\nregister('system', 'plain')(type('Plain', (__import__('trainbook').BaseTrainer,), {'__module__': 'project'}))\nPlain = __import__('trainbook.registry', fromlist=['find']).find('system', 'plain')\n")
    Path("two.yaml").write_text(CONFIG.replace("project:Net", "plain_net") + "system: plain\n")
    start = "import project, trainbook; trainbook.train_stages('two.yaml', save_dir='r', only=['coarse'])"
    env = {**os.environ, "PYTHONPATH": f"{Path(__file__).resolve().parent.parent}{os.pathsep}{here}", "DIE": "coarse:300"}
    assert subprocess.run([sys.executable, "-c", start], env=env, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    said = elsewhere("resume", here/"r", cwd=tmp_path_factory.mktemp("elsewhere"))
    assert said.returncode == 0 and stage_state(Run("r"), "coarse") == "finished", said


@pytest.mark.parametrize("verb", ["resume {}", "branch {}@7", "evaluate {}", "predict {} out.npz --split val", "train --resume {}"])
def test_a_run_from_elsewhere_runs_nothing_unasked(killed, verb, tmp_path_factory):
    """Whatever its config names would be called, with its arguments: a person is asked first. And no folder that it names is looked into."""
    text = (killed/"config.yaml").read_text()
    (killed/"config.yaml").write_text(re.sub(r'name: "project:Net".*', 'name: "os:system"\n  command: "touch /tmp/never-made-by-trainbook"', text))
    said = elsewhere(*verb.format(killed).split(), cwd=killed.parent)
    assert said.returncode == 2 and said.stderr.startswith(f"{killed}  names os:system, which would run as code here") and len(said.stderr.splitlines()) == 1, said
    assert not Path("/tmp/never-made-by-trainbook").exists()
    (killed/"config.yaml").write_text(text)
    friend = tmp_path_factory.mktemp("friend")  # whose answers are others
    said = elsewhere(*verb.format(killed).split(), cwd=friend, XDG_CONFIG_HOME=str(friend))
    assert said.returncode == 2 and "names project:Net, project:all_points, project:data, which would run as code here" in said.stderr
    said = elsewhere(*verb.format(killed).split(), "--trust-code", cwd=friend, XDG_CONFIG_HOME=str(friend))
    assert said.returncode == 2 and "there is no module project" in said.stderr, said  # that is looked for here, not where the run says


def test_code_that_was_edited_is_said_and_refused(killed):
    Path("project.py").write_text(PROJECT + "# a remark\n")
    said = command("resume", "killed")
    assert said.returncode == 1 and "project.py has changed" in said.stdout and "cannot go on exactly: project.py is not what it was" in said.stderr, said
    Path("project.py").write_text(PROJECT)
    said = command("resume", "killed", die="coarse:60")
    assert said.returncode == -signal.SIGKILL and "has changed" not in said.stdout
    Path("project.py").write_text(PROJECT + "# a remark\n")
    assert command("resume", "killed", "--allow-drift", die="coarse:60").returncode == -signal.SIGKILL
    said = command("resume", "killed")  # it is known now
    assert said.returncode == 0 and "has changed" not in said.stdout, said
    assert "project.py" not in command("resume", "killed").stderr


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.soak)])
def test_proved_by_the_command_itself(here, kills):
    """Two stages that train and an extraction between them, killed at random: one `resume RUN` per kill, and all bits are the same."""
    Path("project.py").write_text(PROJECT.replace("def all_points(count=160)", "def all_points(count=160, pause=0.0)"))
    Path("slow.yaml").write_text(CONFIG.replace('name: "project:data"}', 'name: "project:data", pause: 0.004}', 1))
    done = command("prove", "slow.yaml", "--kills", kills)
    assert done.returncode == 0 and f"{kills} kills" in done.stdout, done


# --- a stage that is trained alone ----------------------------------------------------------------------------------------------------------

def test_a_stage_alone_begins_with_the_newest_run_of_its_config(here):
    """As the guides train: a command for each stage, each in a run of its own, the second one also in a sweep."""
    assert command(*"train --config two.yaml --stage coarse --epochs 1".split()).returncode == 0
    assert command(*"train --config two.yaml --stage coarse --epochs 1 --save_dir runs/mine --lr 5e-3".split()).returncode == 0
    Path("other.yaml").write_text(CONFIG)  # of the same name, but another config
    assert command(*"train other.yaml --stage coarse --epochs 1".split()).returncode == 0
    for lr in ("1e-2", "1e-3"):
        done = command(*f"train --config ./two.yaml --stage fine --epochs 1 --lr {lr} --save_dir sweeps/lr_{lr}".split())
        assert done.returncode == 0, done.stderr
        (said,) = [line for line in done.stdout.splitlines() if "fine begins with" in line]
        assert said.startswith("fine begins with runs/mine/coarse/step-00000010, of the newest run of this config that has coarse (another: --init_from RUN/coarse@best): 2 of"), said
        assert next(Run(f"sweeps/lr_{lr}").story().of("start"))["init_from"] == "runs/mine/coarse/step-00000010"
        assert onward.further(Run(f"sweeps/lr_{lr}")) == f"branch sweeps/lr_{lr} training.epochs=2"  # and no stage that it has from elsewhere
    assert create_trainer(Config.from_yaml(here/"two.yaml").stage("fine"), quiet=True).begins.startswith("runs/mine/")  # however the file is typed
    assert create_trainer(Config.from_yaml("other.yaml").stage("fine"), quiet=True).begins.startswith("runs/two-")
    with pytest.raises(CheckpointError, match="stage coarse has not been trained in this run"): create_trainer(Config.from_yaml("two.yaml").stage("fine").merge({"run": {"root": "sweeps"}}), quiet=True)


def test_a_config_without_a_file_is_known_by_its_name(here):
    coarse = lambda name: train_stages(small(save_dir=f"runs/{name}"), only=["coarse"], quiet=True)
    values = {"run": {"name": "two"}, **{key: value for key, value in Config.from_yaml("two.yaml").to_dict().items() if key != "run"}}
    coarse("two-20261121-090000"), coarse("two-large-20261121-100000")
    fine = Config.from_dict(values).stage("fine")
    assert create_trainer(fine, quiet=True).begins.startswith("runs/two-20261121-090000/")
    assert create_trainer(fine.merge({"init_from": "best_coarse.pth"}), quiet=True).begins.startswith("runs/two-20261121-090000/")
    assert create_trainer(fine.merge({"optional": True}), quiet=True).begins.startswith("runs/two-20261121-090000/")
    with pytest.raises(CheckpointError, match="coarse has not been trained"): create_trainer(fine.merge({"run": {"name": "tow"}}), quiet=True)
    Path("runs/odd").mkdir()
    for odd in ([1], {"file": 5}, {}, "two.yaml"):
        Path("runs/odd/run.json").write_text(json.dumps(Run("runs/two-20261121-090000").info | {"config": odd, "cwd": 7, "created": "2999"}))
        assert begins().begins.startswith("runs/two-")


@pytest.mark.parametrize("stage, die", [("fine", "fine:20"), ("features", "look:2")])
def test_a_stage_alone_that_is_killed_at_once_begins_with_the_same(here, stage, die):
    """A newer run of the stage before is not taken when it goes on, nor by what branches from it."""
    train_stages(small(save_dir="runs/a"), only=["coarse"], quiet=True)
    straight = train_stages(small(save_dir="straight"), only=[stage], quiet=True)
    dies(lambda: train_stages(small(save_dir="killed"), only=[stage], quiet=True), die)
    assert stage_state(Run("killed"), stage) == "begun"
    train_stages(small(save_dir="runs/b", lr=1.0), only=["coarse"], quiet=True)
    resume("killed", quiet=True)
    for run in (straight, Run("killed")): assert {row["init_from"] for row in run.story().of("start", "resume")} == {"runs/a/coarse/step-00000010"}
    if stage == "features": assert Path("straight/features/output.npz").read_bytes() == Path("killed/features/output.npz").read_bytes(); return
    assert torch.equal(weights("straight"), weights("killed"))
    child = branch("killed@7", ["training.epochs=2"], quiet=True)
    assert child.config.stage("fine").init_from == "runs/a/coarse/step-00000010" and stage_state(child, "fine") == "finished" and stage_state(child, "coarse") == "new"


def test_what_a_run_has_itself_comes_first(here):
    run = train_stages(small(save_dir="own"), only=["coarse"], quiet=True)
    train_stages(small(save_dir="runs/newer"), only=["coarse"], quiet=True)
    assert train_stages(small(save_dir="own"), only=["fine"]).folder == run.folder
    assert next(run.story().of("start", stage="fine"))["init_from"] == "own/coarse/step-00000010" and run.config.stage("fine").init_from == "coarse"
    parent = train_stages(small(save_dir="runs/parent"), only=["coarse"], quiet=True)
    train_stages(small(save_dir="runs/newest"), only=["coarse"], quiet=True)
    child = Run.create(small(save_dir="child"), parent=(parent, "coarse", 10))
    assert begins(child).begins == str(here/"runs/parent/coarse/step-00000010")


def test_a_stage_that_does_not_come_before_is_none_to_begin_with(here):
    train_stages(small(), only=["coarse"], quiet=True)
    for stage in ("coarse", "features"):
        with pytest.raises(ConfigError, match=f"init_from  best_fine.pth: fine does not come before {stage}"):
            create_trainer(small().merge({"init_from": "best_fine.pth"}, stage).stage(stage), quiet=True)


# --- what one is told at the end ------------------------------------------------------------------------------------------------------------

def shell(line: str, **env) -> subprocess.CompletedProcess:
    "A line as a person pastes it; bin/ is where the program lies, and nothing else finds it."
    root = Path(__file__).resolve().parent.parent
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{Path.cwd()}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", **env}
    return subprocess.run(line, shell=True, capture_output=True, text=True, env=env, timeout=120)


def pasted(said: str, *only: str) -> dict[str, str]:
    "Each line that is told at the end (or `only` these), by its verb: pasted, it works."
    told = [line.strip() for line in said.splitlines() if re.match(r"  \S*trainbook ", line)]
    assert [re.search(r"trainbook (\w+)", line)[1] for line in told[::2]] == ["watch", "compare"] and "trainbook show" in told[3], said
    found = {}
    for line in told:
        verb = line.partition("trainbook ")[2].split()[0]
        if only and verb not in only: continue
        done = shell(line)
        assert done.returncode == 0, (line, done.stderr)
        found[verb] = done.stdout
    return found


@pytest.fixture
def bin(here):
    if not (script := Path(sys.executable).with_name("trainbook")).exists(): pytest.skip("trainbook is not installed beside this Python")
    (here/"bin").symlink_to(script.parent)


def test_what_is_told_at_the_end_can_be_pasted(here, bin):
    done = shell("bin/trainbook train two.yaml --epochs 1 --save_dir 'all of/my own'")
    assert done.stdout.splitlines()[-7:] == """
Run all of/my own  finished  fine step 10
  coarse  best val_loss 0.6877 at step 10
  fine    best val_loss 1.1374 at step 10
  bin/trainbook watch 'all of/my own'
  bin/trainbook branch 'all of/my own' training.epochs=2
  bin/trainbook compare 'all of/*'
  bin/trainbook show 'all of/my own'""".strip().splitlines(), done.stdout + done.stderr
    found = pasted(done.stdout)
    assert "fine step 20" in found["branch"] and "my own" in found["compare"] and "end  finished" in found["watch"]
    again = shell("bin/trainbook resume 'all of/my own'")
    assert "has finished" in again.stdout and "bin/trainbook branch 'all of/my own' training.epochs=2" in again.stdout


def test_of_a_stage_alone_the_next_one_is_told(here, bin):
    done = shell("bin/trainbook train two.yaml --epochs 1 --save_dir r --stage coarse")
    assert "  bin/trainbook train r/config.yaml --stage features --save_dir r\n" in done.stdout and "fine " not in done.stdout
    assert "features has written" in pasted(done.stdout, "train")["train"] and stage_state(Run("r"), "features") == "finished"


@pytest.mark.parametrize("words, line", [("early_stopping=true patience=1 lr=1e-9 epochs=9", "branch r@best training.early_stopping=false training.epochs=18"),
                                         ("'epochs=10 steps' restore_best=true", "branch r 'training.epochs=20 steps'"), ("'epochs=0.3 s' scheduler=none", "branch r 'training.epochs=0.6 s'")])
def test_what_has_ended_in_another_way_goes_on_too(here, bin, words, line):
    Path("one.yaml").write_text(CONFIG.split("stages:")[0])
    done = shell(f"bin/trainbook train one.yaml --save_dir r {words}")
    assert f"  bin/trainbook {line}\n" in done.stdout, done.stdout + done.stderr
    last = Run("r").progress()["step"]
    branched = pasted(done.stdout, "branch")["branch"]
    assert int(re.search(r"Run r-branch-\S+  finished  train step (\d+)", branched)[1]) > last, branched


def test_who_was_interrupted_is_told_how_to_go_on(here, bin):
    process = start("train", "two.yaml", "--save_dir", "r", "stages.coarse.data.pause=0.01")
    while not Path("r/coarse/best").exists(): time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 130 and re.search(r"\nRun r  paused  coarse step \d+\n  coarse  best val_loss 0\.\d{4} at step \d+\n", said), said
    said = re.sub(r"(?m)^  \S+/trainbook ", "  bin/trainbook ", said)
    assert "Run r  finished" in pasted(said, "resume")["resume"]


def test_a_training_that_was_not_finite_is_told_in_lines(here):
    """Which step, and which line made it so; no traceback through what is ours. A debugger hears what is piped into it."""
    Path("logs.py").write_text('''
import torch
class Logs(torch.nn.Linear):
    def __init__(self): super().__init__(2, 2)
    def forward(self, x): return torch.log(super().forward(x))
''')
    Path("one.yaml").write_text(CONFIG.split("stages:")[0].replace("project:Net", "logs:Logs"))
    done = command("train", "one.yaml", "--save_dir", "r")
    said = done.stderr.splitlines()
    assert done.returncode == 1 and said[0].startswith("step 1  its gradient is not finite") and "log in Logs.forward (logs.py:5)" in said[1] and "Traceback" not in done.stderr, done.stderr
    assert Run("r").status == "failed" and (here/"r/train/nonfinite-00000001").is_dir()
    both = [start("replay", "r") for _ in range(2)]
    told = [one.communicate(timeout=60)[0] for one in both]
    assert told[0] == told[1] and told[0].startswith("first non-finite: log in Logs.forward (logs.py:5)") and [one.returncode for one in both] == [0, 0]
    debugged = command("replay", "r", "--debug", input="p x.shape\nq\n")
    assert debugged.returncode == 0 and "-> def forward(self, x): return torch.log" in debugged.stdout and "torch.Size([16, 2])" in debugged.stdout


def test_the_name_of_the_program_is_that_by_which_it_was_called(here, monkeypatch):
    from trainbook.cli import _program
    for name in ("bin/trainbook", "my bin/trainbook"): Path(name).parent.mkdir(); Path(name).touch(0o755)
    monkeypatch.setenv("PATH", str(here/"bin"))
    for called, told in (("bin/trainbook", "bin/trainbook"), (here/"bin/trainbook", "trainbook"), (here/"my bin/trainbook", "'my bin/trainbook'"), ("a/notebook.py", "trainbook"),
                         ("/x/trainbook/__main__.py", "bin/trainbook")):
        monkeypatch.setattr(sys, "argv", [str(called)])
        monkeypatch.setattr(sys, "executable", str(here/"bin/python"))
        if "__main__" in str(called): monkeypatch.setenv("PATH", "/nowhere")
        assert _program() == told, called
