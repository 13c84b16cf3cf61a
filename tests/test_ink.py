"""The ink recipe as one trains it: killed anywhere and gone on, side by side, by the lines of guide 002, from old checkpoints, with mistakes."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from pages import ROOT
from test_stages import came_to

from trainbook import Config, Run, load_model, runs
from trainbook.cli import main
from trainbook.device import mix
from trainbook.load import load_checkpoint
from trainbook.recipes import ink, ink_strokes
from trainbook.recipes.ink_strokes import DIFFICULTIES, curves, draw, save_strokes
from trainbook.stages import create_trainer, stage_state

SMALL = "data.img_size=16 model.embed_dim=8 model.num_layers=1 model.channels=4 data.epoch_length=32 --batch_size 8 data.val_length=8 data.num_workers=0 training.device=cpu".split()
STAGES = ("structural", "dense")


@pytest.fixture(scope="module", autouse=True)
def _place_is_kept():
    "Folder and path of this process, which verbs change: other tests are told where things are from there."
    folder, path = os.getcwd(), [*sys.path]
    yield
    os.chdir(folder)
    sys.path[:] = path


@pytest.fixture
def here(here):
    shutil.copytree(ROOT/"configs", "configs")
    return here


def says(capsys, line: str, *more, code: int = 0) -> str:
    "What `trainbook …` prints."
    capsys.readouterr()
    assert (found := main([*line.split(), *map(str, more)])) == code, (line, found, capsys.readouterr())
    said = capsys.readouterr()
    return said.out + said.err


def pictures(run: Path) -> dict[str, bytes]: return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*.png"))}


# --- killed -----------------------------------------------------------------------------------------------------------------------------

DEATHS = [  # (a function, at which of its calls), one life after the other; the fifth is the first of the dense stage
    ("trainbook.recipes.ink.InkTrainer.training_step", 2), ("trainbook.recipes.ink.InkTrainer.validation_step", 2), ("trainbook.recipes.ink.picture", 1), ("trainbook.recipes.ink.Samples._show", 2),
    ("trainbook.recipes.ink.StrokeLoss._keypoints", 2), ("trainbook.recipes.ink.StrokeLoss._keypoints", 6), ("trainbook.recipes.ink.picture", 1), ("matplotlib.figure.Figure.savefig", 2)]


@pytest.fixture(scope="module")
def trained(server, tmp_path_factory) -> Path:
    "A folder with a run of two stages that nobody touched."
    server.ask({"import": ["trainbook.recipes.ink", "matplotlib.figure", "matplotlib.backends.backend_agg", "torch.utils.tensorboard"]})
    folder = tmp_path_factory.mktemp("ink")
    assert server.live(folder, "", words=["train", str(ROOT/"configs/default.yaml"), *TWO, "--save_dir", "straight"]) == 0, (folder/"out-0").read_text()
    return folder


TWO = [*SMALL, "--epochs", "2", "data.val_length=16", "training.save_interval=3 steps", "training.val_batch_size=8", "training.keep_last_n=9", "logging.every=1"]


def test_killed_in_each_stage_it_ends_the_same(server, trained):
    """Weights, optimizer, rows and pictures, bit by bit; the lives that are killed read with two workers, the one that is not with none."""
    for life, die in enumerate([*DEATHS, None], start=1):
        words = ["resume", "killed"] if life > 1 else ["train", str(ROOT/"configs/default.yaml"), *TWO, "data.num_workers=2", "--save_dir", "killed"]
        assert server.live(trained, "", life=life, words=words, die=die) == (-signal.SIGKILL if die else 0), (die, (trained/f"out-{life}").read_text())
    lives = [(row["event"], row["stage"]) for row in Run(trained/"killed").story("start", "resume").rows]
    assert [stage for _, stage in lives].count("structural") == 5 and [stage for _, stage in lives].count("dense") == 5, lives
    killed, straight = (came_to(trained/name, STAGES) for name in ("killed", "straight"))
    assert killed == straight and pictures(trained/"killed") == pictures(trained/"straight")


def test_each_evaluation_leaves_its_picture(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    for stage in STAGES:
        steps = [row["step"] for row in Run(trained/"straight").story().of("eval", stage=stage)]
        assert [path.name for path in sorted((trained/"straight"/stage/"samples").iterdir())] == [f"step-{step:08}.png" for step in steps] and steps == [4, 8]
        for name in ("straight", "killed"):
            board = EventAccumulator(str(trained/name/"tensorboard"/stage)).Reload()
            assert {one.step for one in board.Images("samples")} == {*steps}
            assert all(one.encoded_image_string.startswith(b"\x89PNG") for one in board.Images("samples"))


def test_what_was_trained_is_measured_and_used(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    model, x = load_model("straight/dense@best"), draw([5], 2, 16)["image"]
    code = "import numpy, sys, trainbook, torch; numpy.save(sys.argv[1], trainbook.load_model('straight/dense@best')(torch.from_numpy(numpy.load(sys.argv[2])))['width'].detach())"
    numpy.save("x.npy", x)
    subprocess.run([sys.executable, "-c", code, "width.npy", "x.npy"], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert numpy.array_equal(numpy.load("width.npy"), model(x)["width"].detach()) and set(load_model("straight/structural@best")(x)) == {"skeleton", "tangent"}
    assert load_model("straight@best").use_skips  # the newest stage

    said = says(capsys, "evaluate straight/dense@latest")
    last = list(Run("straight").story().of("eval", stage="dense"))[-1]
    assert f"val_loss {last['val_loss']:.4f}" in said and "val_iou" in said and "val_keypoints_loss" in said, said
    said = says(capsys, "evaluate straight/structural@latest")  # hidden in the same way
    assert f"val_loss {list(Run('straight').story().of('eval', stage='structural'))[-1]['val_loss']:.4f}" in said, said
    says(capsys, "predict straight/dense@best maps.npz --split val")
    with numpy.load("maps.npz") as maps: assert {name: maps[name].shape[1:] for name in maps.files} == {name: (count, 16, 16) for name, count in ink_strokes.MAPS.items() if name != "image"}
    assert "there is no split test" in says(capsys, "predict straight@best maps.npz", code=2)


# --- lines of the guide -------------------------------------------------------------------------------------------------------------------

def test_experiments_side_by_side_and_a_sweep(here):
    """2.49, 2.63, 2.66: in a shell; two that begin in the same second are two runs, each with its own config."""
    small = " ".join(SMALL) + " --epochs 1"
    script = f'''
trainbook() {{ {sys.executable} -m trainbook "$@"; }}
trainbook train --config configs/exp_baseline.yaml --run-all-stages {small} > baseline.log 2>&1 & first=$!
trainbook train --config configs/exp_high_lr.yaml --run-all-stages {small} > high.log 2>&1 & second=$!
wait $first && wait $second || exit 1
for lr in 1e-3 5e-4 1e-4; do
    trainbook train --config configs/default.yaml --stage structural --lr $lr --save_dir sweeps/lr_$lr {small} || exit 1
done
trainbook compare 'sweeps/*'
'''
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, (done.stdout[-500:], done.stderr[-2000:])
    found = {re.sub(r"-\d{8}-.*", "", run.name): run for run in runs()}
    assert {name: run.config.stage("dense").training.lr for name, run in found.items()} == {"baseline": 1e-3, "high-lr": 5e-3} and len(runs()) == 2
    assert {stage_state(run, stage) for run in found.values() for stage in STAGES} == {"finished"}
    one, other = (load_checkpoint(f"{run.folder}@latest", quiet=True)["model_state_dict"]["encoder.pos_embed"] for run in found.values())
    assert not torch.equal(one, other)
    assert {run.name: run.config.stage("structural").training.lr for run in runs("sweeps")} == {"lr_1e-3": 1e-3, "lr_5e-4": 5e-4, "lr_1e-4": 1e-4}
    assert "lr_5e-4" in done.stdout.rpartition("trainbook show")[2]  # compare


def test_the_lines_of_the_guide(here, capsys, monkeypatch):
    """2.44 to 2.53, 2.62, 2.64, 2.65, 2.70, 2.71, 2.76: in its order, in one folder."""
    one = [*SMALL, "--epochs", "1"]
    says(capsys, "train --config configs/default.yaml --stage structural --epochs 1", *one)
    (first,) = runs()
    assert stage_state(first, "structural") == "finished" and stage_state(first, "dense") == "new"
    whole = says(capsys, "train --config configs/default.yaml --run-all-stages", *one, "--save_dir", "checkpoints")
    assert "best_structural.pth → dense: 308 of 350" in whole and [stage_state(Run("checkpoints"), stage) for stage in STAGES] == ["finished"] * 2

    steps, step = iter(range(99)), ink.InkTrainer.training_step
    with monkeypatch.context() as patch:  # Ctrl-C in the third step; --resume alone goes on with all that it was told
        patch.setattr(ink.InkTrainer, "training_step", lambda self, batch: (next(steps) == 2 and signal.raise_signal(signal.SIGINT), step(self, batch))[1])
        with pytest.raises(SystemExit) as left: main(["train", "--config", "configs/default.yaml", "--stage", "structural", *SMALL, "--epochs", "2", "--lr", "1e-2", "--save_dir", "stopped"])
        assert left.value.code == 130
    says(capsys, "train --resume stopped/structural@latest")
    stopped = Run("stopped")
    assert stopped.status == "finished" and stopped.config.stage("structural").training.lr == 1e-2 and load_checkpoint("stopped", quiet=True)["epoch"] == 2

    said = says(capsys, "train --config configs/default.yaml --stage dense --init_from stopped/structural@best --save_dir dense", *one)
    assert "dense begins with stopped/structural/" in said and Run("dense").config.stage("dense").init_from == "stopped/structural@best"
    says(capsys, "train --config configs/default.yaml --stage structural --lr 1e-2 --epochs 1 --batch_size 16 --save_dir words", *[word for word in SMALL if word not in ("--batch_size", "8")])
    training = Run("words").config.stage("structural").training
    assert (training.lr, training.epochs, training.batch_size) == (1e-2, 1, 16) and load_checkpoint("words", quiet=True)["step"] == 2

    # the old scripts' flags, and the file that the one leaves for the other
    flat = [word for word in SMALL if not re.match("model.(embed_dim|num_layers)", word)]
    says(capsys, "train --config configs/structural.yaml --embed-dim 8 --num-layers 1 --lr 1e-3 --epochs 1 --mask-ratio 0.5 --save_dir old", *flat)
    torch.save({"model_state_dict": load_checkpoint("old", quiet=True)["model_state_dict"]}, "checkpoints/best_structural.pth")
    says(capsys, "train --config configs/dense.yaml --init_from checkpoints/best_structural.pth --embed_dim 8 --num_layers 1 --lr 5e-4 --epochs 1 data.difficulty=1 --save_dir old-dense", *flat)
    config = Run("old-dense").config.stage("dense")
    assert (config.training.lr, config.data["difficulty"], config.training.epochs) == (5e-4, 1, 1) and Run("old").config.stage("structural").data["mask_ratio"] == 0.5

    assert "lr" in says(capsys, "compare runs/* words old")
    said = says(capsys, f"compare {first.folder}/structural@best words/structural@best")
    assert "lr" in said and "0.01" in said, said
    shutil.copy("configs/default.yaml", "configs/my_experiment.yaml")
    says(capsys, "train --config configs/my_experiment.yaml --stage structural", *one)
    assert any(run.name.startswith("my_experiment") for run in runs())

    before = json.dumps(Run("stopped").config.to_dict(), default=str)
    said = says(capsys, "train --resume stopped/structural@latest --lr 1e-3 --batch_size 32", code=2)  # the guide: do not
    assert "lr" in said and "batch_size" in said and "trainbook branch stopped" in said and json.dumps(Run("stopped").config.to_dict(), default=str) == before


def test_make_train_in_an_empty_folder(tmp_path, monkeypatch, capsys):
    """The same command with fewer numbers: one run, both stages, and the lines that one pastes next are good."""
    monkeypatch.chdir(tmp_path)
    assert "trainbook train configs/demo.yaml\n" in (ROOT/"Makefile").read_text()
    said = says(capsys, f"train {ROOT}/configs/demo.yaml", *SMALL, "--epochs", "1")
    (run,) = runs()
    assert os.listdir() == ["runs"] and run.status == "finished" and [stage_state(run, stage) for stage in STAGES] == ["finished"] * 2 and run.name.startswith("demo")
    lines = [re.sub(r"^  \S*trainbook ", "", line) for line in said.splitlines() if re.match(r"  \S*trainbook ", line)]
    assert [line.split()[0] for line in lines] == ["watch", "branch", "compare", "show"] and all(str(run.folder) in line or "'runs/*'" in line for line in lines)
    for line in lines: says(capsys, line.replace("'", ""))
    assert len(runs()) == 2 and len(run.children()) == 1 and load_checkpoint(run.children()[0].folder, quiet=True)["epoch"] == 2


# --- old checkpoints ------------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def old(here):
    "What train_structural.py and train_dense.py have left after one epoch: with scheduler and config, and without both."
    for stage, name, more in (("structural", "old_structural.pth", {"scheduler_state_dict": {"last_epoch": 1}, "config": {"embed_dim": 8, "num_layers": 1}}), ("dense", "best_dense_model.pth", {})):
        trainer = create_trainer(Config.from_yaml("configs/default.yaml", SMALL).stage(stage).merge({"init_from": None}), run=False, quiet=True)
        trainer.train(num_epochs=1)
        torch.save({"epoch": 1, "model_state_dict": trainer.model.state_dict(), "optimizer_state_dict": trainer.updates[""].optimizer.state_dict(), "loss": 0.9} | more, name)
    return here


def taken(state) -> int: return int(max(one["step"] for one in state["optimizer_state_dict"]["state"].values()))


def test_old_checkpoints_go_on(old, capsys):
    """2.54: at the epoch that they tell, with the optimizer's state; where all stages are asked for, the next one follows by itself."""
    said = says(capsys, "train --config configs/default.yaml --stage dense --resume best_dense_model.pth --epochs 3 --save_dir d", *SMALL)
    last = load_checkpoint("d", quiet=True)
    assert "epoch 2/3" in said and "epoch 1/3" not in said and "of another training" not in said and last["epoch"] == 3, said
    assert taken(last) == 12 and [row["epoch"] for row in Run("d").story().of("epoch")] == [2, 3]

    said = says(capsys, "train --config configs/default.yaml --run-all-stages --resume old_structural.pth --epochs 2 --save_dir s", *SMALL)
    assert [(row["stage"], row["epoch"]) for row in Run("s").story().of("epoch")] == [("structural", 2), ("dense", 1), ("dense", 2)]
    assert taken(load_checkpoint("s/structural", quiet=True)) == 8 and re.search(r"dense begins with \S*s/structural", said), said
    assert [stage_state(Run("s"), stage) for stage in STAGES] == ["finished"] * 2 and len(runs(".")) == 2

    said = says(capsys, "train --config configs/default.yaml --resume old_structural.pth --epochs 2 --save_dir t stages.dense.data.img_size=60", *SMALL, code=2)
    assert said.startswith("data.img_size  expected") and not Path("t").exists()  # before the first stage goes on


def test_old_weights_that_do_not_fit_are_an_error_and_weights_alone_a_beginning(old, capsys):
    """Whoever goes on shall not begin from scratch by mistake; a file without an optimizer is one to begin with."""
    weights = torch.load("best_dense_model.pth")["model_state_dict"]
    torch.save({"epoch": 1, "model_state_dict": weights}, "weights.pth")
    wider = [word for word in SMALL if not word.startswith("model.channels")] + ["model.channels=8"]
    said = says(capsys, "train --config configs/default.yaml --stage dense --resume best_dense_model.pth --save_dir d", *wider, code=1)
    assert "the weights do not fit; nothing was loaded" in said and not runs(".") and not Path("d").exists()
    said = says(capsys, "train --config configs/default.yaml --stage dense --resume weights.pth --epochs 1 --save_dir d", *SMALL)
    assert "weights.pth is of another training" in said and [row["epoch"] for row in Run("d").story().of("epoch")] == [1], said


def test_names_shapes_and_order_are_those_of_inktrace():
    """Written down from the original: its weights load by name, its optimizer by the order of the parameters."""
    theirs = (Path(__file__).parent/"inktrace_names.txt").read_text().splitlines()
    assert [f"{name} {' '.join(map(str, one.shape))}".strip() for name, one in ink.UnifiedModel().state_dict().items()] == theirs
    structural = [line for line in theirs if not line.startswith(tuple(f"decoder.heads.{part}" for part in ("width", "offset", "geo_aspp", "keypoints")))]
    assert [line.split()[0] for line in structural] == list(ink.UnifiedModel(full_heads=False).state_dict())


@pytest.mark.parametrize("words", [["training.freeze=[encoder.*]"], ["data.epoch_length=17"], ["--batch_size", "1"], ["training.channels_last=true", "training.freeze=[encoder.*]"]], ids=" ".join)
def test_what_once_broke_a_dense_step(here, capsys, words):
    """A frozen encoder ended the process in torch's group norm; the norm of a single sample, which a last batch may be, raised."""
    says(capsys, "train --config configs/base.yaml --epochs 1 --limit 3 --save_dir r", *SMALL, *words)
    assert Run("r").status == "finished"


# --- configs and mistakes -------------------------------------------------------------------------------------------------------------------

def test_the_config_files(here, capsys):
    """2.12 to 2.28, 2.62."""
    for file in sorted(Path("configs").glob("*.yaml")): says(capsys, f"config check {file}")
    config = Config.from_yaml("configs/default.yaml")
    assert config.stage_names == [*STAGES] and [config.stage(stage).training.epochs for stage in STAGES] == [30, 50]
    for stage in config.stages:
        t = stage.training
        assert (stage.model["embed_dim"], stage.model["num_layers"], t.lr, t.batch_size, t.save_interval, t.keep_last_n, stage.data["img_size"], stage.data["num_workers"]) == (128, 4, 1e-3, 32, 5, 3, 64, 4)
    structural, dense = config.stages
    assert structural.model["full_heads"] is False and dense.model["full_heads"] is True and structural.data["mask_ratio"] == 0.6 and dense.init_from == "best_structural.pth"
    assert [Config.from_yaml(f"configs/{stage}.yaml").stage_names for stage in STAGES] == [["structural"], ["dense"]]
    child = Config.from_yaml("configs/experiment1.yaml")
    assert (child.model["embed_dim"], child.model["num_layers"], child.training.lr, child.training.weight_decay, child.training.batch_size) == (128, 4, 5e-4, 1e-4, 64)
    assert Config.from_yaml("configs/exp_long_train.yaml").stage("dense").training.epochs == 100 and Config.from_yaml("configs/exp_large_model.yaml").model["embed_dim"] == 256


MISTAKES = {  # what is said of it
    "data.mask_ratio=1.5": "data.mask_ratio  expected a share", "data.mask_ratio=yes": "data.mask_ratio  expected", "data.mask_block=3": "data.mask_block  expected a size that divides img_size 16",
    "data.img_size=60": "data.img_size  expected a multiple of 8", 'data.img_size="64"': 'found "64"', "data.epoch_length=ten": "data.epoch_length  expected 1 or more samples, found ten", "data.val_length=0": "data.val_length",
    "data.difficulty=true": "data.difficulty  expected a whole number from 0 to 9, found true", "data.difficulty=1.5": "found 1.5", "training.curriculum={0: 0, 8: 12}": "curriculum  expected a whole number from 0 to 9, found 12",
    "training.curriculum={8: 1}": "curriculum  does not say what the first epoch has", "model.embed_dmi=8": "did you mean embed_dim", "model.embed_dim=6": "model.embed_dim  expected a multiple of 4", "model.dropout=2": "model.dropout",
    "training.curriculum={enabled: true, start_stage: 0}": "curriculum  enabled: expected", "training.curriculum={0: 0, 10 epochs: 1}": "curriculum  10 epochs: expected",
    "model.full_heads=maybe": "model.full_heads  expected true or false", "data.data_path=3": "there is no 3/train.npz",
    "model.num_layers=0": "model.num_layers", "model.num_heads=0": "model.num_heads", "data.data_path=nowhere": "there is no nowhere/train.npz", "data.data_path=text": "cannot be read as .npz", "data.data_path=large": "image has shape (4, 1, 32, 32), expected (4, 1, 16, 16)",
    "data.data_path=cut": "cut/train.npz  cannot be read as .npz", "data.data_path=none": "has no tangent", "data.data_path=nan": "width has values that are not finite"}


@pytest.mark.parametrize("where", ("", "stages.dense.", "--stage dense"))
def test_mistakes_are_one_line_before_anything_is_trained(here, capsys, where):
    """For all stages at once, in the second alone, and for a stage by itself."""
    for name in ("text", "large", "cut", "none", "nan"): Path(name).mkdir()
    Path("text/train.npz").write_text("x")
    whole = save_strokes("large/train.npz", 4, 1, 32).read_bytes()
    Path("cut/train.npz").write_bytes(whole[:len(whole) // 2])
    maps = {name: one.numpy() for name, one in draw([1, 2], 1, 16).items()}
    numpy.savez("none/train.npz", **{name: one for name, one in maps.items() if name != "tangent"})
    numpy.savez("nan/train.npz", **maps | {"width": maps["width"] * numpy.nan})
    for word, text in MISTAKES.items():
        key = re.split("[.=]", word)[1]
        words = [one for one in SMALL if key not in one] if where != "stages.dense." else SMALL
        stage, prefix = (where, "") if where.startswith("--") else ("", where)
        said = says(capsys, f"train configs/demo.yaml --epochs 1 {stage}", *words, f"{prefix}{word}", *(["init_from=null"] if stage else []), code=2)
        assert text in said and len(said.splitlines()) == 1 and not said.startswith("Traceback"), (word, said)
        assert not Path("runs").exists() or not os.listdir("runs"), word


# --- the generator ----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("difficulty", range(len(DIFFICULTIES)))
def test_all_of_it_is_on_the_canvas(difficulty):
    """Of 2,000 samples: every point of every line is on the canvas, each value is finite and in its range, and lines lie in ink."""
    keys = numpy.array([mix(difficulty, number) for number in range(2000)], dtype=numpy.uint64)
    points = curves(keys, difficulty, 16)[0]
    assert points.min() > 0 and points.max() < 16
    for size in (16,) if difficulty else (16, 64):
        maps = draw(keys, difficulty, size)
        assert all(bool(one.isfinite().all()) for one in maps.values())
        line = maps["skeleton"].bool()
        assert bool((maps["image"][line] > 0).all()) and bool(line.any(3).any(2).all())  # each sample has a line, in its ink
        assert all(0 <= float(maps[name].min()) and float(maps[name].max()) <= 1 for name in ("image", "skeleton", "keypoints"))
        assert float(maps["offset"].abs().max()) <= 0.5 and float(maps["width"][line].min()) > 0
        assert not maps["width"][~line].any() and not maps["tangent"][~line.expand(-1, 2, -1, -1)].any()


def test_a_sample_is_its_key(here):
    """By seed, epoch and index; whatever the batch, and whoever reads it."""
    def batches(**words):
        trainer = create_trainer(Config.from_yaml("configs/demo.yaml", [*SMALL, "--epochs", "1", "data.epoch_length=12"]).merge(words).stage("dense").merge({"init_from": None}), run=False, quiet=True)
        return {epoch: torch.cat([batch["image"] for _, batch in trainer.train_loader.batches(epoch)]) for epoch in (0, 1)}
    usual = batches()
    assert not torch.equal(usual[0], usual[1]) and not torch.equal(batches(training={"seed": 7})[0], usual[0])
    for words in ({"training": {"batch_size": 5}}, {"data": {"num_workers": 1}}, {"data": {"num_workers": 2}, "training": {"batch_size": 12}}):
        assert all(torch.equal(one, usual[epoch]) for epoch, one in batches(**words).items()), words


def test_another_difficulty_is_another_training(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    shutil.copytree("straight", "other", dirs_exist_ok=True)
    kept = {name: Path("other", name).read_bytes() for name in ("events.jsonl", "config.yaml")}
    assert "trainbook branch other" in says(capsys, "resume other data.difficulty=5", code=2)
    said = says(capsys, "train --config straight/config.yaml --stage dense --resume straight/dense@latest data.difficulty=5 --epochs 1 --save_dir changed")
    assert "of another training (data.difficulty)" in said and kept == {name: Path("other", name).read_bytes() for name in kept}


def test_a_full_disk_is_no_end(here, monkeypatch, capsys):
    """A picture that cannot be written is said; the training goes on."""
    from matplotlib.figure import Figure
    def full(*words, **more): raise OSError(28, "No space left on device")
    monkeypatch.setattr(Figure, "savefig", full)
    said = says(capsys, "train configs/demo.yaml --stage structural --epochs 2 --save_dir r", *SMALL)
    assert said.count("no picture of samples: [Errno 28] No space left on device") == 2 and Run("r").status == "finished"
    assert not list(Path("r").rglob("*.png"))
    monkeypatch.undo()
    os.chdir(here)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_figure", full)
    said = says(capsys, "train configs/demo.yaml --stage structural --epochs 1 --save_dir b", *SMALL)
    assert "No space left on device" in said and Run("b").status == "finished"


def test_a_diagnosis_finds_nothing(here, capsys):
    """In the structural stage the shortcuts rest, in the dense one what stands in for them; their trainers say so."""
    says(capsys, "train configs/demo.yaml --stage structural --epochs 1 --save_dir r", *SMALL)
    for stage, more in (("structural", []), ("dense", ["--init_from", "r/structural@best"])):
        said = says(capsys, f"diagnose configs/demo.yaml --stage {stage} --seconds 4", *SMALL, *more)
        assert not re.findall(r"^[✕△] (\w+)", said, re.M), said
