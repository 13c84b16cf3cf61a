"""What a person sees of a training: the bar in a terminal, lines as the guides have them, nothing that floods a file."""
import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from exact import DATA, VAL, X, Y, net
from trainbook import console
from trainbook.console import Console, fill
from trainbook.events import Callback
from trainbook.trainer import Trainer

SCRIPT = """
import time, torch
from torch.utils.data import DataLoader, TensorDataset
from trainbook.trainer import Trainer
class Slow(Trainer):
    def training_step(self, batch): time.sleep(0.06); return super().training_step(batch)
    def validation_step(self, batch): time.sleep(0.1); return super().training_step(batch)
torch.manual_seed(0)
data = TensorDataset(torch.randn(160, 4), torch.randint(0, 2, (160,)))
Slow(torch.nn.Linear(4, 2), DataLoader(data, 4), DataLoader(data, 16), loss="cross_entropy", epochs=2, lr=1e-3, {more}).train()
"""


def make(epochs=1, model=None, val=VAL, **words) -> Trainer:
    return Trainer(model or net(), DataLoader(DATA, 8), val and DataLoader(val, 20), **({"loss": "cross_entropy", "lr": 1e-2, "epochs": epochs, "run": False} | words))


def lines_of(*forms, **more) -> dict: return {"config": {"logging": {"epoch_line": list(forms)}, **more}}


def on_a_screen(code: str, columns: int = 100) -> str:
    "What a program writes to a terminal of this width."
    ours, theirs = pty.openpty()
    program = subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True, env={**os.environ, "COLUMNS": str(columns), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"})
    os.close(theirs)
    seen = b""
    while True:
        try: part = os.read(ours, 65536)
        except OSError: break  # the other end is closed
        if not part: break
        seen += part
    os.close(ours)
    assert program.wait() == 0, seen.decode()
    return seen.decode()


def stays(screen: str) -> list[str]:
    "The lines that are there at the end: what was taken back is gone."
    return [line.split("\x1b[2K")[-1].strip("\r") for line in screen.replace("\r\n", "\n").split("\n")]


@pytest.mark.parametrize("columns", [100, 60])
def test_the_bar_in_a_terminal(columns):
    """In the form that everybody knows, with the newest loss where there is room; the evaluation has one of its own; the lines are all that stays."""
    screen = on_a_screen(SCRIPT.format(more="run=False"), columns)
    drawn = [part.strip("\r\n") for part in screen.split("\x1b[2K")]
    assert any(re.match(r"Epoch 1/2:  \d\d%\|█+[▏▎▍▌▋▊▉]? +\| \d+/40 \[00:0\d<00:0\d, \d+\.\d\dit/s\]" + r"  loss \d\.\d{4}" * (columns == 100), part) for part in drawn), drawn
    assert any(re.match(r"evaluating:  \d0%\|", part) for part in drawn)
    assert max(len(part.partition("\r\n")[0]) for part in drawn if "it/s" in part) < columns
    assert [line.partition("  ")[0] for line in stays(screen) if line] == ["epoch 1/2", "epoch 2/2"]
    assert len([part for part in drawn if part.startswith("Epoch 1/2")]) <= 5 * 2.4 + 2  # at most five times a second


def test_the_bar_of_a_training_that_ends_within_an_epoch():
    screen = on_a_screen(SCRIPT.replace("epochs=2", "epochs='50 steps'").format(more="run=False"))
    assert re.search(r"Epoch 1: +\d\d%\|[^|]*\| \d+/40 ", screen) and re.search(r"Epoch 2: +\d0%\|[^|]*\| \d/10 ", screen)


def test_a_file_gets_no_bar(tmp_path):
    """And a screen without an encoding for it gets plain signs."""
    code = SCRIPT.format(more="save_dir='r', save_interval='1 step'")
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout
    for text in (told, Path(tmp_path, "r", "train.log").read_text()):
        assert not set("\r\x1b█#%") & set(text) and len(text.splitlines()) == 5, text  # where it trains, and two lines an epoch


def test_quiet_is_quiet():
    assert on_a_screen(SCRIPT.format(more="run=False, quiet=True")) == ""


GUIDES = ["Epoch {epoch}/{epochs} - Loss: {train_loss:.2f} - LR: {lr:short} - Time: {seconds:.0f}s", "Train Loss: {train_loss:.3f}, Train Acc: {train_acc:.3f}", "Val Loss: {val_loss:.3f}, Val Acc: {val_acc:.3f}, Val AUC: {val_auc:.3f}",
          "Epoch {epoch}/{epochs} - Eval - Recall@10: {val_recall@10:.1f} - Recall@20: {val_recall@20:.1f}"]


def test_the_lines_of_the_guides(capsys, tmp_path, monkeypatch):
    """Verbatim, on the screen and in the file."""
    monkeypatch.chdir(tmp_path)
    metrics = {"acc": "acc", "auc": lambda outputs, targets: 0.976, "recall@10": lambda outputs, targets: 8.2, "recall@20": lambda outputs, targets: 12.1}
    class Keeps(Callback):
        def epoch_end(self, trainer): trainer.save_checkpoint(f"results/saved_models/epoch_{trainer.epoch}.pth")
    trainer = make(3, metrics=metrics, save_dir="results/saved_models", run=None, scheduler="constant", lr=1e-4, callbacks=Keeps(), **lines_of(*GUIDES))
    trainer.train()
    said = capsys.readouterr().out
    number = r"\d\.\d{3}"
    for line in (r"Epoch 3/3 - Loss: \d\.\d\d - LR: 1e-4 - Time: \d+s", f"Train Loss: {number}, Train Acc: 0{number[2:]}", f"Val Loss: {number}, Val Acc: 0{number[2:]}, Val AUC: 0.976",
                 r"Epoch 3/3 - Eval - Recall@10: 8\.2 - Recall@20: 12\.1", "new best", r"Saving checkpoint to: results/saved_models/epoch_3\.pth"):
        assert re.search(f"^{line}$", said, re.M), (line, said)
        assert re.search(f"  {line}$", Path("results/saved_models/train.log").read_text(), re.M)


@pytest.mark.parametrize("export, names", [({}, "step-{:08d}"), ({"latest": "last.pth"}, "last.pth"), ({"best": "best.pth"}, "best.pth")])
def test_where_a_checkpoint_lies(export, names, capsys, tmp_path, monkeypatch):
    """One line an epoch, however often it is saved in between; the plain file, where one is exported."""
    monkeypatch.chdir(tmp_path)
    trainer = make(3, save_dir="r", run=None, save_interval="2 steps", export=export)
    trainer.train()
    said = [line for line in capsys.readouterr().out.splitlines() if "Saving" in line]
    assert said == [f"Saving checkpoint to: r/train/{names.format(13 * epoch)}" for epoch in (1, 2, 3)]
    assert all(Path(line.partition(": ")[2]).exists() for line in said[-1:])


def test_a_checkpoint_within_an_epoch_is_told_where_it_is_the_last(capsys, tmp_path):
    make("20 steps", save_dir=str(tmp_path/"r"), run=None, save_interval="5 steps").train()
    assert re.findall(r"Saving checkpoint to: .*(step-\d+)", capsys.readouterr().out) == ["step-00000013", "step-00000020"]


def test_a_line_of_the_validation_in_an_epoch_without_one(capsys):
    """It is left out for that epoch; a name that nobody measures is said once, and the others stay."""
    make(4, eval_every=2, **lines_of("E{epoch} {train_loss:.3f}", "V{epoch} {val_loss:.3f}", "{val_f1}", "{trainloss}")).train()
    said = [line for line in capsys.readouterr().out.splitlines() if line != "new best"]
    assert [line.split(" ")[0] for line in said] == ["E1", "epoch_line", "E2", "V2", "epoch_line", "E3", "E4", "V4"]
    assert said[1].startswith("epoch_line  there is no trainloss, did you mean train_loss?") and said[4].startswith("epoch_line  there is no val_f1")


@pytest.mark.parametrize("form, says", [("{seconds:99999999999}", "is no format for"), ("{epoch:.999999999f}", "is no format for"), ("{train_loss:d}", "is no format for"), ("{lr:%s}", "is no format for"), ("{lr.__class__}", "there is no lr.__class__"), ("{lr!r}", "there is no lr!r")])
def test_a_line_that_cannot_be_written_is_one_line(form, says, capsys):
    make(2, **lines_of(form)).train()
    said = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(said) == 3 and said[0].startswith("epoch_line  ") and says in said[0] and said[1].startswith("epoch 1/2  train_loss") and said[2].startswith("epoch 2/2  ")


@pytest.mark.parametrize("end, told", [(2, "2 2   2"), ("20 steps", "? ?"), (1.5, "1.5 1.5 1.5")])
def test_how_many_epochs(end, told, capsys):
    """A number where it is one."""
    make(end, **lines_of("{epochs} {epochs:short} {epochs:3}")).train()
    assert capsys.readouterr().out.splitlines()[0].startswith(told)


SHORT = {0: "0", 1e-4: "1e-4", 1.5e-4: "1.5e-4", 3e-5: "3e-5", 2.468e-10: "2.47e-10", 0.05: "0.05", 0.001: "0.001", 0.28412: "0.284", -1e-4: "-1e-4", 12: "12", 12345.0: "1.23e4", 999.9: "1e3", float("inf"): "inf"}


@pytest.mark.parametrize("value", SHORT, ids=str)
def test_a_short_number(value): assert fill("{x:short}", {"x": value}) == SHORT[value] and fill("{x:short}", {"x": float("nan")}) == "nan"


def test_accuracy_of_the_training():
    """The mean over the samples of the epoch, of the outputs that the loss has seen; nothing changes by it."""
    seen, models = [], [net(), net()]
    class Mine(Trainer):
        def calculate_loss(self, outputs, targets):
            if outputs.requires_grad: seen.append((outputs.argmax(1) == targets).float())
            return super().calculate_loss(outputs, targets)
    trainer = Mine(models[0], DataLoader(DATA, 8), DataLoader(VAL, 20), run=False, quiet=True, loss="cross_entropy", lr=1e-2, epochs=1, accumulate=2, **lines_of("{train_acc}"))
    trainer.train()
    assert trainer.history[-1]["train_acc"] == pytest.approx(torch.cat(seen).mean().item())
    make(1, models[1], quiet=True, accumulate=2).train()
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_nobody_measures_what_nobody_asked_for():
    """No metric on a training batch, unless a line or the monitor names it; then this one only, and none that collects."""
    counted = []
    def often(name): return lambda outputs, targets: counted.append(name) or 0.5
    class Collects:
        def reset(self): pass
        def update(self, outputs, targets): counted.append("collects")
        def compute(self): return 0.5
    metrics = {"one": often("one"), "two": often("two"), "three": Collects()}
    def times(**words):
        counted.clear()
        trainer = make(1, val=None, quiet=True, metrics=metrics, **words)
        trainer.train()
        return counted, trainer.history[-1]
    assert times()[0] == [] and times(**lines_of("{train_loss} {lr}"))[0] == []
    class Counts(Trainer):
        def measure(self, outputs, targets): return counted.append("any") or super().measure(outputs, targets)
    for form, count in (("{train_loss}", 0), ("{train_acc}", 13)):
        counted.clear()
        Counts(net(), DataLoader(DATA, 8), run=False, quiet=True, loss="cross_entropy", epochs=1, **lines_of(form)).train()
        assert len(counted) == count
    assert times(**lines_of("{train_one} {train_three} {train_loss}"))[0] == ["one"] * 13
    called, epoch = times(monitor="train_two", monitor_mode="max")
    assert called == ["two"] * 13 and epoch["train_two"] == 0.5
    class Own(Trainer):
        def training_step(self, batch): return super().training_step(batch) * 2  # a number as ever
    Own(net(), DataLoader(DATA, 8), run=False, quiet=True, loss="cross_entropy", epochs=1, **lines_of("{train_acc}")).train()


def test_accuracy_of_the_training_asks_the_device_for_nothing():
    class Asked(TorchDispatchMode):
        times = 0
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.times += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
            return function(*args, **kwargs or {})
    counts = []
    for form in ("{train_loss}", "{train_acc}"):
        trainer = make(1, val=None, quiet=True, **lines_of(form))
        trainer.train()
        with Asked() as asked: trainer.objective((X[:8], Y[:8]))
        counts.append(asked.times)
    assert counts == [0, 0]


class Screen(io.StringIO):
    def isatty(self): return True


def test_a_bar_that_is_not_drawn_costs_nothing(monkeypatch):
    """Ten seconds of a thousand steps: where output is no terminal nothing is written, nor where it shall be quiet; in a terminal five times a second, after half a one."""
    now, drawn = [0.0], {}
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    for name, screen, quiet in (("file", io.StringIO(), False), ("quiet", Screen(), True), ("terminal", Screen(), False)):
        monkeypatch.setattr(sys, "stdout", screen)
        told = Console(quiet=quiet)
        told.start_bar()
        for step in range(1000):
            now[0] += 0.01
            told.bar.at(step, "loss 1.0")
        drawn[name] = screen.getvalue().count("it/s")
        assert drawn[name] or not screen.getvalue()
    assert drawn == {"file": 0, "quiet": 0, "terminal": pytest.approx(47, abs=3)}
