"""Cells as modules: in a real kernel, in plain processes, in workers that are spawned, in a run that somebody else opens."""
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
from lab import notebook

from trainbook import cells, registry
from trainbook.cells import keep_code, module, use_code
from trainbook.config import Config
from trainbook.registry import KINDS, find, register
from trainbook.source import ConfigError
from trainbook.trust import NotTrusted

NET = """from trainbook.registry import register

@register("model", "net")
class Net:
    "A net."
    width = 8
"""
ROWS = """class Rows:
    def __len__(self): return 4
    def __getitem__(self, i):
        if not 0 <= i < 4: raise IndexError(i)
        return i * 10
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch, here):
    "A registry, a session and a home of its own for each test."
    monkeypatch.setenv("XDG_CONFIG_HOME", str(here/"home"))
    monkeypatch.setattr(registry, "_BUILDERS", {kind: {} for kind in KINDS})
    for name, new in {"_CELLS": {}, "_BROUGHT": {}}.items(): monkeypatch.setattr(cells, name, new)
    monkeypatch.setattr(registry, "_OWN", set())
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    cells._session.cache_clear()
    yield
    for name in {*cells._CELLS, *cells._BROUGHT, *(set(sys.modules) - before)}:
        if "/" not in name and "." not in name and str(getattr(sys.modules.get(name), "__file__", "")).startswith(str(cells._session())): del sys.modules[name]
    cells._remove(cells._session(), os.getpid())
    cells._session.cache_clear()


def python(code: str, home: str = "home", **more) -> str:
    "What a fresh process prints, or the last line of its error."
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env={**os.environ, "XDG_CONFIG_HOME": str(Path(home).absolute())}, **more)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


USE = "from trainbook.cells import use_code; from trainbook.registry import find; {}"


# --- a module -------------------------------------------------------------------------------------

def test_it_is_a_module_like_any_other(here):
    made = module("nets", "from __future__ import annotations\n" + NET)
    import nets
    assert nets is made is sys.modules["nets"] and find("model", "nets:Net") is find("model", "net") is nets.Net
    import inspect
    import pickle
    assert pickle.loads(pickle.dumps(nets.Net)) is nets.Net and '"A net."' in inspect.getsource(nets.Net)


def test_the_future_of_this_page_is_not_the_cells():
    with pytest.raises(NameError): module("plain", "def f(x: NoSuchName): ...")


def test_written_again_it_replaces_names_classes_and_registrations():
    module("nets", NET)
    module("nets", NET.replace("class Net", "class Other").replace("width = 8", "width = 9"))  # the same name for another class
    assert find("model", "net").width == 9 and not hasattr(sys.modules["nets"], "Net")
    module("nets", "x = 1")
    with pytest.raises(ConfigError, match="model net  is not registered"): find("model", "net")


def test_a_name_of_another_module_stays_taken():
    module("nets", NET)
    with pytest.raises(ConfigError, match="model net  is taken by nets:Net; give others:Net another name"): module("others", NET)
    assert "others" not in sys.modules and find("model", "net").__module__ == "nets"


def test_a_class_that_moves_from_the_notebook_to_a_cell_keeps_its_name():
    Net = type("Net", (), {"__module__": "__main__", "__qualname__": "Net"})
    register("model", "net")(Net)
    module("nets", NET)
    assert find("model", "net").__module__ == "nets"


@pytest.mark.parametrize("slip", ["class Net(:", "1 / 0", "raise KeyboardInterrupt", "raise SystemExit", NET.replace('"net"', '"other"') + "1 / 0"])
def test_a_slip_leaves_everything_as_it_was(slip):
    module("nets", NET)
    before = find("model", "net")
    kinds = SyntaxError, ZeroDivisionError, KeyboardInterrupt, SystemExit
    with pytest.raises(kinds): module("nets", slip)
    assert sys.modules["nets"].Net is before is find("model", "net") is find("model", "nets:Net", trusted=False) and registry.names("model") == ["net"]
    assert (cells._session()/"nets.py").read_text() == NET
    with pytest.raises(kinds): module("fresh", slip)
    assert "fresh" not in sys.modules and "fresh" not in cells._CELLS and not (cells._session()/"fresh.py").exists()


def test_a_traceback_shows_the_line():
    import traceback
    try: module("nets", "x = 1\ny = x / 0  # here\n")
    except ZeroDivisionError as error: text = "".join(traceback.format_exception(error))
    assert "nets.py\", line 2" in text and "# here" in text


@pytest.mark.parametrize("name, says", [("torch", "is taken by .*torch"), ("numpy", "is taken by"), ("yaml", "is taken by"), ("trainbook", "is taken by"), ("pytest", "is taken by"), ("json", "by Python itself"), ("__main__", "by Python itself"), ("__future__", "by Python itself"),
                                        ("class", "is no name"), ("", "is no name"), ("a b", "is no name"), ("a.b", "is no name"), ("../x", "is no name"), ("1a", "is no name"), ("a-b", "is no name"), ("nétz", "is no name"), ("a\nb", "is no name")])
def test_names_that_lead_elsewhere_are_refused_in_one_line(name, says):
    before = sys.modules.get(name)
    with pytest.raises(ConfigError, match=says) as caught: module(name, "x = 1")
    assert "\n" not in str(caught.value) and sys.modules.get(name) is before and not cells._CELLS


def test_a_file_beside_the_notebook_is_another_module_and_a_folder_is_not(here, monkeypatch):
    monkeypatch.syspath_prepend(str(here))
    (here/"mine.py").write_text("")
    (here/"models").mkdir()
    with pytest.raises(ConfigError, match="module  mine  is taken by .*mine.py; choose another name"): module("mine", "")
    assert module("models", "x = 3").x == 3


def test_a_checkpoint_may_name_what_stands_in_a_cell_and_nothing_that_it_imported():
    module("nets", "import os\nfrom collections import OrderedDict\ndef wipe(): ...\nclass Plain: ...\n")
    assert find("model", "nets:Plain", trusted=False).__name__ == "Plain"
    for name in ("nets:os.system", "nets:OrderedDict", "nets:wipe", "nets:os", "nets:Plain.__init__", "nets:No", "os:system"):
        with pytest.raises(ConfigError, match="is not registered in this process"): find("model", name, trusted=False)


def test_the_folder_of_the_session_goes_with_the_process_and_not_with_a_child(here):
    code = ("import os; from trainbook.cells import module, _session; module('nets', 'x = 1')\n"
            "child = os.fork()\nif not child: raise SystemExit\nos.waitpid(child, 0); print(_session(), (_session()/'nets.py').exists())")
    folder, there = python(code).split()
    assert there == "True" and not Path(folder).exists()


def test_spawned_workers_import_what_was_written_last():
    code = f"""
import torch.utils.data
from trainbook.cells import module
if __name__ == "__main__":
    for factor in (10, 20, 30):  # sources of one size within one second
        rows = module("rows_of_a_cell", {ROWS!r}.replace("10", str(factor)))
        loader = torch.utils.data.DataLoader(rows.Rows(), batch_size=4, num_workers=1, multiprocessing_context="spawn")
        print([batch.tolist() for batch in loader])
"""
    Path("main.py").write_text(code)
    done = subprocess.run([sys.executable, "main.py"], capture_output=True, text=True)
    assert done.stdout == "[[0, 10, 20, 30]]\n[[0, 20, 40, 60]]\n[[0, 30, 60, 90]]\n", done


def test_a_cell_that_is_run_again_within_a_second_is_not_taken_for_the_old_one():
    for width in ("8", "9"):
        module("nets", NET.replace("8", width))
        os.utime(cells._session()/"nets.py", (1, 1))
        assert python("import nets; print(nets.Net.width)", cwd=cells._session()) == width
    assert (cells._session()/"__pycache__").is_file()


def test_what_is_installed_is_not_ones_own_also_where_the_venv_is_a_link(here):
    os.symlink(sys.prefix, "linked")
    code = "import nbformat; from trainbook.cells import own_code; from trainbook.config import Config; print(own_code(Config.from_dict({'model': {'name': 'nbformat:read'}})))"
    done = subprocess.run([here/"linked/bin"/Path(sys.executable).name, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)})
    assert done.stdout.strip() == "{}", done


def test_what_is_written_for_an_installed_package_is_not_ones_own(here, monkeypatch):
    """A module that torch.compile has made lies in a folder of its own, which may be less deep than its name."""
    import torch  # noqa: F401
    Path("deep").mkdir()
    Path("mine.py").write_text("def net(): ...")
    monkeypatch.syspath_prepend(str(here))
    for name, file in (("torch._inductor.runtime.compile_tasks.cabc", "/tmp/ab/cabc.py"), ("torch.cdef", str(here/"deep/cdef.py")), ("a.b.c.d.e.f", "/f.py")):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules[name].__file__ = file
    find("model", "mine:net")
    found = cells.own_code(Config.from_dict({"model": {"name": "mine:net"}}))
    del sys.modules["mine"]
    assert found["folders"].keys() == {str(here)} and found["folders"][str(here)].keys() == {"mine.py"}


# --- in a notebook --------------------------------------------------------------------------------

def test_a_notebook_defines_keeps_and_a_fresh_process_finds(here):
    shown = notebook(
        "%load_ext trainbook.cells",
        "%%module nets\nimport torch\nfrom trainbook.registry import register\n@register('model')\nclass Net(torch.nn.Linear):\n    def __init__(self, width: int = 3): super().__init__(width, 1)\n_hidden = 1",
        "Net().in_features, Net.__module__, torch.__name__, '_hidden' in globals()",
        f"%%module rows\n{ROWS}\nold = 3",
        f"%%module rows\n{ROWS}",
        "'old' in globals(), Rows()[2]",
        "%%module json\nx = 1",
        "%%module rows\nclass Rows:\n    1 / 0",
        "Rows()[2]",
        "loader = torch.utils.data.DataLoader(Rows(), batch_size=4, num_workers=1, multiprocessing_context='spawn')\n[batch.tolist() for batch in loader]",
        "import os\nfrom trainbook.cells import keep_code\nos.makedirs('runs/demo')\nkeep_code('runs/demo')")
    assert shown[:6] == ["", "", "(3, 'nets', 'torch', False)", "", "", "(False, 20)"]
    assert "module  json  is taken by Python itself; choose another name" in shown[6] and "Traceback" not in shown[6]
    assert "ZeroDivisionError" in shown[7] and shown[8] == "20" and shown[9] == "[[0, 10, 20, 30]]" and shown[10] == "['nets', 'rows']"
    assert sorted(os.listdir("runs/demo/code")) == ["nets.py", "rows.py"]
    ask = USE.format("print(use_code('runs/demo'), find('model', 'nets:Net')(5).in_features, find('model', 'net').__module__, find('data', 'rows:Rows')()[1])")
    for _ in range(2): assert python(ask) == "['nets', 'rows'] 5 nets 10"
    assert "NotTrusted" in python(ask, home="elsewhere")


def test_the_magic_is_there_after_an_import(here):
    shown = notebook("import trainbook.cells", "%%module nets\nx = 3", "x, __import__('nets').x", "print(trainbook.cells._session())")
    assert shown[:3] == ["", "", "(3, 3)"] and not Path(shown[3]).exists()


def test_all_says_what_is_public():
    class Shell:
        user_ns = {}
        def push(self, names): self.user_ns.update(names)
        def register_magic_function(self, function, kind, name): self.magic = function
    shell = Shell()
    cells.load_ipython_extension(shell)
    shell.magic(" nets ", "__all__ = ['a']\na = b = 1")
    assert shell.user_ns == {"a": 1}
    shell.user_ns["a"] = "mine"
    shell.magic("nets", "b = 2")
    assert shell.user_ns == {"a": "mine", "b": 2}  # what a person put there is theirs


# --- a run's code ---------------------------------------------------------------------------------

def kept(name: str = "run", **sources: str) -> Path:
    "A run whose code was kept by another process of this person."
    Path(name).mkdir()
    code = "from trainbook.cells import module, keep_code\n" + "".join(f"module({key!r}, {value!r})\n" for key, value in sources.items()) + f"keep_code({name!r})"
    assert python(code) == ""
    return Path(name)


def test_nothing_defined_nothing_kept(here):
    Path("run").mkdir()
    assert keep_code("run") == [] == os.listdir("run") and use_code("run") == []


def test_ones_own_code_needs_no_answer_also_when_it_moves(here):
    os.rename(kept(nets=NET), "moved")
    assert use_code("moved") == ["nets"] and find("model", "nets:Net").width == 8 and find("model", "net") is find("model", "nets:Net", trusted=False)
    assert os.listdir("moved/code") == ["nets.py"] and str(Path("moved/code").absolute()) not in sys.path


def test_code_from_elsewhere_is_asked_about_once(here, monkeypatch):
    run = kept(nets=NET)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(here/"other"))
    with pytest.raises(NotTrusted, match="run  brings code/nets.py, which would run as code here; .*trust_code=True") as caught: use_code(run)
    assert "\n" not in str(caught.value) and "nets" not in sys.modules
    assert use_code(run, trust_code=True) == ["nets"] == use_code(run)
    (run/"code"/"nets.py").write_text(NET + "\n")
    with pytest.raises(NotTrusted): use_code(run)


def test_an_owner_and_a_host_prove_nothing(here):
    "A packed run that I unpack is mine, and its run.json says what its author wants."
    from trainbook.run import Run
    run = Run.create()
    (run.folder/"code").mkdir()
    (run.folder/"code"/"nets.py").write_text("raise SystemExit('ran')")
    with pytest.raises(NotTrusted): use_code(run.folder)


@pytest.mark.parametrize("name", ["json", "torch", "yaml", "a-b", ".hidden"])
def test_code_that_would_hide_another_module_is_refused_even_when_trusted(here, name):
    Path("run/code").mkdir(parents=True)
    Path(f"run/code/{name}.py").write_text("raise SystemExit('ran')")
    says = python(USE.format("use_code('run', trust_code=True)"))
    assert "ConfigError" in says and (name in says) and "ran" not in says


def test_modules_of_a_run_import_each_other(here):
    kept(z_last="z = 2\n" + NET.replace('"net"', '"late"'), a_first="x = 1", nets="import a_first, z_last\ny = a_first.x + z_last.z\n" + NET)
    assert use_code("run") == ["a_first", "nets", "z_last"] and sys.modules["nets"].y == 3 and registry.names("model") == ["late", "net"]


def test_two_runs_with_modules_of_one_name_do_not_mix(here):
    kept("one", nets=NET, only_here="x = 1")
    kept("two", nets=NET.replace("8", "16"), others="x = 2")
    use_code("one")
    first = find("model", "net")
    assert use_code("two") == ["nets", "others"] and find("model", "net").width == 16 and first.width == 8
    assert "only_here" not in sys.modules and not (cells._session()/"only_here.py").exists()
    again = find("model", "net")
    use_code("two")
    assert find("model", "net") is again  # the same code: nothing is imported anew


def test_a_branch_keeps_what_its_parent_brought(here):
    kept(nets=NET)
    use_code("run")
    module("mine", "x = 1")
    Path("branch").mkdir()
    assert keep_code("branch") == ["mine", "nets"] and Path("branch/code/nets.py").read_text() == NET
    assert python(USE.format("print(use_code('branch'))")) == "['mine', 'nets']"


def test_what_the_session_has_wins_and_a_difference_is_said(here):
    kept(nets=NET, rows=ROWS)
    mine = module("nets", NET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert use_code("run") == ["nets", "rows"]
    module("nets", NET.replace("8", "99"))
    with pytest.warns(UserWarning, match="code/nets.py  is not what this session has under that name; the session's is used"): use_code("run")
    assert find("model", "net").width == 99 and mine is not sys.modules["nets"]
    assert keep_code("run") == ["nets", "rows"] and "99" in Path("run/code/nets.py").read_text()
    assert python(USE.format("print(use_code('run'), find('model', 'net').width)")) == "['nets', 'rows'] 99"


def test_a_cell_may_replace_what_a_run_brought(here):
    kept(nets=NET)
    use_code("run")
    module("nets", NET.replace("8", "9"))
    use_code(Path("nowhere"))
    assert find("model", "net").width == 9 and cells._CELLS.keys() == {"nets"} and not cells._BROUGHT


def test_another_module_of_that_name_that_is_imported_already_is_an_error(here, monkeypatch):
    kept(nets=NET)
    monkeypatch.syspath_prepend(str(here))
    (here/"nets.py").write_text("x = 1")
    assert python(USE.format("use_code('run'); print(find('model', 'net').width)")) == "8"  # it lies there, the run has its own
    assert "run/code/nets.py  would hide" in python(USE.format("import nets; use_code('run')"))


def test_code_that_does_not_run_is_one_line_and_leaves_nothing(here, monkeypatch):
    Path("run/code").mkdir(parents=True)
    Path("run/code/good.py").write_text(NET)
    Path("run/code/nets.py").write_text("import good\n1 / 0")
    with pytest.raises(ConfigError, match="nets.py  cannot be imported: ZeroDivisionError: division by zero"): use_code("run", trust_code=True)
    assert not {"good", "nets"} & set(sys.modules) and registry.names("model") == [] and not cells._BROUGHT
    assert not list(cells._session().glob("*.py"))


def test_a_kill_between_any_two_calls_leaves_whole_code_that_is_trusted_or_none(here):
    from test_kill import ended, fork
    for n in range(60):
        def life(n=n):
            count = [0]
            for call in ("open", "write", "rename", "replace", "mkdir", "fsync", "unlink", "rmdir"):
                real = getattr(os, call)
                def deadly(*args, real=real, **kwargs):
                    if count[0] == n: os.kill(os.getpid(), 9)
                    count[0] += 1
                    return real(*args, **kwargs)
                setattr(os, call, deadly)
            keep_code("run")
        cells._CELLS.update(nets=NET, rows=ROWS)
        Path("run").mkdir(exist_ok=True)
        done = ended(fork(life)) == 0
        if Path("run/code").exists():
            cells._CELLS.clear()
            assert use_code("run") == ["nets", "rows"]
            cells._leave("nets", "rows")
        if done: break
        subprocess.run(["rm", "-r", "run", "home"], stderr=subprocess.DEVNULL)
    assert 10 < n < 59 and os.listdir("run") == ["code"]


def test_a_file_that_this_session_does_not_know_stays_and_is_asked_about(here):
    kept(nets=NET)
    Path("run/code/strange.py").write_text("raise SystemExit('ran')")
    module("nets", NET)
    keep_code("run")
    assert Path("run/code/strange.py").exists() and "NotTrusted" in python(USE.format("use_code('run')"))


def test_without_a_home_the_code_is_kept_and_that_is_said(here, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", "/proc/nowhere")
    module("nets", NET)
    Path("run").mkdir()
    with pytest.warns(UserWarning, match="cannot be remembered"): assert keep_code("run") == ["nets"]
    assert os.listdir("run/code") == ["nets.py"]
