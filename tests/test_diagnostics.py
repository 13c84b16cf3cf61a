"""Readings are judged as they should be; the panel in a real JupyterLab, live, asked, at rest; and in a kernel alone."""
import json
import math
import time
from importlib.util import find_spec
from pathlib import Path

import exact
import nbformat
import pytest
from lab import notebook
from test_panel import button, distrusted, moves, until

from trainbook import Trainer
from trainbook.diagnostics import Diagnostics, shown
from trainbook.ledger import read_rows
from trainbook.probes import clip
from trainbook.readings import Check, Readings, checks, overview, picture, report, units_card
from trainbook.run import Run

SETUP = """import torch
from torch.utils.data import DataLoader, TensorDataset
from trainbook import Callback, Diagnostics, Trainer
torch.set_num_threads(1); torch.manual_seed(0)
x = torch.randn(2048, 64); y = (x.sum(1) > 0).long()
def made(name, epochs=10000, **more):
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 2))
    return Trainer(model, DataLoader(TensorDataset(x, y), 64, shuffle=True), loss="cross_entropy", num_epochs=epochs, lr=1e-2, save_dir="runs/" + name, panel=False, **more)"""


# --- readings -----------------------------------------------------------------------------------------

GOOD = {"step": 1000, "time": 0.0, "phases": {"data": 1.0, "transfer": 0.0, "forward": 20.0, "backward": 40.0, "optimizer": 5.0, "logging": 0.5, "checkpoint": 0.5},
        "memory": {"allocated": 20e9, "reserved": 24e9, "peak": 22e9, "total": 80e9}, "blocks": [["embed", 0.1, 1e-3], ["head", 1.0, 2e-3]], "dead": [["act", 0.1]],
        "types": {"bfloat16": 20, "float32": 2}, "full": ["norm"]}
CARD = {"name": "a card", "torch": "2.13", "bf16": True, "tf32": True}


def of(*rows: dict, about=CARD) -> Readings:
    found = Readings(Path("nowhere"))
    found.rows, found.about = [GOOD | {"time": 5.0 * i} | row for i, row in enumerate(rows)], about
    return found


def without(*keys: str) -> dict: return {key: value for key, value in GOOD.items() if key not in keys}


FAULTS = {  # what a reading has → the verdict, its name, what it says, what it advises
    "data": ({"phases": GOOD["phases"] | {"data": 60.0}}, "problem", "data wait", "47.6 % of a step", "num_workers: 2"),
    "data with workers": ({"phases": GOOD["phases"] | {"data": 15.0}, "workers": [0, 4]}, "note", "data wait", "0 of 4 batches ready", "num_workers: 4"),
    "copy": ({"phases": GOOD["phases"] | {"transfer": 20.0}}, "note", "data wait", "24.1 %", "pin_memory"),
    "logging": ({"phases": GOOD["phases"] | {"logging": 10.0}}, "note", "logging", "13.1 %", "logging.every"),
    "checkpoint": ({"phases": GOOD["phases"] | {"checkpoint": 10.0}}, "note", "checkpoint", "13.1 %", "save_interval"),
    "memory": ({"memory": {"allocated": 78e9, "reserved": 79e9, "peak": 78e9, "total": 80e9}}, "note", "memory", "72.6 GB of 74.5 GB", "accumulate"),
    "fragments": ({"memory": {"allocated": 20e9, "reserved": 60e9, "peak": 22e9, "total": 80e9}}, "problem", "fragmentation", "35.4 GB reserved", "expandable_segments"),
    "nothing in half": ({"types": {"float32": 22}, "full": ["all"]}, "note", "autocast", "no module in half", ""),
    "skipped": ({"scale": 1024.0, "skipped": 50}, "note", "loss scale", "50 of 1,000", "bf16"),
    "not finite": ({"blocks": [["embed", math.nan, 1e-3], ["head", 1.0, 1e-3]]}, "problem", "gradients", "not finite in embed", "replay"),
    "no gradient": ({"blocks": [["embed", 0.0, 1e-3], ["head", 1.0, 1e-3]]}, "problem", "gradients", "none reaches embed", "detached"),
    "vanishing": ({"blocks": [["embed", 1e-7, 1e-3], ["head", 1.0, 1e-3]]}, "note", "gradients", "elsewhere in embed", "normalisation"),
    "too fast": ({"blocks": [["embed", 0.1, 0.2], ["head", 1.0, 1e-3]]}, "note", "updates", "20 % a step in embed", "lower lr"),
    "too slow": ({"blocks": [["embed", 0.1, 1e-9], ["head", 1.0, 1e-3]]}, "note", "updates", "next to none in embed", "higher lr"),
    "dead": ({"dead": [["act", 0.8]]}, "note", "dead units", "half of act", "LeakyReLU"),
    "saturated": ({"saturated": [["gate", 0.8]]}, "note", "saturated units", "half of gate", "smaller weights"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_told_and_comes_first(fault):
    row, verdict, name, said, fix = FAULTS[fault]
    first = checks(of(*[row] * 6))[0]
    assert (first.verdict, first.name) == (verdict, name) and said in first.found and fix in first.fix


def test_a_good_reading_has_no_note():
    assert {one.verdict for one in checks(of(*[{}] * 6))} == {"ok"}
    fp32 = of(*[{}] * 6)
    fp32.rows = [without("full", "types") | {"time": i} for i in range(6)]
    assert [one.name for one in checks(fp32) if one.verdict != "ok"] == ["half precision"]  # which this card has
    fp32.about = CARD | {"bf16": False, "tf32": False}
    assert [one.name for one in checks(fp32) if one.verdict != "ok"] == ["TF32 matmul"]
    assert checks(of()) == [] and "no reading yet" in report(of()) and "no reading yet" in overview(of())


def test_a_long_life_is_thinned_and_a_strange_log_is_survived(tmp_path):
    rows = [{"event": "probe", "stage": "train", **GOOD, "step": i, "time": float(i)} for i in range(2000)]
    odd = [{"event": "probe", "step": 1}, {"event": "probe", "phases": 3}, {"event": "answer", "to": ["?"], "text": 5}, {"event": "answer"}]
    (tmp_path/"events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*odd, *rows]) + "{torn")
    readings = Readings(tmp_path)
    assert len(readings.rows) <= 600 and readings.newest["step"] == 1999 and readings.rows[0]["step"] < 50
    assert not readings.poll() and picture(readings).startswith(b"\x89PNG")
    for row in readings.answers.values(): assert "<script" not in shown(row)
    assert "&lt;script&gt;" in shown({"to": "find_lr", "text": "<script>", "found": {"rates": "x"}})


def test_names_from_a_log_are_only_words():
    row = {"blocks": [["<script>x</script>", 1.0, 1e-3]], "dead": [["<b>", 0.9]], "types": {"<i>": 1}, "full": ["<u>"]}
    readings = of(row, row, about={"name": "<h1>"})
    html = overview(readings) + units_card(readings)
    assert "<script>" not in html and "<b>" not in html and "<u>" not in html and "&lt;script&gt;" in html


# --- the panel ----------------------------------------------------------------------------------------

def net(**more): return Trainer(exact.net(), exact.loader(), loss="cross_entropy", **({"epochs": 3, "quiet": True} | more))


def test_a_trainer_without_a_run_and_before_its_training(capsys):
    trainer = net(run=False)
    panel = Diagnostics(trainer)
    assert "no reading yet" in panel.html() and not panel.trains
    for question in ("profile", "memory", "find_lr", "find_batch_size", "diagnose"):
        if not find_spec(f"trainbook.{ {'find_lr': 'finders', 'find_batch_size': 'finders', 'profile': 'probes'}.get(question, question)}"): continue
        panel.ask(question)
        panel.wait()
        assert panel.readings.answers[question]["found"], panel.readings.answers[question]["text"]
    assert trainer.step == 0 and capsys.readouterr().out == ""
    clip(trainer)._first = 0
    trainer.train()
    panel.poll()
    assert panel.readings.rows and trainer.step == 39
    for tab in panel.tabs.options:
        panel.tabs.value = tab
        assert panel.name in panel._view.value
    bare = net(run=False)
    bare.train()
    assert all(bool((one == other).all()) for one, other in zip(bare.model.parameters(), trainer.model.parameters()))


def test_training_while_it_answers_is_refused(monkeypatch):
    trainer = net(run=False)
    panel, told = Diagnostics(trainer), []

    def slowly(trainer, question):
        from trainbook.trial import trial
        with trial(trainer):
            told.append("in")
            time.sleep(0.5)

    monkeypatch.setattr("trainbook.diagnostics.answer", slowly)
    panel.ask("profile")
    until(lambda: told)
    with pytest.raises(RuntimeError, match="trains in another thread"): trainer.train()
    panel.ask("profile")  # one at a time
    panel.wait()
    assert told == ["in"]
    trainer.train()


def test_a_run_that_is_over_or_gone(tmp_path):
    trainer = net(save_dir=str(tmp_path/"over"))
    clip(trainer)._first = 0
    trainer.train()
    panel = Diagnostics(tmp_path/"over")
    assert panel.readings.rows and all(one.disabled for one in panel.buttons)
    panel.ask("diagnose")
    assert "nobody trains it now" in panel._said.value and not [*(tmp_path/"over/inbox").iterdir()]
    (tmp_path/"over").rename(tmp_path/"away")
    panel.poll()
    panel.paint()
    assert not panel.trains and "data wait" in repr(panel)


def test_in_a_real_notebook(lab):
    with lab.open("probed.ipynb", SETUP, "trainer = made('probed')\ntrainer.train(background=True)", "Diagnostics('runs/probed')",
                  "rest = made('rest', 3)\nDiagnostics(rest)", "rest.train()") as page:
        page.run(0)
        page.run(1)
        page.run(2)
        run = Run(lab.folder/"runs/probed")
        found = lambda kind: read_rows(run.folder, 0, kind)[0]
        until(lambda: found("probe"), page)
        page.until(2, "where a step goes")
        moves(page, 2)
        assert page.output(2).locator("img").count() == 0 or not any(one.is_visible() for one in page.output(2).locator("img").all())
        for label, question in (("Profile 20 steps", "profile"), ("Find LR", "find_lr"), ("Explain memory", "memory")):
            button(page, 2, label).click()
            until(lambda question=question: any(row["to"] == question for row in found("answer")), page)
        page.until(2, "calls")
        for tab in ("memory", "precision", "time", "gradients", "checks"):
            page.output(2).locator(f"button[data-value={tab}]").click()
            page.tab.wait_for_timeout(150)
        page.output(2).locator("button[data-value=overview]").click()
        page.until(2, "data wait")
        button(page, 2, "Copy report").click()
        page.until(2, "Copied")
        page.picture(lab.folder/"diagnostics-light.png", 2)
        page.theme("dark")
        page.picture(lab.folder/"diagnostics-dark.png", 2)
        page.theme("light")
        page.run(3)
        button(page, 3, "Diagnose").click()
        page.until(3, "diagnose:", 120)
        page.run(4)
        page.until(3, "where a step goes") if read_rows(lab.folder/"runs/rest", 0, "probe")[0] else None
        run.tell("stop")
        until(lambda: run.status == "stopped", page)
        until(lambda: button(page, 2, "Find LR").is_disabled(), page)
        page.tab.wait_for_timeout(800)
        page.save()
    book = nbformat.read(lab.folder/"probed.ipynb", 4)
    kinds = [sorted(one.data) for one in book.cells[2].outputs if "data" in one]
    assert kinds == [["image/png", "text/plain"], ["text/html", "text/plain"], ["application/vnd.jupyter.widget-view+json", "text/plain"]]
    with lab.open("probed.ipynb") as page:  # nobody runs it, and all is there, once
        page.until(2, "where a step goes")
        assert not any(one.is_visible() for one in page.output(2).locator("img").all())
    distrusted(lab, "probed.ipynb", "theirs-probed.ipynb")
    with lab.open("theirs-probed.ipynb") as page: until(lambda: page.output(2).locator("img").count() > 0, page)


def test_in_a_kernel_alone_and_as_text(here):
    said = notebook(SETUP, "trainer = made('alone', 20, quiet=True)\ntrainer.train()", "panel = Diagnostics(trainer)\nprint(panel)\npanel")
    assert said[2].startswith("alone")
    assert Check("ok", "a", "b").fix == ""
