"""Corners of durability: new folders, a new log, deletions, a commit whose last fsync failed, a folder that was lost."""
import errno
import json
import os
import random

import pytest
from disk import Disk, show, state
from test_power_cut import LOSS, Life, look, new_run, root_in

from trainbook.checkpoint import CheckpointManager
from trainbook.ledger import read_rows
from trainbook.lock import LostOwnership, write_whole
from trainbook.stepfolder import read_latest


def test_new_folders_further_up_are_on_the_disk_too(tmp_path):
    found, _, _ = look(Life(root_in(tmp_path, False), "new/main"), tmp_path/"disk", 0, later=False, until=("error", 1))
    assert not found


def test_synced_rows_are_there_even_in_a_new_log(tmp_path):
    run = new_run(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(run.folder, patch)
        ledger = run.write()
        ledger.start("main"); ledger.log("step", 1); ledger.sync()
        ledger.close()
    for _, tree in disk.cuts(random.Random(0), 1, since=len(disk.ops)):
        show(tree, tmp_path/"disk")
        assert [row["step"] for row in read_rows(tmp_path/"disk")[0]] == [0, 1]


def test_a_pruned_step_is_whole_or_gone(tmp_path):
    for _, tree in Life(root_in(tmp_path, False), "main").disk.cuts(random.Random(0), 1):
        for step in LOSS: assert sum(name.startswith(f"main/step-0000000{step}/") for name in tree) in (0, 3)


@pytest.mark.filterwarnings("ignore:checkpoint of step")
def test_a_commit_that_failed_pushes_nothing_out(tmp_path, monkeypatch):
    root = root_in(tmp_path, False)
    with pytest.MonkeyPatch.context() as patch:
        disk, failing = Disk(root, patch), []
        fsync = os.fsync
        def fail(fd):
            if failing and disk.fds.get(fd) == str(root/"main"): raise OSError(errno.EIO, "Input/output error")
            fsync(fd)
        patch.setattr(os, "fsync", fail)
        with CheckpointManager(root/"main", save_interval="1 step", keep_last_n=1) as manager:
            for step in (1, 2, 3, 4): failing += [step] * (step > 2); manager.save(state(step), step, wait=True)
    for _, tree in disk.cuts(random.Random(0), 9, since=len(disk.ops)):
        show(tree, tmp_path/"disk")
        assert read_latest(tmp_path/"disk"/"main").facts["step"] >= 2  # its save was over, without a warning


def test_who_lost_the_folder_does_not_settle_in_it(tmp_path):
    with CheckpointManager(tmp_path/"main", save_interval="1 step") as manager:
        manager.save(state(1), 1, wait=True)
        write_whole(tmp_path/"main"/"owner.json", json.dumps({"format": 1, "token": "another", "pid": 1, "host": "elsewhere"}))
        with pytest.raises(LostOwnership): manager.save(state(1), 1, final=True, wait=True)
        with pytest.raises(LostOwnership): manager.save(state(2), 2, wait=True)
    assert not (tmp_path/"main"/"final").exists()
