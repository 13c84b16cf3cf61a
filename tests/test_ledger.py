"""The ledger under real kills: a toy trainer dies before each of its writes, and in the middle of them, and goes on."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trainbook import Config, ConfigError, Run, runs
from trainbook.ledger import Ledger, Story, row_of, last_row, read_rows, tell
from trainbook.lock import Lock, LostOwnership, RunBusy, holder, write_whole
from trainbook.run import cut_short

STEPS = {"a": 6, "b": 4}
person_acts = [False]
SENT = {("a", 3): ("set", {"training.lr": 0.5}), ("a", 5): ("pause", None), ("b", 1): ("set", {"training.lr": 0.25}), ("b", 2): ("save", None)}


def train() -> None:
    "value += lr in two stages, a checkpoint every two steps; commands come while it runs, each once in its life."
    run = runs()[0] if runs() else Run.create(Config.from_dict({"run": {"name": "toy"}}), command=["toy"])
    with run.write() as ledger:
        state = {"value": 0.0, "lr": 1.0}
        for stage, total in STEPS.items():
            saved = run.folder/f"{stage}.json"
            known = json.loads(saved.read_text()) if saved.exists() else None
            if known and known["step"] == total: state = known; continue
            begun = any(row["event"] == "start" and row["stage"] == stage for row in read_rows(run.folder)[0])
            if known: state, again = known, ledger.resume(stage, known["step"], known["position"])
            elif begun: again = ledger.resume(stage, 0, 0)
            else: again = ledger.start(stage) or []
            if train_stage(ledger, run, stage, total, {**state, "step": known["step"] if known else 0}, again, saved): return
            state = json.loads(saved.read_text())
        ledger.end("finished")


def train_stage(ledger, run, stage, total, state, again, saved) -> bool:
    "True if it was paused."
    came_from = state["step"]
    while True:
        for control in [control for control in again if control["step"] == state["step"]]: ledger.again(control); state["lr"] = control["values"]["training.lr"]
        paused = False
        for control in ledger.commands():
            if control["command"] == "set": state["lr"] = control["values"]["training.lr"]
            paused |= control["command"] == "pause"
        if state["step"] % 2 == 0 and state["step"] > came_from:  # a checkpoint that is there is not written again
            ledger.sync()
            state["position"] = ledger.position
            write_whole(saved, json.dumps(state))
            ledger.log("checkpoint")
        if paused: ledger.end("paused"); return True
        if state["step"] == total: return False
        state["step"] += 1; state["value"] += state["lr"]
        ledger.log("step", state["step"], value=state["value"])
        send = Path(f"sent-{stage}-{state['step']}")
        if (stage, state["step"]) in SENT and not send.exists():  # a person in another process, who types it once
            person_acts[0] = True
            tell(run.folder, *SENT[stage, state["step"]])
            send.touch()
            person_acts[0] = False


def life(die_at: int = 0, torn: bool = False) -> tuple[int, int]:
    "One process of the trainer that kills itself before its n-th write (or halfway in it): its exit code, and how many writes it made."
    Path("count").unlink(missing_ok=True)
    if child := os.fork(): return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(Path("count").read_text() or 0) if Path("count").exists() else 0
    try:
        made = [0]
        def mortal(real, writes=False):
            def call(*words, **more):
                made[0] += not person_acts[0]
                if made[0] == die_at and not person_acts[0]:
                    if torn and writes and len(words[1]) > 1: real(words[0], bytes(words[1])[:len(words[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*words, **more)
            return call
        os.write, write = mortal(os.write, True), os.write
        for name in ("fsync", "rename", "unlink", "mkdir"): setattr(os, name, mortal(getattr(os, name)))
        train()
        fd = os.open("count", os.O_CREAT | os.O_WRONLY); write(fd, str(made[0]).encode())
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)


def check(story: Story) -> None:
    "The story has every step once, every command that took effect once, and values that follow from exactly these."
    lr, value, seen = 1.0, 0.0, []
    for row in story.rows:
        if row["event"] == "control" and row["command"] == "set": lr = row["values"]["training.lr"]
        if row["event"] == "step":
            value += lr
            seen.append((row["stage"], row["step"]))
            assert row["value"] == value, (row, value)
    assert seen == [(stage, step) for stage, total in STEPS.items() for step in range(1, total + 1)]
    ids = [row["id"] for row in story.of("control")]
    assert len(ids) == len(set(ids))
    assert sorted(str(row["values"]) for row in story.of("control") if row["command"] == "set") == sorted(str(values) for command, values in SENT.values() if command == "set")
    saved = [(row["stage"], row["step"]) for row in story.of("checkpoint")]  # this row may be missing, the checkpoint counts; it never stands twice
    assert len(saved) == len(set(saved)) and set(saved) <= {("a", 2), ("a", 4), ("a", 6), ("b", 2), ("b", 4)}


def live_on() -> int:
    "Further lives until the run is finished; how many it took."
    for n in range(9):
        if runs() and runs()[0].status == "finished": return n
        for run in runs(): assert run.status in ("new", "interrupted", "paused"), run.status  # nobody is alive
        assert life()[0] == 0
    raise AssertionError("it does not end")


@pytest.fixture
def unhurt(here):
    "The reference: a run that nobody kills, paused once; and the number of writes before and after the pause."
    first, before = life()
    assert first == 0 and runs()[0].status == "paused"
    second, after = life()
    assert second == 0 and runs()[0].status == "finished"
    check(runs()[0].story())
    return before, after


def test_a_run_that_nobody_kills(unhurt): assert min(unhurt) > 20


@pytest.mark.parametrize("torn", [False, True], ids=["before", "halfway"])
def test_a_kill_at_every_write(unhurt, tmp_path_factory, monkeypatch, torn, request):
    """Every other one before it, and those between halfway; in a soak each in both ways."""
    before, after = unhurt
    first, by = (1, 1) if request.config.getoption("--soak") else (1 + torn, 2)
    for n in range(first, before + after + 1, by):
        monkeypatch.chdir(tmp_path_factory.mktemp("life"))
        if n > before: life()
        code, _ = life(n if n <= before else n - before, torn)
        assert code == -signal.SIGKILL, n
        if not runs(): assert len(cut_short()) <= 1  # it died while the run was made
        else: assert runs()[0].status in ("new", "interrupted", "paused", "finished")  # finished: it died after the last row
        live_on()
        check(runs()[-1].story())


@pytest.mark.soak
def test_kills_in_each_of_many_lives(unhurt, tmp_path_factory, monkeypatch):
    import random
    rng = random.Random(0)
    for _ in range(300):
        monkeypatch.chdir(tmp_path_factory.mktemp("life"))
        for _ in range(rng.randrange(2, 6)): life(rng.randrange(1, max(unhurt) + 1), rng.random() < 0.5)
        live_on()
        check(runs()[-1].story())


def test_the_check_notices_a_row_too_many(unhurt):
    run = runs()[0]
    lines = (run.folder/"events.jsonl").read_bytes().splitlines(True)
    step = next(i for i, line in enumerate(lines) if b'"event": "step"' in line)
    for wrong in (lines[:step] + lines[step + 1:], lines[:step + 1] + lines[step:], [line for line in lines if b'"control"' not in line]):
        (run.folder/"events.jsonl").write_bytes(b"".join(wrong))
        with pytest.raises(AssertionError): check(run.story())


# --- the log --------------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def run(here): return Run.create(Config.from_dict({"run": {"name": "x"}}), command=["x"])


def test_numbers_of_all_kinds_come_back(run):
    import numpy
    with run.write() as ledger:
        ledger.start("m")
        ledger.log("eval", 1, nan=float("nan"), inf=float("inf"), minus=-float("inf"), numpy=numpy.float32(0.5), whole=numpy.int64(3), nested={"a": [float("nan"), 1]}, text="NaN-like", path=Path("a"))
    row = run.story().rows[-1]
    assert row["nan"] != row["nan"] and row["inf"] == float("inf") == -row["minus"] and (row["numpy"], row["whole"], row["text"], row["path"]) == (0.5, 3, "NaN-like", "a")
    assert row["nested"]["a"][0] != row["nested"]["a"][0]
    for line in (run.folder/"events.jsonl").read_text().splitlines(): json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_rows_survive_a_full_disk(run):
    """The real thing: a limit on the size of files, in a process of its own."""
    code = f"""
import resource, signal
from trainbook import Run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
ledger = Run({str(run.folder)!r}).write()
ledger.start("m"); size = ledger.position
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 250, resource.RLIM_INFINITY))
for step in range(1, 11): ledger.log("step", step, loss=1 / step)
try: ledger.flush()
except OSError as error: print("full:", error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
ledger.end("finished"); ledger.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("full:")
    assert [row["step"] for row in run.story().of("step")] == list(range(1, 11)) and run.status == "finished"


def test_a_reader_of_a_growing_log_sees_whole_rows_only(run):
    with run.write() as ledger:
        ledger.start("m")
        def write():
            for step in range(1, 3001):
                ledger.log("step", step, loss=0.5)
                if step % 7 == 0: ledger.flush()
            ledger.flush()
        thread = threading.Thread(target=write); thread.start()
        story = run.story()
        while thread.is_alive(): story.poll()
        thread.join(); story.poll()
    assert [row["step"] for row in story.of("step")] == list(range(1, 3001))


def test_damage_in_the_middle_costs_one_row(run):
    with run.write() as ledger:
        ledger.start("m")
        for step in (1, 2, 3): ledger.log("step", step)
    path = run.folder/"events.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"step": 2', b'\xff\xfe": 2') + b"[1]\nnull\n{}\n")
    assert [row["step"] for row in run.story().of("step")] == [1, 3]


def test_a_resume_of_a_stage_supersedes_rows_of_that_stage_alone(run):
    """A later stage began with what was there, and its first row says with what; its story stays."""
    with run.write() as ledger:
        ledger.start("one"); ledger.log("step", 1); position = ledger.position; ledger.log("step", 2)
        ledger.start("two"); ledger.log("step", 1)
        ledger.resume("one", 1, position); ledger.log("step", 2)
    assert [(row["stage"], row["step"]) for row in run.story().of("step")] == [("one", 1), ("two", 1), ("one", 2)]


def test_the_story_starts_anew_when_the_log_was_replaced(run):
    with run.write() as ledger: ledger.start("m"); ledger.log("step", 1); ledger.log("step", 2)
    story = run.story()
    (run.folder/"events.jsonl").write_text('{"event": "step", "step": 9}\n')
    story.poll(); assert [row["step"] for row in story.rows] == [9]
    (run.folder/"events.jsonl").unlink()
    story.poll(); assert story.rows == []


def test_the_status_of_a_large_log_reads_its_end_only(run, monkeypatch):
    with open(run.folder/"events.jsonl", "wb") as log: log.write(b'{"event": "warning", "text": "%s"}\n' % (b"x" * 30_000)); log.write(b'{"event": "step", "stage": "m", "step": 7}\n' * 100_000)
    monkeypatch.setattr("trainbook.ledger.row_of", lambda line, real=row_of, seen=[]: seen.append(line) or (real(line) if len(seen) < 10 else pytest.fail("it reads on")))
    assert last_row(run.folder)["step"] == 7 and run.status == "interrupted"


def test_a_control_is_remembered_over_a_life_that_never_came_to_it(run):
    """Life 1: a number is set at step 8. Life 2 saves at 5 and dies at 6. Life 3 goes on from 5 and must still change it at 8."""
    with run.write() as ledger:
        ledger.start("a"); ledger.log("step", 2); ledger.sync(); at_2 = ledger.position
        ledger.log("step", 8); tell(run.folder, "set", {"lr": 0.5}); first = ledger.commands()
    with run.write() as ledger:
        assert [control["id"] for control in ledger.resume("a", 2, at_2)] == [first[0]["id"]]
        ledger.log("step", 5); ledger.sync(); at_5 = ledger.position; ledger.log("step", 6)
    with run.write() as ledger:
        assert [(control["id"], control["step"]) for control in ledger.resume("a", 5, at_5)] == [(first[0]["id"], 8)]
        ledger.log("step", 8); ledger.again(first[0]); ledger.sync(); at_8 = ledger.position
    with run.write() as ledger: assert ledger.resume("a", 8, at_8) == []


def test_results_at_the_step_of_a_resume_stand_once(run):
    with run.write() as ledger:
        ledger.start("a"); ledger.log("step", 1); ledger.sync(); position = ledger.position
        ledger.log("checkpoint"); ledger.log("eval", val_loss=1.0); ledger.log("epoch"); ledger.log("step", 2)
    with run.write() as ledger:
        ledger.resume("a", 1, position); ledger.log("eval", val_loss=1.0); ledger.log("epoch"); ledger.log("step", 2)
    assert [row["event"] for row in run.story().rows] == ["start", "step", "checkpoint", "resume", "eval", "epoch", "step"]


def test_rows_that_are_no_rows_do_no_harm(run):
    with run.write() as ledger: ledger.start("m"); ledger.log("step", 1)
    with open(run.folder/"events.jsonl", "a") as log:
        for text in ('{"event": "control"}', '{"event": "end"}', '{"event": "step", "step": "x"}', '{"event": "step", "stage": 3}', '{"event": "resume"}', "[" * 50_000, '"x"', '{"event": []}'): log.write(text + "\n")
    assert run.status == "interrupted" and [row["step"] for row in run.story().of("step")] == [1]
    with run.write() as ledger: ledger.resume("m", 1, ledger.position)


def test_a_row_of_any_length_is_the_last_row(run):
    with run.write() as ledger: ledger.start("m"); ledger.log("step", 7, loss=0.5); ledger.end("failed", error="x" * 200_000)
    assert run.status == "failed" and run.progress()["step"] == 7


def test_text_that_looks_like_a_number_stays_text(run):
    import numpy
    with run.write() as ledger: ledger.start("m"); ledger.log("message", text="NaN", other="Infinity", array=numpy.array([1.0, float("nan")]))
    row = run.story().rows[-1]
    assert row["text"] == "NaN" and row["other"] == "Infinity" and row["array"][0] == 1.0 and row["array"][1] != row["array"][1]


# --- the inbox ------------------------------------------------------------------------------------------------------------------------

def test_nonsense_in_the_inbox_is_removed_and_told(run, tmp_path):
    inbox = run.folder/"inbox"
    for name, text in {"1.json": "{", "2.json": "[]", "3.json": '{"command": "rm -rf", "id": "x"}', "4.json": '{"command": "set", "id": "x", "values": {"model.width": 3}}',
                       "5.json": '{"command": "set", "id": "x", "values": 3}', "6.json": '{"command": ["stop"], "id": "x"}', "7.json": '{"command": "stop", "id": 3}'}.items(): (inbox/name).write_text(text)
    (inbox/"72.json").write_text("[" * 60_000); (inbox/"73.json").write_text('{"command": "set", "id": "x", "values": {"training.lr": ' + "9" * 400 + "}}")
    (inbox/"74.json").write_text('{"command": "set", "id": "x", "values": {"optimizer": "sgd"}}')
    (inbox/"8.json").write_bytes(b"\xff" * 200_000)
    (inbox/"9.json").symlink_to("/etc/passwd")
    os.mkfifo(inbox/"91.json")
    with run.write() as ledger:
        ledger.stage = "m"
        tell(run.folder, "stop")
        assert [command["command"] for command in ledger.commands()] == ["stop"]
    assert os.listdir(inbox) == [] and len(list(run.story().of("warning"))) == 13


def test_a_stale_stop_is_not_obeyed_but_a_stale_number_is(run):
    for command, values in (("stop", None), ("pause", None), ("set", {"lr": 0.5})): tell(run.folder, command, values)
    with run.write() as ledger:
        ledger.start("m")
        assert [command["command"] for command in ledger.commands()] == ["set"]
    assert [row["text"] for row in run.story().of("message")] == ["discarded a stale stop", "discarded a stale pause"]


def test_a_stop_between_two_stages_is_obeyed(run):
    with run.write() as ledger:
        ledger.start("one"); tell(run.folder, "stop"); ledger.start("two")
        assert [command["command"] for command in ledger.commands()] == ["stop"]


@pytest.mark.parametrize("values", [{"optimizer": "sgd"}, {"training.compile": True}, {"seed": 3}, {"loss": "mse"}, {"freeze": "a", "freeze.b": 2}, {"model.width": 1}, {"lr": "fast"}, {"": 1}, {"lr": None}])
def test_what_cannot_be_changed_is_told_to_who_asks(run, values):
    with pytest.raises(ConfigError, match="^set  "): tell(run.folder, "set", values)
    assert os.listdir(run.folder/"inbox") == []


def test_no_command_is_overlooked(run):
    """A thread sends while the trainer looks, as fast as both can."""
    with run.write() as ledger:
        ledger.start("m")
        sent, taken = [], []
        def send():
            for _ in range(200): sent.append(tell(run.folder, "save"))
        thread = threading.Thread(target=send); thread.start()
        while thread.is_alive(): taken += ledger.commands()
        thread.join(); taken += ledger.commands()
    assert sorted(sent) == sorted(command["id"] for command in taken)


# --- the lock -------------------------------------------------------------------------------------------------------------------------

def test_a_second_writer_is_refused_in_the_same_process_and_in_another(run):
    with run.write():
        with pytest.raises(RunBusy, match="in use in this process"): run.write()
        done = subprocess.run([sys.executable, "-c", f"from trainbook import Run; Run({str(run.folder)!r}).write()"], capture_output=True, text=True)
        assert f"is in use by process {os.getpid()}" in done.stderr
        with pytest.raises(RunBusy): run.write()  # the refused ones left the lock alone
    run.write().close()


def test_looking_at_a_run_from_its_own_process_keeps_the_lock(run):
    with run.write() as ledger:
        ledger.start("m")
        for _ in range(3): assert run.status == "running" and holder(run.folder)
        code = f"from trainbook import Run; print(Run({str(run.folder)!r}).status)"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "running\n"


def test_a_forked_child_does_not_keep_the_lock_of_a_killed_trainer(run):
    """DataLoader workers may outlive the trainer for a while."""
    read, write = os.pipe()
    if (trainer := os.fork()) == 0:
        run.write()
        if (worker := os.fork()) == 0: time.sleep(30); os._exit(0)
        os.write(write, str(worker).encode()); time.sleep(30)
    worker = int(os.read(read, 20))
    assert holder(run.folder)["pid"] == trainer
    os.kill(trainer, signal.SIGKILL); os.waitpid(trainer, 0)
    assert holder(run.folder) is None
    run.write().close()
    os.kill(worker, signal.SIGKILL); os.close(read); os.close(write)


def test_who_lost_the_run_notices(run):
    with run.write() as ledger:
        ledger.lock.check()
        write_whole(run.folder/"owner.json", json.dumps({"format": 1, "token": "another", "pid": 1, "host": "elsewhere"}))
        with pytest.raises(LostOwnership, match="taken over by process 1 on elsewhere"): ledger.lock.check()
    with Ledger(run.folder) as ledger:
        (run.folder/".lock").unlink()
        with pytest.raises(LostOwnership): ledger.lock.check()


def test_of_many_threads_that_ask_at_once_one_gets_the_lock(run):
    def ask(barrier, won, lost):
        barrier.wait()
        try: won.append(Lock(run.folder))
        except RunBusy: lost.append(1)
    for _ in range(60):
        won, lost, barrier = [], [], threading.Barrier(4)
        threads = [threading.Thread(target=ask, args=(barrier, won, lost)) for _ in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert len(won) == 1 and len(lost) == 3 and holder(run.folder)
        won[0].release()


def test_ten_start_at_once_and_one_writes(run):
    """Barrier by a file; each tries once, and the one that won holds the run until all others have given up."""
    code = f"""
import time
from pathlib import Path
from trainbook import Run
run = Run({str(run.folder)!r})
while not Path('go').exists(): time.sleep(0.001)
run.write(); print('mine', flush=True)
while not Path('enough').exists(): time.sleep(0.01)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(10)]
    time.sleep(1); Path("go").touch()
    while sum(process.poll() is None for process in processes) > 1: time.sleep(0.05)
    Path("enough").touch()
    outcomes = [process.communicate() for process in processes]
    assert [out for out, _ in outcomes].count("mine\n") == 1 and sum("RunBusy" in err for _, err in outcomes) == 9
