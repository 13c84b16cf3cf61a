"""Lives of trainings for test_resume.py: each recipe is a training that is made the same way in every life, and a server forks cheap processes for them."""
import importlib
import io
import itertools
import json
import os
import pkgutil
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

import numpy
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from trainbook import checkpoint, run
from trainbook.cli import main
from trainbook.events import Callback, Paused
from trainbook.metrics import deciding_metric
from trainbook.run import Run, versions
from trainbook.state import split
from trainbook.trainer import Trainer

_G = torch.Generator().manual_seed(0)
X, Y = torch.randn(100, 6, generator=_G), torch.randint(0, 3, (100,), generator=_G)
DATA, VAL = TensorDataset(X, Y), TensorDataset(X[:20], Y[:20])  # in batches of eight 13 steps an epoch


# --- data -----------------------------------------------------------------------------------------------------------------------------

class Augmented(Dataset):
    "Each sample draws from torch, numpy and random."
    def __init__(self, n=100): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return X[i] + 0.1 * torch.randn(6) + 0.1 * float(numpy.random.randn()) + 0.1 * random.gauss(0, 1), Y[i]


def noisy_collate(samples):
    "Random numbers in collate: a shift for the batch, a shuffle of its samples, a cut."
    random.shuffle(samples)
    x, y = torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])
    return x * float(numpy.random.uniform(0.9, 1.1)) + 0.1 * torch.rand(1), y


class Stream(IterableDataset):
    "Samples from a generator of its own: where it is, and what it draws, are its state."
    def __init__(self, n=100): self.n, self.at, self.own = n, 0, random.Random(3)

    def __iter__(self):
        while self.at < self.n:
            self.at += 1
            yield X[self.at - 1] + self.own.gauss(0, 0.1) + 0.1 * torch.randn(6), Y[self.at - 1]
        self.at = 0

    def state_dict(self): return {"at": self.at, "own": repr(self.own.getstate())}

    def load_state_dict(self, state):
        self.at = state["at"]
        self.own.setstate(eval(state["own"]))


# --- models, trainers, listeners ------------------------------------------------------------------------------------------------------

def net(drop=0.0, norm=False) -> torch.nn.Module:
    torch.manual_seed(7)
    norms, drops = [torch.nn.BatchNorm1d(16)] * norm, [torch.nn.Dropout(drop)] * bool(drop)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), *norms, torch.nn.ReLU(), *drops, torch.nn.Linear(16, 3))


def blocks() -> torch.nn.Module:
    torch.manual_seed(7)
    block = lambda wide: torch.nn.Sequential(torch.nn.Linear(wide, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Dropout(0.2))
    return torch.nn.Sequential(block(6), block(16), torch.nn.Linear(16, 3))


class Noisy(Trainer):
    "Every step draws from all three generators of the process, and takes its time."
    pause = 0.002

    def training_step(self, batch):
        time.sleep(self.pause)
        x, y = batch
        x = x + 0.05 * torch.rand(()) + 0.05 * random.random() + 0.05 * float(numpy.random.rand())
        return {"loss": self.loss(self.model(x), y), "drawn": x.mean()}


class Steering(Callback):
    "Has a state that grows with every event and reaches into the weights."
    def __init__(self): self.seen, self.value = [0, 0, 0, 0], 1.0
    def state_dict(self): return {"seen": list(self.seen), "value": self.value}
    def load_state_dict(self, state): self.seen, self.value = list(state["seen"]), state["value"]

    def epoch_start(self, trainer): self.seen[0] += 1

    def step_end(self, trainer):
        self.seen[1] += 1
        self.value = 0.9 * self.value + 0.1 * random.random()
        if self.seen[1] % 5 == 0:
            with torch.no_grad():
                for one in trainer.model.parameters(): one.mul_(1 - 0.01 * self.value)

    def eval_end(self, trainer):
        self.seen[2] += 1
        self.value += trainer.metrics[deciding_metric(trainer.metrics)]

    def epoch_end(self, trainer):
        self.seen[3] += 1
        self.value += trainer.metrics["train_loss"]


class Rates(Callback):
    "The rate that each step was made with, by its number."
    def __init__(self): self.seen = {}
    def step_end(self, trainer): self.seen[trainer.step] = trainer.numbers._waiting._there[-1][0].lr


class Pulse(Callback):
    "Writes each step and the time to a file that the killer watches."
    def __init__(self, path): self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    def step_end(self, trainer): os.write(self.fd, struct.pack("qq", trainer.step, time.monotonic_ns()))


def hardness(sample) -> float: return float(sample[0].sum())


def at_event(event: str, number: int, work) -> Callback:
    "A callback that does this at the n-th time of an event."
    def hear(self, trainer):
        self.times = getattr(self, "times", 0) + 1
        if self.times == number: work(trainer)
    return type("At", (Callback,), {event: hear})()


def kill_me(trainer=None): os.kill(os.getpid(), signal.SIGKILL)


def at_step(step: int, work) -> Callback:
    "A callback that does this after one step."
    def hear(self, trainer):
        if trainer.step == step: work(trainer)
    return type("AtStep", (Callback,), {"step_end": hear})()


# --- recipes --------------------------------------------------------------------------------------------------------------------------

BROKEN = X.clone()
BROKEN[17] = torch.inf  # one step of each epoch has a gradient that is not finite


def pictures() -> torch.nn.Module:
    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Unflatten(1, (1, 2, 3)), torch.nn.Conv2d(1, 4, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8, 3))


def of_torch(kind, build, per=None, **words):
    "Words for an optimizer of this kind and a scheduler of torch's that moves it, both made with the model."
    def made(model):
        optimizer = kind(model.parameters(), lr=1e-2)
        return {"optimizer": optimizer, "scheduler": (build(optimizer), per) if per else build(optimizer), **words}
    return made


S = torch.optim.lr_scheduler


def loader(data=None, workers=0, **more) -> DataLoader: return DataLoader(data or TensorDataset(X, Y), 8, shuffle=True, num_workers=workers, **more)


_PLAIN = {"epochs": 4, "save_interval": 1, "optimizer": "adamw", "lr": 1e-2}
# name → (loader from a number of workers, numbers of workers of the lives, model, keywords, perhaps from the model)
RECIPES = {
    "plain": (loader, (0,), net, {}),
    "accumulate": (loader, (0,), net, {"accumulate": 3, "epochs": 9, "save_interval": "4 steps"}),
    "workers": (lambda workers: loader(Augmented(), workers), (2,), net, {"epochs": 3}),
    "changed_workers": (lambda workers: loader(Augmented(), workers, collate_fn=noisy_collate), (0, 2, 0), net, {"save_interval": "7 steps"}),
    "dropout_norm": (loader, (0,), lambda: net(0.3, True), {}),
    "augment": (lambda workers: loader(Augmented()), (0,), lambda: net(0.2), {"save_interval": "7 steps"}),
    "collate": (lambda workers: loader(collate_fn=noisy_collate), (0,), net, {"save_interval": "9 steps"}),
    "intervals": (loader, (0,), net, {"save_interval": "7 steps", "eval_every": "5 steps", "keep_last_n": 1}),
    "callbacks": (loader, (0,), net, {"save_interval": "7 steps", "eval_every": "5 steps"}),
    "sgd": (loader, (0,), net, {"optimizer": "sgd", "momentum": 0.9, "save_interval": "5 steps"}),
    "schedule": (loader, (0,), net, {"clip": 0.5, "scheduler": "cosine", "warmup": "10 steps", "save_interval": "6 steps"}),
    "bf16": (loader, (0,), lambda: net(0.1, True), {"precision": "bf16", "save_interval": "6 steps"}),
    "iterable": (lambda workers: DataLoader(Stream(), 8), (0,), net, {"scheduler": "constant", "save_interval": "7 steps", "eval_every": "5 steps"}),
    "stream_accumulate": (lambda workers: DataLoader(Stream(), 8), (0,), net, {"scheduler": "constant", "accumulate": 3, "epochs": 9, "save_interval": "4 steps"}),
    "persistent": (lambda workers: loader(Augmented(), workers, persistent_workers=workers > 0), (2, 0), net, {"epochs": 3, "save_interval": "5 steps"}),
    "groups": (loader, (0,), lambda: net(0.1, True), {"groups": [{"match": "0.*", "lr": 1e-3, "betas": [0.8, 0.99]}], "no_decay": True, "weight_decay": 0.1, "clip": 0.5,
                                                      "warmup": "10 steps", "save_interval": "6 steps"}),
    "freeze": (loader, (0,), lambda: net(0.1, True), {"freeze": ["0.*", "1.*"], "optimizer": "sgd", "save_interval": "6 steps"}),
    "thaw": (loader, (0,), lambda: net(0.1, True), {"freeze": {"0.bias": None, "0.*": 2, "1.*": 1}, "save_interval": "6 steps", "eval_every": "5 steps"}),
    "thaw_groups": (loader, (0,), lambda: net(0.1, True), {"freeze": {"0.*": 2, "1.*": 2}, "groups": [{"match": "0.*", "lr": 1e-3}], "no_decay": True, "accumulate": 3, "epochs": 5,
                                                           "precision": "bf16", "save_interval": "4 steps"}),
    "plateau": (loader, (0,), net, {"scheduler": "plateau", "plateau_patience": 0, "gamma": 0.3, "eval_every": "4 steps", "save_interval": "6 steps", "warmup": "5 steps"}),
    "multistep": (loader, (0,), net, {"scheduler": "multistep", "milestones": [1, "30 steps"], "gamma": 0.3, "save_interval": "7 steps"}),
    "onecycle": (loader, (0,), net, {"scheduler": "onecycle", "save_interval": "7 steps"}),
    "stops_early": (loader, (0,), net, {"lr": 0.3, "early_stopping": True, "patience": 2, "eval_every": "3 steps", "save_interval": "5 steps", "epochs": 20}),
    "averaged": (loader, (0,), lambda: net(0.2, True), {"ema": 0.9, "eval_every": "5 steps", "save_interval": "7 steps"}),
    "recomputed": (loader, (0,), lambda: blocks(), {"gradient_checkpointing": True, "save_interval": "7 steps"}),
    "loss_arguments": (loader, (0,), net, {"label_smoothing": 0.1, "class_weights": [1, 3, 0.5], "save_interval": "7 steps"}),
    "clip_value_adam": (loader, (0,), net, {"clip_value": 0.02, "clip": 0.05, "optimizer": "adam", "save_interval": "7 steps"}),
    "left_out": (lambda workers: loader(TensorDataset(BROKEN, Y)), (0,), net, {"nonfinite": 4, "save_interval": "5 steps", "clip_value": 0.1}),
    "left_out_rmsprop": (lambda workers: loader(TensorDataset(BROKEN, Y)), (0,), net, {"nonfinite": "skip", "optimizer": "rmsprop", "accumulate": 3, "epochs": 9, "save_interval": "4 steps"}),
    "step_adagrad_limit": (loader, (0,), net, {"scheduler": "step", "step_size": "11 steps", "gamma": 0.5, "optimizer": "adagrad", "limit": 9, "epochs": 5, "save_interval": "4 steps"}),
    "linear_end_in_steps": (loader, (0,), net, {"scheduler": "linear", "epochs": "41 steps", "warmup": "5 steps", "save_interval": "6 steps"}),
    "polynomial_eval_every_2": (loader, (0,), net, {"scheduler": "polynomial", "power": 2, "min_lr": 1e-4, "eval_every": 2, "save_interval": "8 steps"}),
    "monitor_restore_best": (loader, (0,), net, {"monitor": "val_loss", "monitor_mode": "max", "restore_best": True, "early_stopping": True, "patience": 4, "min_delta": 1e-3,
                                                 "scheduler": "constant", "lr": 0.1, "ema": 0.8, "eval_every": "6 steps", "save_interval": "5 steps"}),
    "torch_per_update": (loader, (0,), net, of_torch(torch.optim.AdamW, lambda one: S.CyclicLR(one, 1e-2, 5e-2, 4, cycle_momentum=False), "update", save_interval="7 steps")),
    "torch_per_epoch": (loader, (0,), net, of_torch(torch.optim.SGD, lambda one: S.ExponentialLR(one, 0.5), "epoch", save_interval="7 steps", clip=0.5)),
    "torch_plateau": (loader, (0,), net, of_torch(torch.optim.NAdam, lambda one: S.ReduceLROnPlateau(one, patience=0), eval_every="4 steps", save_interval="7 steps")),
    "channels_last_deterministic": (loader, (0,), pictures, {"channels_last": True, "deterministic": True, "save_interval": "7 steps"}),
    "held": (loader, (0,), net, {"after_end": "hold", "epochs": 2, "save_interval": "5 steps"}),
    "restarted": (loader, (0,), net, {"after_end": "restart", "scheduler": "linear", "epochs": 1, "warmup": "4 steps", "save_interval": "5 steps"}),
    "stretched": (loader, (0,), net, {"after_end": "stretch", "epochs": 2, "save_interval": "5 steps"}),
    "compiled": (loader, (0,), net, {"compile": True, "save_interval": "7 steps"}),
    "curriculum": (lambda workers: loader(Augmented(), workers), (0, 2), lambda: net(0.1), {
        "curriculum": {"difficulty": hardness, 0: 0.3, 1: range(20, 70), 3: "all"}, "save_interval": "5 steps", "eval_every": 0.5, "warmup": 2, "min_lr": 1e-4}),
    "several_validations": (loader, (0,), net, {"val_loader": {"near": DataLoader(Augmented(20), 8), "far": DataLoader(Augmented(30), 8)}, "monitor": "val_far_loss",
                                                "early_stopping": True, "patience": 2, "eval_every": "4 steps", "save_interval": "6 steps"}),
    "everything": (lambda workers: loader(Augmented(), workers, collate_fn=noisy_collate), (0, 2), lambda: net(0.2, True),
                   {"accumulate": 3, "epochs": 9, "clip": 0.5, "warmup": "5 steps", "precision": "bf16", "save_interval": "4 steps", "eval_every": "3 steps"}),
}
ENDS = {"held": (2, 4), "restarted": (1, 2, 4), "stretched": (2, 4)}  # of calls of train(), one after the other


def make(recipe: str, folder: Path, life: int = 0, callbacks=(), kind=Noisy, on_existing="resume", **changed) -> Trainer:
    "The trainer of a recipe, the same in each of its lives but for the number of workers."
    data, workers, model, words = RECIPES[recipe]
    model = model()
    words = words(model) if callable(words) else words
    config = {"run": {"on_existing": on_existing}, "logging": {"every": "3 steps"}}
    words = {"val_loader": DataLoader(Augmented(20), 8)} | _PLAIN | words | changed
    return kind(model, data(workers=workers[life % len(workers)]), loss="cross_entropy", config=config, callbacks=[Steering(), *callbacks],
                save_dir=str(folder/"run"), quiet=True, **words)


# --- one life -------------------------------------------------------------------------------------------------------------------------

class Slow(Noisy):
    "Evaluates slowly, and may die of it."
    lasts, die_at, made = 0.0, 0, 0

    def validation_step(self, batch):
        self.made += 1
        if self.made == self.die_at: kill_me()
        time.sleep(self.lasts)
        return super().validation_step(batch)


def live(folder: str, recipe: str, life: int = 0, die: tuple[str, int] | None = None, slow_disk: float = 0, interrupts: bool = False, interactive: bool = False,
         say: list | None = None, slow_validation: float = 0, **changed) -> None:
    "Trains to the end, or dies on the way; leaves end.bin with all that it came to."
    folder = Path(folder)
    callbacks = [Pulse(folder/f"pulse-{life}")]
    for event, number, values in say or (): callbacks.append(at_event(event, number, lambda trainer, values=values: say_and_wait(trainer, values)))
    if die and die[0] == "validation": Slow.die_at = die[1]
    elif die: callbacks.append(at_step(die[1], kill_me) if die[0] == "step" else at_event(*die, kill_me))
    Slow.lasts = slow_validation
    if slow_disk:
        real = os.fsync
        os.fsync = lambda fd: (time.sleep(slow_disk), real(fd))
    checkpoint.git_state = run.git_state = lambda: None  # it asks git, each time
    trainer = make(recipe, folder, life, callbacks, Slow, **changed)
    if interactive: sys.ps1 = ">>> "
    if interrupts:
        Noisy.pause = 0.001
        signal.signal(signal.SIGINT, lambda *_: tell(folder/"outside", 0))  # between two sessions
    for end in ENDS.get(recipe, (None,)):
        while True:
            try: trainer.train(end)
            except (Paused, SystemExit) as error:
                if not interrupts: raise
                assert isinstance(error, Paused) == interactive and (interactive or error.code == 130)
                tell(folder/"pauses", trainer.step)
                continue
            break
    leave_end(trainer, folder)


def live_words(folder: str, words: list[str], die: tuple[str, int] | None = None, **_) -> None:
    "A command line, in that folder; `die` is a function, and at which of its calls."
    os.chdir(folder)
    if die:
        home, name = die[0].rsplit(".", 1)
        real, calls = getattr(pkgutil.resolve_name(home), name), itertools.count(1)
        setattr(pkgutil.resolve_name(home), name, lambda *args, **named: kill_me() if next(calls) == die[1] else real(*args, **named))
    raise SystemExit(main(words))


def say_and_wait(trainer: Trainer, values: dict) -> None:
    "Tells its own training, and waits for as long as it takes until the inbox is looked into."
    trainer.run.tell("set", **values)
    time.sleep(0.3)


def tell(path: Path, number: int) -> None:
    with open(path, "a") as file: file.write(f"{number}\n")


def leave_end(trainer: Trainer, folder: Path) -> None:
    tree, tensors = split(trainer.state_dict())
    torch.save((json.dumps(tree, sort_keys=True), tensors), folder/"end.tmp")
    os.rename(folder/"end.tmp", folder/"end.bin")


def outcome(folder: Path) -> dict:
    "All that a training came to, as things that can be compared: the state, bit by bit, and the rows."
    tree, tensors = torch.load(folder/"end.bin")
    rows = [{key: value for key, value in row.items() if key not in ("time", "seconds")} for row in Run(folder/"run").story().of("step", "eval", "epoch")]
    return {"tree": json.loads(tree), "rows": rows, "tensors": {name: (one.dtype, tuple(one.shape), one.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
                                                                 for name, one in tensors.items()}}


def pulses(folder: Path, life: int = 0) -> list[tuple[int, int]]:
    "(step, nanoseconds) of each step of a life."
    try: return list(struct.iter_unpack("qq", (folder/f"pulse-{life}").read_bytes()))
    except FileNotFoundError: return []


def last_step(folder: Path, life: int) -> int:
    "The step of the newest pulse of a life; 0 before the first."
    try: fd = os.open(folder/f"pulse-{life}", os.O_RDONLY)
    except FileNotFoundError: return 0
    try: return struct.unpack("qq", os.pread(fd, 16, size - 16))[0] if (size := os.fstat(fd).st_size) else 0
    finally: os.close(fd)


# --- the server -----------------------------------------------------------------------------------------------------------------------

class Server:
    "A process with torch and trainbook imported and no threads started, that forks a child for each life."

    def __init__(self):
        where = Path(__file__).resolve().parent
        path = os.pathsep.join([str(where.parent), str(where), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen([sys.executable, "-W", "ignore", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path})
        assert self.ask() == "ready"

    def ask(self, order: dict | None = None):
        if order is not None:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, folder: Path, recipe: str, **words) -> int:
        "A life begins; its process number."
        folder.mkdir(parents=True, exist_ok=True)
        return self.ask({"folder": str(folder), "recipe": recipe, **words})

    def ended(self, pid: int) -> int:
        "Its exit code, once it is over."
        return self.ask({"wait": pid})

    def live(self, folder: Path, recipe: str, **words) -> int: return self.ended(self.start(folder, recipe, **words))

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def _child(order: dict) -> None:
    code = 1
    try:
        out = os.open(Path(order["folder"])/f"out-{order.get('life', 0)}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDONLY)
        for fd, number in ((null, 0), (out, 1), (out, 2)): os.dup2(fd, number)
        sys.stdin, sys.stdout, sys.stderr = io.TextIOWrapper(open(0, "rb")), open(1, "w", buffering=1), open(2, "w", buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        (live_words if "words" in order else live)(**order)
        code = 0
    except SystemExit as end: code = end.code
    except BaseException: traceback.print_exc()
    finally:
        for one in threading.enumerate():
            if one.name == "checkpoint-writer": one.join()
        os._exit(code)


def _warm() -> None:
    "What torch and Python import when they are first used; no backward, which would start threads."
    one = torch.zeros(2, requires_grad=True)
    for optimizer in (torch.optim.AdamW([one], fused=True), torch.optim.SGD([one], 0.1, fused=True)):
        one.grad = torch.zeros(2)
        optimizer.step()
    make("plain", Path("none"))
    versions()


def serve() -> None:
    warnings.simplefilter("ignore")
    _warm()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order: answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        elif "import" in order: answer = [importlib.import_module(name).__name__ for name in order["import"]]
        elif not (answer := os.fork()): _child(order)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__": serve()
