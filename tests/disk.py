"""What the tests of crashes share: states that cannot be mixed unseen, and a disk that remembers.

The disk records the system calls of a program in a folder, and shows what a power cut after each of them may leave.
A file may lack a write, hold zeros in its place, or half of it, until it is fsynced. A folder may lack a name, or show a removed one,
until the folder is fsynced. Nothing else is promised by POSIX, so nothing else is taken for granted here, not even an order."""
import fcntl
import io
import os
import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from trainbook import checkpoint, foreign


EXPORT = {"best": "best_model.pth", "latest": "weights.safetensors"}


def state(step: int, size: int = 16) -> dict:
    "A state that follows from its step, so that parts of two steps, or zeros, never look like one."
    return {"model": {"w": torch.full((size,), step + 0.25)}, "optimizer": {"m": torch.arange(1, size + 1) * step, "step": step}}


def same(found: dict, step: int) -> bool:
    "Is this the state of that step, to the bit?"
    want = state(step, found["model"]["w"].numel())
    return (torch.equal(found["model"]["w"], want["model"]["w"]) and torch.equal(found["optimizer"]["m"], want["optimizer"]["m"])
            and found["optimizer"]["step"] == step)


def slim(patch: pytest.MonkeyPatch) -> None:
    "Facts about the program take longer than a small save."
    for name in ("git_state", "versions"): patch.setattr(checkpoint, name, dict)


class Op(NamedTuple):
    "One call: enter, leave, move (names in a folder), room, data (bytes of a file), force. `where` is what must be fsynced to keep it."
    kind: str
    where: int  # the number of a file or folder
    what: Any = None
    at: int = 0


class Disk:
    "Records what is done below a folder; `forgets(path)` are the fsyncs that a mutant leaves out."

    def __init__(self, root: Path, patch: pytest.MonkeyPatch, forgets=lambda path: False):
        self.root, self.forgets, self.ops, self.fds = str(root), forgets, [], {}
        self.numbers, self.folders = {self.root: 0}, {0}
        for path in sorted(root.rglob("*")):
            self.enter(str(path), path.is_dir())
            if path.is_file(): self.ops.append(Op("data", self.numbers[str(path)], path.read_bytes()))
        self.first = len(self.ops)  # what was there before is on the disk
        patch.delattr(fcntl, "F_FULLFSYNC", raising=False)
        patch.setattr(foreign, "open", open_seen, raising=False)
        self.real = {name: getattr(os, name) for name in "open close mkdir write pwrite posix_fallocate fsync rename unlink rmdir".split()}
        for name in self.real: patch.setattr(os, name, getattr(self, name))

    def _path(self, path, dir_fd=None) -> str: return os.path.join(self.fds[dir_fd] if dir_fd in self.fds else os.getcwd(), os.fspath(path))
    def _home(self, path: str) -> tuple[int, str]: return self.numbers[os.path.dirname(path)], os.path.basename(path)

    def enter(self, path: str, folder: bool) -> None:
        self.numbers[path] = number = len(self.ops) + 1
        if folder: self.folders.add(number)
        home, name = self._home(path)
        self.ops.append(Op("enter", home, (name, number)))

    def open(self, path, flags, mode=0o777, *, dir_fd=None):
        full = self._path(path, dir_fd)
        new = flags & os.O_CREAT and not os.path.lexists(full)
        fd = self.real["open"](path, flags, mode, dir_fd=dir_fd)
        if new: self.enter(full, folder=False)
        if full in self.numbers: self.fds[fd] = full
        return fd

    def close(self, fd):
        self.fds.pop(fd, None)
        self.real["close"](fd)

    def mkdir(self, path, mode=0o777, *, dir_fd=None):
        self.real["mkdir"](path, mode, dir_fd=dir_fd)
        self.enter(self._path(path, dir_fd), folder=True)

    def _data(self, fd, data, at: int) -> None:
        if fd in self.fds: self.ops.append(Op("data", self.numbers[self.fds[fd]], bytes(data), at))

    def write(self, fd, data):
        done = self.real["write"](fd, data)
        if fd in self.fds: self._data(fd, data[:done], os.lseek(fd, 0, os.SEEK_CUR) - done)  # true with O_APPEND too
        return done

    def pwrite(self, fd, data, at):
        done = self.real["pwrite"](fd, data, at)
        self._data(fd, data[:done], at)
        return done

    def posix_fallocate(self, fd, at, size):
        self.real["posix_fallocate"](fd, at, size)
        self.ops.append(Op("room", self.numbers[self.fds[fd]], at + size))

    def fsync(self, fd):
        if fd in self.fds and not self.forgets(self.fds[fd]): self.ops.append(Op("force", self.numbers[self.fds[fd]]))

    def rename(self, old, new):
        self.real["rename"](old, new)
        (home, name), (there, other) = self._home(old := self._path(old)), self._home(new := self._path(new))
        assert home == there, "a move between folders is not modelled"
        number = self.numbers[old]
        for path in [path for path in self.numbers if path == old or path.startswith(old + os.sep)]: self.numbers[new + path[len(old):]] = self.numbers.pop(path)
        self.ops.append(Op("move", home, (name, other, number)))

    def unlink(self, path, *, dir_fd=None, _call="unlink"):
        self.real[_call](path, dir_fd=dir_fd)
        home, name = self._home(full := self._path(path, dir_fd))
        del self.numbers[full]
        self.ops.append(Op("leave", home, name))

    def rmdir(self, path, *, dir_fd=None): self.unlink(path, dir_fd=dir_fd, _call="rmdir")

    # --- after the power cut

    def tree(self, kept: dict[int, str]) -> dict[str, bytes | None]:
        "{path: bytes, None for a folder} if only these calls reached the disk, each whole, half, or as zeros."
        names, files = {number: {} for number in self.folders}, {}
        for i in sorted(kept):
            kind, where, what, at = self.ops[i]
            if kind == "enter": names[where][what[0]] = what[1]
            if kind == "leave": names[where].pop(what, None)
            if kind == "move":
                if names[where].get(what[0]) == what[2]: del names[where][what[0]]
                names[where][what[1]] = what[2]
            if kind == "room": files[where] = files.get(where, b"").ljust(what, b"\0")
            if kind == "data":
                data, old = {"whole": what, "half": what[:len(what) // 2], "zeros": bytes(len(what))}[kept[i]], files.get(where, b"")
                files[where] = old[:at].ljust(at, b"\0") + data + old[at + len(data):]
        return dict(self._walk(0, "", names, files))

    def _walk(self, folder: int, at: str, names: dict, files: dict):
        for name, number in names[folder].items():
            yield at + name, None if number in self.folders else files.get(number, b"")
            if number in self.folders: yield from self._walk(number, f"{at}{name}/", names, files)

    def cuts(self, rng: random.Random, subsets: int, since: int = 0):
        "(how many calls were made, what the disk shows) for each instant, and each mixture of what was not on the disk by then."
        forced, safe = {}, [0] * self.first
        for i in reversed(range(self.first, len(self.ops))):  # the call that puts this one on the disk, if any
            safe.insert(self.first, forced.get(self.ops[i].where, len(self.ops) + 1))
            if self.ops[i].kind == "force": forced[self.ops[i].where] = i
        for made in range(max(since, self.first), len(self.ops) + 1):
            calls = [i for i in range(made) if self.ops[i].kind != "force"]
            fast = {i: "whole" for i in calls if safe[i] < made}
            for some in self._mixtures([i for i in calls if i not in fast], rng, subsets): yield made, self.tree(fast | some)

    def _mixtures(self, loose: list[int], rng: random.Random, subsets: int):
        "Nothing, all, each alone, all but one, one of them torn, and some at random."
        everything = dict.fromkeys(loose, "whole")
        yield from ({}, everything)
        for i in loose:
            yield from ({i: "whole"}, {j: "whole" for j in loose if j != i})
            if self.ops[i].kind == "data": yield from (everything | {i: "half"}, everything | {i: "zeros"})
        for _ in range(subsets if len(loose) > 2 else 0): yield {i: rng.choice(("whole", "whole", "half", "zeros")) for i in loose if rng.random() < 0.5}


class _Written(io.FileIO):
    "A file whose writes go through os.write, where they are seen."
    def write(self, data): return os.write(self.fileno(), data)


def open_seen(path: Path, mode: str):
    "open() for export_checkpoint, whose torch.save writes from C++."
    return io.BufferedWriter(_Written(path, mode, opener=lambda name, flags: os.open(name, flags, 0o644)), 1 << 20)


def show(tree: dict[str, bytes | None], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in tree.items(): (folder/name).mkdir() if data is None else (folder/name).write_bytes(data)


def seen(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}
