"""The picker and the comparison: what they say of runs of any state, what a click does, what 500 runs cost."""
import importlib
import json
import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

from trainbook import Config, branch, compare, launch, launch_branch, load_checkpoint, train_stages
from trainbook.compare import Shelf, choices_of, picture_of, short_names
from trainbook.picker import ResumePicker, card, words_of
from trainbook.run import Run, RunError, runs
from trainbook.source import ConfigError
from trainbook.stepfolder import steps

NASTY = "<script>alert(1)</script>"
NETS = """import time, torch
from torch.utils.data import TensorDataset
def net(width: int = 4, words: str = ""): return torch.nn.Linear(2, 2)
def points(pause: float = 0.0):
    x = torch.randn(80, 2, generator=torch.Generator().manual_seed(0))
    y = (x.sum(1) > 0).long()
    class Slow(TensorDataset):
        def __getitem__(self, i): time.sleep(pause); return super().__getitem__(i)
    return Slow(x[:64], y[:64]), TensorDataset(x[64:], y[64:])
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Three runs, each a branch of the one before: made once, copied for each test."
    folder, before = tmp_path_factory.mktemp("picker"), os.getcwd()
    (folder/"picker_nets.py").write_text(NETS)
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    words = {"epochs": 6, "batch_size": 16, "lr": 1e-2, "loss": "cross_entropy", "save_interval": 1, "keep_last_n": 10}
    config = Config.from_dict({"run": {"name": "base"}, "model": {"name": "picker_nets:net", "words": NASTY}, "data": {"name": "picker_nets:points"},
                               "logging": {"every": "1 step"}, "training": words})
    base = train_stages(config, quiet=True)
    lower = branch(f"{base.folder}@8", ["lr=1e-3"], "lower", quiet=True)
    branch(f"{lower.folder}@16", ["weight_decay=0.5"], "third", quiet=True)
    os.chdir(before)
    yield folder/"runs"
    sys.path.remove(str(folder))


@pytest.fixture
def three(made, here):
    shutil.copytree(made, here/"runs")
    for note in Path("runs").glob("*/branches/*"): note.write_text(note.read_text().replace(str(made.absolute()), str(here/"runs")))
    return {run.config.run.name: run for run in runs()}


def until(holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def said(picker) -> str: return re.sub("<[^>]*>", "", picker._said.value)


def cut(three):
    "base as it is when it was killed behind step 20; and its last checkpoint, for later."
    run = three["base"]
    rows, last = run.folder/"events.jsonl", run.folder/"train/step-00000024"
    rows.write_bytes(b"".join(line for line in rows.read_bytes().splitlines(True) if b'"event": "end"' not in line))
    last.rename("later")
    (run.folder/"train/final").unlink(missing_ok=True)
    return run, lambda: Path("later").rename(last)


def by_name(shelf, name): return next(one for one in shelf.choices if f"{shelf.name_of(one.run)}@{one.step}" == name)


def test_lineage_is_lived_until_it_branched_and_given_up_behind_it(three):
    shelf = Shelf()
    assert shelf.read() and shelf.names == {three[name].folder: name for name in three}
    chosen = by_name(shelf, "third@20")
    lines = {line.name: line for line in shelf.lines(chosen)}
    assert [(line.role, line.until, line.fork) for line in lines.values()] == [("ancestor", 8, 0), ("ancestor", 16, 8), ("ancestor", 20, 16)]
    assert lines["third"].chosen == 20 and lines["third"].parent == "lower" and lines["lower"].parent == "base"
    assert {line.name: line.role for line in shelf.lines(by_name(shelf, "base@8"))} == {"base": "ancestor", "lower": "other", "third": "other"}
    told = ["".join(text for _, text in line) for line in card(shelf, chosen)]
    assert told[1] == "lineage base 0…8 → lower …16 → third …20" and told[2].startswith("✓ exact model, optimizer, random numbers (python, torch, numpy)")
    assert told[3] == "△ 4 later steps of third stay on disk; going on from here opens a branch"
    assert "the end of this run" in card(shelf, by_name(shelf, "third@24"))[3][0][1]


def test_ranked_by_the_metric_that_decides_with_a_word_for_the_best(three):
    picker = ResumePicker().wait()
    values = [one.value for one in picker._order if one.metric]
    assert values == sorted(values) and picker.rows()[0][2] == "★ best" and [row[2] for row in picker.rows()].count("★ best") == 1
    shelf = picker.shelf  # of another metric more is better, and what is NaN is last of its kind
    shelf.choices = [one._replace(facts=one.facts | {"monitor": "val_acc", "metric": float("nan") if one.step == 8 else one.step}) for one in shelf.choices if one.metric]
    found = [choice.value for choice in shelf.ranked()]
    assert found[:2] == [24, 24] and found[-1] != found[-1] and len(shelf.best()) == 1


def test_a_damaged_checkpoint_is_shown_as_such_and_nothing_can_be_done_with_it(three):
    short = three["base"].folder/"train/step-00000012/model.safetensors"
    os.truncate(short, short.stat().st_size - 1)
    flipped = three["base"].folder/"train/step-00000016/model.safetensors"
    data = bytearray(flipped.read_bytes()); data[-1] ^= 1; flipped.write_bytes(data)
    picker = ResumePicker().wait()
    assert picker.rows()[-1][::2] == ("base@12", "✕ damaged")
    picker.choose("base@12")
    assert picker.resume.disabled and picker.branch.disabled and picker.weights.disabled and "✕ damaged" in picker.html()
    picker.choose("base@16")  # its length is right: seen when it is chosen, since then every byte is read
    assert "comparing every byte" in picker.html() or "✕" in picker.html()
    picker.wait()
    assert "✕ " in picker.html() and "model.safetensors" in repr(picker)


def test_clicks_do_it_and_the_code_does_the_same(three, monkeypatch):
    picker = ResumePicker().wait()
    picker.choose("base@12")
    assert picker.codes()[0] == f'launch_branch("{three["base"].folder}@12")'
    picker.resume.click()
    assert picker.resume.disabled  # until it has begun
    picker.wait()
    until(lambda: picker.run.status == "finished")
    first = picker.run.story().rows[0]
    assert picker.run.parent["step"] == 12 and picker.run.name.startswith("base-") and first["event"] in ("start", "resume") and not picker.resume.disabled
    picker.again.click()
    assert picker._below.children[0].run == picker.run and any(one.run == picker.run for one in picker.wait()._order)
    assert list(three["base"].story().rows)[-1]["event"] == "end"  # what was there is as it was
    picker.choose(f"{three['lower'].folder}@20")
    picker.name.value, picker.changes.value = "own", "lr=0.5, epochs=8"
    assert picker.codes()[1] == f'launch_branch("{three["lower"].folder}@20", ["lr=0.5", "epochs=8"], "own")'
    picker.branch.click()
    picker.wait()
    until(lambda: picker.run.status == "finished")
    assert picker.run.name.startswith("own-") and picker.run.config.training.lr == 0.5 and max(row["step"] for row in picker.run.story().of("step")) == 32
    picker.weights.click()
    picker.wait()
    assert picker.model.weight.equal(load_checkpoint(f"{three['lower'].folder}@20", quiet=True)["model_state_dict"]["weight"]) and not picker.model.training


def test_the_newest_of_an_interrupted_run_goes_on_in_it(three):
    run, _ = cut(three)
    picker = ResumePicker(run.folder).wait()
    picker.choose(f"{run.folder}@20")
    assert picker.codes()[0] == f'launch("{run.folder}")' and "goes on in this run; 4 later steps of base" in repr(picker)
    picker.resume.click()
    picker.wait()
    until(lambda: run.status == "finished")
    assert picker.run == run and [row["from"] for row in run.story().of("resume")] == [20] and steps(run.folder/"train")[-1] == 24


def test_a_list_that_is_older_than_the_run(three):
    """What was the newest goes on in a branch, once it is not; and a stage that came meanwhile changes nothing of what was chosen."""
    run, put_back = cut(three)
    picker = ResumePicker().wait()
    picker.choose("base@20")
    assert picker.codes()[0].startswith("launch(")
    put_back()
    shutil.copytree(run.folder/"train", run.folder/"afterwards")
    rows = len(list(run.story().rows))
    picker.resume.click()
    picker.wait()
    assert picker.run.parent["name"] == run.name and picker.run.parent["step"] == 20 and picker.run.parent["stage"] == "train", said(picker)
    assert len(list(run.story().rows)) == rows and f"a branch from {run.name}@20," in said(picker)
    until(lambda: picker.run.status == "finished")


def test_the_lines_do_it_when_they_are_pasted(three):
    run, _ = cut(three)
    picker = ResumePicker().wait()
    picker.choose("base@20")
    picker.changes.value = "lr=2e-3"
    assert picker.codes()[0] == f'launch("{run.folder}", lr=0.002)'
    again = eval(picker.codes()[0], {"launch": launch})
    until(lambda: run.status == "finished")
    assert again == run and [row["values"] for row in run.story().of("control") if "values" in row] == [{"training.lr": 2e-3}]
    picker.choose("lower@12")
    picker.changes.value, picker.name.value = 'model.words="big one", betas=[0.9, 0.98]', "worded"
    assert picker.codes()[1] == f'launch_branch("{three["lower"].folder}@12", ["model.words=\\"big one\\"", "betas=[0.9, 0.98]"], "worded")'
    made = eval(picker.codes()[1], {"launch_branch": launch_branch})
    assert made.config.model["words"] == "big one" and [*made.config.training.betas] == [0.9, 0.98] and made.name.startswith("worded-")
    until(lambda: made.status == "finished")


@pytest.mark.parametrize("text, words", [
    ("", []), ("lr=1 epochs=2", ["lr=1", "epochs=2"]), ("lr=1,epochs=2 ,  seed=3", ["lr=1", "epochs=2", "seed=3"]), ("betas=[0.9, 0.99] lr=1", ["betas=[0.9, 0.99]", "lr=1"]),
    ("a.b='x, y' c=1", ["a.b='x, y'", "c=1"]), ("a=[[1, 2], [3]], b={x: [1, 2]}", ["a=[[1, 2], [3]]", "b={x: [1, 2]}"]), ("a='[' b=1", ["a='['", "b=1"]), ('a=["x ]", 2] b=1', ['a=["x ]", 2]', "b=1"])])
def test_changes_are_parted_by_blanks_and_commas(text, words): assert words_of(text) == words


@pytest.mark.parametrize("text", ["slower", "lr = 1", "a='x", "a=[1, 2", "--trust-code=1", "allow_drift=True", "lr=1 trust_code=1", "config=x", "=1"])
def test_what_is_no_change(text):
    with pytest.raises(ConfigError): words_of(text)


def test_no_change_is_a_word_of_the_call(three):
    run, _ = cut(three)
    picker = ResumePicker().wait()
    picker.choose("base@20")
    for wrong in ("trust_code=1", "allow_drift=True", "config=x"):
        picker.changes.value = wrong
        assert picker.codes()[0].startswith(f"# {wrong}  expected key=value")
        picker.resume.click()
        assert f"{wrong}  expected key=value of a config" in said(picker.wait()) and run.status == "interrupted"


def test_the_end_of_a_finished_run(three):
    picker = ResumePicker().wait()
    picker.choose("third@24")
    assert picker.resume.disabled and not picker.branch.disabled and [line[:10] for line in picker.codes()] == ["model = lo"]
    picker.changes.value = "epochs=7"
    assert picker.resume.disabled and [line.split("(")[0] for line in picker.codes()] == ["launch_branch", "model = load_model"]
    picker.choose("third@20")
    assert not picker.resume.disabled and len(picker.codes()) == 3


def test_looking_again_looks_at_every_byte_and_misses_what_is_gone(three):
    picker = ResumePicker().wait()
    picker.choose("base@16")
    assert "every byte as written" in repr(picker.wait())
    flipped = picker.chosen.path/"model.safetensors"
    data = bytearray(flipped.read_bytes()); data[-1] ^= 1; flipped.write_bytes(data)
    picker.again.click()
    assert "✕ " in repr(picker.wait()) and "every byte as written" not in repr(picker)
    shutil.rmtree(picker.chosen.path)
    picker.again.click()
    assert "@16 is gone; the best one is chosen" in said(picker.wait()) and "★" in picker.rows()[picker.list.value][2]


def test_a_branch_lies_beside_its_parent(three, here, monkeypatch):
    Path("elsewhere").mkdir()
    monkeypatch.chdir(here/"elsewhere")
    picker = ResumePicker("../runs").wait()
    picker.choose("base@20")
    picker.branch.click()
    picker.wait()
    assert picker.run.folder.parent == Path("../runs") and picker.run in picker.shelf.runs and not Path("runs").exists(), said(picker)
    until(lambda: picker.run.status == "finished")
    base = three["base"].name
    assert branch(f"../runs/{base}@20", [], "here", quiet=True).folder.parent == Path("../runs")
    assert branch(f"../runs/{base}@20", ["run.root=mine"], "asked", quiet=True).folder.parent == Path("mine")
    monkeypatch.chdir(here/"runs"/base)
    assert branch("latest", ["epochs=7"], "within", quiet=True).folder.parent == here/"runs"
    monkeypatch.setenv("HOME", str(here))
    assert len(ResumePicker("~/runs").wait().shelf.runs) == 6


def test_a_branch_of_a_run_that_is_gone_on_with_by_its_name(three):
    """It is a run of its own all the same, also while that one is not finished."""
    base = three["base"]
    rows = base.folder/"events.jsonl"
    rows.write_bytes(b"".join(line for line in rows.read_bytes().splitlines(True) if b'"event": "end"' not in line))
    text = (base.folder/"config.yaml").read_text()
    (base.folder/"config.yaml").write_text(re.sub(r"(\n +on_existing: )new", r"\1resume", text))
    assert base.config.run.on_existing == "resume" and base.status == "interrupted"
    child = branch(f"{base.folder}@8", [], "base", quiet=True)
    assert child != base and child.parent["id"] == base.id and base.status == "interrupted"


def test_the_panel_below_is_heard_and_gives_way_to_the_next(three, monkeypatch):
    heard = []
    monkeypatch.setattr("trainbook.picker.heard_beside", lambda *controls: heard.extend(controls))
    picker, run = ResumePicker().wait(), three["base"]
    with run.write() as ledger:
        ledger.resume("train", 24, ledger.position, stages=["train"])
        ledger.flush()
        picker._began(run)
        [first] = picker._below.children
        assert {first.pause, first.stop, first.lr, first.metric, first._view} <= {*heard} and not first._over.is_set()
        picker._began(three["lower"])
        assert first._over.is_set() and picker._below.children[0].run == three["lower"]
        ledger.end("finished")


class Slot:
    "An output on a page."
    def __init__(self, bundle): self.now = bundle
    def update(self, bundle, raw): self.now = bundle


def test_what_a_saved_page_shows_is_what_was_seen_last(three, monkeypatch):
    read = threading.Event()
    shows = lambda widget, *stills: tuple(map(Slot, [*stills, {}]))
    monkeypatch.setattr("trainbook.picker.show_widget", shows)
    monkeypatch.setattr(importlib.import_module("trainbook.compare"), "show_widget", shows)
    monkeypatch.setattr("trainbook.picker.check_step", lambda path: read.wait(60))  # large files
    picker = ResumePicker()
    picker.show()
    picture, table, _ = picker._slots
    assert "comparing every byte" in table.now["text/html"] and f"{picker._name}-still" in table.now["text/html"]
    before = picture.now["image/png"]
    read.set()
    picker.wait()
    assert "every byte as written" in table.now["text/html"] and picture.now["image/png"] == before
    picker.choose("third@20")
    picker.wait()
    assert "third@20" in picture.now["text/plain"].replace(three["third"].name, "third") and picture.now["image/png"] != before
    assert "every byte as written" in table.now["text/html"] and "third" in table.now["text/html"]
    compared = compare("runs/*")
    compared.show()
    before = compared._slots[0].now["image/png"]
    compared.axis.value = "samples"
    assert (then := compared._slots[0].now["image/png"]) != before
    compared.curve.value = "loss"
    assert compared._slots[0].now["image/png"] != then


def test_a_damaged_run_is_passed_over_by_a_pattern(three):
    Path("runs/broken").mkdir()
    Path("runs/broken/run.json").write_text("{")
    assert {entry.run for entry in compare("runs/*").entries} == {entry.run for entry in compare("runs").entries} == {*three.values()}
    assert [entry.run for entry in compare("./runs/base*").entries] == [three["base"]]
    with pytest.raises(RunError, match="no run"): compare("runs/brok*")


def test_mistakes_are_one_line_and_leave_no_run(three, monkeypatch):
    picker, there = ResumePicker().wait(), sorted(os.listdir("runs"))
    for name, changes, click, words in (("third@24", "", "resume", "has finished"), ("third@24", "", "branch", "needs a change"), ("base@8", "lr=fast", "branch", "lr"), ("base@8", "slower", "branch", "key=value"),
                                        ("base@8", "no.such=1", "branch", "no.such"), ("base@8", "'", "branch", "quotation")):
        picker.choose(name)
        picker.changes.value = changes
        getattr(picker, click).click()
        picker.wait()
        assert words in said(picker) and "\n" not in said(picker) and sorted(os.listdir("runs")) == there, said(picker)
    picker.name.value, picker.changes.value = "../out", ""
    picker.branch.click()
    assert "no name for a run" in said(picker.wait())
    monkeypatch.setenv("XDG_CONFIG_HOME", os.path.abspath("nobody"))
    picker.name.value = "mine"
    picker.branch.click()
    assert "if you trust who made it" in said(picker.wait()) and sorted(os.listdir("runs")) == there and picker.run is None


def test_a_run_that_trains_is_busy(three):
    run = three["base"]
    picker = ResumePicker().wait()
    with run.write() as ledger:
        ledger.resume("train", 24, ledger.position, stages=["train"])
        ledger.flush()
        picker.choose("base@24")
        assert "trains at this moment" in repr(picker)
        picker.resume.click()
        picker.wait()
        assert "is in use in this process" in said(picker)
        ledger.end("finished")


def test_names_and_configs_are_text(three):
    (Path("runs")/"x").mkdir()
    shutil.copytree(three["third"].folder, "runs/y", dirs_exist_ok=True)
    info = json.loads(Path("runs/y/run.json").read_text()) | {"id": "9" * 32}
    Path("runs/y/run.json").write_text(json.dumps(info))
    os.rename("runs/y", f"runs/{NASTY.replace('/', '_')}")
    picker = ResumePicker().wait()
    picker.list.value = next(i for i, one in enumerate(picker._order) if "script" in one.name)
    compared = compare("runs")
    text = picker.html() + picker._codes.value + compared.html() + json.dumps([one.get("text/html", "") for one in picker.wait().still() + compared.still()])
    assert "<script" not in text and "&lt;script&gt;" in text and "words" in compared.same["model.words"] + "words"
    with open(three["base"].folder/"events.jsonl", "ab") as log: log.write(b'{"event": "message", "stage": "train", "step": 24, "text": "\\u001b[31m"}\n')
    assert "\x1b" not in repr(ResumePicker()) + repr(compare("runs"))


@pytest.mark.parametrize("folder", ["empty", "nothing", "no-run"])
def test_a_folder_without_runs(folder, here):
    if folder != "nothing": Path(folder).mkdir()
    if folder == "no-run": Path(folder, "notes.txt").touch()
    picker = ResumePicker(folder)
    assert picker.chosen is None and picker.resume.disabled and (f"{folder} has no runs" if folder != "nothing" else "there is no folder nothing") in repr(picker)
    picker.resume.click()
    assert picker.html() and picker.still() and picker.wait().run is None
    with pytest.raises(RunError, match="no run"): compare(folder)
    run = Run.create(Config.from_dict({"save_dir": f"{folder}/new"}))  # a run without a row, and without a checkpoint
    assert "0 checkpoints · 1 run" in repr(ResumePicker(folder)) and compare(run).entries[0].best is None and "nothing measured yet" in compare(run).html()
    assert picture_of(compare(run).lines()) and choices_of(run) == []


def test_a_run_that_is_deleted_while_it_is_shown(three):
    picker = ResumePicker().wait()
    picker.choose("base@12")
    compared = compare("runs/*")
    for run in three.values(): shutil.rmtree(run.folder)
    for one in (picker.resume, picker.branch, picker.weights):
        one.click()
        assert "is gone" in said(picker.wait())
    picker.choose("lower@20")
    compared.axis.value = "time"
    assert "✕" in picker.wait().html() and "lower" in compared.html() and repr(picker)


def test_half_a_log_and_a_stage_of_its_own(three):
    log = three["third"].folder/"events.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    shutil.copytree(three["base"].folder/"train", three["base"].folder/"later")
    picker = ResumePicker().wait()
    names = [row[0] for row in picker.rows()]
    assert "base/train@8" in names and "base/later@8" in names and "third/train@20" in names
    picker.choose(f"{three['base'].folder}/later@8")
    assert picker.codes()[1] == f'launch_branch("{three["base"].folder}/later@8", [], "base-branch")' and "no numbers yet" in picker.html()


def test_made_by_hand_it_says_where_it_goes_on(here):
    import torch

    from trainbook import Trainer
    data = [(torch.ones(4, 2), torch.zeros(4, dtype=torch.long))] * 4
    trainer = Trainer(torch.nn.Linear(2, 2), data, loss="cross_entropy", num_epochs=2, quiet=True, save_dir="runs/hand", save_interval=1)
    trainer.train()
    picker = ResumePicker().wait()
    assert "trainer.resume_from_checkpoint" in picker.codes()[0] and picker.resume.disabled and picker.branch.disabled and not picker.weights.disabled
    picker.resume.click()
    assert "trainer.resume_from_checkpoint" in said(picker.wait())
    picker.weights.click()
    picker.wait()
    assert "weight" in picker.model["model_state_dict"]


def test_short_names_stay_different(here):
    for name in ("a-20260101-101010", "b-20260101-101010", "b-20260101-111111", "c-20260101-101010", "c-20260102-101010", "plain", "a-20260101-101010-2"):
        Run.create(Config.from_dict({"save_dir": f"runs/{name}"}))
    found = {folder.name: name for folder, name in short_names(runs()).items()}
    assert found == {"a-20260101-101010": "a", "b-20260101-101010": "b-101010", "b-20260101-111111": "b-111111", "c-20260101-101010": "c-20260101-101010",
                     "c-20260102-101010": "c-20260102-101010", "plain": "plain", "a-20260101-101010-2": "a-2"}


def test_text_and_picture_forms(three, capsys):
    picker = ResumePicker().wait()
    text, [first, second] = repr(picker), picker.still()
    assert text.splitlines()[0] == f"runs  {len(picker._order)} checkpoints · 3 runs" and "★ best" in text and "lineage" in text and "load_model(" in text
    assert first["text/plain"] == text and len(first["image/png"]) > 5000 and "<table" in second["text/html"] and "<svg" not in second["text/html"]
    compared = compare(*three.values())
    assert {*compared.differ} == {"lr", "weight_decay"} and compared.same["epochs"] == "6" and "same in all: model.name=picker_nets:net" in repr(compared)
    assert repr(compared).splitlines()[1].split()[2] == "★" and [entry.best[1] for entry in compared.entries] == sorted(entry.best[1] for entry in compared.entries)
    from trainbook.cli import main
    assert main(["compare", "runs/*"]) == 0 and capsys.readouterr().out == f"{compare('runs/*')}\n"
    assert main(["compare", "base-x"]) != 0


def test_two_checkpoints_are_compared_layer_by_layer(three):
    a, b = f"{three['base'].folder}@8", f"{three['lower'].folder}@12"
    found = compare(a, b)
    assert [one.name for one in found.moved] and found.settings["training.lr"] == (1e-2, 1e-3)
    assert compare(load_checkpoint(a, quiet=True), load_checkpoint(b, quiet=True)).settings == found.settings
    with pytest.raises(RunError, match="two of them"): compare(a, three["lower"])


def test_five_hundred_runs(three, here):
    "The first paint is in time whatever there is; the rest follows."
    third = three["third"].folder
    for i in range(500):
        shutil.copytree(third, f"many/r{i:03}")
        info = json.loads((third/"run.json").read_text()) | {"id": f"{i:032}"}
        Path(f"many/r{i:03}/run.json").write_text(json.dumps(info))
    began = time.process_time()
    picker = ResumePicker("many")
    assert picker.chosen and picker.html() and time.process_time() - began < 4
    picker.wait()
    assert len(picker.shelf.curves) >= 500 and len(picker._order) == 500 * len(steps(third/"train"))
    began = time.process_time()
    picker.choose("r250@20")
    assert time.process_time() - began < 1 and len(picker.html()) < 1_500_000 and len(repr(picker).splitlines()) < 40
