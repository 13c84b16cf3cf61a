"""Curves against a reader that keeps every row: logs of many lives, damage, a state that does not fit, a folder that vanishes."""
import json
import math
import os
import random

import numpy as np
import pytest
import torch

import trainbook.curves
from trainbook.curves import Curves, as_text, sparkline
from trainbook.ledger import Ledger, Story
from trainbook.series import BUCKETS, Series, plain_rows, spell, ticks
from trainbook.trainer import Trainer

ROW = '{"event": "step", "stage": "%s", "step": %d, "time": %.3f, "epoch": %s, "lr": %r, "loss": %s}\n'


def lives(rng: random.Random, many: int, steps: int, every: int = 1) -> list[bytes]:
    "The pieces of a log of many lives, each killed somewhere and resumed from a checkpoint; as a trainer writes them."
    pieces, size, saved, step, time = [], 0, [(0, 0)], 0, 1.8e9
    def put(text):
        nonlocal size
        pieces.append(text.encode())
        size += len(pieces[-1])
    for life in range(many):
        time += rng.randrange(1000)
        if life == 0: put(json.dumps({"event": "start", "stage": "a", "step": 0, "time": time, "total": steps, "batches": 100}) + "\n")
        else:
            step, known = rng.choice(saved[-3:])
            saved = [one for one in saved if one[0] <= step]
            put(json.dumps({"event": "resume", "stage": "a", "step": step, "time": time, "from": step, "position": known}) + "\n")
        for _ in range(rng.randrange(1, steps // 2)):
            step, time = step + every, time + 0.5
            loss = '{"$float": "NaN"}' if rng.random() < 0.002 else repr(rng.random() / step)
            put(ROW % ("a", step, time, step / 100, 10.0 ** -rng.randrange(2, 9), loss))
            if rng.random() < 0.01: put(json.dumps({"event": "eval", "stage": "a", "step": step, "time": time, "val_loss": rng.random(), "recall@10": rng.random()}) + "\n")
            if rng.random() < 0.01: put(json.dumps({"event": "epoch", "stage": "a", "step": step, "time": time, "epoch": step // 100, "lr": 1.0, "train_loss": 1.0}) + "\n")
            if rng.random() < 0.01: put(json.dumps({"event": "step", "stage": "b", "step": rng.randrange(10**6), "loss": 1.0}) + "\n")
            if rng.random() < 0.02: saved.append((step, size)); put(json.dumps({"event": "checkpoint", "stage": "a", "step": step, "time": time}) + "\n")
    return pieces


def told(folder) -> dict[str, tuple]:
    "(steps, values) of each metric of stage a, from a reader that keeps every row; the finest kind of row counts."
    found = {}
    for event in ("epoch", "eval", "step"):
        this = {}
        for row in Story(folder).of(event, stage="a"):
            for name, value in row.items():
                if isinstance(value, float) and name not in ("time", "epoch"): this.setdefault(name, []).append((row["step"], value))
        found |= this
    return found


def agrees(curves: Curves, folder) -> None:
    "Every bucket is what its rows give, and no row is in none."
    expected = told(folder)
    assert {name for name, one in curves.of("a").series.items() if len(one)} == set(expected)
    for name, pairs in expected.items():
        one, at = curves.of("a").series[name], 0
        assert len(one) <= BUCKETS
        for first, last, rows, mean, low, high in zip(one.first, one.last, one.rows, one.mean, one.low, one.high):
            inside = pairs[at:at + int(rows)]
            at += int(rows)
            values = [value for _, value in inside if math.isfinite(value)]
            assert (inside[0][0], inside[-1][0]) == (first, last)
            if not values: assert math.isnan(mean); continue
            assert (min(values), max(values)) == (low, high) and mean == pytest.approx(sum(values) / len(values), rel=1e-12)
        assert at == len(pairs)
        least = min((value, i) for i, (_, value) in enumerate(pairs) if math.isfinite(value))
        assert one.extreme("min") == (pairs[least[1]][0], least[0])


@pytest.mark.parametrize("seed", range(16))
def test_many_lives_polled_at_any_byte(seed, tmp_path):
    rng = random.Random(seed)
    text, at, log = b"".join(lives(rng, rng.randrange(1, 9), rng.choice([40, 400, 3000, 9000]), rng.choice([1, 10]))), 0, tmp_path/"events.jsonl"
    log.write_bytes(b"")
    curves = Curves(tmp_path)
    while at < len(text):
        size = rng.choice([1, 50, 1000, 20_000, len(text)])
        with open(log, "ab") as f: f.write(text[at:at + size])
        whole = text[:at + size].rfind(b"\n") + 1
        assert curves.poll() == (whole > text[:at].rfind(b"\n") + 1) and not curves.poll()
        at += size
    agrees(curves, tmp_path)
    at_once = Curves(tmp_path)
    agrees(at_once, tmp_path)
    story = [row for row in Story(tmp_path).of("step", stage="a")]
    lived = [curves.progress("a"), at_once.progress("a")]
    assert lived[0].seconds == pytest.approx(lived[1].seconds, abs=1e-6) and lived[0].step == lived[1].step
    if story: assert len(story) * 0.5 == pytest.approx(at_once.of("a")._told, abs=0.51 * 9)  # what was superseded took no time
    saved = [row["step"] for row in Story(tmp_path).of("checkpoint", stage="a")]
    for one in (curves, at_once):
        kept = [mark.step for mark in one.marks_of("checkpoint", stage="a")]
        assert kept == saved if not one.left_out else set(kept) <= set(saved) and kept[-1] == saved[-1]


def test_a_resume_far_back_gets_its_resolution_again(tmp_path):
    log = tmp_path/"events.jsonl"
    log.write_text("".join(ROW % ("a", i, 1.8e9 + i, i / 100, 0.1, i / 7) for i in range(1, 20_001)))
    curves = Curves(tmp_path)
    assert curves.of("a").series["loss"].width == 128
    with open(log, "a") as f: f.write('{"event": "resume", "stage": "a", "step": 200, "time": 1.9e9, "from": 200, "position": 999999999}\n')
    assert curves.poll() and curves.of("a").series["loss"].width == 1 and curves.of("a").step == 200
    agrees(curves, tmp_path)


@pytest.fixture(scope="module")
def million(tmp_path_factory):
    folder = tmp_path_factory.mktemp("million")
    rng = np.random.default_rng(0)
    values, steps = rng.random(1_000_000), np.arange(1, 1_000_001) * 10
    with open(folder/"events.jsonl", "w") as log:
        for at in range(0, 1_000_000, 1000):
            log.write("".join(ROW % ("a", step, 1.8e9 + step / 100, step / 1e4, 1e-5, repr(value)) for step, value in zip(steps[at:at + 1000].tolist(), values[at:at + 1000].tolist())))
            log.write(json.dumps({"event": "eval", "stage": "a", "step": int(steps[at + 999]), "time": 1.8e9, "val_loss": float(values[at])}) + "\n")
    return folder, steps, values


def test_a_million_rows(million):
    import time
    import tracemalloc
    folder, steps, values = million
    tracemalloc.start()
    first = Curves(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6  # of 130 MB
    one = first.of("a").series["loss"]
    assert len(one) <= BUCKETS and one.rows.sum() == 1_000_000 and one.extreme("min") == (steps[values.argmin()], values.min())
    for i in range(len(one)):
        inside = values[int(one.first[i]) // 10 - 1:int(one.last[i]) // 10]
        assert (one.low[i], one.high[i]) == (inside.min(), inside.max()) and one.mean[i] == pytest.approx(inside.mean(), rel=1e-12)
    began = time.perf_counter()
    again = Curves(folder)
    assert time.perf_counter() - began < 0.5
    for name, one in first.of("a").series.items(): assert np.array_equal(one.table, again.of("a").series[name].table, equal_nan=True)
    assert again.marks == first.marks and again.progress() == first.progress()


@pytest.mark.parametrize("damage", ["", "{", "[]", "7", '{"format": 2}', '{"format": 1}', "deep", "texts", "wide", "other log", "negative", "huge"])
def test_a_state_that_does_not_fit_is_ignored(damage, tmp_path, monkeypatch):
    monkeypatch.setattr(trainbook.curves, "_WORTH", 1000)
    log, kept = tmp_path/"events.jsonl", tmp_path/".curves.json"
    log.write_bytes(b"".join(lives(random.Random(1), 3, 2000)))
    Curves(tmp_path)
    state = json.loads(kept.read_text())
    if damage == "deep": damage = "[" * 100_000
    if damage == "texts": state["stages"]["a"]["series"]["loss"][2][0][0] = "x"
    if damage == "wide": state["stages"]["a"]["series"]["loss"][2] = [[0.0] * 5000] * 12
    if damage == "negative": state["offset"] = -5
    if damage == "huge": state["stages"]["a"]["series"]["loss"][1] = 1e400
    if damage == "other log":
        log.write_bytes(b"".join(lives(random.Random(2), 6, 4000)))
        assert log.stat().st_size > state["offset"]
    kept.write_text(json.dumps(state) if damage in ("texts", "wide", "other log", "negative", "huge") else damage)
    agrees(Curves(tmp_path), tmp_path)


def test_the_state_is_used_and_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(trainbook.curves, "_WORTH", 1000)
    pieces = lives(random.Random(3), 6, 3000)
    for share in (0.3, 0.5, 0.9, 1.0):
        (tmp_path/"events.jsonl").write_bytes(b"".join(pieces[:int(share * len(pieces))]))
        agrees(Curves(tmp_path), tmp_path)
    (tmp_path/"events.jsonl").write_bytes(b"".join(lives(random.Random(0), 1, 20_000)))
    agrees(Curves(tmp_path), tmp_path)
    read = []
    monkeypatch.setattr(Curves, "_take", lambda self, at, block: read.append(len(block)))
    Curves(tmp_path)
    assert not read


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(trainbook.curves, "_WORTH", 0)
    (tmp_path/"events.jsonl").write_bytes(b"".join(lives(random.Random(1), 1, 100)))
    def refused(*_): raise PermissionError
    monkeypatch.setattr(trainbook.curves, "write_whole", refused)
    agrees(Curves(tmp_path), tmp_path)
    assert not (tmp_path/".curves.json").exists()


def test_a_log_that_is_cut_replaced_and_deleted(tmp_path):
    log = tmp_path/"events.jsonl"
    assert Curves(tmp_path).gone and Curves(tmp_path).status == "new"
    log.write_bytes(b"".join(lives(random.Random(1), 1, 1000)))
    curves = Curves(tmp_path)
    log.write_bytes(log.read_bytes()[:5000])  # cut
    assert curves.poll()
    agrees(curves, tmp_path)
    before, stamp = log.stat().st_size, log.stat()
    log.write_bytes(b"".join(lives(random.Random(5), 1, 1000))[:before])  # another of the same size
    os.utime(log, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert curves.poll()
    agrees(curves, tmp_path)
    kept = curves.of("a").series["loss"].table
    log.unlink()
    assert curves.poll() and curves.gone and not curves.poll() and curves.of("a").series["loss"].table is kept
    log.mkdir()
    assert not curves.poll() and curves.gone


def test_garbage_costs_itself_only(tmp_path):
    good = [ROW % ("a", i, 1.8e9 + i, i / 100, 0.1, i / 7) for i in range(1, 301)]
    rubbish = ['{"event": "step", "stage": "a", "step": 5', "\x00\xff\n", '{"event": "step", "stage": ["a"], "step": 5, "loss": 1}', '{"event": "step", "stage": "a", "step": "5", "loss": 1}',
               '{"event": "step", "stage": "a", "step": 1.5, "loss": 1}', '{"event": "resume", "from": "x"}', '{"event": "dance", "step": 4}', "[" * 5000, '{"event": "control", "step": 1}', "", " ", "null",
               '{"event": "step", "stage": "a", "step": 7, "time": 1-2, "epoch": 1.2.3, "lr": 0.1, "loss": 1}', '{"event": "end"}']
    for seed in range(20):
        rng, lines = random.Random(seed), list(good)
        for one in rubbish: lines.insert(rng.randrange(len(lines)), one + "\n")
        (tmp_path/"events.jsonl").write_text("".join(lines), errors="surrogateescape", encoding="utf-8")
        agrees(Curves(tmp_path), tmp_path)
    (tmp_path/"events.jsonl").write_text('{"event": "step", "stage": "a", "step": 1, "loss": 1' + "0" * 400 + ', "ok": 1.5, "flag": true, "text": "x"}\n')
    assert Curves(tmp_path).newest() == {"ok": 1.5}


def test_both_ways_of_reading_give_the_same(monkeypatch, tmp_path):
    (tmp_path/"events.jsonl").write_bytes(b"".join(lives(random.Random(7), 4, 3000)))
    fast = Curves(tmp_path)
    monkeypatch.setattr(trainbook.curves, "plain_rows", lambda block: None)
    slow = Curves(tmp_path)
    for name, one in fast.of("a").series.items(): assert np.array_equal(one.table, slow.of("a").series[name].table, equal_nan=True)


def test_rows_that_only_look_alike_are_not_taken_at_once():
    row = '{"event": "step", "stage": "a", "step": %d, "%s": 1.5}\n'
    assert plain_rows("".join(row % (i, "top5") for i in range(9)).encode())[1]["top5"].tolist() == [1.5] * 9
    assert plain_rows((row % (1, "top1") + row % (2, "top5")).encode()) is None
    assert plain_rows(b'{"event": "step", "stage": "a 2", "step": 1, "loss": 2}\n') is None  # read one by one


def test_marks_are_bounded_and_checkpoints_spread(tmp_path):
    row = '{"event": "%s", "stage": "a", "step": %d, "time": 1.0, "text": "%s"}\n'
    (tmp_path/"events.jsonl").write_text("".join(row % (event, i, "x" * 1000) for i in range(5000) for event in ("checkpoint", "warning")))
    curves = Curves(tmp_path)
    saved, warned = ([mark.step for mark in curves.marks_of(kind, stage="a")] for kind in ("checkpoint", "warning"))
    assert len(saved) == len(warned) == 200 and saved[0] == 0 and saved[-1] == 4999 and max(np.diff(saved)) <= 100 and warned[-1] == 4999
    assert curves.left_out == {"checkpoint": 4800, "warning": 4800} and max(len(mark.text) for mark in curves.marks) == 300


def test_a_real_training_killed_and_resumed(here):
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    data = torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long())
    def trainer(): return Trainer(torch.nn.Linear(4, 2), data, data, epochs=4, batch_size=8, lr=0.1, save_dir="run", quiet=True, logging={"every": 1}, run={"on_existing": "resume"})
    first = trainer()
    first.train(num_epochs=2)
    curves = Curves("run")
    trainer().train()
    assert curves.poll() and not curves.poll()
    story = Story("run")
    for event, name in (("step", "loss"), ("eval", "val_loss"), ("epoch", "train_loss")):
        rows = [row for row in story.of(event) if name in row]
        one = curves.of().series[name]
        assert [row["step"] for row in rows] == one.last.tolist() and [row[name] for row in rows] == one.mean.tolist()
    now = curves.progress()
    assert (now.step, now.epoch, now.epochs, now.left, curves.status) == (32, 4, 4, 0, "finished")
    best = min(story.of("eval"), key=lambda row: row["val_loss"])
    assert curves.best() == ("val_loss", best["step"], best["val_loss"])
    assert "finished  epoch 4/4 · step 32/32" in as_text(curves)


def test_the_metric_that_decides_is_the_configs(here):
    x = torch.randn(32, 4)
    data = torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long())
    Trainer(torch.nn.Linear(4, 2), data, data, epochs=2, batch_size=8, save_dir="run", quiet=True, monitor="val_acc").train()
    assert Curves("run").deciding() == ("val_acc", "max") and Curves("run").best("train_loss")[0] == "train_loss" and Curves("run").best("nothing") is None


def test_pauses_and_lives_are_not_counted(tmp_path):
    (tmp_path/"inbox").mkdir()
    rows = [("start", 0, 0, dict(total=100))] + [("step", s, s, dict(loss=1.0)) for s in range(1, 51)]
    rows += [("control", 50, 50, dict(id="a", command="pause")), ("control", 50, 950, dict(id="b", command="resume"))]
    rows += [("step", s, 900 + s, dict(loss=1.0)) for s in range(51, 61)] + [("resume", 55, 5000, {"from": 55, "position": 10**9})]
    rows += [("step", s, 4945 + s, dict(loss=1.0)) for s in range(56, 81)] + [("step", 81, 5626, dict(loss=1.0))]  # a laptop slept for ten minutes
    with open(tmp_path/"events.jsonl", "w") as log:
        for event, step, time, more in rows: log.write(json.dumps({"event": event, "stage": "a", "step": step, "time": 1.8e9 + time} | more) + "\n")
    now = Curves(tmp_path).progress()
    assert now.seconds == pytest.approx(681) and now.speed == pytest.approx(1) and now.step == 81


def test_a_writer_and_two_readers(tmp_path):
    (tmp_path/"inbox").mkdir()
    first, second = Curves(tmp_path), Curves(tmp_path)
    with Ledger(tmp_path) as ledger:
        ledger.start("a", total=10)
        for step in range(1, 11):
            ledger.log("step", step, loss=1 / step)
            ledger.flush()
            assert first.poll() and not first.poll()
        ledger.end("finished")
    assert first.poll() and second.poll() and first.newest() == second.newest() and first.status == second.status == "finished"


def test_series_of_nothing_and_numbers_for_people():
    one = Series()
    assert len(one) == 0 and one.extreme("min") is None and len(one.mean) == 0 and one.cut(5, 5) is None
    assert sparkline([]) == "" and sparkline([math.nan]) == "" and sparkline([1, math.nan, 2]) == "▁ █"
    for low, high in ((0, 0), (math.nan, 1), (0, math.inf), (-5, 5), (1e-300, 1e300), (-1e-9, 1e-9), (5, 1)):
        for kind in ("", "log", "time", "whole"): assert len(ticks(low, high, 5, kind)) <= 12
    assert [spell(one) for one in (math.nan, 0, 1e-3, 0.12345, 12345.6, 1e9, -2e-5)] == ["nan", "0", "1e-3", "0.123", "12,346", "1e9", "-2e-5"]


# --- time, as a person who watched would tell it ------------------------------------------------------

def logged(folder, *rows) -> Curves:
    folder.mkdir(exist_ok=True)
    (folder/"events.jsonl").write_text("".join(json.dumps({"stage": "a", **row}) + "\n" for row in rows))
    return Curves(folder)


def test_rows_that_land_in_a_pause_take_no_time(tmp_path):
    steps = lambda first, last, off=0.0: [{"event": "step", "step": i, "time": 100 + i / 10 + off, "loss": 1.0} for i in range(first, last)]
    control = lambda command, step, time: {"event": "control", "id": command, "command": command, "step": step, "time": time}
    rows = [{"event": "start", "step": 0, "time": 100.0, "total": 100}, *steps(1, 21), control("pause", 21, 102.1), *steps(21, 22, 0.2),
            control("resume", 21, 500.0), *steps(22, 41, 397.9)]
    now = logged(tmp_path/"r", *rows).progress()
    assert now.seconds == pytest.approx(4.0, abs=0.02) and now.left == pytest.approx(6, rel=0.1)
    again = Curves(tmp_path/"r")
    for stage in again.stages.values(): assert stage.of(json.loads(json.dumps(stage.state())), "a").resting == stage.resting
    resting = logged(tmp_path/"s", *rows[:23]).of("a")
    assert resting.resting and resting.of(json.loads(json.dumps(resting.state())), "a").resting


def test_what_is_left_of_a_branch(tmp_path):
    rows = [{"event": "start", "step": 0, "time": 100.0, "total": 2000},
            *({"event": "step", "step": 1000 + i, "time": 100 + i / 10, "loss": 1.0} for i in range(1, 31))]
    for many, left in ((31, 97), (3, 99.8)):
        now = logged(tmp_path/"r", *rows[:many]).progress()
        assert now.left == pytest.approx(left, rel=0.02) and now.speed == pytest.approx(10, rel=0.02)
    assert logged(tmp_path/"r", *rows[:2]).progress().left is None


def test_an_end_that_was_moved_and_a_last_interval_that_is_short(tmp_path):
    trainer = Trainer(torch.nn.Linear(2, 2), [(torch.ones(4, 2), torch.zeros(4, dtype=torch.long))] * 7, loss="cross_entropy", num_epochs=2, quiet=True,
                      save_dir=str(tmp_path/"r"), log_every=3)
    from trainbook.events import Callback
    class Moves(Callback):
        def step_end(self, trainer): trainer.step == 2 and trainer.run.tell("set", epochs=3)
    trainer.listeners.of["step_end"].append(Moves().step_end)
    trainer.train()
    curves = Curves(tmp_path/"r")
    now = curves.progress()
    assert (now.step, now.total, now.epoch, now.epochs) == (21, trainer.plan.total, trainer.epoch, 3.0), curves.marks
    assert curves.along("samples", [21])[0] == 4 * 21


def test_two_threads_that_poll_one_log(tmp_path):
    """Every row is taken once."""
    import sys
    import threading
    before, rows = sys.getswitchinterval(), [ROW % ("a", i, i / 10, i / 100, 1e-3, 1 / i) for i in range(1, 2001)]
    sys.setswitchinterval(1e-5)
    try:
        for trial in range(30):
            (folder := tmp_path/str(trial)).mkdir()
            curves, failed = Curves(folder), []
            def polls(curves=curves, failed=failed):
                try: curves.poll()
                except Exception as error: failed.append(error)
            (folder/"events.jsonl").write_text("".join(rows))
            threads = [threading.Thread(target=polls) for _ in range(2)]
            for one in threads: one.start()
            for one in threads: one.join()
            assert not failed and sum(curves.of("a").series["loss"].count) == 2000
    finally: sys.setswitchinterval(before)
