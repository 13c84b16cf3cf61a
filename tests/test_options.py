"""Each option of the trainer: it changes what it says, in the numbers that it says, and a resume is exact with it on (the recipes of exact.py)."""
import math

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from exact import DATA, VAL, X, Y, Rates, blocks, net
from trainbook.events import Callback
from trainbook.ledger import CHANGEABLE
from trainbook.load import load_checkpoint
from trainbook.metrics import NonFinite
from trainbook.source import ConfigError
from trainbook.trainer import Trainer



def make(model=None, epochs=3, **words) -> Trainer:
    return Trainer(model or net(), DataLoader(DATA, 8, shuffle=True), DataLoader(VAL, 8), **({"run": False, "quiet": True, "lr": 1e-2, "epochs": epochs, "loss": "cross_entropy"} | words))


def rates(**words) -> list[float]:
    seen = Rates()
    make(callbacks=[seen], **words).train()
    return [*seen.seen.values()]


def by_torch(build, steps=39, per=1) -> list[float]:
    "What a scheduler of torch's sets, step by step."
    optimizer, seen = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2), []
    scheduler = build(optimizer)
    for step in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (step + 1) % per == 0: scheduler.step()
    return seen


S = torch.optim.lr_scheduler
SCHEDULES = {
    "cosine": ({"min_lr": 1e-3}, lambda optimizer: S.CosineAnnealingLR(optimizer, 39, 1e-3), 1),
    "step": ({"step_size": 2, "gamma": 0.5}, lambda optimizer: S.StepLR(optimizer, 2, 0.5), 13),
    "multistep": ({"milestones": [1, 2], "gamma": 0.5}, lambda optimizer: S.MultiStepLR(optimizer, [1, 2], 0.5), 13),
    "linear": ({}, lambda optimizer: S.LinearLR(optimizer, 1.0, 0.0, 39), 1),
    "polynomial": ({"power": 2}, lambda optimizer: S.PolynomialLR(optimizer, 39, 2), 1),
    "onecycle": ({}, lambda optimizer: S.OneCycleLR(optimizer, 1e-2, 39), 1),
    "constant": ({}, lambda optimizer: S.ConstantLR(optimizer, 1.0), 1)}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_torchs(name):
    """Step by step, through the trainer."""
    words, build, per = SCHEDULES[name]
    for ours, theirs in zip(rates(scheduler=name, **words), by_torch(build, per=per), strict=True):
        assert math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize("name", [*SCHEDULES, "plateau"])
def test_any_schedule_warms_up(name):
    words = {} if name == "plateau" else SCHEDULES[name][0]
    found = rates(scheduler=name, warmup="5 steps", **words)
    assert found[0] < found[1] < found[2] < found[3] < found[4] and found != rates(scheduler=name, **words)


def test_a_plateau_lowers_the_rate():
    """Of a loss that cannot improve: a model whose rate is far too high."""
    found = rates(scheduler="plateau", plateau_patience=1, gamma=0.1, weight_decay=0, monitor="val_acc", metrics={"acc": lambda outputs, targets: 0.5}, epochs=6)
    assert [found[13 * epoch] for epoch in range(6)] == pytest.approx([1e-2, 1e-2, 1e-2, 1e-3, 1e-3, 1e-4])


@pytest.mark.parametrize("per, rate", [("epoch", lambda step: 1e-2 * 0.9 ** (step // 13)), ("update", lambda step: 1e-2 * 0.9 ** step)])
def test_a_scheduler_of_torchs(per, rate):
    model, seen = net(), Rates()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    Trainer(model, DataLoader(DATA, 8), run=False, quiet=True, epochs=3, loss="cross_entropy", optimizer=optimizer, scheduler=(S.ExponentialLR(optimizer, 0.9), per), callbacks=seen).train()
    assert [*seen.seen.values()] == pytest.approx([rate(step) for step in range(39)])


def test_a_scheduler_of_torchs_says_when_it_moves():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ConfigError, match="after each epoch, or after each update"):
        Trainer(model, DataLoader(DATA, 8), run=False, optimizer=optimizer, scheduler=S.ExponentialLR(optimizer, 0.9))


@pytest.mark.parametrize("after_end, rate", [("hold", lambda first, whole, step: first[-1]), ("stretch", lambda first, whole, step: whole[step]), ("restart", lambda first, whole, step: first[step - 26])])
def test_training_on_after_the_end(after_end, rate, capsys):
    seen = Rates()
    trainer = make(epochs=2, after_end=after_end, callbacks=[seen])
    trainer.train()
    trainer.console.quiet = False
    trainer.train(num_epochs=4)
    first, whole = rates(epochs=2), rates(epochs=4)
    assert [*seen.seen.values()][26:] == pytest.approx([rate(first, whole, step) for step in range(26, 52)])
    assert f"training goes on after its end at step 26, to step 52: {after_end}, " in capsys.readouterr().out


def test_early_stopping(capsys):
    """After so many evaluations without improvement; it has finished then, and goes on where a person wants more."""
    class Told(Trainer):
        def validation_step(self, batch): return {"acc": [0.5, 0.6, 0.55, 0.55, 0.7, 0.9][self.epoch]}
    trainer = Told(net(), DataLoader(DATA, 8), DataLoader(VAL, 20), run=False, epochs=6, loss="cross_entropy", monitor="val_acc", early_stopping=True, patience=2)
    trainer.train()
    assert trainer.epoch == 4 and "val_acc has not improved for 2 evaluations; this is the end" in capsys.readouterr().out
    trainer.train()
    assert trainer.epoch == 4 and len(trainer.history) == 4 and "is the end" in capsys.readouterr().out
    trainer.train(num_epochs=5)
    assert trainer.epoch == 5


def test_min_delta_is_what_counts():
    kept = {}
    for delta in (0.0, 10.0):
        trainer = make(epochs=8, early_stopping=True, patience=2, min_delta=delta)
        trainer.train()
        kept[delta] = trainer.epoch
    assert kept[10.0] == 3 < kept[0.0]


def test_gradient_checkpointing_changes_no_bit():
    models = [blocks() for _ in range(2)]
    for model, on in zip(models, (False, True)): make(model, gradient_checkpointing=on).train()
    assert all(map(torch.equal, *[model.state_dict().values() for model in models])) and list(models[0].state_dict()) == list(models[1].state_dict())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in its own compiler
def test_a_compiled_model_keeps_its_names(tmp_path):
    """It is really compiled, trains to the same weights up to rounding, and its checkpoint is one of a model like any other."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    models, words = [net() for _ in range(3)], {"loss": "cross_entropy", "lr": 1e-2, "quiet": True, "scheduler": "constant"}
    made = lambda model, **more: Trainer(model, DataLoader(DATA, 10), **(words | more))
    made(models[0], run=False, epochs=2).train()
    made(models[1], compile=True, epochs=1, save_dir=str(tmp_path/"r")).train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    again = made(models[2], compile=True, epochs=2, save_dir=str(tmp_path/"r"), config={"run": {"on_existing": "resume"}})
    again.train()
    assert again.step == 20 and list(load_checkpoint(tmp_path/"r", quiet=True)["model_state_dict"]) == list(models[0].state_dict())
    for one, other in zip(models[0].parameters(), models[2].parameters()): assert torch.allclose(one, other, atol=1e-4)


def test_channels_last_is_the_models_layout():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 3))
    data = TensorDataset(torch.randn(16, 1, 4, 4), torch.randint(0, 3, (16,)))
    Trainer(model, DataLoader(data, 8), run=False, quiet=True, epochs=1, channels_last=True).train()
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("words, loss", [({"label_smoothing": 0.2}, {"label_smoothing": 0.2}), ({"class_weights": [1, 5, 1]}, {"weight": torch.tensor([1., 5, 1])}),
                                         ({"class_weights": {1: 5}}, {"weight": torch.tensor([1., 5])}),
                                         ({"class_weights": "balanced"}, {"weight": (100 / (3 * torch.bincount(Y).double())).float()})], ids=str)
def test_what_a_config_says_of_the_loss(words, loss):
    """The same weights as with the loss made by hand; others than without; and written into the loss that is told from the first batch."""
    models, more = [net() for _ in range(4)], {"weight": torch.cat([loss["weight"], torch.ones(3 - len(loss["weight"]))])} if "weight" in loss else loss
    words = {"class_weights": {1: 5, 2: 1}} if words == {"class_weights": {1: 5}} else words
    made = [{"loss": "cross_entropy", **words}, {"loss": torch.nn.CrossEntropyLoss(**more)}, {"loss": None, **words}, {"loss": "cross_entropy"}]
    for model, one in zip(models, made): Trainer(model, DataLoader(DATA, 8), run=False, quiet=True, lr=1e-2, epochs=2, **one).train()
    assert torch.equal(models[0][0].weight, models[1][0].weight) and torch.equal(models[0][0].weight, models[2][0].weight)
    assert not torch.equal(models[0][0].weight, models[3][0].weight)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_clipping_by_value(clip):
    """As torch's clip_grad_value_, and then by norm; an infinite gradient is still seen."""
    models = [net() for _ in range(2)]
    Trainer(models[0], DataLoader(DATA, 8), run=False, quiet=True, lr=1e-2, weight_decay=0.01, epochs=2, loss="cross_entropy", scheduler="constant", clip_value=0.01, clip=clip).train()
    optimizer = torch.optim.AdamW(models[1].parameters(), lr=1e-2, weight_decay=0.01)
    for _ in range(2):
        for x, y in DataLoader(DATA, 8):
            torch.nn.functional.cross_entropy(models[1](x), y).backward()
            torch.nn.utils.clip_grad_value_(models[1].parameters(), 0.01)
            if clip: torch.nn.utils.clip_grad_norm_(models[1].parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters()): assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)
    class Infinite(Trainer):
        def training_step(self, batch): return super().training_step(batch) * (torch.inf if self.step == 3 else 1)
    with pytest.raises(NonFinite): Infinite(net(), DataLoader(DATA, 8), run=False, quiet=True, clip_value=0.01).train()


def test_an_average_of_the_weights(tmp_path):
    """Evaluated, predicted with, saved as the model, loaded as the model; training goes on with the weights that train."""
    model, kept = net(), {}
    class Mine(Callback):
        def fit_start(self, trainer): self.value, self.n = [one.detach().clone() for one in model.parameters()], 0
        def step_end(self, trainer):
            self.n += 1
            decay = min(0.9, (1 + self.n) / (10 + self.n))
            self.value = [decay * a + (1 - decay) * b.detach() for a, b in zip(self.value, model.parameters())]
        def eval_end(self, trainer):
            inner = net()
            for one, value in zip(inner.parameters(), self.value): one.data = value
            kept[trainer.step] = torch.nn.functional.cross_entropy(inner(X[:20]), Y[:20]).item(), trainer.metrics["val_loss"]
    words = {"loss": "cross_entropy", "lr": 1e-2, "epochs": 3, "quiet": True}
    mine = Mine()
    trainer = Trainer(model, DataLoader(DATA, 8), DataLoader(VAL, 20), ema=0.9, save_dir=str(tmp_path/"r"), callbacks=mine, **words)
    trainer.train()
    plain = net()
    Trainer(plain, DataLoader(DATA, 8), run=False, **words).train()
    assert all(map(torch.equal, model.parameters(), plain.parameters())) and len(kept) == 3
    for ours, theirs in kept.values(): assert ours == pytest.approx(theirs, rel=1e-5)
    saved = load_checkpoint(tmp_path/"r", quiet=True)["model_state_dict"]
    for one, value, now in zip(mine.value, saved.values(), model.parameters()): assert torch.allclose(one, value, atol=1e-6) and not torch.equal(value, now)
    with trainer.averaged(): expected = model(X)
    assert torch.equal(trainer.predict(DataLoader(DATA, 100)), expected)
    without = Trainer(net(), DataLoader(DATA, 8), save_dir=str(tmp_path/"r"), config={"run": {"on_existing": "resume"}}, **words).resume_from_checkpoint()
    assert torch.equal(without.model[0].weight, model[0].weight)


def test_the_best_weights_at_the_end(tmp_path):
    class Told(Trainer):
        def validation_step(self, batch): return {"acc": [0.5, 0.9, 0.6, 0.7][self.epoch]}
    seen = {}
    class Keeps(Callback):
        def eval_end(self, trainer): seen[trainer.epoch] = trainer.model[0].weight.detach().clone()
    trainer = Told(net(), DataLoader(DATA, 8), DataLoader(VAL, 20), loss="cross_entropy", lr=1e-2, epochs=4, quiet=True, monitor="val_acc", restore_best=True, save_dir=str(tmp_path/"r"), callbacks=Keeps())
    trainer.train()
    assert torch.equal(trainer.model[0].weight, seen[1]) and not torch.equal(seen[1], seen[3])
    assert "the weights are those of step 26, the best  val_acc 0.9000" in (trainer.run.folder/"train.log").read_text()
    with pytest.raises(RuntimeError, match="has ended with its best weights; resume_from_checkpoint"): trainer.train(num_epochs=5)
    trainer.resume_from_checkpoint()
    assert torch.equal(trainer.model[0].weight, seen[3])


@pytest.mark.parametrize("bad, ends", [((3, 9), 26), ((3, 5, 9), None)])
def test_a_limit_on_steps_that_are_left_out(bad, ends):
    """Two may be; the third is the end, and the count is part of the state."""
    class Explodes(Trainer):
        def training_step(self, batch): return super().training_step(batch) * (math.nan if self.step in bad else 1)
    trainer = Explodes(net(), DataLoader(DATA, 8), run=False, quiet=True, epochs=2, loss="cross_entropy", nonfinite=2)
    if ends: trainer.train()
    else:
        with pytest.raises(NonFinite, match="it is number 3, and nonfinite: 2 leaves out no more"): trainer.train()
    assert trainer.state_dict()["trainer"]["numbers"]["skipped"] == len(bad) and all(one.isfinite().all() for one in trainer.model.parameters())


def test_the_summary_names_what_learns():
    text = make(freeze={"0.*": 2}, no_decay=True).summary()
    assert "163" in text and "no decay" in text and "until epoch 2" in text


def test_the_schedule_as_a_picture():
    trainer = make(scheduler="onecycle")
    assert trainer.plot_schedule()._repr_png_()[:4] == b"\x89PNG" and trainer.plot_schedule().axes and trainer.step == 0


# --- numbers that are changed while it trains -------------------------------------------------------------------------------------------

CHANGES = {  # key → what it becomes, who has it
    "lr": (5e-3, lambda it: it.updates[""].optimizer.param_groups[0]["initial_lr"]), "weight_decay": (0.5, lambda it: it.updates[""].optimizer.param_groups[0]["weight_decay"]),
    "momentum": (0.5, lambda it: it.updates[""].optimizer.param_groups[0]["momentum"]), "min_lr": (1e-4, lambda it: it.schedule.min_lr), "gamma": (0.7, lambda it: it.schedule.gamma),
    "clip": (2.0, lambda it: it.updates[""].clip), "clip_value": (3.0, lambda it: it.updates[""].clip_value), "epochs": (4, lambda it: it.plan.end.amount),
    "patience": (2, lambda it: it.patience.patience + 1), "min_delta": (0.25, lambda it: it.patience.min_delta), "save_interval": ("4 steps", lambda it: f"{it.record.manager.save_interval.amount:g} steps"),
    "keep_last_n": (1, lambda it: it.record.manager.keep_last_n), "eval_every": (2, lambda it: it.plan.eval_epochs), "ema": (0.5, lambda it: it.average.decay)}


@pytest.mark.parametrize("key", CHANGEABLE)
def test_what_can_be_changed_is_changed_where_it_is_used(key, tmp_path):
    """While it trains; not only in the config."""
    value, used = CHANGES[key]
    found = []
    class Changes(Callback):
        def step_end(self, trainer):
            if trainer.step == 3: trainer.set(**{key: value})
            if trainer.step in (3, 5): found.append(used(trainer))
    make(epochs=2, run=None, save_dir=str(tmp_path/"r"), optimizer="sgd", momentum=0.9, scheduler="step", gamma=0.9, ema=0.9, early_stopping=True, patience=5, callbacks=[Changes()]).train()
    assert found[0] != value and found[1] == value


def test_a_patience_that_was_changed_ends_it():
    class Told(Trainer):
        def validation_step(self, batch): return {"loss": 1.0}
    trainer = Told(net(), DataLoader(DATA, 8), DataLoader(VAL, 20), run=False, quiet=True, epochs=20, loss="cross_entropy", early_stopping=True, patience=5)
    trainer.set(patience=2)
    trainer.train()
    assert trainer.epoch == 3


def test_what_changes_nothing_is_no_change():
    with pytest.raises(ConfigError, match="label_smoothing  cannot be changed while training"): make().set(label_smoothing=0.3)
    for words, change in (({}, 0.5), ({"ema": 0.9}, None)):
        with pytest.raises(ConfigError, match=r"^ema  \S+ cannot be turned on or off while training; make a new Trainer$"): make(**words).set(ema=change)


@pytest.mark.parametrize("words, told", [({"patience": 5}, True), ({"scheduler": "plateau", "patience": 3}, True), ({"patience": 5, "early_stopping": True}, False), ({"patience": 5, "early_stopping": False}, False), ({}, False)], ids=str)
def test_a_patience_that_nobody_has_is_told(words, told, capsys):
    trainer = make(epochs=1, **words)
    trainer.console.quiet = False
    trainer.train()
    assert (f"note: patience: {words.get('patience')} (keyword) changes nothing without early_stopping: true; of a plateau it is plateau_patience\n" in capsys.readouterr().out) == told
