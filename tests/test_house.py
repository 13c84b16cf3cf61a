"""The architecture, kept true: numbers look only down, names match, the package loads fast and shows what it promised."""
import ast
import importlib
import inspect
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from pages import NBS, ROOT, module_of, pages

PAGES = pages()
PACKAGE = ROOT/"trainbook"
RECIPES = [page.stem[3:] for page in PAGES if page.parent.name == "recipes"]


def number_of(page: Path) -> float:
    "Recipes stand above all other pages; a part of one (ink_strokes of ink) comes before it."
    number, name = int(page.name[:2]), page.stem[3:]
    if page.parent.name != "recipes": return number
    return 100 + number + (0 if any(name.startswith(f"{other}_") for other in RECIPES) else 0.5)


NUMBER = {name: number_of(page) for page in PAGES if (name := module_of(page)) and page.name[:2].isdigit()}
MODULES = [f"trainbook.{name}" for name in sorted(NUMBER, key=NUMBER.get)]


def imports_of(source: str, module: str) -> set[str]:
    "The trainbook modules that this source imports, anywhere in it."
    package, found = f"trainbook.{module}".rsplit(".", 1)[0].split("."), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = ".".join(package[:len(package) - node.level + 1]) if node.level else ""
            name = ".".join(part for part in (base, node.module) if part)
            found |= {name} | {f"{name}.{alias.name}" for alias in node.names}
    return {name.removeprefix("trainbook.") for name in found if name.startswith("trainbook.")} & set(NUMBER)


def test_a_page_imports_only_from_smaller_numbers():
    up = [f"{name} ({NUMBER[name]}) imports {other} ({NUMBER[other]})" for name in NUMBER
          for other in imports_of((PACKAGE/f"{name.replace('.', '/')}.py").read_text(), name) if NUMBER[other] >= NUMBER[name]]
    assert not up, up


def test_the_import_check_sees_every_form_of_import():
    forms = "import trainbook.run\nfrom trainbook.lock import Lock\nfrom .source import near\nfrom . import ledger\ndef f():\n    from trainbook import config"
    assert imports_of(forms, "cli") == {"run", "lock", "source", "ledger", "config"}


@pytest.mark.parametrize("page", [p for p in PAGES if module_of(p)], ids=lambda p: p.stem)
def test_page_is_named_after_its_module(page):
    assert re.fullmatch(rf"\d\d_{module_of(page).rpartition('.')[2]}", page.stem)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_page_opens_with_a_title_and_one_sentence(page):
    first = nbformat.read(page, 4).cells[0].source
    assert re.fullmatch(r"# [^\n]+\n\n> [^\n]+[.!?]", first), first


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_page_has_at_most_60_cells_and_200_kB(page):
    assert page.stat().st_size < 200_000
    assert len(nbformat.read(page, 4).cells) <= 60


def test_no_number_is_used_twice(): assert len(set(NUMBER.values())) == len(NUMBER)


@pytest.mark.parametrize("module", MODULES)
def test_module_reads_well_alone(module):
    """A docstring, a map, no wildcard, no patched method, a docstring on everything public; not too long."""
    source = inspect.getsource(importlib.import_module(module))
    assert importlib.import_module(module).__doc__ and "# Map of this module" in source
    assert "import *" not in source and "@patch" not in source
    assert len(source.splitlines()) <= 420
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"): assert ast.get_docstring(node), f"{module}.{node.name}"
        if isinstance(node, ast.FunctionDef): assert node.end_lineno - node.lineno < 40, f"{module}.{node.name} has {node.end_lineno - node.lineno + 1} lines"


def public_surface() -> str:
    "Every public name with its signature, one a line."
    lines = []
    for module in ["trainbook", *MODULES]:
        for name in sorted(importlib.import_module(module).__all__):
            thing = getattr(importlib.import_module(module), name)
            if inspect.isclass(thing):
                lines.append(f"{module}.{name}")
                lines += [f"{module}.{name}.{key}" for key, value in sorted(vars(thing).items()) if not key.startswith("_") and (callable(value) or isinstance(value, (property, classmethod)))]
            elif inspect.isfunction(thing): lines.append(f"{module}.{name}{inspect.signature(thing)}")
            else: lines.append(f"{module}.{name}")
    return "\n".join(lines) + "\n"


def test_public_surface_is_the_frozen_one():
    frozen = ROOT/"tests"/"api.txt"
    assert public_surface() == frozen.read_text(), "the public surface changed; if on purpose: make surface, and say so in CHANGELOG.md"


PROBE = "import sys, time; t = time.perf_counter(); {what}; assert not {{'torch', 'pydantic', 'yaml', 'matplotlib', 'fastcore'}} & set(sys.modules), sorted(sys.modules)"


@pytest.mark.parametrize("what", ["import trainbook", "import trainbook.cli; assert trainbook.cli.main(['--help']) == 0"])
def test_front_door_loads_nothing_heavy(what):
    subprocess.run([sys.executable, "-c", PROBE.format(what=what)], check=True, capture_output=True)


@pytest.mark.parametrize("module", [m for m in MODULES if NUMBER[m.removeprefix("trainbook.")] < 10])
def test_words_load_without_torch_and_without_dev_tools(module):
    code = f"import sys, {module}; assert not {{'torch', 'fastcore', 'nbdev', 'IPython'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_front_door_takes_under_300_ms_beyond_the_interpreter():
    def fastest(*words):
        times = []
        for _ in range(5):
            began = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, capture_output=True)
            times.append(time.perf_counter() - began)
        return min(times)
    bare = fastest("-c", "pass")
    assert fastest("-c", "import trainbook") - bare < 0.3
    assert fastest("-m", "trainbook", "--help") - bare < 0.3


def test_windows_gets_one_clear_line():
    done = subprocess.run([sys.executable, "-c", "import sys; sys.platform = 'win32'; import trainbook"], capture_output=True, text=True)
    assert done.returncode and done.stderr.strip() == "ImportError: trainbook needs Linux or macOS (file locks, signals); on Windows use it inside WSL"


def test_package_never_imports_a_dev_tool():
    tools = re.compile(r"^\s*(?:from|import) (fastcore|nbdev|execnb|IPython|jupyter\w*|nbformat)\b", re.M)
    assert not [path.name for path in PACKAGE.rglob("*.py") if tools.search(path.read_text())]


def test_every_module_has_its_page():
    by_hand = {"__init__", "__main__", "_modidx"}
    stray = [str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.stem not in by_hand and ".".join(path.relative_to(PACKAGE).with_suffix("").parts) not in NUMBER]
    assert not stray, f"modules without a page (a page was renamed?): {stray}"
    assert (PACKAGE/"py.typed").exists()


def test_nothing_of_this_machine_is_in_the_tree():
    secret = re.compile(r"/root/|/home/|/work/|pypi\.org|files\.pythonhosted|/tmp/tmp")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    found = [name for name in tracked if name != "tests/test_house.py" and (ROOT/name).is_file() and (ROOT/name).suffix != ".png" and secret.search((ROOT/name).read_text(errors="replace"))]
    assert not found, found


def test_index_names_every_page():
    index = nbformat.read(NBS/"index.ipynb", 4)
    text = "\n".join(cell.source for cell in index.cells)
    assert not [page.stem for page in PAGES if page.stem != "index" and page.stem not in text]


def test_links_lead_somewhere():
    from pages import readme
    for text, folder in ((readme(), ROOT), *(("\n".join(c.source for c in nbformat.read(p, 4).cells if c.cell_type == "markdown"), p.parent) for p in PAGES)):
        assert not [link for link in re.findall(r"\]\((?!\w+:|#)([^)]+)\)", text) if not (folder/link).exists()]


def test_readme_is_the_index():
    from pages import readme
    assert (ROOT/"README.md").read_text() == readme(), "README.md is made from nbs/index.ipynb: python tools/pages.py readme"


if __name__ == "__main__": Path(ROOT/"tests"/"api.txt").write_text(public_surface())
