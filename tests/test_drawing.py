"""Drawings: well-formed whatever is in the log, the same twice, flat in cost, legible in both themes."""
import json
import math
import random
import re
import time
from xml.etree import ElementTree

import numpy as np
import pytest
from lab import find_chromium
from test_curves import lives

from trainbook.curves import Curves, as_text
from trainbook.drawing import INKS, Line, chart, picture, plain, together
from trainbook.series import Series

NASTY = '<script>alert(1)</script>"\'&\x00\x1b[31m\ud800 ]]> var(--tb-line0)'
SVG = "{http://www.w3.org/2000/svg}"


def a_run(folder, rows) -> Curves:
    folder.mkdir(parents=True, exist_ok=True)
    (folder/"events.jsonl").write_bytes("".join(json.dumps({"stage": "a", "time": 1.8e9 + row["step"]} | row) + "\n" for row in rows).encode("utf-8", "backslashreplace"))
    return Curves(folder)


def whole(text: str) -> ElementTree.Element:
    "A drawing that a browser takes: XML, no number that is none, nothing that acts, no reference."
    root = ElementTree.fromstring(text.encode())
    numbers = " ".join(value for one in root.iter() for key, value in one.attrib.items() if key in ("points", "d", "x", "y", "x1", "x2", "y1", "y2", "width", "height"))
    assert not re.search("nan|inf", numbers.lower()) and all(abs(float(one)) < 1e5 for one in re.findall(r"-?\d+\.?\d*", numbers))
    assert root.attrib["role"] == "img" and root.attrib["aria-label"] == root.find(f"{SVG}title").text
    tags = {one.tag.removeprefix(SVG) for one in root.iter()}
    assert tags <= {"svg", "title", "rect", "line", "polyline", "polygon", "path", "text"} and not [1 for one in root.iter() if {"id", "href", "onload"} & set(one.attrib)]
    return root


@pytest.mark.parametrize("theme", [None, "light", "dark"])
@pytest.mark.parametrize("seed", range(4))
def test_logs_of_any_kind_make_whole_drawings(seed, theme, tmp_path):
    (tmp_path/"events.jsonl").write_bytes(b"".join(lives(random.Random(seed), 4, 2000)))
    curves = Curves(tmp_path)
    for axis in ("step", "epoch", "time", "samples"):
        for log in (False, True):
            whole(chart(curves, axis=axis, stage="a", log=log, theme=theme))
            whole(together([Line(curves, "x", "loss", "a", "ancestor", 20, dots=(1, 20, 10**9), chosen=20), Line(curves, "y", "val_loss", "a", parent="x", fork=3)], axis, log, theme))
    for metric in (*curves.of("a").series, "nothing"): whole(chart(curves, metric, "a", theme=theme))
    assert chart(curves, stage="a", theme=theme) == chart(Curves(tmp_path), stage="a", theme=theme)


@pytest.mark.parametrize("values", [[], [1.0], [0.0], [-1.0, -1.0], [math.nan] * 3, [math.inf, 1.0], [1e300, -1e300, 1e300], [5e-324, 1.0], [1.0] * 1000, [1e9, *[0.1] * 500], [math.nan, 1.0, math.nan, 2.0]])
def test_any_numbers(values, tmp_path):
    curves = a_run(tmp_path, [{"event": "start", "step": 0, "total": 10**9, "lr": 1}, *({"event": "step", "step": i, "loss": value, "lr": value, "epoch": value} for i, value in enumerate(values))])
    for log in (False, True):
        for theme in (None, "dark"):
            for axis in ("step", "epoch", "time"):
                whole(chart(curves, axis=axis, log=log, theme=theme))
                whole(together([Line(curves, "x", "loss")], axis, log, theme))
    as_text(curves)
    if values and all(abs(value) < 1e100 for value in values): assert picture(curves)[:4] == b"\x89PNG"


@pytest.mark.parametrize("theme", [None, "light"])
def test_names_are_words_and_nothing_else(theme, tmp_path):
    rows = [{"event": "step", "step": i, NASTY: i / 7, "val_" + NASTY: 1.0, "loss": 1.0, "lr": 1.0} for i in range(20)]
    rows += [{"event": "warning", "step": 5, "text": NASTY}, {"event": "control", "step": 6, "id": NASTY, "command": "set", "values": {NASTY: NASTY}}, {"event": "end", "step": 19, "status": NASTY}]
    curves = a_run(tmp_path/'<img src=x onerror="alert(1)">', rows)
    for drawn in (chart(curves, NASTY.encode("utf-8", "replace").decode(), theme=theme), chart(curves, theme=theme), *(chart(curves, name, theme=theme) for name in curves.of().series), together([Line(curves, NASTY, "loss")], theme=theme)):
        whole(drawn)
        assert "<script" not in drawn and "<img" not in drawn and "\x1b" not in drawn
    told = as_text(curves)
    assert "\x1b" not in told and "\x00" not in told and max(map(len, told.splitlines())) <= 79
    told.encode()
    assert plain("a\ud800b\x00") == "a\ufffdb\ufffd"


def test_what_happened_is_told(tmp_path):
    rows = [{"event": "start", "step": 0, "total": 200, "batches": 50}, *({"event": "step", "step": i, "loss": 100.0 if i < 5 else 1 / i, "lr": 0.1} for i in range(1, 101))]
    rows += [{"event": "eval", "step": 60, "val_loss": 0.05}, {"event": "checkpoint", "step": 60}, {"event": "eval", "step": 90, "val_loss": 0.07}, {"event": "checkpoint", "step": 90},
             {"event": "resume", "step": 100, "from": 100}, {"event": "warning", "step": 100, "text": "odd"}]
    curves = a_run(tmp_path, rows)
    root = whole(chart(curves))
    titles, words = [one.text for one in root.iter(f"{SVG}title")], [one.text for one in root.iter(f"{SVG}text")]
    assert {"resumed at step 100", "warning odd at step 100", "best val_loss 0.05 at step 60", "checkpoint at step 60, the best", "checkpoint at step 90", "val_loss 0.07 at 90"} <= set(titles)
    assert {"resumed", "↑ 100", "loss 0.01", "val_loss 0.07", "lr 0.1", "200", "steps"} <= {re.sub("0.010.*", "0.01", one) for one in words}
    points = [one.attrib["points"] for one in root.iter(f"{SVG}polyline")]
    assert len(points) == 4  # loss as measured and as a line, val_loss, lr


def test_no_two_inks_are_alike_for_anybody():
    """Simulated for each of the three kinds of colour blindness (Machado and others, 2009), in both themes."""
    from trainbook.drawing import mixed
    kinds = [np.eye(3), np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]), np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]), np.array([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]])]
    linear = lambda colour: np.array([(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in (int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5))])
    lab = lambda rgb: (lambda f: np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])]))(np.cbrt(np.clip(np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb / [0.9505, 1, 1.089], 1e-9, None)))
    light = lambda colour: float(linear(colour) @ [0.2126, 0.7152, 0.0722]) + 0.05
    for theme, ground in (("light", "#ffffff"), ("dark", "#111111")):
        lines = [mixed(f"line{i}", theme) for i in range(6)]
        for kind in kinds:
            seen = [lab(np.clip(kind @ linear(one), 0, 1)) for one in lines]
            assert min(np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]) > 8
            assert min(np.linalg.norm(a - b) for i, a in enumerate(seen[:3]) for b in seen[:i]) > 12  # those that a chart of one run has
        for ink in INKS:
            if ink == "grid": continue
            ratio = max(light(mixed(ink, theme)), light(ground)) / min(light(mixed(ink, theme)), light(ground))
            assert ratio >= (2.95 if ink.startswith("line") else 4.5), (theme, ink, ratio)


def test_a_drawing_costs_the_same_at_any_length(tmp_path):
    def long(many) -> Curves:
        curves = Curves(tmp_path)
        stage = curves._stage("a")
        for name in ("loss", "lr"):
            one = stage.series[name] = Series()
            for at in range(0, many, 100_000):
                steps = np.arange(at, min(at + 100_000, many), dtype=float)
                one.add(steps, 1 / (steps + 1), steps)
        curves.stage, stage.step = "a", many
        return curves
    few, many = long(1000), long(3_000_000)
    assert len(chart(many)) < 1.3 * len(chart(few)) < 60_000
    def best(curves): return min(timed(lambda: chart(curves)) for _ in range(5))
    assert best(many) < 2 * best(few)


def timed(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def test_five_hundred_runs_are_one_drawing(tmp_path):
    one = a_run(tmp_path, [{"event": "step", "step": i, "loss": 1 / (i + 1)} for i in range(1000)])
    drawn = together([Line(one, f"run-{i}", "loss") for i in range(500)])
    whole(drawn)
    assert len(drawn) < 500_000 and drawn.count("<text") < 50


def test_a_browser_shows_it_in_both_themes(tmp_path):
    """Inline the text has the colour around it, dark or light; as an <img> it brings its own."""
    from playwright import sync_api as sync
    curves = a_run(tmp_path/"run", [{"event": "step", "step": i, "loss": 1 / (i + 1), "lr": 0.1} for i in range(50)])
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        for colour in ("rgb(20, 20, 20)", "rgb(240, 240, 240)"):
            page.set_content(f'<body style="color:{colour}">{chart(curves)}{chart(curves, "lr")}')
            found = page.evaluate("[...document.querySelectorAll('svg text')].map(one => getComputedStyle(one).fill)")
            stroke = page.evaluate("getComputedStyle(document.querySelector('polyline')).stroke")
            assert all(one != "none" for one in found) and stroke.startswith("color(srgb") or stroke.startswith("rgb")
            share = float(re.findall(r"[\d.]+", stroke)[0])  # the red of blue: the text's share of it
            assert (share < 0.05) == (colour == "rgb(20, 20, 20)")
        from base64 import b64encode
        page.set_content(f'<img src="data:image/svg+xml;base64,{b64encode(chart(curves, theme="dark").encode()).decode()}">')
        assert page.evaluate("document.querySelector('img').decode().then(() => document.querySelector('img').naturalWidth)") == 860
        browser.close()
