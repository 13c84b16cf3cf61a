"""What all tests share: the tools folder on the path, a folder of their own, and the line that runs a failed test alone."""
import gc
import os
import shlex
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"tools"))
os.environ["OMP_NUM_THREADS"] = "1"  # tests fork, and a pool of threads does not survive that: a child would wait for it for ever
_home = tempfile.TemporaryDirectory(prefix="trainbook-tests-")
os.environ["XDG_CONFIG_HOME"] = _home.name  # what tests agree to is not remembered as the person's own answers


def pytest_addoption(parser): parser.addoption("--soak", action="store_true", help="run the long repetitions too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--soak"):
        soak = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=soak)
        items[:] = [item for item in items if item not in soak]


@pytest.fixture(scope="module", autouse=True)
def _forks_are_cheap():
    "What all tests so far have left is no garbage to look for, neither here nor in a child: its copy is not touched."
    gc.collect()
    gc.freeze()


@pytest.fixture
def here(tmp_path, monkeypatch):
    "The test runs in an empty folder."
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def server():
    "Forks cheap lives of a training (exact.py)."
    import exact
    server = exact.Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab in a browser (lab.py); both start once for a file of tests, and only for one that asks for them."
    from lab import Lab
    with Lab(tmp_path_factory.mktemp("lab")) as lab: yield lab


@pytest.fixture(scope="module")
def unhurt(server, tmp_path_factory):
    "recipe → (the outcome of a life that nobody touched, its pulses, the first step that it saved); each is made once."
    import exact

    from trainbook.run import Run
    made = {}
    def get(recipe: str, **words):
        key = (recipe, str(words))
        if key not in made:
            folder = tmp_path_factory.mktemp("unhurt")
            assert server.live(folder, recipe, **words) == 0, (folder/"out-0").read_text()
            made[key] = exact.outcome(folder), exact.pulses(folder), min(row["step"] for row in Run(folder/"run").story().of("checkpoint"))
        return made[key]
    return get


def pytest_terminal_summary(terminalreporter):
    failed = [report.nodeid for report in terminalreporter.stats.get("failed", []) + terminalreporter.stats.get("error", [])]
    if failed:
        terminalreporter.write_line("\nto run what failed alone:")
        for nodeid in dict.fromkeys(failed): terminalreporter.write_line(f"  .venv/bin/python -m pytest {shlex.quote(nodeid)}")
