"""What the guides 001 and 004 promise of a trainer, item by item: the numbers are those of the checklist in the reference report."""
import random
import re
from collections.abc import Callable

import numpy
import pytest
import torch
from exact import DATA, VAL, net
from test_config import GUIDE_001
from torch.utils.data import DataLoader

from trainbook.config import Config
from trainbook.load import load_checkpoint
from trainbook.schedule import Plateau
from trainbook.source import ConfigError
from trainbook.trainer import Trainer


def made(kind=Trainer, **words) -> Trainer:
    return kind(model=net(), train_loader=DataLoader(DATA, 8, shuffle=True), val_loader=DataLoader(VAL, 64), **({"quiet": True} | words))


def trained(**words) -> Trainer:
    trainer = made(**({"run": False} | words))
    trainer.train()
    return trainer


def lines_of(capsys) -> str: return capsys.readouterr().out


# --- guide 001: the file, and the words of the API --------------------------------------------------------------------------------------

def test_the_file_of_guide_001(here, capsys):
    """1.22 to 1.38: as it stands, loaded, unpacked, trained; each key has its effect."""
    (here/"config.yaml").write_text(GUIDE_001)
    config = Config.from_yaml("config.yaml")
    trainer = made(quiet=False, **config.training)
    optimizer, plan, t = trainer.updates[""].optimizer, trainer.plan, trainer.config.training
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["lr"] == 1e-4 and optimizer.defaults["weight_decay"] == 0.01
    assert (t.momentum, t.precision, t.early_stopping, t.patience, t.batch_size) == (0.9, "auto", True, 3, 32)
    assert trainer.precision.name == ("fp32" if trainer.device.type == "cpu" else "bf16")
    assert (trainer.schedule.kind, trainer.schedule.warmup, trainer.schedule.min_lr) == ("cosine", 13, 1e-6)
    assert (plan.end.amount, plan.total, t.accumulate, trainer.updates[""].clip) == (10, 130, 1, 1.0)
    trainer.train()
    run = trainer.run
    assert run.folder == here/"results"/"saved_models" and run.status == "finished" and trainer.epoch == 10
    assert [row["step"] for row in run.story().of("checkpoint")] == [13 * epoch for epoch in range(1, 11)]
    rates = [row["lr"] for row in run.story().of("step")]
    assert max(rates) == pytest.approx(1e-4, rel=0.01) and 1e-6 <= min(rates) < 1e-5 and rates[0] == pytest.approx(1e-4 * 10 / 13)
    assert load_checkpoint("results/saved_models", quiet=True)["config"]["training"]["clip"] == 1.0
    said = lines_of(capsys)
    assert "note: train_loader makes batches of 8; batch_size: 32 (keyword) is for datasets" in said and "epoch 10/10  train_loss" in said


@pytest.mark.parametrize("line, key, value", [("momentum: 0.9", "momentum", 0.9), ("learning_rate: 1e-4", "lr", 1e-4), ("weight_decay: 0.01", "weight_decay", 0.01)])
def test_the_file_of_guide_001_with_sgd(here, line, key, value):
    """1.25: the momentum is SGD's."""
    assert line in GUIDE_001
    (here/"config.yaml").write_text(GUIDE_001.replace('"adamw"', '"sgd"'))
    trainer = made(run=False, **Config.from_yaml("config.yaml").training)
    assert type(trainer.updates[""].optimizer) is torch.optim.SGD and trainer.updates[""].optimizer.defaults[key] == value


def test_the_patience_of_guide_001_ends_it(here):
    """1.34, 1.35: three evaluations without improvement; with early_stopping: False it goes on."""
    class Worse(Trainer):
        def validation_step(self, batch): return {"loss": float(self.epoch)}
    for text, epochs in ((GUIDE_001, 4), (GUIDE_001.replace("early_stopping: True", "early_stopping: False"), 10)):
        (here/"config.yaml").write_text(text)
        trainer = made(Worse, run=False, **Config.from_yaml("config.yaml").training)
        trainer.train()
        assert trainer.epoch == epochs


def test_the_words_of_the_api(here):
    """1.06 to 1.14."""
    trainer = made(optimizer_type="adamw", learning_rate=1e-4, weight_decay=0.01, scheduler_type="cosine", num_epochs=2, device="cpu", checkpoint_dir="results/saved_models")
    assert trainer.train() is trainer.history and trainer.epoch == 2
    assert (trainer.device.type, trainer.schedule.kind, trainer.run.folder) == ("cpu", "cosine", here/"results"/"saved_models")
    assert type(trainer.updates[""].optimizer) is torch.optim.AdamW and trainer.updates[""].optimizer.defaults["lr"] == 1e-4


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there():
    """1.12: device="cuda", where there is none."""
    with pytest.raises(ConfigError, match=r"^device  cuda is not there: .*; write device: auto$"): made(run=False, device="cuda")


# --- item by item -----------------------------------------------------------------------------------------------------------------------

def kind_of(trainer: Trainer) -> type: return type(trainer.updates[""].optimizer)
def recall(outputs, targets): return (outputs.argmax(1) == targets).float().mean()


# item, keywords as the guide has them, what must hold of the trainer before it trains
ITEMS: list[tuple[str, dict, Callable]] = [
    ("1.15", {}, lambda it: kind_of(it) is torch.optim.AdamW),
    ("1.15", {"optimizer_type": "adam"}, lambda it: kind_of(it) is torch.optim.Adam),
    ("1.15", {"optimizer_type": "sgd", "momentum": 0.9}, lambda it: kind_of(it) is torch.optim.SGD and it.updates[""].optimizer.defaults["momentum"] == 0.9),
    ("1.16", {"scheduler_type": "cosine", "warmup_epochs": 1}, lambda it: it.schedule(0, 1.0) == 1 / 13 and it.schedule(13, 1.0) == 1.0 and it.schedule(38, 1.0) < 0.01),
    ("1.17", {"scheduler_type": "step", "scheduler_step_size": 1, "scheduler_gamma": 0.5}, lambda it: [it.schedule(step, 1.0) for step in (12, 13, 26)] == [1, 0.5, 0.25]),
    ("1.18", {"scheduler_type": "ReduceLROnPlateau"}, lambda it: isinstance(it.schedule, Plateau)),
    ("1.19", {"clip_grad_norm": 1.0}, lambda it: it.updates[""].clip == 1.0),
    ("1.20", {"grad_accumulation_steps": 4}, lambda it: it.plan.per_epoch == 4),
    ("1.21", {"mixed_precision": "bf16"}, lambda it: it.precision.dtype is torch.bfloat16),
    ("1.21", {"mixed_precision": False}, lambda it: it.precision.dtype is None),
    ("1.38", {"optimizer": "sgd", "scheduler": "linear"}, lambda it: (kind_of(it), it.schedule.kind) == (torch.optim.SGD, "linear")),
    ("1.40", {}, lambda it: it.plan.eval_epochs == 1),
    ("4.15", {"weight_decay": "1e-5"}, lambda it: it.updates[""].optimizer.defaults["weight_decay"] == 1e-5),
    ("4.16", {"clip_grad": 5.0}, lambda it: it.updates[""].clip == 5.0),
    ("4.17", {"warmup_steps": 30}, lambda it: it.schedule.warmup == it.plan.warmup == 30),
    ("4.18", {"scheduler": "step"}, lambda it: it.schedule.kind == "step"),
    ("4.18", {"scheduler": "plateau", "patience": 3}, lambda it: (it.schedule.kind, it.schedule.patience) == ("plateau", 10)),  # and a note says so
    ("4.18", {"scheduler": "plateau", "plateau_patience": 3}, lambda it: it.schedule.patience == 3),
    ("4.20", {"eval_freq": 5}, lambda it: it.plan.eval_epochs == 5),
    ("4.40", {"early_stopping": True, "patience": 10, "min_delta": 0.001, "monitor": "val_recall@20", "metrics": {"recall@20": recall}},
     lambda it: (it.patience.patience, it.patience.min_delta, it.patience.mode) == (9, 0.001, "max")),
    ("4.41", {"use_amp": "True", "opt_level": "O1"}, lambda it: it.precision.name == ("fp32" if it.device.type == "cpu" else "bf16")),
    ("4.41", {"use_amp": "False"}, lambda it: it.precision.name == "fp32"),
    ("4.42", {"batch_size": 1, "accumulate_grad_batches": 4}, lambda it: it.plan.per_epoch == 4),
    ("4.57", {"seed": 42}, lambda it: it.seed == 42 and it.facts()["seed"] == 42),
]


@pytest.mark.parametrize("item, words, holds", ITEMS, ids=[f"{item} {words}".split(" at 0x")[0] for item, words, _ in ITEMS])
def test_an_item(item, words, holds):
    """What is said has its effect, and it trains."""
    trainer = made(run=False, **({"num_epochs": 3, "lr": 1e-3} | words))
    assert holds(trainer)
    trainer.train()
    assert trainer.epoch == 3 and all(one.isfinite().all() for one in trainer.model.parameters())


@pytest.mark.parametrize("words, steps", [({"save_frequency": 2, "num_epochs": 5}, [26, 52, 65]), ({"save_freq": 10, "num_epochs": 20}, [130, 260])], ids=["1.33", "4.19"])
def test_an_interval_of_checkpoints(here, words, steps):
    """1.33, 4.19: every so many epochs, and the last; without an evaluation there is no best beside them."""
    trainer = trained(run=None, save_dir="r", eval_every=None, **words)
    assert [row["step"] for row in trainer.run.story().of("checkpoint")] == steps


def test_an_epoch_is_evaluated_and_logged(here, capsys):
    """1.39 to 1.43, 4.35 to 4.37, 4.39: loss, accuracy and a metric of one's own after each epoch; the best is kept; on the console and in a file; with the rate and the norm."""
    trainer = made(quiet=False, num_epochs=2, checkpoint_dir="r", metrics={"acc": recall, "auc": lambda outputs, targets: 0.5}, monitor="val_auc")
    trainer.train()
    for text in (lines_of(capsys), (here/"r"/"train.log").read_text()): assert re.search(r"epoch 2/2  train_loss \d.*val_loss \d.*val_acc \d.*val_auc 0\.5", text)
    steps, epochs = (list(trainer.run.story().of(event)) for event in ("step", "epoch"))
    assert {"loss", "grad_norm", "lr"} <= steps[0].keys() and {"train_loss", "val_loss", "val_acc", "val_auc", "lr", "seconds"} <= epochs[0].keys()
    assert load_checkpoint("r@best", quiet=True)["val_auc"] == 0.5


@pytest.mark.parametrize("values, epochs", [([0.5] * 30, 11), ([0.5 + 0.0005 * n for n in range(30)], None), ([0.01 * n for n in range(30)], 30)], ids=["flat", "creeping", "rising"])
def test_early_stopping_of_guide_004(values, epochs):
    """4.40: ten evaluations in which recall@20 rose by no more than 0.001 since the best that counted."""
    class Told(Trainer):
        def validation_step(self, batch): return {"recall@20": values[self.epoch]}
    trainer = made(Told, run=False, num_epochs=30, early_stopping=True, patience=10, min_delta=0.001, monitor="val_recall@20")
    trainer.train()
    assert trainer.epoch == (epochs or 30)  # it creeps: every third epoch counts, so it goes on


def test_accumulation_is_a_larger_batch():
    """1.20, 4.42: four batches of one are one of four."""
    models = [net() for _ in range(2)]
    for model, size, count in ((models[0], 1, 4), (models[1], 4, 1)):
        Trainer(model, DataLoader(DATA, size), run=False, quiet=True, num_epochs=1, lr=1e-2, loss="cross_entropy", accumulate_grad_batches=count).train()
    for one, other in zip(*(model.parameters() for model in models)): assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("seed", [42, 7])
def test_a_seed_is_torchs_numpys_and_pythons(seed):
    """4.57: what the three generators give in a step depends on the seed and on nothing before."""
    def drawn(before: int) -> list:
        seen = []
        class Draws(Trainer):
            def training_step(self, batch):
                seen.append((torch.rand(()).item(), numpy.random.rand(), random.random()))
                return super().training_step(batch)
        for one in (random.seed, numpy.random.seed, torch.manual_seed): one(before)
        made(Draws, run=False, num_epochs=1, seed=seed).train()
        return seen
    first = drawn(1)
    assert first == drawn(2) and len({one for three in first[:13] for one in three}) == 3 * 13


@pytest.mark.parametrize("deterministic", [True, False])
def test_what_makes_it_reproducible_is_written_down(here, deterministic, monkeypatch):
    """4.57, 4.58: seed and switches, in the config, in run.json, in the first row."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)  # the opposite of what is wanted
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        trainer = trained(run=None, save_dir="r", num_epochs=1, deterministic=deterministic)
        assert torch.are_deterministic_algorithms_enabled() == torch.backends.cudnn.deterministic == deterministic and not torch.backends.cudnn.benchmark
    finally: torch.use_deterministic_algorithms(False)
    begin = next(trainer.run.story().of("start"))
    assert begin["seed"] == trainer.run.info["seed"] == Config.from_yaml("r/config.yaml").training.seed == 42
    assert (begin["deterministic"], begin["cudnn_deterministic"], begin["cudnn_benchmark"]) == (deterministic, deterministic, False)
    assert Config.from_yaml("r/config.yaml").training.deterministic is deterministic


# --- what cannot be ---------------------------------------------------------------------------------------------------------------------

def frozen() -> torch.nn.Module: return net().requires_grad_(False)


class Nothing(torch.nn.Module):
    def forward(self, x): return x


NO_VAL = {"val_loader": None}
# keywords → what the one line says: where, what, and what is accepted
REFUSED = [
    ({"optimizer": "adamww"}, r"keyword  training.optimizer  expected one of adamw, .* found adamww, did you mean adamw\?"),
    ({"optimizer": "gradient_boosting"}, r"keyword  training.optimizer  expected one of adamw, .* found gradient_boosting"),
    ({"optimizer_type": "sdg"}, r"keyword  training.optimizer_type  expected one of adamw, .* found sdg"),
    ({"scheduler": "cosin"}, r"keyword  training.scheduler  expected one of constant, cosine, .* found cosin, did you mean cosine\?"),
    ({"scheduler": "zigzag"}, r"keyword  training.scheduler  expected one of constant, cosine, .* found zigzag"),
    ({"lr": -1}, r"keyword  training.lr  expected at least 0, found -1"),
    ({"lr": "fast"}, r"keyword  training.lr  expected a number, found fast"),
    ({"early_stopping": True, "patience": 3, **NO_VAL}, r"keyword  early_stopping  needs a val_loader, or monitor: train_loss"),
    ({"early_stopping": True, "eval_every": None}, r"keyword  early_stopping  needs eval_every, which is null, or monitor: train_loss"),
    ({"restore_best": True, "run": None, **NO_VAL}, r"keyword  restore_best  needs a val_loader, or monitor: train_loss"),
    ({"restore_best": True, "monitor": "train_loss"}, r"keyword  restore_best  needs a run to keep them in, and run is False"),
    ({"monitor": "val_acc", **NO_VAL}, r"keyword  monitor  val_acc needs a val_loader"),
    ({"scheduler": "plateau", **NO_VAL}, r"keyword  scheduler  plateau hears of no validation; give a val_loader, or monitor: train_loss"),
    ({"min_lr": 1}, r"keyword  min_lr  1 is above lr \(0.0001\), so the rate could never fall; lower it, or raise lr"),
    ({"warmup": 5}, r"keyword  warmup  of 65 steps is longer than the training \(39 steps\)"),
    ({"warmup_steps": 1000}, r"keyword  warmup  of 1,000 steps is longer than the training \(39 steps\)"),
    ({"model": frozen}, r"optimizer  found nothing to train: no parameter of the model wants a gradient; set requires_grad on those that shall learn"),
    ({"model": Nothing, "ema": 0.9}, r"ema  found no weights to average in this model"),
    ({"ema": 1.5}, r"keyword  training.ema  expected less than 1, found 1.5"),
    ({"loss": "mse", "class_weights": [1, 2, 3]}, r"class_weights  is for cross_entropy and nll, and the loss is mse; leave it out"),
    ({"loss": "mse", "label_smoothing": 0.1}, r"label_smoothing  is for cross_entropy, and the loss is mse; leave it out"),
    ({"loss": recall, "class_weights": [1, 2, 3]}, r"class_weights  is for a loss by name, and a function was given; write it into that"),
    ({"freeze": "backbone.*"}, r"freeze  backbone.\* matches no parameter of the model; it has 0, 2"),
    ({"freeze": "0.wieght"}, r"freeze  0.wieght matches no parameter of the model, did you mean 0.weight\?"),
    ({"freeze": "*"}, r"freeze  \* leaves nothing to train; let a part of the model learn from the beginning"),
    ({"groups": [{"match": "llm.*", "lr": 1e-6}]}, r"groups  llm.\* matches no parameter of the model; it has 0, 2"),
    ({"lr": 1e-3, "learning_rate": 1e-4}, r"keyword  learning_rate  sets the same as training.lr \(keyword\); keep one"),
    ({"use_amp": True, "opt_level": "O0"}, r"keyword  opt_level  sets the same as use_amp \(keyword\); keep one"),
    ({"fp16": True, "bf16": True}, r"keyword  bf16  sets the same as fp16 \(keyword\); keep one"),
    ({"monitor_mode": "max"}, r"keyword  monitor_mode  max needs a monitor; say monitor: val_…"),
    ({"epochs": 0}, r"keyword  training.epochs  expected a duration of more than nothing, found 0"),
    ({"learnin_rate": 1}, r"keyword  learnin_rate  unknown key, did you mean learning_rate\?"),
    ({"scheduler": "multistep", "milestones": [2, 1]}, r"keyword  milestones  do not rise, found steps 26, 13; each must be later than the one before"),
    ({"scheduler": "multistep"}, r"milestones  are missing; say when the rate drops: milestones: \[30, 60\] \(epochs\)"),
    ({"channels_last": True}, r"channels_last  is a layout of pictures, and this model has no two-dimensional convolution"),
    ({"gradient_checkpointing": True}, r"gradient_checkpointing  found no blocks: no ModuleList, .*; give the model a gradient_checkpointing_enable\(\)"),
    ({"class_weights": "balance"}, r"keyword  training.class_weights  .*balance.*"),
    ({"clip_value": 1, "precision": "fp16"}, r"(clip_value|precision)  .*fp16.*"),
    ({"monitor": "val_quality", "early_stopping": True}, r"metric val_quality  cannot tell whether less or more of it is better; say metric_mode: min or max"),
]


@pytest.mark.parametrize("words, says", [*REFUSED, pytest.param({"precision": "fp16", "device": "cpu"}, "precision  fp16 needs a CUDA device, found cpu; write bf16 or fp32")], ids=lambda words: str(words).split(" at 0x")[0])
def test_what_cannot_be_is_said_before_training(here, words, says):
    """In one line, when the trainer is made; no run is begun."""
    words = {"model": net, "train_loader": DataLoader(DATA, 8), "val_loader": DataLoader(VAL, 8), "run": False, "quiet": True, "epochs": 3} | words
    words["model"] = words["model"]()
    with pytest.raises(ConfigError, match=f"^(?:{says})$") as told: Trainer(**words)
    assert "\n" not in str(told.value) and not list(here.iterdir())


def test_a_mistake_in_a_file_says_its_line(here):
    """The same, from a file."""
    for line, says in (("  early_stopping: true", "early_stopping  needs"), ("  min_lr: 1", "min_lr  1 is above lr"), ("  optimizer: adamm", "optimizer  expected one of")):
        (here/"c.yaml").write_text(f"training:\n{line}\n")
        with pytest.raises(ConfigError, match=rf"c\.yaml:2:\d+  (training\.)?{says}"): Trainer(net(), DataLoader(DATA, 8), run=False, config="c.yaml")


@pytest.mark.parametrize("words, says", [({"accumulate": 14}, True), ({"accumulate": 13}, False), ({"accumulate": 14, "limit": 2}, False)], ids=str)
def test_a_window_longer_than_the_epoch(words, says, capsys):
    """It may be meant so, the gradient of all the data; a note says it. A smoke run of a big configuration needs none."""
    trainer = trained(epochs=2, quiet=False, **words)
    note = "note: accumulate: 14 (keyword) is more than an epoch has batches (13); each epoch is one update"
    assert trainer.step == 2 and (note in lines_of(capsys)) == says


def test_the_best_at_the_end_is_told(here, capsys):
    trainer = trained(run=None, save_dir="r", epochs=2, quiet=False, restore_best=True, lr=1e-2)
    said = re.search(r"the weights are those of step (\d+), the best  val_loss (\d\.\d+)", lines_of(capsys))
    assert int(said[1]) == trainer.best["step"] and float(said[2]) == pytest.approx(trainer.best["value"], abs=1e-3)
