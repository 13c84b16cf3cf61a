"""What a step keeps: against sizes counted by hand, beside every kind of training; and the answer to a real lack of memory."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import exact
import pytest
import torch
from exact import at_step, make
from test_trial import MEANWHILE, odd, rows, taken_apart
from torch.utils.data import DataLoader, TensorDataset

from trainbook import Trainer, memory
from trainbook.device import answered, out_of_memory
from trainbook.memory import Memory, of_size, parts_of, shown
from trainbook.source import ConfigError

WIDE, IN, SIZE = 40, 6, 16


def net(many=4, wide=WIDE) -> torch.nn.Module:
    torch.manual_seed(0)
    block = lambda: torch.nn.Sequential(torch.nn.Linear(wide, 2 * wide), torch.nn.ReLU(), torch.nn.Linear(2 * wide, wide), torch.nn.Tanh())
    return torch.nn.Sequential(torch.nn.Linear(IN, wide), *(block() for _ in range(many)), torch.nn.Linear(wide, 3))


def data(n=512): return TensorDataset(torch.randn(n, IN), torch.randint(0, 3, (n,)))


def trainer_of(model=None, size=SIZE, **words):
    torch.manual_seed(0)
    return Trainer(model or net(), DataLoader(data(), size, shuffle=True), **({"loss": "cross_entropy", "epochs": 1, "run": False, "quiet": True} | words))


# --- by hand --------------------------------------------------------------------------------------------------------------------------

def test_a_layer_of_known_shape():
    trainer = trainer_of(torch.nn.Linear(IN, 3), optimizer="adamw")
    found = memory(trainer)
    weights = IN * 3 + 3
    assert found.parts == {"activations": 4 * SIZE * 3 + 4, "parameters": 4 * weights, "gradients": 4 * weights, "optimizer": 8 * weights + 2 * 4, "average": 0,
                           "buffers": 0, "batch": 4 * SIZE * IN + 8 * SIZE}  # log_softmax, the total weight of the loss; a step for each tensor
    assert found.whole == sum(found.parts.values()) and found.peak is None and found.blocks == []
    trainer.train()
    assert memory(trainer).parts == found.parts  # now with a state of its own


@pytest.mark.parametrize("optimizer, each", [("sgd", 4), ("adam", 8), ("rmsprop", 4), ("adagrad", 4)])
def test_what_an_optimizer_keeps(optimizer, each):
    weights = sum(one.numel() for one in net().parameters())
    found = memory(trainer_of(optimizer=optimizer, momentum=0.9 if optimizer == "sgd" else 0.0)).parts["optimizer"]
    assert each * weights <= found <= each * weights + 4 * 20


def test_activations_of_blocks():
    "Each block keeps its input, what relu gives, and what tanh gives, which is the input of the next."
    found, inside = memory(trainer_of()), WIDE + 2 * WIDE
    assert found.parts["activations"] == 4 * SIZE * (WIDE + 4 * inside + 3) + 4
    assert {name: kept for name, _, kept in found.blocks}["2"] == 4 * SIZE * inside


def test_frozen_parts_average_and_buffers():
    model = torch.nn.Sequential(torch.nn.Linear(IN, WIDE), torch.nn.BatchNorm1d(WIDE), torch.nn.Linear(WIDE, 3))
    found = memory(trainer_of(model, freeze=["0.*"], ema=0.9))
    weights, first = sum(one.numel() for one in model.parameters()), (IN + 1) * WIDE
    assert found.parts["gradients"] == 4 * (weights - first) and found.parts["average"] == 4 * weights and found.parts["parameters"] == 4 * weights
    assert found.parts["buffers"] == 2 * 4 * WIDE + 8 and found.parts["optimizer"] == 8 * (weights - first) + 4 * 4


def test_tied_weights_are_counted_once():
    model = net()
    model[2][0].weight = model[1][0].weight
    assert memory(trainer_of(model)).parts["parameters"] == sum(4 * one.numel() for one in model.parameters())


# --- what would be less ---------------------------------------------------------------------------------------------------------------

def test_what_is_promised_is_kept():
    trainer, said = trainer_of(size=256), {}
    for words, size, _ in (found := memory(trainer)).changes: said[words] = size
    activations = found.parts["activations"]
    kept = {"gradient_checkpointing: true": trainer_of(size=256, gradient_checkpointing=True), "precision: bf16": trainer_of(size=256, precision="bf16"),
            "accumulate: 2 with batch_size: 128": trainer_of(size=128, accumulate=2)}
    for words, other in kept.items(): assert abs(said[words] - (activations - memory(other).parts["activations"])) < 0.02 * activations, words
    assert said["optimizer: sgd"] == found.parts["optimizer"] - memory(trainer_of(optimizer="sgd")).parts["optimizer"]
    assert said["gradient_checkpointing: true"] > 0.2 * activations
    own = [size for words, size, _ in found.changes if "fsdp" not in words]
    assert own == sorted(own, reverse=True) and "fsdp" in found.changes[-1][0]


def test_bf16_halves_what_it_computes():
    "A wide batch: what is kept of the weights in bf16 does not grow with it."
    large = [memory(Trainer(net(), DataLoader(data(4096), 2048), loss="cross_entropy", run=False, quiet=True, precision=word)).parts["activations"] for word in ("fp32", "bf16")]
    assert 0.45 < large[1] / large[0] < 0.6


def test_what_does_not_apply_is_left_out():
    words = lambda trainer: " ".join(one for one, *_ in memory(trainer).changes)
    assert "bf16" not in words(trainer_of(precision="bf16")) and "gradient_checkpointing" not in words(trainer_of(gradient_checkpointing=True))
    assert "gradient_checkpointing" not in words(trainer_of(torch.nn.Linear(IN, 3))) and "sgd" not in words(trainer_of(optimizer="sgd"))
    assert "accumulate: 6 with batch_size: 8" in words(trainer_of(accumulate=3)) and "accumulate" not in words(trainer_of(size=1))


class Own(torch.nn.Module):
    "Switches it on and off by itself, as models of transformers do."

    def __init__(self, off=True):
        super().__init__()
        self.body, self.on = net(), False
        if off: self.gradient_checkpointing_disable = lambda: setattr(self, "on", False)

    def gradient_checkpointing_enable(self): self.on = True

    def forward(self, x):
        x = self.body[0](x)
        for block in self.body[1:-1]: x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if self.on else block(x)
        return self.body[-1](x)


def test_a_model_that_has_a_switch_of_its_own():
    saves = {words: size for words, size, _ in memory(trainer_of(Own())).changes}
    assert saves["gradient_checkpointing: true"] == {words: size for words, size, _ in memory(trainer_of()).changes}["gradient_checkpointing: true"]
    assert "gradient_checkpointing: true" not in {words for words, *_ in memory(trainer_of(Own(off=False))).changes}


# --- as it was ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("recipe", "accumulate workers dropout_norm bf16 iterable groups thaw averaged recomputed loss_arguments left_out curriculum everything".split())  # test_trial has them all
def test_a_training_that_is_measured_ends_like_one_that_is_not(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(exact.Noisy, "pause", 0)
    ends = []
    for measured in (False, True):
        inside = [at_step(7, memory)] if measured and recipe not in MEANWHILE else []
        trainer = make(recipe, tmp_path/str(measured), callbacks=inside)
        forwards = lambda trainer=trainer: {name: sorted(vars(one)) for name, one in trainer.model.named_modules()}
        try:
            was = forwards()
            if measured: assert memory(trainer).parts["activations"] > 0
            assert forwards() == was
            for end in exact.ENDS.get(recipe, (None,)): trainer.train(end)
        finally: torch.use_deterministic_algorithms(False)
        ends.append((taken_apart(trainer), rows(tmp_path/str(measured))))
    assert ends[0] == ends[1]


class Falls(torch.nn.Module):
    "Fails in the n-th call with an error."

    def __init__(self, at, error, room=10**9):
        super().__init__()
        self.body, self.at, self.error, self.room, self.calls = net(), at, error, room, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.at: raise self.error
        if len(x) > self.room: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.body(x)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_an_interrupt_leaves_nothing(at):
    trainer = trainer_of(Falls(at, KeyboardInterrupt()))
    was, forwards = taken_apart(trainer), [sorted(vars(one)) for one in trainer.model.modules()]
    with pytest.raises(KeyboardInterrupt): memory(trainer)
    assert taken_apart(trainer) == was and [sorted(vars(one)) for one in trainer.model.modules()] == forwards
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in trainer.model.modules()) and trainer.precision.dtype is None
    trainer.model.at = 0
    trainer.train()
    assert trainer.step == 32


def test_a_system_with_everything_is_as_it_was():
    trainer = odd()
    trainer.train()
    was = taken_apart(trainer), trainer.count, trainer.bank["means"][0].clone(), [*vars(trainer.model)]
    memory(trainer)
    assert taken_apart(trainer) == was[0] and trainer.count == was[1] and torch.equal(trainer.bank["means"][0], was[2]) and [*vars(trainer.model)] == was[3]


def test_several_optimizers():
    class Two(Trainer):
        def training_step(self, batch):
            for name in ("first", "second"):
                loss = self.loss(self.model(batch[0]), batch[1])
                self.backward(loss, name)
                self.update(name)
            return {"loss": loss}

        def validation_step(self, batch): return {"loss": self.loss(self.model(batch[0]), batch[1])}

    model = torch.nn.Sequential(torch.nn.Linear(IN, WIDE), torch.nn.ReLU(), torch.nn.Linear(WIDE, 3))
    optimizers = {"first": torch.optim.Adam(model[0].parameters()), "second": torch.optim.SGD(model[2].parameters(), lr=0.1)}
    found = memory(Two(model, DataLoader(data(), SIZE), optimizer=optimizers, loss="cross_entropy", run=False, quiet=True))
    assert found.parts["activations"] == 4 * SIZE * (WIDE + 3) + 4  # of one pass at a time
    assert found.parts["optimizer"] == 8 * (IN + 1) * WIDE + 2 * 4 and "accumulate" not in repr(found)


# --- what it looks like ---------------------------------------------------------------------------------------------------------------

def test_a_row_is_plain_and_small_and_shows_the_same():
    found = memory(trainer_of())
    row = json.loads(json.dumps(found.row()))
    assert row == found.row() and len(json.dumps(row)) < 2000 and shown(row) == found._repr_html_() and "<script" not in shown(row)
    assert repr(Memory(row)) == repr(found) and found.text.startswith("a step on 16 samples keeps at most ") and "\n" not in found.text
    assert "&lt;b&gt;" in shown(row | {"blocks": [["<b>", 1, 1], ["c", 1, 1]]})


def test_names_of_blocks():
    inner = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)])
    class Model(torch.nn.Module):
        def __init__(self): super().__init__(); self.embed, self.layers, self.head = torch.nn.Embedding(3, 2), inner, torch.nn.Linear(2, 3)
    class Wrapped(torch.nn.Module):
        def __init__(self): super().__init__(); self.model = Model()
    assert [*parts_of(Model())] == ["embed", "layers.0", "layers.1", "head"] and [*parts_of(Wrapped())] == ["model.embed", "model.layers.0", "model.layers.1", "model.head"]
    assert [*parts_of(torch.nn.Linear(2, 2))] == [] and [*parts_of(torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.ReLU()))] == ["0", "1"]


# --- not enough -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, word", [(16, "measured on 4"), (64, "measured on 4"), (3, "measured on 1")])
def test_an_error_of_memory_is_answered(size, word):
    trainer = trainer_of(Falls(0, None, room=size // 4 if size == 16 else 5 if size == 64 else 2), size=size)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2.00 GiB") as caught: trainer.train()
    note = "".join(caught.value.__notes__)
    assert word in note and all(f"{i}. " in note for i in (1, 2, 3)) and "fsdp" not in note
    assert all(line.startswith("  ") for line in note.splitlines() if line)
    full = memory(trainer_of(size=size)).parts
    assert f"a step on {size} samples" in note and full["parameters"]


def test_scaled_up_it_is_what_the_whole_would_be():
    from trainbook.memory import _measured
    part, whole = _measured(trainer_of(), 4), memory(trainer_of())
    assert part.parts | {"activations": 0} == whole.parts | {"activations": 0} and abs(part.parts["activations"] - whole.parts["activations"]) < 20


def test_where_nothing_fits_there_are_still_three_things_to_do():
    trainer = trainer_of(Falls(0, None, room=0))
    with pytest.raises(torch.OutOfMemoryError) as caught: trainer.train()
    assert "accumulate: 2 with batch_size: 8" in caught.value.__notes__[0] and "3. gradient_checkpointing" in caught.value.__notes__[0]


def test_data_that_cannot_be_cut_is_answered_with_words():
    trainer = Trainer(Falls(0, None, room=4), [(torch.randn(8, IN), torch.zeros(8).long())] * 3, loss="cross_entropy", run=False, quiet=True)
    with pytest.raises(torch.OutOfMemoryError) as caught: trainer.train()
    assert caught.value.__notes__[0].count(". ") == 3


def test_an_answer_that_fails_hides_nothing(monkeypatch):
    monkeypatch.setattr(memory, "table", lambda *_: 1 / 0)
    with pytest.raises(torch.OutOfMemoryError) as caught: trainer_of(Falls(0, None, room=4)).train()
    assert not hasattr(caught.value, "__notes__")


def test_other_errors_are_not_answered():
    with pytest.raises(RuntimeError, match="shapes") as caught: trainer_of(Falls(2, RuntimeError("shapes differ"))).train()
    assert not hasattr(caught.value, "__notes__")
    assert out_of_memory(MemoryError()) and not out_of_memory(ValueError("out of memory"))
    answered(None, None)


def test_an_error_in_the_optimizers_step_is_answered(monkeypatch):
    trainer = trainer_of()
    def full(*_): raise torch.OutOfMemoryError("CUDA out of memory.")
    update = type(trainer.updates[""])
    monkeypatch.setattr(update, "_step", lambda self, *rest, was=update._step: full() if not trainer.shown else was(self, *rest))
    trainer.shown = False
    with pytest.raises(torch.OutOfMemoryError) as caught: trainer.train()
    assert "3. " in caught.value.__notes__[0] and "middle of an update" in trainer.torn


def test_a_run_is_closed_and_says_how_it_failed(tmp_path):
    trainer = trainer_of(Falls(0, None, room=4), run=None, save_dir=str(tmp_path/"run"))
    with pytest.raises(torch.OutOfMemoryError): trainer.train()
    assert trainer.run.status == "failed"
    trainer.model.room = 99
    trainer.train()
    assert trainer.step == 32 and trainer.run.status == "finished"


REAL = """
import resource, torch
from torch.utils.data import DataLoader, TensorDataset
from trainbook import Trainer
import trainbook.memory
torch.set_num_threads(1)
x = torch.randn(4000, 10)
net = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.Linear(10, 10), torch.nn.ReLU()) for _ in range(4)))
Trainer(net, DataLoader(TensorDataset(x, x), 500), loss="mse", run=False, quiet=True, epochs=1).train()
class Wide(torch.utils.data.Dataset):
    def __len__(self): return 250
    def __getitem__(self, i): return x, x
trainer = Trainer(net, DataLoader(Wide(), 250), loss="mse", run=False, quiet=True, optimizer="sgd", momentum=0, epochs=1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 350 * 2**20, -1))
trainer.train()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a process's memory")
def test_a_real_lack_of_memory():
    "The allocator of the CPU fails for real, in the last of four blocks; the part of a batch that is measured then still fits."
    ended = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 1 and "can't allocate memory" in ended.stderr, ended.stderr[-2000:]
    note = ended.stderr.partition("can't allocate memory")[2]
    assert "a step on 250 samples keeps at most 400 MB, measured on" in note, note
    saved = re.findall(r"[123]\. (\S+) .*?(\d+)(?:\.\d)? MB", note)
    assert [one for one, _ in saved] == ["accumulate:", "precision:", "gradient_checkpointing:"] and [int(size) for _, size in saved] == [160, 100, 80], note


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda():
    trainer = Trainer(net(8, 512), DataLoader(data(4096), 2048), loss="cross_entropy", run=False, quiet=True, device="cuda", precision="fp32")
    found = memory(trainer)
    assert found.peak and 0.4 < found.peak / found.whole < 1.6 and found.row()["room"] > found.whole
    most = torch.cuda.memory_allocated()
    memory(trainer)
    assert torch.cuda.memory_allocated() <= most + 2**20


def test_batches_of_another_size():
    assert next(of_size(trainer_of(), 5).batches(0))[0] == 5
    flow = Trainer(net(), DataLoader(exact.Stream(), 8), loss="cross_entropy", run=False, quiet=True, scheduler="constant")
    chosen = DataLoader(data(), batch_sampler=torch.utils.data.BatchSampler(torch.utils.data.SequentialSampler(range(512)), 8, False))
    for trainer, word in ((flow, "Stream has no length"), (Trainer(net(), chosen, loss="cross_entropy", run=False, quiet=True), "made by BatchSampler")):
        with pytest.raises(ConfigError, match=word): of_size(trainer, 4)


def test_it_is_found_in_the_package(): assert Path(memory.__file__).name == "memory.py" and repr(memory(trainer_of()))
