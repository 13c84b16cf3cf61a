"""Code from elsewhere: what is asked, what is remembered, and whose answer is believed."""
import json
import multiprocessing
import os
import stat
import threading
from pathlib import Path

import pytest

from trainbook import registry
from trainbook.registry import KINDS, register
from trainbook.trust import NotTrusted, check_trust, fingerprint, trust, trusted

HOW = "trust_code=True, or --trust-code on the command line (asked once, and again if it changes)"


@pytest.fixture(autouse=True)
def alone(monkeypatch, here):
    "A registry and a configuration folder of its own for each test."
    monkeypatch.setattr(registry, "_BUILDERS", {kind: {} for kind in KINDS})
    monkeypatch.setenv("XDG_CONFIG_HOME", str(here/"config"))


def answers() -> Path: return Path(os.environ["XDG_CONFIG_HOME"])/"trainbook"/"trusted.json"


def code(name="run/code", **files):
    for file, text in (files or {"net": "class Net: ..."}).items():
        path = Path(name)/f"{file.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Path(name)


def refusal(*args, **how):
    with pytest.raises(NotTrusted) as caught: check_trust(*args, **how)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable() and not answers().exists()
    return str(caught.value)


def test_nothing_to_trust_asks_nothing_and_writes_nothing():
    @register("model", "unet")
    class Net: ...
    Path("empty").mkdir()
    for names in ([], ["unet", "resnet", "", None], [f"{Net.__module__}:{Net.__qualname__}"], "unet"):
        for folder in (None, Path("nowhere"), Path("empty")): check_trust(names, folder)
    assert not answers().exists()


ASKED = [(["os:system"], "names os:system, which"), ("os:system", "names os:system, which"), (["b:y", "a:x", "b:y", "unet"], "names a:x, b:y, which"), (["trainbook.lock:os.system"], "names trainbook.lock:os.system, which"),
         (["os:system\nall is well"], r'names "os:system\nall is well", which'), (["os:\x1b[2Jsystem"], r'"os:\u001b[2Jsystem"'), (["os:\u202emetsys"], r'"os:\u202emetsys"'), (["a b:c\"d"], r'"a b:c\"d"'), (["os:\udcff"], r'"os:\udcff"'),
         (["m:" + "x" * 500], "xxx..., which"), ([f"m:n{i:02}" for i in range(50)], "m:n05 and 44 more, which")]


@pytest.mark.parametrize("names, says", ASKED, ids=range(len(ASKED)))
def test_a_name_that_would_import_is_one_line(names, says):
    line = refusal(names, where="runs/demo")
    assert line.startswith("runs/demo  names ") and says in line and line.endswith(HOW) and len(line) < 700


def test_code_is_asked_about_with_its_files_also_when_every_name_is_registered():
    register("model", "unet")(dict)
    line = refusal(["unet"], code(net="1", sub__part="2"), where="odd\nplace")
    assert line == r'"odd\nplace"  brings code/net.py, code/sub/part.py, which would run as code here; if you trust who made it: ' + HOW
    assert "names os:system and brings code/net.py" in refusal(["os:system"], code())


def test_a_yes_is_remembered_by_content():
    folder = code(net="1", sub__part="2")
    check_trust(["net:Net", "unet"], folder, trust_code=True, where="runs/demo")
    assert stat.S_IMODE(answers().stat().st_mode) == 0o600 and stat.S_IMODE(answers().parent.stat().st_mode) == 0o700
    assert json.loads(answers().read_text())["trusted"] == {fingerprint(["net:Net"]): "runs/demo: names net:Net", fingerprint([], folder): "runs/demo: brings code/net.py, code/sub/part.py"}
    copied = code("elsewhere/other", sub__part="2", net="1")
    for where in (folder, copied): check_trust(["unet", "net:Net", "net:Net"], where)
    both = [f"{fingerprint.__module__}:fingerprint", "net:Other"]
    check_trust(both, copied, trust_code=True)
    register("loss", "mark")(fingerprint)  # what is registered meanwhile does not change the question
    check_trust(both, copied)
    for change in (lambda: code("elsewhere/other", net="1 "), lambda: code("elsewhere/other", net="1", more=""), lambda: (copied/"more.py").rename(copied/"less.py"), lambda: ((copied/"less.py").unlink(), (copied/"net.py").rename(copied/"not.py"))):
        change()
        with pytest.raises(NotTrusted): check_trust(["net:Net"], copied)
    with pytest.raises(NotTrusted, match="names os:system, which"): check_trust(["net:Net", "os:system"], folder)  # what was agreed to is not asked about again
    for names in ([], ["net:Net"], ["net:Other"]): check_trust(names, folder)


@pytest.mark.parametrize("word", ["false", "no", 0, 1, None])
def test_only_true_is_a_yes(word): refusal(["os:system"], trust_code=word)


def test_different_things_have_different_fingerprints():
    seen = [fingerprint(["a:b"]), fingerprint(["a:b", "c:d"]), fingerprint(["a:b,c:d"]), fingerprint([]), fingerprint([], code("one", a="", b="")), fingerprint([], code("two", ab="")), fingerprint(["a.py"], code("three", b="")), fingerprint([], code("four", sub__a="", b=""))]
    assert len(set(seen)) == len(seen) and all(len(mark) == 64 for mark in seen)
    assert fingerprint(["c:d", "a:b"]) == seen[1] == fingerprint(iter(["a:b", "c:d", "c:d"]))


def test_a_stale_pycache_and_odd_names_count():
    folder = code()
    marks = {fingerprint([], folder)}
    (folder/"__pycache__").mkdir()
    for name in (b"__pycache__/net.pyc", b"\xff.py", b".hidden", b"new\nline.py"):
        Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_bytes(b"\0")
        marks.add(fingerprint([], folder))
    assert len(marks) == 5 and r'"code/new\nline.py", "code/\udcff.py"' in refusal([], folder)


def link(folder): os.symlink("/etc/passwd", folder/"notes\n.py")
def link_to_folder(folder): os.symlink("/etc", folder/"sub")
def fifo(folder): os.mkfifo(folder/"pipe.py")
def link_itself(folder): folder.rename("real"); os.symlink(Path("real").absolute(), folder)
def a_file(folder): folder.rename("real"); folder.write_text("1")
def too_big(folder): os.truncate(folder/"net.py", (64 << 20) + 1)
def link_deep_inside(folder): (folder/"a/b").mkdir(parents=True); (folder/"a/b/x").symlink_to("y")


SPOILED = [(link, r'"run/code/notes\n.py"  is a link or no plain file'), (link_to_folder, "run/code/sub  is a link"), (fifo, "run/code/pipe.py  is a link or no plain file"), (link_itself, "run/code  is a link"), (a_file, "run/code  is a link or no plain file"),
           (too_big, "run/code  has more than 10,000 files or 64 MB"), (link_deep_inside, "run/code/a/b/x  is a link or no plain file")]


@pytest.mark.parametrize("spoil, says", SPOILED)
def test_what_is_no_plain_code_is_refused_whoever_says_yes(spoil, says):
    spoil(folder := code())
    assert says in refusal([], folder) and says in refusal([], folder, trust_code=True)


def test_ten_thousand_folders_are_too_many():
    folder = code()
    for i in range(10_000): os.mkdir(folder/f"{i}")
    assert "has more than 10,000 files" in refusal([], folder)


def world_writable(path): path.chmod(0o666)
def group_writable(path): path.chmod(0o620)
def open_folder(path): path.parent.chmod(0o777)
def a_link(path): path.rename("real.json"); path.symlink_to(Path("real.json").absolute())
def a_pipe(path): path.unlink(); os.mkfifo(path)
def cut(path): os.truncate(path, 30)
def no_text(path): path.write_bytes(b"\xff\xfe")
def a_list(path): path.write_text("[1]")
def nested(path): path.write_text("[" * 100_000)
def no_words(path): path.write_text(json.dumps({"trusted": {"mark": 3}}))


DOUBTS = [(world_writable, "can be written by others"), (group_writable, "can be written by others"), (open_folder, "can be written by others"), (a_link, "is a link or no plain file"), (a_pipe, "is a link or no plain file"),
          (cut, "is damaged"), (no_text, "is damaged"), (a_list, "is damaged"), (nested, "is damaged"), (no_words, "is damaged")]


@pytest.mark.parametrize("spoil, why", DOUBTS)
def test_a_file_that_others_may_have_written_is_not_believed(spoil, why):
    trust({"mark": "mine"}); assert trusted("mark")
    spoil(answers())
    with pytest.warns(UserWarning, match=f"trusted.json  {why}.*nothing is trusted until then") as said: assert not trusted("mark")
    assert len(said) == 1
    with pytest.warns(UserWarning, match=why) as said: trust({"new": "mine"})  # and nothing of it is carried over
    assert len(said) == 1
    answers().parent.chmod(0o700)
    assert trusted("new") and not trusted("mark") and not answers().is_symlink() and stat.S_IMODE(answers().stat().st_mode) == 0o600


def test_the_file_of_another_user_is_not_believed(monkeypatch):
    trust({"mark": "theirs"})
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.warns(UserWarning, match="belongs to another user"): assert not trusted("mark")


def test_a_configuration_that_cannot_be_written_asks_every_time(here):
    Path("config").write_text("no folder")
    with pytest.warns(UserWarning, match="the answer holds for this time only, it cannot be remembered"): check_trust(["os:system"], trust_code=True)
    with pytest.raises(NotTrusted): check_trust(["os:system"])


def test_a_relative_place_is_never_read(monkeypatch, here):
    trust({"mark": "mine"})
    for base, home, found in (("config", str(here/"home"), False), ("", "", False), ("config", ".", False), (str(here/"config"), ".", True)):
        monkeypatch.setenv("XDG_CONFIG_HOME", base); monkeypatch.setenv("HOME", home)
        assert trusted("mark") == found
    monkeypatch.setenv("XDG_CONFIG_HOME", ""); monkeypatch.setenv("HOME", str(here/"home"))
    trust({"mark": "mine"}); assert (here/"home/.config/trainbook/trusted.json").exists()


def test_answers_at_the_same_time_are_all_kept():
    def answer(who): [trust({f"{who}-{i}": "mine"}) for i in range(10)]
    fork = multiprocessing.get_context("fork")
    workers = [*(fork.Process(target=answer, args=(f"process{k}",)) for k in range(3)), *(threading.Thread(target=answer, args=(f"thread{k}",)) for k in range(3))]
    for worker in workers: worker.start()
    for worker in workers: worker.join()
    assert len(json.loads(answers().read_text())["trusted"]) == 60
    assert sorted(os.listdir(answers().parent)) == [".lock", "trusted.json"]
