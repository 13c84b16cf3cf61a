"""Pages run, show what they kept, are clean, and are in step with the package."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import NBS, ROOT, pages, stale

BIN = Path(sys.executable).parent
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


RUNNER = """
import json, sys, traceback
from pathlib import Path
from pages import stale
for line in sys.stdin:
    try: found = stale(Path(line.strip()))
    except BaseException: found = [traceback.format_exc()[-3000:]]
    print(json.dumps(found), flush=True)
"""


@pytest.fixture(scope="module")
def runner():
    "A process that runs pages, one after the other: the Jupyter client's loops and sockets are its own."
    env = ONE_THREAD | {"PYTHONPATH": str(ROOT/"tools")}
    with subprocess.Popen([sys.executable, "-c", RUNNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(NBS).with_suffix("")))
def test_page_runs_and_shows_what_it_kept(runner, page):
    """Each in a kernel of its own, top to bottom, with a limit for every cell."""
    print(page, file=runner.stdin, flush=True)
    found = json.loads(runner.stdout.readline())
    assert not found, "\n".join(found) + f"\nrefresh it: python tools/pages.py refresh {page.relative_to(ROOT)}"


def test_a_page_that_shows_something_else_is_noticed(tmp_path):
    import nbformat
    cell = nbformat.v4.new_code_cell("1 + 1", outputs=[nbformat.v4.new_output("execute_result", {"text/plain": "3"}, execution_count=1)])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path/"a.ipynb")
    assert "kept [{'text/plain': '3'}]\n  now  [{'text/plain': '2'}]" in stale(tmp_path/"a.ipynb")[0]


def test_nbdev_test_passes():
    """People run it, so it passes too: another executor, all pages in its own workers. The page that trains for a minute has run above."""
    done = subprocess.run([BIN/"nbdev_test", "--n_workers", "2", "--skip_file_re", r"^[_.]|52_ink\.ipynb"], cwd=ROOT, capture_output=True, text=True, timeout=300, env=ONE_THREAD)
    assert done.returncode == 0 and "Success" in done.stdout + done.stderr, (done.stdout + done.stderr)[-3000:]


def prose(page: Path) -> str:
    "What a page says, without its code."
    import nbformat
    return "\n".join(cell.source for cell in nbformat.read(page, 4).cells if cell.cell_type == "markdown")


def rows_of_options() -> list[tuple[str, list[str]]]:
    "(key, the pages where it shall be shown) for each key of the trainer's table; here is the trainer's own page."
    rows = [row.strip("|").split("|") for row in prose(NBS/"33_trainer.ipynb").splitlines() if row.startswith("|") and "|---" not in row]
    rows = [row for row in rows if len(row) == 3 and ("`" in row[2] or "here" in row[2]) and "`" in row[1]]
    return [(key, re.findall(r"`(\w+)`", places) + ["33_trainer"] * ("here" in places)) for _, keys, places in rows for key in re.findall(r"`([\w.]+)`", keys)]


@pytest.mark.parametrize("key, places", rows_of_options(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_key_is_explained_where_the_table_says(key, places):
    """It is named in the prose of one of these pages, outside of any table."""
    for place in places:
        text = "\n".join(line for line in prose(NBS/f"{place}.ipynb").splitlines() if not line.startswith("|"))
        if re.search(rf"`[^`\n]*\b{re.escape(key)}\b[^`\n]*`", text): return
    pytest.fail(f"{key} is not explained in {', '.join(places)}")


def test_the_table_of_the_options_has_them_all():
    """But for those that are no option of the loop."""
    from trainbook.schema import Training
    assert set(Training.model_fields) - {key for key, _ in rows_of_options()} <= {"distributed"}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "The tree as git sees it, elsewhere, so that a check changes nothing here."
    folder = tmp_path_factory.mktemp("copy")
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT/name).exists():
            (folder/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT/name, folder/name)
    return folder


def changed(folder: Path, *commands: str) -> list[str]:
    "Files that these nbdev commands change."
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for command in commands: subprocess.run([BIN/command], cwd=folder, check=True, capture_output=True, timeout=120, env={**os.environ, "PYTHONPATH": ""})
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return sorted(str(path.relative_to(folder)) for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def test_pages_are_clean(copy): assert changed(copy, "nbdev_clean") == [], "run: python tools/pages.py export"
def test_package_is_in_step_with_the_pages(copy): assert changed(copy, "nbdev_export") == [], "run: python tools/pages.py export"


def test_no_undefined_name_and_no_unused_import():
    """nbdev runs the cells of a page, never the module it wrote: a forgotten export shows only here."""
    done = subprocess.run([BIN/"ruff", "check", "--no-cache", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


def test_lint_catches_a_forgotten_export(tmp_path):
    (tmp_path/"module.py").write_text("def f(): return forgotten\n")
    done = subprocess.run([BIN/"ruff", "check", "--no-cache", "--config", ROOT/"pyproject.toml", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and "F821" in done.stdout
