"""The live panel, the picker and the comparison, as a person uses them: in a real JupyterLab; in a kernel alone; by themselves."""
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from lab import Lab, notebook

from trainbook.config import Config
from trainbook.run import Run, find_run, runs
from trainbook.widgets import LivePanel, live, panel_html

SETUP = """import time, torch
from torch.utils.data import DataLoader, TensorDataset
from trainbook import Callback, Trainer
torch.set_num_threads(1); torch.manual_seed(0)
x = torch.randn(768, 8); y = (x.sum(1) + torch.randn(768) / 2 > 0).long()
class Slowly(Callback):
    def __init__(self, seconds): self.seconds = seconds
    def step_end(self, trainer): time.sleep(self.seconds)
def made(name, epochs=200, seconds=0.004, **more):
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    parts = TensorDataset(x[:512], y[:512]), TensorDataset(x[512:], y[512:])
    return Trainer(model, DataLoader(parts[0], 8, shuffle=True), DataLoader(parts[1], 64), num_epochs=epochs, lr=3e-3,
                   save_dir="runs/" + name, callbacks=[Slowly(seconds)], **more)"""


def until(holds, page=None, seconds: float = 30.0):
    "Waits until it holds; in a page so that the browser goes on meanwhile."
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "it did not come about"
        page.tab.wait_for_timeout(50) if page else time.sleep(0.05)
    return found


def rows(run: Run, event: str) -> list[dict]: return [*run.story().of(event)]
def told(run: Run) -> list[str]: return [row["command"] for row in rows(run, "control")]
def step(run: Run) -> int: return run.progress().get("step", 0)
def button(page, cell: int, label: str): return page.output(cell).locator("button", has_text=label)
def curve(page, cell: int) -> str: return page.output(cell).locator("svg polyline").first.get_attribute("points")


def moves(page, cell: int, seconds: float = 10.0) -> None:
    "Its picture changes by itself."
    page.output(cell).locator("svg polyline").first.wait_for(timeout=1000 * seconds)
    was = curve(page, cell)
    until(lambda: curve(page, cell) != was, page, seconds)


def click(page, cell: int, label: str, run: Run, command: str) -> float:
    "Clicks, and waits until the log says so; the seconds that it took."
    before = told(run).count(command)
    button(page, cell, label).click()
    began = time.monotonic()
    until(lambda: told(run).count(command) > before, page, 10)
    return time.monotonic() - began


def steer(page, cell: int, run: Run) -> None:
    "Every control once, with what it does."
    saved = len(rows(run, "checkpoint"))
    click(page, cell, "Save now", run, "save")
    until(lambda: len(rows(run, "checkpoint")) > saved, page)
    click(page, cell, "Evaluate now", run, "evaluate")
    until(lambda: any("asked for: val_loss" in row["text"] for row in rows(run, "message")), page)
    click(page, cell, "Pause", run, "pause")
    button(page, cell, "Go on").wait_for()
    at = step(run)
    page.until(cell, "paused")
    page.tab.wait_for_timeout(300)
    assert step(run) == at and run.status == "running"
    click(page, cell, "Go on", run, "resume")
    until(lambda: step(run) > at, page)
    button(page, cell, "Pause").wait_for()
    slider = page.output(cell).get_by_role("slider")
    slider.focus()
    slider.press("ArrowLeft")
    until(lambda: "set" in told(run), page)
    [change] = [row["values"] for row in rows(run, "control") if row["command"] == "set"]
    assert change == {"training.lr": 2.674e-3}
    choice = page.output(cell).locator("select")
    choice.select_option("val_acc")
    page.output(cell).locator("svg text", has_text="val_acc").wait_for()
    choice.select_option("loss")
    page.output(cell).locator("svg text", has_text="val_loss").first.wait_for()
    linear = page.output(cell).locator("svg text").all_text_contents()
    button(page, cell, "log y").click()
    until(lambda: page.output(cell).locator("svg text").all_text_contents()[:3] != linear[:3], page)


def shown_at_rest(page, cell: int) -> None:
    "The picture and the table, and nothing that begs for a kernel."
    page.output(cell).locator("table").first.wait_for()
    pictures = page.output(cell).locator("img, svg[role=img]").all()
    assert sum(one.is_visible() and one.bounding_box()["height"] > 100 for one in pictures) == 1
    assert sum(one.is_visible() for one in page.output(cell).locator("table").all()) == 1
    assert "rror" not in page.text(cell) and "Loading" not in page.text(cell)


def distrusted(lab, name: str, as_name: str) -> None:
    "The notebook as somebody else's: a copy that this server has not signed."
    book = nbformat.read(lab.folder/name, 4)
    book.cells[0].source += "\n# from elsewhere"
    for cell in book.cells: cell.metadata.pop("trusted", None)
    nbformat.write(book, lab.folder/as_name)


def test_a_training_in_a_cell(lab):
    run_folder = lab.folder/"runs/here"
    with lab.open("here.ipynb", SETUP, "trainer = made('here')\ntrainer.train()") as page:
        page.run(0)
        page.begin(1)
        page.until(1, "running")
        assert page.bar(1).count() == 0 and page.output(1).get_by_role("progressbar").is_visible()
        run = Run(run_folder)
        until(lambda: rows(run, "epoch"), page)
        moves(page, 1)
        assert not any(one.is_visible() for one in page.output(1).locator("img").all())  # the picture for later is hidden
        steer(page, 1, run)
        page.picture(lab.folder/"light.png")
        page.theme("dark")
        page.picture(lab.folder/"dark.png")
        page.theme("light")
        click(page, 1, "Stop", run, "stop")
        page.wait()
        assert run.status == "stopped" and "stopped" in page.text(1) and 'live("runs/here")' in page.text(1)
        assert page.output(1).locator("button, select").count() == 0
        shown_at_rest(page, 1)
        page.save()
    [kinds] = [[sorted(one.data) for one in book.cells[1].outputs if "data" in one] for book in [nbformat.read(lab.folder/"here.ipynb", 4)]]
    assert kinds == [["image/png", "text/plain"], ["text/html", "text/plain"], ["text/plain"]]  # the last is the history
    distrusted(lab, "here.ipynb", "theirs.ipynb")
    for name in ("here.ipynb", "theirs.ipynb"):
        with lab.open(name) as page: shown_at_rest(page, 1)


def test_the_stop_button_pauses_and_the_cell_goes_on_in_its_panel(lab):
    with lab.open("stop.ipynb", SETUP, "trainer = made('stop', 40)\ntrainer.train()", "print('not reached')", "trainer.train(epochs=5)") as page:
        page.begin()
        page.until(1, "running")
        until(lambda: (lab.folder/"runs/stop/events.jsonl").exists() and step(run := Run(lab.folder/"runs/stop")) > 100 and run, page)
        page.stop()
        page.wait()
        assert page.text(1).splitlines()[-1].startswith("paused at step") and page.text(2) == ""
        assert "‖ paused" in page.text(1)


def test_in_the_background_and_after_a_reload(lab):
    with lab.open("behind.ipynb", SETUP, "trainer = made('behind', 600)\ntrainer.train(background=True)", "print('free')",
                  "from trainbook.widgets import live\nlive(trainer.run)", "from trainbook.widgets import live\nlive('runs/behind')") as page:
        page.run(0)
        page.run(1)
        run = Run(lab.folder/"runs/behind")
        assert page.run(2) == "free" and run.status == "running"
        page.run(3)
        moves(page, 1)
        steer(page, 1, run)
        until(lambda: page.output(3).get_by_role("slider").get_attribute("aria-valuenow") != "1", page)  # the other panel knows
        page.save()
        distrusted(lab, "behind.ipynb", "left.ipynb")
        page.tab.reload()
        page._ready()
        began = time.monotonic()
        for cell in (1, 3): moves(page, cell, 3)
        assert time.monotonic() - began < 3
        click(page, 3, "Pause", run, "pause")  # one of two panels; both see it
        button(page, 1, "Go on").click()
        until(lambda: told(run)[-1] == "resume", page)
        at = step(run)
        page.restart_kernel()
        until(lambda: run.status == "interrupted", page)
        page.run(4)  # in a fresh kernel, without anything of the training
        assert "interrupted" in page.text(4) and "run its cell again; its model Sequential, data are objects" in page.text(4) and run.progress()["step"] >= at
    with lab.open("left.ipynb") as page: shown_at_rest(page, 1)  # saved while it trained


NETS = """%%module nets
import time
import torch

class Net(torch.nn.Linear):
    def __init__(self): super().__init__(2, 2)

class Points(torch.utils.data.Dataset):
    def __len__(self): return 64
    def __getitem__(self, i):
        time.sleep(0.002)
        return torch.full((2,), i / 64), i % 2

def points(): return Points(), Points()"""
LAUNCH = """from trainbook.launch import launch
from trainbook.widgets import live
live(launch({"model": {"name": "nets:Net"}, "data": {"name": "nets:points"}, "loss": "cross_entropy", "save_dir": "runs/far",
             "training": {"epochs": 500, "batch_size": 8}}))"""


def test_a_launched_run_outlives_page_and_kernel(lab):
    with lab.open("far.ipynb", "import trainbook.cells", NETS, LAUNCH, "from trainbook.widgets import live\nlive('runs/far')") as page:
        for cell in range(3): page.run(cell)
        run = find_run(lab.folder/"runs/far")
        try:
            moves(page, 2)
            page.save()
            page.tab.reload()
            page._ready()
            moves(page, 2, 3)
            at = step(run)
            page.restart_kernel()
            page.run(3)
            moves(page, 3)
            begin, *_, end = curve(page, 3).split()
            assert float(begin.split(",")[0]) < 3 < float(end.split(",")[0]) and step(run) >= at  # from its first step on
            click(page, 3, "Pause", run, "pause")
            click(page, 3, "Go on", run, "resume")
        finally: run.tell("stop")
        page.until(3, "stopped")
        until(lambda: button(page, 3, "Stop").is_disabled(), page)
        assert run.status == "stopped"
        page.output(3).locator("select").select_option("val_loss")  # and one may still look around


SHELF = """from trainbook import Config, branch, train_stages
config = Config.from_dict({"model": {"name": "nets:Net"}, "data": {"name": "nets:points"}, "loss": "cross_entropy", "run": {"name": "base", "root": "shelf"},
                           "logging": {"every": "1 step"}, "training": {"epochs": 4, "batch_size": 16, "lr": 1e-2, "save_interval": 1, "keep_last_n": 9}})
base = train_stages(config, quiet=True)
lower = branch(f"{base.folder}@8", ["lr=1e-3"], "lower", quiet=True)"""
LONG = 'train_stages(config.merge({"run": {"name": "long"}, "training": {"epochs": 900}}), quiet=True)'


def test_pick_go_on_branch_and_compare(lab):
    """The picker by mouse and keyboard, what it begins, and the comparison of all of it; both stay in the saved notebook."""
    with lab.open("pick.ipynb", "import trainbook.cells", NETS, SHELF, LONG, "from trainbook import ResumePicker\npicker = ResumePicker('shelf'); picker",
                  "from trainbook import compare\ncompare('shelf/*')") as page:
        for cell in range(3): page.run(cell)
        page.begin(3)
        [long] = until(lambda: [run for run in runs(lab.folder/"shelf") if run.name.startswith("long") and step(run) > 20], page)
        page.stop()
        page.wait()
        assert long.status == "paused"
        page.run(4)
        listed = page.output(4).locator("select[title='checkpoints, the best first']")
        until(lambda: "every byte as written" in page.text(4), page)
        assert not any(one.is_visible() for one in page.output(4).locator("img").all())
        [newest] = [line for line in listed.locator("option").all_text_contents() if line.startswith("long@") and "latest" in line]
        listed.select_option(label=newest)
        until(lambda: "goes on in this run" in page.text(4), page)
        at = step(long)
        button(page, 4, "Resume here").click()
        until(lambda: rows(long, "resume") and step(long) > at, page)
        drawn = lambda: page.output(4).locator("svg polyline").last.get_attribute("points")  # of its panel, below
        before = drawn()
        until(lambda: drawn() != before, page)
        page.theme("dark")
        page.picture(lab.folder/"picker-dark.png")
        page.theme("light")
        page.picture(lab.folder/"picker-light.png")
        page.output(4).locator("button", has_text="Stop").click()
        until(lambda: told(long) == ["stop"] and long.status == "stopped", page)
        listed.focus()
        listed.press("Home")
        until(lambda: "★" in listed.locator("option:checked").inner_text(), page)
        listed.select_option(label=next(line for line in listed.locator("option").all_text_contents() if line.startswith("base@8")))
        page.output(4).get_by_placeholder("branch name").fill("typed")
        page.output(4).get_by_placeholder("changes: lr=1e-4").fill("lr=2e-3 epochs=9")
        until(lambda: '"lr=2e-3", "epochs=9"], "typed")' in page.text(4), page)
        button(page, 4, "Branch as…").click()
        [typed] = until(lambda: [run for run in runs(lab.folder/"shelf") if run.name.startswith("typed") and run.status == "finished"], page)
        assert typed.config.training.lr == 2e-3 and f"{typed.parent['name'].split('-')[0]}@{typed.parent['step']}" == "base@8"
        button(page, 4, "Look again").click()
        until(lambda: "typed@" in listed.inner_text(), page)
        button(page, 4, "Weights only").click()
        page.until(4, "picker.model is the model of")
        page.run(5)
        assert page.output(5).locator("svg polyline").count() >= 4 and not any(one.is_visible() for one in page.output(5).locator("img").all())
        table = page.output(5).locator("table").first.inner_text()
        assert [name for name in ("base", "lower", "long", "typed") if name in table] and "★" in table and "batch_size" not in table
        before = page.output(5).locator("svg polyline").first.get_attribute("points")
        page.output(5).get_by_label("axis").select_option("time")
        until(lambda: page.output(5).locator("svg polyline").first.get_attribute("points") != before, page)
        page.output(5).get_by_label("curve").select_option("loss")
        page.theme("dark")
        page.output(5).scroll_into_view_if_needed()
        page.picture(lab.folder/"compared-dark.png")
        page.theme("light")
        page.picture(lab.folder/"compared-light.png")
        page.save()
    with lab.open("pick.ipynb") as page:
        for cell in (4, 5): shown_at_rest(page, cell)


# --- in a kernel alone --------------------------------------------------------------------------------

LOOP = "took = time.time()\nfor _ in range(20): trainer.train(num_epochs=trainer.epoch + 1)\nprint('took', time.time() - took)"
STAGES = """from trainbook.stages import train_stages
run = train_stages({"model": {"name": "nets:Net"}, "data": {"name": "nets:points"}, "save_dir": "runs/staged",
                    "training": {"epochs": 1, "batch_size": 2, "loss": "cross_entropy"},
                    "stages": [{"name": f"stage{i}", **({"init_from": f"stage{i - 1}"} if i else {})} for i in range(4)]})"""
FAILS = """class Bad(Callback):
    def step_end(self, trainer):
        if trainer.step == 5: raise ValueError("<b>oh</b>")
bad = made("bad", 1, 0); bad.listeners.of["step_end"].append(Bad().step_end)
bad.train()"""


def test_in_a_kernel_alone(here):
    said = notebook(
        SETUP, "trainer = made('<i>it<script>', 2, 0)\ntrainer.train()", "trainer.history", LOOP, "import trainbook.cells", NETS, STAGES,
        "for i in range(3): made(f'one{i}', 1, 0).train()", FAILS, "made('quiet', 1, 0, quiet=True).train(); made('off', 1, 0, panel=False).train();",
        "behind = made('behind', 2, 0.002)\nbehind.train(background=True)", "print('mine'); behind.wait()",
        "import threading; time.sleep(0.3); print([one.name for one in threading.enumerate() if 'trainbook' in one.name])",
        "from trainbook.widgets import live\nended = live('runs/one0'); ended", "ended.metric.value = 'val_acc'; ended", "behind.train(num_epochs=90, background=True)",
        "two = made('two', 1, 0)\ntwo.train(background=True); two.wait(); two.train(num_epochs=300, background=True); time.sleep(1)")
    book = nbformat.read("out.ipynb", 4)
    kinds = [[sorted(kind for kind in one.data if kind != "text/plain") for one in cell.outputs if "data" in one] for cell in book.cells]
    html = ["".join(one.data.get("text/html", "") for one in cell.outputs if "data" in one) for cell in book.cells]
    printed = ["".join(one.text for one in cell.outputs if one.output_type == "stream").splitlines() for cell in book.cells]
    picture, panel, table = ["image/png"], ["text/html"], []
    assert kinds[1] == [picture, panel, table] and kinds[2] == [picture]  # the history beside its panel is a table
    assert "&lt;i&gt;it&lt;script&gt;" in html[1] and "<i>it" not in html[1]
    assert kinds[3] == kinds[6] == kinds[7] == [picture, panel]  # one panel, whatever a cell trains
    assert float(said[3].split()[-1]) < 10 and ">22</th>" in html[3]
    assert "stage3" in html[6] and "finished" in html[6]
    assert "one2" in html[7] and [line.split()[0] for line in printed[7] if "  finished  " in line] == ["one0", "one1"]
    assert "✕ failed" in html[8] and "ValueError: &lt;b&gt;oh&lt;/b&gt;" in html[8]
    assert kinds[9] == [] and printed[11] == ["mine"] and printed[10][0] == "trains in runs/behind"
    assert said[12] == "[]"
    assert kinds[14] == [["text/html"], ["application/vnd.jupyter.widget-view+json"]] and kinds[13] != kinds[14]
    assert "<img" in html[14] and "<table" in html[14]
    assert kinds[16][-1] == ["application/vnd.jupyter.widget-view+json"] and kinds[16].count(["text/html"]) == 2  # what came to rest stays, and one that lives
    until(lambda: Run("runs/behind").status == "interrupted")  # the kernel has gone, and no panel kept it
    done = subprocess.run([sys.executable, "-m", "nbconvert", "--to", "html", "out.ipynb"], capture_output=True, text=True)
    page = Path("out.html").read_text()
    assert done.returncode == 0 and page.count("<img") >= 6 and page.count("<svg") >= 6 and "best val_loss" in page


# --- on an older kernel -------------------------------------------------------------------------------

@pytest.fixture
def older(lab, tmp_path, monkeypatch):
    "JupyterLab with ipykernel 6: everything else is that of this Python."
    place, own = tmp_path/"older", Path(sys.prefix)
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    python = place/"bin/python"
    [packages] = place.glob("lib/python*/site-packages")
    (packages/"beside.pth").write_text(str(Path(pytest.__file__).parent.parent))
    pip = [python, "-m", "pip", "install", "-q", "--no-deps", "--ignore-installed", "ipykernel==6.31"]
    if subprocess.run(pip).returncode: pytest.skip("ipykernel 6.31 cannot be had here")
    for part in ("lab", "labextensions"): (place/"share/jupyter"/part).symlink_to(own/"share/jupyter"/part)
    monkeypatch.setattr(sys, "executable", str(python))
    with Lab(tmp_path, beside=lab) as older: yield older


def test_an_older_kernel_hears_clicks_in_the_background(older):
    with older.open("older.ipynb", SETUP, "import ipykernel; print(ipykernel.__version__)\nmade('front', 5).train()",
                    "trainer = made('behind')\ntrainer.train(background=True)", "print('free'); time.sleep(1)") as page:
        page.run(0)
        page.begin(1)
        page.until(1, "the buttons are heard when this cell has ended")
        page.wait()
        assert page.text(1).startswith("6.31") and "✓ finished" in page.text(1)
        shown_at_rest(page, 1)
        page.run(2)
        run = Run(older.folder/"runs/behind")
        moves(page, 2)
        steer(page, 2, run)
        assert page.run(3) == "free"
        click(page, 2, "Stop", run, "stop")
        page.until(2, "stopped")


# --- by itself ------------------------------------------------------------------------------------------

@pytest.fixture
def run(here):
    "Half a training: its folder."
    run = Run.create(Config.from_dict({"save_dir": str(here/"runs/demo")}))
    made = [{"event": "start", "stage": "train", "step": 0, "total": 100}]
    made += [{"event": "step", "stage": "train", "step": i, "time": i / 10, "loss": 1 / i, "lr": 1e-3, "epoch": i / 50} for i in range(1, 51)]
    (run.folder/"events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return run


def test_a_run_that_is_deleted_while_one_looks(run):
    panel = LivePanel(run)
    assert panel.status == "interrupted" and panel.pause.disabled
    shutil.rmtree(run.folder)
    panel.tell("stop")
    assert "not told: " in panel._said.value and not run.folder.exists()
    panel.curves.poll()
    panel.paint()
    assert panel.status == "gone" and "? gone" in panel._view.value and "image/png" in panel.still(table=False)
    assert "step 50" in repr(panel)


def test_a_half_written_log_and_one_of_nobody(run):
    log = run.folder/"events.jsonl"
    log.write_bytes(log.read_bytes()[:-20] + b'\xff{"event": ')
    assert "step 49" in repr(live(run))
    log.write_text("")
    panel = live(run)
    assert panel.status == "new" and "waiting for the first step" in panel._view.value and list(panel.still()) == ["text/plain"]
    assert "&lt;b&gt;" in panel_html(panel.curves, "<b>", "<b>") and "<b></b>" not in panel_html(panel.curves, "<b>", "<b>")


def test_in_a_terminal_it_is_a_text(run, capsys):
    live(run)._ipython_display_()
    assert capsys.readouterr().out.startswith("demo  running")


def test_a_log_and_a_config_that_are_damaged_behind_a_change(run):
    with open(run.folder/"events.jsonl", "a") as log:
        for lr in ("0.5e-3", '"e"'): log.write(f'{{"event": "control", "id": "i{lr}", "stage": "train", "step": 50, "command": "set", "values": {{"training.lr": {lr}}}}}\n'.replace("i\"e\"", "i2"))
    assert live(run).lr.value == 1
    rows = (run.folder/"events.jsonl").read_text().splitlines(True)
    (run.folder/"events.jsonl").write_text("".join(rows[:-1]))
    assert live(run).lr.value == pytest.approx(0.5e-3 / run.config.training.lr)
    (run.folder/"config.yaml").write_text("training: [")
    panel = live(run)
    assert panel.lr.value == 1 and "step 50" in repr(panel)
    shutil.rmtree(run.folder)
    panel.curves.poll(); panel.paint()
    assert panel.status == "gone"


def test_a_run_whose_losses_have_other_names(run):
    """The first that is chosen is one of them, not the learning rate, and so is the picture that stays."""
    made = [{"event": "start", "stage": "train", "step": 0}]
    made += [{"event": "step", "stage": "train", "step": i, "time": i / 10, "lr": 1e-3, "grad_norm": 1.0, "loss_g": 1 / i, "loss_d": i} for i in range(1, 51)]
    (run.folder/"events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made[:1]))
    panel = live(run)
    assert panel.metric.options == ("loss",)
    (run.folder/"events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    panel.curves.poll(); panel.paint()
    assert panel.metric.value == "loss_g" and panel.metric.options == ("loss_g", "loss_d", "grad_norm", "lr")
    first = panel.still()["text/html"]
    panel.metric.value = "loss_d"
    assert panel.still()["text/html"] != first and "loss_d" in panel._view.value
    with open(run.folder/"events.jsonl", "a") as log: log.write(json.dumps(made[-1] | {"step": 51, "new": 1.0}) + "\n")
    panel.curves.poll(); panel.paint()
    assert panel.metric.value == "loss_d" and "new" in panel.metric.options


def test_from_another_folder_and_on_again_elsewhere(run, tmp_path, monkeypatch):
    panel = live(Path("runs/demo"))
    (tmp_path/"elsewhere").mkdir()
    monkeypatch.chdir(tmp_path/"elsewhere")
    panel.begin()
    assert panel.status == "interrupted" and "resume(" in panel._said.value
    with run.write() as ledger:
        ledger.resume("train", 50, ledger.position, by_hand=["model Net", "data"])
        ledger.log("step", 51, loss=0.1); ledger.flush()
        until(lambda: "running" in panel._view.value and "step 51" in panel._view.value and not panel.stop.disabled)
    until(lambda: panel.status == "interrupted" and panel.stop.disabled)
    assert "model Net, data are objects" in panel._said.value and "resume(" not in panel._said.value
    panel._over.set()


def test_clicks_and_the_thread_that_follows_draw_one_at_a_time(run):
    """Whatever is read meanwhile; no error, and nothing twice."""
    before, panel = sys.getswitchinterval(), live(run)
    panel.share = 1.0
    panel.begin()
    sys.setswitchinterval(1e-5)
    try:
        with open(run.folder/"events.jsonl", "a", buffering=1) as log:
            for i in range(51, 500):
                log.write(json.dumps({"event": "step", "stage": "train", "step": i, "time": i / 10, "loss": 1 / i, "lr": 1e-3, f"more{i // 50}": 1.0}) + "\n")
                if i % 10 == 0: panel.log_y.value = not panel.log_y.value; panel.curves.poll(); repr(panel); panel._due = 0.0
    finally: sys.setswitchinterval(before)
    panel._due = 0.0
    until(lambda: "step 499" in panel._view.value)
    assert "no longer followed" not in panel._said.value and sum(panel.curves.of().series["loss"].count) == 499
    panel._over.set()
