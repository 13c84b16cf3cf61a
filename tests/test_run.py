"""Run folders: made once, listed fast, never overwritten, removed only when nothing hangs on them."""
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from trainbook import Config, Run, RunError, find_run, runs
from trainbook.ledger import _row_text
from trainbook.lock import LostOwnership, RunBusy
from trainbook.run import check_name, cut_short


def made(**run) -> Run: return Run.create(Config.from_dict({"run": {"name": "demo", **run}}), command=["x"])


# --- made -----------------------------------------------------------------------------------------------------------------------------

def test_many_that_start_in_the_same_second_get_folders_of_their_own(here):
    code = "import time\nfrom pathlib import Path\nfrom trainbook import Config, Run\nwhile not Path('go').exists(): time.sleep(0.001)\nprint(*[Run.create(Config.from_dict({'run': {'name': 'demo'}})).folder for _ in range(20)], sep='\\n')"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    time.sleep(1); Path("go").touch()
    folders = [line for process in processes for line in process.communicate()[0].splitlines()]
    assert len(folders) == len(set(folders)) == len(runs()) == 80


def test_two_that_start_at_once_with_one_save_dir(here):
    """One makes the run; the other makes a sibling or is told that it is busy; nothing is shared."""
    Path("out").mkdir()
    code = "import time\nfrom pathlib import Path\nfrom trainbook import Config, Run\nwhile not Path('go').exists(): time.sleep(0.0005)\nprint(Run.create(Config.from_dict({'save_dir': 'out/here'})).folder)"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    time.sleep(1); Path("go").touch()
    told = [process.communicate() for process in processes]
    folders = [out.strip() for out, _ in told if out]
    assert len(set(folders)) == len(folders) >= 1 and "out/here" in folders
    assert all(out or "RunBusy" in err for out, err in told) and len(runs("out")) == len(folders)


def test_what_is_recorded(here):
    run = made()
    assert run.info["format"] == 1 and run.info["seed"] == 42 and run.info["command"] == ["x"] and run.info["parent"] is None
    assert {"python", "trainbook", "torch"} <= set(run.info["versions"]) and run.info["cwd"] == str(here)
    assert run.config == Config.from_dict({"run": {"name": "demo"}}) and run.info["git"] is None
    assert set(os.listdir(run.folder)) == {"run.json", "config.yaml", "inbox"}


def test_the_commit_and_its_changes_are_recorded(here):
    git = lambda *words: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, capture_output=True)
    git("init", "."); Path("a").write_text("1"); git("add", "a"); git("commit", "-m", "one")
    assert len(made().info["git"]["commit"]) == 40 and made().info["git"]["changed"] is False
    Path("a").write_text("2")
    assert made().info["git"]["changed"] is True


def test_every_file_has_a_format(here):
    run = made()
    with run.write() as ledger:
        ledger.start("m"); run.tell("save")
        mail = next((run.folder/"inbox").iterdir())
        assert json.loads(mail.read_text())["format"] == 1
    assert run.story().rows[0]["format"] == 1 and json.loads((run.folder/"owner.json").read_text())["format"] == 1
    assert (run.folder/"config.yaml").read_text().startswith("# trainbook config, format 1")


@pytest.mark.parametrize("name", ["../up", "a/b", "/etc", ".hidden", "-rf", "a b", "ü", "x" * 101, "", "a\n", "a\0b", "CON\\"])
def test_names_that_would_be_paths_are_refused(name, here):
    with pytest.raises(RunError): check_name(name)
    with pytest.raises(RunError): Run.create(Config.from_dict({"run": {"name": name}})) if name else check_name(name)
    assert not Path("runs").exists() or not os.listdir("runs")


@pytest.mark.parametrize("stem", ["my exp (2)", "-x-", "été", "a" * 200, "..."])
def test_the_name_of_a_config_file_is_tidied(stem, here):
    Path(f"{stem}.yaml").write_text("{}")
    assert check_name(Run.create(Config.from_yaml(f"{stem}.yaml")).name)


# --- read -----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, says", [("", "cannot be read"), ("{", "cannot be read"), ("[]", "lacks everything"), ('{"format": 2}', "newer trainbook wrote it"), ('{"format": "1"}', "damaged, or not ours"),
                                        ('{"format": 1}', "it lacks id, name"), ("[" * 100_000, "cannot be read")])
def test_a_damaged_or_newer_run_is_told(text, says, here):
    run, other = made(), made()
    (run.folder/"run.json").write_text(text)
    with pytest.raises(RunError, match=says): Run(run.folder)
    assert runs() == [other] and trainbook("runs").returncode == 0  # and it does not spoil the list


def test_a_folder_that_is_no_run(here):
    Path("x").mkdir()
    with pytest.raises(RunError, match="x is no run .it has no run.json.$"): find_run("x")
    with pytest.raises(RunError, match="there is no run y; runs has none"): find_run("y")


def test_status_of_each_life(here):
    run = made()
    assert run.status == "new"
    for status in ("finished", "stopped", "paused", "failed"):
        with run.write() as ledger:
            ledger.start("m"); assert run.status == "running"
            ledger.end(status); assert run.status == status
        assert run.status == status
    with run.write() as ledger: ledger.resume("m", 0, 0)
    assert run.status == "interrupted"


def test_a_copied_run_is_alive_only_where_it_runs(here):
    import shutil
    run = made()
    with run.write() as ledger:
        ledger.start("m")
        shutil.copytree(run.folder, "elsewhere", ignore=shutil.ignore_patterns(".lock"))
        assert Run("elsewhere").status == "interrupted" and run.status == "running"


def test_500_runs_are_listed(here):
    """In well under a second; how long it takes is measured in benchmarks/words.py."""
    first = made()
    info = json.loads((first.folder/"run.json").read_text())
    rows = b"".join(_row_text({"event": "step", "stage": "m", "step": step, "time": 0.0, "loss": 0.5}) for step in range(1000))
    for i in range(499):
        folder = Path(f"runs/many-{i:03}"); (folder/"inbox").mkdir(parents=True)
        (folder/"run.json").write_text(json.dumps(info | {"id": str(i), "name": folder.name}))
        (folder/"events.jsonl").write_bytes(rows); (folder/".lock").touch()
    done = trainbook("runs")
    assert len(done.stdout.splitlines()) == 501 and done.stdout.count("interrupted  m 999") == 499


# --- lineage, and the end -------------------------------------------------------------------------------------------------------------

def test_lineage_survives_renaming_and_a_missing_link(here):
    a = made(); b = Run.create(a.config, parent=(a, "m", 10)); c = Run.create(a.config, parent=(b, "m", 20))
    assert c.ancestors() == [b, a] and a.children() == [b] and c.parent["step"] == 20
    os.rename(b.folder, "runs/renamed")
    assert [run.name for run in c.ancestors()] == ["renamed", a.name]
    find_run("runs/renamed"); c.remove(); find_run("renamed").remove()
    assert a.children() == []


def test_a_run_that_others_branched_from_stays(here):
    a = made(); b = Run.create(a.config, parent=(a, "m", 10))
    for act in (a.remove, a.archive):
        with pytest.raises(RunError, match=f"{b.name} branched from {a.name}; remove it first"): act()
    assert a.folder.exists()


def test_a_running_run_stays(here):
    run = made()
    with run.write() as ledger:
        ledger.start("m")
        for act in (run.remove, run.archive):
            with pytest.raises(RunError, match="is running"): act()


def test_links_are_not_followed(here):
    run, target = made(), made()
    os.symlink(target.folder.absolute(), "runs/link")
    with pytest.raises(RunError, match="is a link"): Run("runs/link").remove()
    os.symlink(target.folder.absolute(), run.folder/"out")
    assert "out" not in {part for part, size in run.sizes().items() if size > 10_000}
    run.remove()
    assert target.folder.exists() and (target.folder/"run.json").exists()


def test_archive_holds_everything(here):
    run = made()
    (run.folder/"m"/"step-00000001").mkdir(parents=True); (run.folder/"m"/"step-00000001"/"model.safetensors").write_bytes(os.urandom(10_000))
    want = {str(path.relative_to(run.folder.parent)): path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    pack = run.archive()
    with tarfile.open(pack) as tar: assert {member.name: tar.extractfile(member).read() for member in tar if member.isfile()} == want
    with tarfile.open(pack) as tar: tar.extractall("back", filter="data")
    assert Run(Path("back")/run.name) == run and not run.folder.exists()


def test_an_archive_that_cannot_be_written_leaves_the_run(here):
    run = made()
    code = f"import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\nfrom trainbook import Run; Run({str(run.folder)!r}).archive()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "File too large" in done.stderr and run.folder.exists() and os.listdir("runs/archive") == []


# --- on the command line --------------------------------------------------------------------------------------------------------------

def trainbook(*words, answer: str | None = None) -> subprocess.CompletedProcess:
    "The real command; with an answer, at a real terminal."
    if answer is None: return subprocess.run([sys.executable, "-m", "trainbook", *words], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    import pty
    main, end = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "trainbook", *words], stdin=end, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.write(main, answer.encode() + b"\n")
    out, err = process.communicate(timeout=30)
    os.close(main); os.close(end)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def test_rm_says_what_would_go_and_asks(here):
    run = made()
    done = trainbook("rm", run.name)
    assert done.returncode == 2 and "add --yes" in done.stderr and run.folder.exists()
    done = trainbook("rm", run.name, answer="n")
    assert done.returncode == 1 and f"{run.folder}  new  " in done.stdout and "nothing was changed" in done.stdout and run.folder.exists()
    done = trainbook("rm", run.name, answer="y")
    assert done.returncode == 0 and f"deleted {run.folder}" in done.stdout and not run.folder.exists()


def test_rm_of_several_does_all_or_asks_about_none(here):
    a = made(); b = Run.create(a.config, parent=(a, "m", 1))
    assert trainbook("rm", b.name, a.name, "--yes").returncode == 2 and b.folder.exists()  # a has a branch
    assert trainbook("rm", b.name, "--yes").returncode == 0 and trainbook("archive", a.name, "--yes").returncode == 0 and runs() == []


def test_a_creation_that_was_cut_short_is_told_and_removable(here):
    (here/"runs"/"half"/"inbox").mkdir(parents=True); (here/"runs"/"half"/"config.yaml").write_text("{}")
    assert "runs/half is no run: its creation was cut short" in trainbook("runs").stdout
    assert trainbook("rm", "runs/half").returncode == 2 and trainbook("rm", "runs/half", answer="n").returncode == 1 and cut_short() == [Path("runs/half")]
    assert trainbook("rm", "runs/half", "--yes").returncode == 0 and cut_short() == []


def test_a_folder_of_somebody_else_is_never_removed(here):
    (here/"Mail"/"inbox").mkdir(parents=True); (here/"Mail"/"cur").mkdir(); (here/"Post"/"inbox").mkdir(parents=True); (here/"Post"/"inbox"/"letter").touch()
    for name in ("Mail", "Post"): assert trainbook("rm", name, "--yes").returncode == 2 and Path(name).exists()


def test_a_project_as_save_dir_keeps_its_files(here):
    (here/"proj"/"src").mkdir(parents=True); Path("proj/src/code.py").touch(); Path("proj/config.yaml").write_text("mine: 1\n")
    with pytest.raises(RunError, match="proj has its own config.yaml"): Run.create(Config.from_dict({"save_dir": "proj"}))
    assert Path("proj/config.yaml").read_text() == "mine: 1\n" and not Path("proj/run.json").exists()
    Path("proj/config.yaml").unlink()
    run = Run.create(Config.from_dict({"save_dir": "proj"}))
    for act in (run.remove, run.archive):
        with pytest.raises(RunError, match="holds what the run did not make .src."): act()
    assert Path("proj/src/code.py").exists()


@pytest.mark.parametrize("name", [".", "a/..", "./a/../b/."])
def test_a_save_dir_with_dots(name, here):
    Path("a").mkdir()
    first, second = (Run.create(Config.from_dict({"save_dir": name})) for _ in range(2))
    assert first.folder.resolve() != second.folder.resolve() and Run(first.folder) == first


def test_a_branch_that_lies_elsewhere_protects_its_parent_too(here):
    parent = made()
    branch = Run.create(Config.from_dict({"save_dir": "elsewhere/b"}), parent=(parent, "m", 1))
    assert parent.children() == [branch]
    with pytest.raises(RunError, match="b branched from"): parent.remove()
    branch.remove()
    parent.remove()


def test_a_run_with_hard_links_is_archived(here):
    run = made()
    (run.folder/"a").write_text("x" * 1000); os.link(run.folder/"a", run.folder/"b")
    pack = run.archive()
    with tarfile.open(pack) as tar: assert {f"{run.name}/a", f"{run.name}/b"} <= set(tar.getnames())


def test_a_writer_whose_run_was_removed_notices(here):
    run = made()
    with run.write() as ledger:
        ledger.start("m")
        os.rename(run.folder, "runs/gone")
        with pytest.raises(LostOwnership): ledger.sync()
        os.rename("runs/gone", run.folder)


def test_rm_of_the_same_run_twice(here):
    run = made()
    assert trainbook("rm", run.name, run.name, "--yes").returncode == 0 and runs() == []


def test_the_longest_name_is_found(here):
    run = made(name="x" * 95)
    assert find_run(run.name) == run


def test_unusual_file_names_and_terminals(here):
    name = "a\nb: 1.yaml"
    Path(name).write_text("{}")
    run = Run.create(Config.from_yaml(name))
    assert run.config.training.lr == 1e-4
    done = subprocess.run([sys.executable, "-m", "trainbook", "config", "show", str(run.folder/"config.yaml"), "run.notes=é"], capture_output=True, env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize("words, code, says", [
    ("runs nowhere", 0, "nowhere has no runs"), ("show nothing", 2, "there is no run nothing"), ("shwo x", 2, "did you mean show?"), ("config", 2, "expected one of show, check, schema"),
    ("config show", 2, "expected a config file"), ("runs --all", 2, "does not understand --all"), ("rm", 2, "expected a run"), ("--version", 0, "trainbook 0."), ("", 0, "VERB"), ("runs --help", 0, "trainbook runs [FOLDER]"), ("help nope", 2, "no such verb"), ("config --help", 0, "config schema"), ("help config check", 0, "config check"),
    ("config show a.yaml --stage", 2, "--stage needs a value"), ("config show a.yaml --stage nope", 2, "has no stage nope"), ("config show missing.yaml", 2, "missing.yaml  no such file"), ("rm ../.. --yes", 2, "../.. is no run")])
def test_words(words, code, says, here):
    Path("a.yaml").write_text("{}")
    done = trainbook(*words.split())
    assert done.returncode == code and says in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert not done.stderr if code == 0 else len(done.stderr.strip().splitlines()) == 1


def test_config_show_with_flags_of_a_guide(here):
    Path("a.yaml").write_text("model: {hidden_dim: 512}\n")
    done = trainbook("config", "show", "a.yaml", "-hidden_dim", "256", "-use_amp", "True", "-opt_level", "O1", "--origin")
    assert "hidden_dim: 256" in done.stdout and "# command line (as -hidden_dim)" in done.stdout and "precision: auto" in done.stdout


def test_config_check_looks_builders_up(here):
    Path("nets.py").write_text("class Net:\n    def __init__(self, width, depth=2): ...\n")
    Path("a.yaml").write_text("model:\n  name: nets:Net\n  wdith: 3\n")
    done = trainbook("config", "check", "a.yaml")
    assert done.returncode == 2 and done.stderr == "a.yaml:3:3  model.wdith  unknown argument of nets:Net, did you mean width?\na.yaml:2:3  model.width  is missing; nets:Net needs it\n"


def test_output_that_nobody_reads_is_no_error(here):
    Path("a.yaml").write_text("{}")
    done = subprocess.run(f"{sys.executable} -m trainbook config schema | head -n 1; exit ${{PIPESTATUS[0]}}", shell=True, executable="/bin/bash", capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr


def test_the_two_front_doors_are_the_same(here):
    script = Path(sys.executable).parent/"trainbook"
    assert subprocess.run([script, "--help"], capture_output=True, text=True).stdout == trainbook("--help").stdout != ""


def test_busy_is_exit_code_one(here):
    from trainbook.cli import _exit_code
    assert _exit_code(RunBusy("x")) == 1 and _exit_code(KeyError("ours")) is None


def test_a_tilde_is_the_home_folder(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here/"home"))
    assert Run.create(Config.from_dict({"save_dir": "~/x"})).folder == here/"home"/"x"
    assert made(root="~/runs").folder.parent == here/"home"/"runs" and not Path("~").exists()


def test_a_creation_that_is_killed_at_any_write_can_be_made_again(here):
    """With save_dir, where the next start finds the remains under the same name."""
    code = """
import os, signal, sys
from trainbook import Config, Run
left = int(sys.argv[1])
def mortal(real):
    def call(*words, **more):
        global left
        left -= 1
        if left == 0: os.kill(os.getpid(), signal.SIGKILL)
        return real(*words, **more)
    return call
for name in ("write", "fsync", "rename", "mkdir"): setattr(os, name, mortal(getattr(os, name)))
Run.create(Config.from_dict({"save_dir": "here"}))
"""
    for n in range(1, 100):
        done = subprocess.run([sys.executable, "-c", code, str(n)], capture_output=True)
        if done.returncode == 0: break
        assert done.returncode == -9, done.stderr
        run = Run.create(Config.from_dict({"save_dir": "here", "run": {"on_existing": "resume"}}))
        assert run.folder == Path("here") and run.status == "new" and run.info["found"] == []
        run.remove()
    assert n > 8 and not Path("here-2").exists()


def test_a_full_inbox_of_somebody_else_is_not_taken_over(here):
    (here/"post"/"inbox").mkdir(parents=True); Path("post/inbox/letter").touch()
    with pytest.raises(RunError, match="post has its own inbox"): Run.create(Config.from_dict({"save_dir": "post"}))
    assert Path("post/inbox/letter").exists()


def test_a_deletion_that_was_cut_short_is_finished_by_the_next(here):
    run = made()
    os.rename(run.folder, "runs/.trash-demo-abcdef")
    made().remove()
    assert os.listdir("runs") == []


def test_a_full_disk_says_where(here):
    code = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\nfrom trainbook import Config, Run; Run.create(Config.from_dict({'save_dir': 'full'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "OSError: [Errno 27] File too large: 'full/config.yaml'" in done.stderr and os.listdir("full/inbox") == []
