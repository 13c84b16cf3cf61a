"""A trial leaves no trace: beside every kind of training, inside one, after an error."""
import json

import exact
import pytest
import torch
from exact import Augmented, Stream, at_step, make
from torch.utils.data import DataLoader, TensorDataset

from trainbook import Trainer
from trainbook.run import Run
from trainbook.source import ConfigError
from trainbook.state import split
from trainbook.trial import trial

MEANWHILE = "iterable", "stream_accumulate"  # they keep their own place, and are tried between two trainings


def taken_apart(trainer) -> tuple:
    tree, tensors = split(trainer.state_dict())
    return json.dumps(tree, sort_keys=True), {name: (one.dtype, one.shape, one.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()) for name, one in tensors.items()}


def rows(folder) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in ("time", "seconds")} for row in Run(folder/"run").story().of("step", "eval", "epoch")]


def look(trainer, steps=4) -> None:
    "Steps that would be the end of every training."
    with trial(trainer) as inside:
        for window, _ in zip(inside.windows(), range(steps)): inside.step(window, lr=10.0)


@pytest.mark.parametrize("recipe", [name for name in exact.RECIPES if name != "compiled"])
def test_a_training_that_is_looked_at_ends_like_one_that_is_not(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(exact.Noisy, "pause", 0)
    ends = []
    for looked_at in (False, True):
        inside = [at_step(step, look) for step in (3, 17)] if looked_at and recipe not in MEANWHILE else []
        trainer = make(recipe, tmp_path/str(looked_at), callbacks=inside)
        try:
            if looked_at: look(trainer)
            trainer.train_epoch()
            if looked_at: look(trainer)
            for end in exact.ENDS.get(recipe, (None,)): trainer.train(end)
        finally: torch.use_deterministic_algorithms(False)
        if looked_at and trainer.torn == "": look(trainer)
        ends.append((taken_apart(trainer), rows(tmp_path/str(looked_at))))
    assert ends[0] == ends[1]


class Odd(torch.nn.Module):
    "Everything that a module may keep: a tied weight, a spectral norm, counters, a tensor that is no buffer."

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(6, 6), torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(6, 6))
        self.c, self.calls = torch.nn.Linear(6, 3), 0
        self.b.bias = self.a.bias
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += 1
        if self.training: self.seen, self.last = self.seen + len(x), "training"
        return self.c(self.b(self.a(x)).relu())


class Bank(Trainer):
    "A system with a memory of its own."

    def __init__(self, *inputs, **words):
        super().__init__(*inputs, **words)
        self.bank, self.count = {"means": [torch.zeros(6)]}, 0

    def training_step(self, batch):
        x, y = batch
        self.count += 1
        self.bank["means"][0].mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.loss(self.model(x), y)


def odd(**words):
    torch.manual_seed(0)
    return Bank(Odd(), DataLoader(Augmented(64), 8, shuffle=True), loss="cross_entropy", epochs=1, run=False, quiet=True, **words)


def test_what_modules_and_systems_keep_comes_back():
    trainer = odd()
    trainer.train()
    model = trainer.model
    was = taken_apart(trainer), model.calls, model.seen, float(model.seen), trainer.count, trainer.bank["means"][0].clone(), [*vars(model)]
    everything = lambda: [*model.parameters(), *model.buffers(), *(one for state in trainer.updates[""].optimizer.state.values() for one in state.values())]
    objects = everything()
    look(trainer)
    assert taken_apart(trainer) == was[0] and (model.calls, trainer.count, float(model.seen)) == (was[1], was[4], was[3])
    assert model.seen is was[2] and torch.equal(trainer.bank["means"][0], was[5]) and [*vars(model)] == was[6]
    assert all(one is other for one, other in zip(objects, everything()))


def test_an_error_inside_and_an_interrupt_leave_nothing(monkeypatch):
    trainer = odd()
    trainer.train()
    was = taken_apart(trainer)
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            with trial(trainer) as inside:
                for window, _ in zip(inside.windows(), range(3)): inside.step(window, lr=10.0)
                raise error
        assert taken_apart(trainer) == was
    trainer.train(2)
    assert trainer.step == 16


def test_gradients_and_modes_of_before_come_back():
    trainer = odd()
    trainer.model.eval()
    trainer.model.a.weight.grad = kept = torch.ones(6, 6)
    look(trainer)
    assert not trainer.model.training and not trainer.model.b.training and trainer.model.a.weight.grad is kept and float(kept.sum()) == 36
    assert trainer.model.c.weight.grad is None and not trainer.updates[""].optimizer.state


def test_a_loss_told_from_the_first_batch_stays_untold(capsys):
    trainer = Trainer(torch.nn.Linear(6, 3), DataLoader(exact.DATA, 8), epochs=1, run=False)
    look(trainer)
    assert trainer.loss is None and trainer.config.training.loss is None and capsys.readouterr().out == ""
    trainer.train()
    assert "loss: cross_entropy, told from the first batch" in capsys.readouterr().out


def test_after_gradients_that_are_not_finite_all_is_well():
    trainer = odd()
    with trial(trainer) as inside:
        for window, _ in zip(inside.windows(), range(6)): inside.step(window, lr=1e30)
        assert float(trainer.updates[""].bad) or not torch.isfinite(trainer.model.c.weight).all()
    trainer.train()
    assert trainer.step == 8 and torch.isfinite(trainer.model.c.weight).all()


def test_several_optimizers(tmp_path):
    class Two(Trainer):
        def training_step(self, batch):
            x, y = batch
            for name in ("first", "second"):
                loss = self.loss(self.model(x), y)
                self.backward(loss, name)
                self.update(name)
            return {"loss": loss}

        def validation_step(self, batch): return {"loss": self.loss(self.model(batch[0]), batch[1])}

    model = exact.net()
    optimizers = {"first": torch.optim.Adam(model[0].parameters()), "second": torch.optim.SGD(model[2].parameters(), lr=0.1)}
    trainer = Two(model, exact.loader(), optimizer=optimizers, loss="cross_entropy", epochs=1, run=False, quiet=True)
    was = taken_apart(trainer)
    with trial(trainer) as inside:
        for window, _ in zip(inside.windows(), range(3)): inside.step(window)
        assert taken_apart(trainer) != was
    assert taken_apart(trainer) == was


def test_what_cannot_be_tried_says_so():
    trainer = odd()
    trainer.train_loader = iter([(exact.X[:8], exact.Y[:8])] * 9)
    with pytest.raises(ConfigError, match="can be read once"):
        with trial(trainer) as inside: next(inside.batches())


def test_a_stream_is_refused_while_it_trains():
    said = []

    def ask(trainer):
        try: look(trainer)
        except RuntimeError as error: said.append(str(error))

    trainer = Trainer(exact.net(), DataLoader(Stream(), 8), loss="cross_entropy", epochs=1, run=False, quiet=True, scheduler="constant", callbacks=[at_step(3, ask)])
    trainer.train()
    assert said and "a trial on data that keeps its own place" in said[0] and trainer.step == 13


def test_steps_inside_are_those_of_a_training():
    "With the rate of the schedule and the data of the training, in its order, a trial learns what a training would."
    make_one = lambda: Trainer(exact.net(), DataLoader(TensorDataset(exact.X, exact.Y), 8), loss="cross_entropy", lr=1e-2, scheduler="constant", epochs=1, run=False, quiet=True)
    trained, tried = make_one(), make_one()
    trained.train()
    with trial(tried) as inside:
        for window, _ in zip(inside.windows(), range(13)): inside.step(window)
        assert torch.equal(tried.model[0].weight, trained.model[0].weight)
    assert torch.equal(tried.model[0].weight, make_one().model[0].weight)


def test_what_rests_rests_in_a_trial_too():
    "A norm that a person froze with eval(), one that rests by the config, weights that thaw later."
    model = exact.net(norm=True)
    model[1].eval()
    trainer = Trainer(model, exact.loader(), loss="cross_entropy", freeze={"0.*": 2}, epochs=3, run=False, quiet=True)
    was = {name: one.clone() for name, one in model.state_dict().items()}
    with trial(trainer) as inside:
        for window, _ in zip(inside.windows(), range(3)): inside.step(window, lr=1.0)
        now = model.state_dict()
        assert torch.equal(now["1.running_mean"], was["1.running_mean"]) and torch.equal(now["0.weight"], was["0.weight"])
        assert not torch.equal(now["3.weight"], was["3.weight"])
    assert not model[0].weight.requires_grad and not model[1].training
    for _ in range(2): trainer.train_epoch()
    with trial(trainer) as inside:
        inside.step(next(inside.windows()), lr=1.0)
        assert model[0].weight.requires_grad and not torch.equal(model.state_dict()["0.weight"], was["0.weight"])


class Remembers(torch.nn.Module):
    "Keeps what a person keeps: a state between calls, a list, a cache that is made when it is first wanted."
    def __init__(self):
        super().__init__()
        self.inner, self.h, self.log = exact.net(), torch.zeros(6), {"seen": []}

    def forward(self, x):
        self.h = 0.9 * self.h + 0.1 * x.mean(0).detach()
        self.log["seen"].append(len(x))
        self.cache = x.sum()
        return self.inner(x + self.h)


def test_what_a_module_keeps_beside_weights_comes_back():
    model = Remembers()
    trainer = Trainer(model, exact.loader(), loss="cross_entropy", epochs=1, run=False, quiet=True)
    was, seen = model.h, model.log["seen"]
    look(trainer)
    assert model.h is was and not was.any() and model.log["seen"] is seen and seen == [] and not hasattr(model, "cache")
    trainer.train()
    assert len(seen) == 13


def test_nobody_trains_while_its_weights_are_copied(monkeypatch):
    import threading
    import time

    from trainbook import trial as page
    trainer, copied = odd(), page._copied
    monkeypatch.setattr(page, "_copied", lambda one: (time.sleep(0.05), copied(one))[1])
    thread = threading.Thread(target=look, args=(trainer,))
    thread.start()
    time.sleep(0.1)
    with pytest.raises(RuntimeError, match="another thread"): trainer.train()
    thread.join()
    trainer.train()
    assert trainer.step == 8
