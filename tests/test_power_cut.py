"""Any power cut in the life of a CheckpointManager: old or new, never mixed, and what wait() returned for is there.

The system calls of four saves, two of which prune, are recorded. After each call, every mixture of what was not yet forced to the disk
is made (see disk.py), read by the real reader, and trained on from. Eleven protocols with one mistake each show that the look can fail."""
import io
import json
import os
import random
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from disk import EXPORT, Disk, same, seen, show, slim, state

from trainbook import Config, Run, stepfolder
from trainbook.checkpoint import CheckpointManager
from trainbook.ledger import Ledger, read_rows
from trainbook.load import load_checkpoint
from trainbook.lock import sync_folder
from trainbook.stepfolder import discard, read_latest, step_path, steps
from trainbook.tensorfile import CheckpointError, read_tensors, write_tensors

LOSS = {1: 3.0, 2: 1.0, 3: 2.0, 4: 0.5}
BEST = {1: 1, 2: 2, 3: 2, 4: 4}  # so the fourth save moves `best` away from the step that it prunes
FINAL = 4


# --- a life, and what must be true after any power cut in it --------------------------------------------------------------------------

class Life:
    "Four saves on a recorded disk: which was begun and over at each call, and what the exported files held."

    def __init__(self, root: Path, stage: str, with_ledger: bool = False, forgets=lambda path: False):
        self.stage, self.with_ledger, self.begun, self.over, self.exported = stage, with_ledger, {}, {}, {}
        with pytest.MonkeyPatch.context() as patch:
            slim(patch)
            self.disk = Disk(root, patch, forgets)
            ledger = Run(root).write() if with_ledger else None
            if ledger: ledger.start(stage)
            with CheckpointManager(root/stage, **self.settings, ledger=ledger) as manager:
                for step in LOSS: self._step(manager, ledger, step)
            if ledger: ledger.close()
        self.real = seen(root)

    @property
    def settings(self) -> dict: return {"save_interval": "1 step", "keep_last_n": 1} | ({} if self.with_ledger else {"export": EXPORT})

    def _step(self, manager: CheckpointManager, ledger: Ledger | None, step: int) -> None:
        if ledger: ledger.log("step", step, loss=LOSS[step])
        self.begun[step] = len(self.disk.ops)
        manager.save(state(step), step, metrics={"val_loss": LOSS[step]}, final=step == FINAL, wait=True)
        self.over[step] = len(self.disk.ops)
        self.exported[step] = {name: (manager.dir/name).read_bytes() for name in manager.export.values()}

    def range_at(self, made: int) -> tuple[int, int]:
        "The last step that was over after this many calls, and the last that was begun; 0 for none."
        return max((step for step, at in self.over.items() if at <= made), default=0), max((step for step, at in self.begun.items() if at <= made), default=0)


def wrong(life: Life, root: Path, over: int, begun: int) -> str:
    "What a reader finds wrong after a power cut, in a word; empty if every promise holds."
    folder = root/life.stage
    try: found = read_latest(folder)
    except CheckpointError as error: return "" if not over and "there is no checkpoint" in str(error) else "error"
    except UserWarning: return "damaged"  # it went back past a checkpoint that is torn; ours never are
    if not over <= (step := found.facts["step"]) <= begun: return "old"
    if not same(found.state, step): return "mixed"
    allowed = range(max(over, 1), begun + 1)
    for word, of in (("best", BEST), ("final", {FINAL: FINAL})):
        if not os.path.lexists(folder/word) and any(step not in of for step in range(over, begun + 1)): continue
        try: pointed = load_checkpoint(word, within=folder, quiet=True)
        except CheckpointError: return word
        if pointed.facts["step"] not in {of.get(step) for step in allowed} or not same(pointed.state, pointed.facts["step"]): return word
    for name in EXPORT.values() if not life.with_ledger else ():
        if not (folder/name).exists() and not over: continue
        if not (folder/name).exists() or (folder/name).read_bytes() not in [life.exported[step][name] for step in allowed]: return name
    return wrong_log(life, root, found) if life.with_ledger else ""


def wrong_log(life: Life, root: Path, found) -> str:
    "The log has every row that the checkpoint knew, to the byte."
    rows = [(row["step"], row["loss"]) for row in read_rows(root)[0] if row["event"] == "step" and row["step"] <= found.facts["step"]]
    known = found.facts["position"]
    whole = (root/"events.jsonl").read_bytes()[:known] == life.real["events.jsonl"][:known]
    return "" if whole and rows == [(step, LOSS[step]) for step in LOSS if step <= found.facts["step"]] else "log"


def wrong_later(life: Life, root: Path) -> str:
    "Training goes on from what the disk shows: the folder is swept, a save works, and it loads."
    at, ledger = max(steps(root/life.stage), default=0), Run(root).write() if life.with_ledger else None
    try:
        if ledger: ledger.resume(life.stage, at, load_checkpoint("latest", within=root/life.stage, quiet=True).facts["position"] if at else 0)
        with CheckpointManager(root/life.stage, **life.settings, ledger=ledger) as manager:
            manager.save(state(9), 9, metrics={"val_loss": 0.1}, wait=True)
            left = [name for name in os.listdir(manager.dir) if name.startswith((".tmp-step", ".trash-step"))]
            return "" if not left and same(manager.load().state, 9) and same(manager.load("best").state, 9) else "afterwards"
    except CheckpointError: return "afterwards"
    finally:
        if ledger: ledger.close()


def look(life: Life, room: Path, subsets: int, later: bool = True, until: tuple[str, int] = ("", 1)) -> tuple[Counter, int, int]:
    "What was wrong how often, over how many states of the disk, and how many of these differ; ends when it saw one word so often."
    found, states, known = Counter(), 0, {}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(os, "fsync", lambda fd: None)  # there is no second power cut
        slim(patch)
        for made, tree in life.disk.cuts(random.Random(0), subsets):
            states, (over, begun) = states + 1, life.range_at(made)
            key = over, begun, frozenset(tree.items())
            if key not in known:
                show(tree, room)
                known[key] = wrong(life, room, over, begun) or (wrong_later(life, room) if later else "")
            if known[key]: found[known[key]] += 1
            if found[until[0]] >= until[1]: break
    return found, states, len(known)


# --- the tests ------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(params=[False, True], ids=["alone", "with a ledger"])
def with_ledger(request): return request.param


def new_run(tmp_path: Path) -> Run: return Run.create(Config.from_dict({"run": {"name": "x", "root": str(tmp_path/"runs")}}), command=["x"])


def root_in(tmp_path: Path, with_ledger: bool) -> Path:
    "A folder that was on the disk long before: empty, or a new run's."
    if with_ledger: return new_run(tmp_path).folder
    (tmp_path/"run").mkdir()
    return tmp_path/"run"


def test_the_recording_misses_nothing(tmp_path, with_ledger):
    """All calls played again make the folder that is there, to the byte; every kind of call occurs, and both prunings."""
    life = Life(root_in(tmp_path, with_ledger), "main", with_ledger)
    whole = {i: "whole" for i, op in enumerate(life.disk.ops) if op.kind != "force"}
    assert life.disk.tree(whole) == life.real and {op.kind for op in life.disk.ops} == {"enter", "leave", "move", "room", "data", "force"}
    assert [name for name in sorted(life.real) if "/step-" in name and name.count("/") == 1] == ["main/step-00000003", "main/step-00000004"]


def test_what_is_exported_is_what_it_says(tmp_path):
    life = Life(root_in(tmp_path, False), "main")
    for step, files in life.exported.items():
        best = torch.load(io.BytesIO(files["best_model.pth"]), weights_only=True)
        assert best["step"] == BEST[step] and torch.equal(best["model_state_dict"]["w"], state(BEST[step])["model"]["w"])
        assert torch.equal(safetensors.torch.load(files["weights.safetensors"])["w"], state(step)["model"]["w"])


def test_no_power_cut_loses_or_mixes_anything(tmp_path, with_ledger, request):
    """latest, best, final, the exported files, the log: old or new; what wait() returned for is there; training goes on from every state."""
    found, states, differ = look(Life(root_in(tmp_path, with_ledger), "main", with_ledger), tmp_path/"disk", 200 if request.config.getoption("--soak") else 1)
    print(f"{states} states, {differ} differ, wrong: {dict(found)}")
    assert not found and states > 1000 and differ > 250


is_tmp = lambda path: os.path.basename(path).startswith(".tmp-")


def in_place(folder, step, text, files, guard=None, hurry=None):
    "write_step without a rename."
    os.mkdir(final := step_path(folder, step))
    about = {name: write_tensors(final/name, tensors) for name, tensors in files.items()}
    stepfolder._write_manifest(final/"manifest.json", f'{text},\n "files": {json.dumps(about)}'.encode())
    sync_folder(final)
    guard()
    sync_folder(folder)
    return final


def delete_first(folder, *words, **more):
    for step in steps(folder): discard(step_path(folder, step))
    return stepfolder.write_step(folder, *words, **more)


def remove_and_write(path, text):
    "write_whole without a rename."
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.write(fd, text.encode()); os.fsync(fd); os.close(fd)
    sync_folder(path.parent)


class Mutant(NamedTuple):
    "What it gets wrong (the word of `wrong`), the fsyncs it leaves out, and what it replaces in the writer and in the reader."
    word: str
    forgets: Any = lambda path: False
    writer: dict = {}
    reader: dict = {}
    with_ledger: bool = False


BLIND = {"trainbook.stepfolder.read_tensors": lambda path, expect: read_tensors(path)}
MUTANTS = {
    "no fsync of files": Mutant("error", lambda path: not os.path.isdir(path)),
    "no fsync of files, no hashes": Mutant("mixed", lambda path: not os.path.isdir(path), reader=BLIND),
    "no fsync of the temporary folder": Mutant("damaged", lambda path: os.path.isdir(path) and is_tmp(path)),
    "no fsync of the parent folder": Mutant("old", lambda path: os.path.isdir(path) and not is_tmp(path)),
    "no fsync at all": Mutant("error", lambda path: True),
    "written in place": Mutant("damaged", writer={"trainbook.checkpoint.write_step": in_place}),
    "the old one deleted first": Mutant("error", writer={"trainbook.checkpoint.write_step": delete_first}),
    "best written in place": Mutant("best", writer={"trainbook.checkpoint.write_whole": remove_and_write}),
    "pruned before best is on the disk": Mutant("best", writer={"trainbook.lock.sync_folder": lambda folder: None}, with_ledger=True),
    "exports claimed too late": Mutant("afterwards", writer={"trainbook.checkpoint.CheckpointManager._claim_exports": lambda self: setattr(self, "_exported", {})}),
    "the log is not forced": Mutant("log", writer={"trainbook.ledger.Ledger.force": lambda self: None}, with_ledger=True),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught(name, tmp_path, request):
    """The same look at a protocol with one mistake sees it, and calls it by its name."""
    mutant, most = MUTANTS[name], 100 if request.config.getoption("--soak") else 5
    with pytest.MonkeyPatch.context() as patch:
        for target, replacement in mutant.writer.items(): patch.setattr(target, replacement)
        life = Life(root_in(tmp_path, mutant.with_ledger), "main", mutant.with_ledger, mutant.forgets)
    with pytest.MonkeyPatch.context() as patch:
        for target, replacement in mutant.reader.items(): patch.setattr(target, replacement)
        found, states, _ = look(life, tmp_path/"disk", 1, later=mutant.word == "afterwards", until=(mutant.word, most))
    print(f"{name}: {dict(found)} in {states} states")
    assert found[mutant.word] > 0
