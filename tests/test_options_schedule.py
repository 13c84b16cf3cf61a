"""Schedules where something changes: a rate that is not theirs to change, another kind after a resume, a part of a longer plan, a picture on the way."""
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from exact import X, Y, net
from trainbook.events import Callback
from trainbook.load import load_checkpoint
from trainbook.schedule import Torched
from trainbook.source import ConfigError
from trainbook.trainer import Trainer

DATA, VAL = TensorDataset(X, Y), TensorDataset(X[:20], Y[:20])  # 13 steps an epoch
S = torch.optim.lr_scheduler


class Rates(Callback):
    "The rate that each step was made with, by its number."
    def __init__(self, trainer=None): self.seen = {}
    def step_end(self, trainer): self.seen[trainer.step] = trainer.numbers._waiting._there[-1][0].lr


class At(Callback):
    "Does something after a step."
    def __init__(self, step, work): self.step, self.work = step, work
    def step_end(self, trainer):
        if trainer.step == self.step: self.work(trainer)


def make(epochs=3, folder=None, **words) -> Trainer:
    words = {"loss": "cross_entropy", "quiet": True, "lr": 1e-2} | words
    words |= {"save_dir": str(folder/"r"), "config": {"run": {"on_existing": "resume"}}} if folder else {"run": False}
    return Trainer(net(), DataLoader(DATA, 8), DataLoader(VAL, 20), epochs=epochs, **words)


KINDS = {
    "exponential": lambda o: (S.ExponentialLR(o, 0.9), "epoch"), "cosine of torch": lambda o: (S.CosineAnnealingLR(o, 26), "update"), "step": lambda o: (S.StepLR(o, 1, 0.5), "epoch"),
    "step per update": lambda o: (S.StepLR(o, 1, 0.5), "update"), "of torch on a metric": lambda o: S.ReduceLROnPlateau(o, patience=0),
    "sequential": lambda o: (S.SequentialLR(o, [S.LinearLR(o, 0.1), S.ExponentialLR(o, 0.9)], [5]), "update"),
    "another sequential": lambda o: (S.SequentialLR(o, [S.LinearLR(o, 0.1), S.StepLR(o, 3)], [5]), "update"), "plateau": lambda o: "plateau", "ours": lambda o: "cosine"}


def with_kind(kind, epochs=1, folder=None, decay=0.01, **words) -> Trainer:
    "A trainer with an optimizer that was given, and a scheduler of this kind."
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=decay)
    words |= {"save_dir": str(folder/"r"), "config": {"run": {"on_existing": "resume"}}} if folder else {"run": False}
    return Trainer(model, DataLoader(DATA, 8), DataLoader(VAL, 20), epochs=epochs, loss="cross_entropy", quiet=True, optimizer=optimizer, scheduler=KINDS[kind](optimizer), **words)


def test_a_rate_that_a_scheduler_of_torchs_sets_cannot_be_changed(capsys):
    """A line, from set() and from train(lr=…); the same number is no change; what else can be changed still can."""
    trainer = with_kind("exponential")
    for change in (lambda: trainer.set(lr=1e-5), lambda: trainer.train(lr=1e-5)):
        with pytest.raises(ConfigError, match=r"^lr  1e-05 would change nothing, for the ExponentialLR that was given sets the rate; make a Trainer with another one$"): change()
    trainer.set(lr=1e-2, weight_decay=0.5)
    assert trainer.updates[""].optimizer.param_groups[0]["weight_decay"] == 0.5 and trainer.config.training.lr == 1e-2


def test_nor_from_an_earlier_life(tmp_path, capsys):
    """A change that was remembered, of a schedule that another has replaced: it is said, and what else the checkpoint tells is followed."""
    first = with_kind("ours", folder=tmp_path, callbacks=[At(5, lambda trainer: trainer.set(lr=1e-3))])
    first.train()
    second = with_kind("step", 2, tmp_path, decay=0.3)
    second.console.quiet = False
    second.train()
    assert "not changed: lr  0.001 would change nothing" in capsys.readouterr().out and second.step == 26
    assert second.updates[""].optimizer.param_groups[0]["weight_decay"] == 0.3


@pytest.mark.parametrize("was, now", [("exponential", "plateau"), ("plateau", "exponential"), ("exponential", "cosine of torch"), ("step", "cosine of torch"), ("of torch on a metric", "plateau"), ("plateau", "of torch on a metric"),
                                      ("ours", "exponential"), ("exponential", "ours"), ("ours", "plateau"), ("plateau", "ours"), ("step", "step per update"), ("sequential", "another sequential"), ("sequential", "ours")])
def test_another_kind_after_a_resume(was, now, tmp_path, capsys):
    """It is told, and the rate is what the new one says from there on: a new one of torch's from its beginning, a function of the step at this step."""
    with_kind(was, 1, tmp_path).train()
    rates = Rates()
    again = with_kind(now, 2, tmp_path, callbacks=[rates])
    again.console.quiet = False
    again.train()
    told = [line for line in capsys.readouterr().out.splitlines() if "followed" in line]
    assert len(told) == 1 and told[0].startswith("note: the learning rate followed ") and "from here on it follows " in told[0]
    fresh = Rates()
    with_kind(now, 2, callbacks=[fresh]).train()
    expected = [fresh.seen[step] for step in range(14, 27)] if now == "ours" else [fresh.seen[step] for step in range(1, 14)]
    assert list(rates.seen.values()) == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_kind_goes_on(kind, tmp_path, capsys):
    rates, whole = Rates(), Rates()
    with_kind(kind, 1, tmp_path).train()
    again = with_kind(kind, 2, tmp_path, callbacks=[rates])
    again.console.quiet = False
    again.train()
    assert "followed" not in capsys.readouterr().out
    if kind == "ours": return  # the end has moved
    with_kind(kind, 2, callbacks=[whole]).train()
    assert list(rates.seen.values()) == [whole.seen[step] for step in range(14, 27)]


@pytest.mark.parametrize("kind", ["plateau", "step", "ours"])
def test_a_checkpoint_that_does_not_say_its_kind(kind):
    """From before it was written down: it is loaded as ever."""
    first, second = with_kind(kind), with_kind(kind, 2)
    first.train()
    state = first.state_dict()
    assert state["trainer"].pop("followed") == {"plateau": "plateau", "step": "StepLR per epoch", "ours": "cosine"}[kind]
    second.load_state_dict(state)
    assert second.schedule.state_dict() == first.schedule.state_dict()


@pytest.mark.parametrize("scheduler", ["onecycle of torch", "plateau", "cosine"])
def test_the_schedule_drawn_in_the_middle(scheduler):
    """One that cannot look back is drawn from now on, up to its end, and says so."""
    drawn, model = {}, net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    given = (S.OneCycleLR(optimizer, 1e-2, 26), "update") if "torch" in scheduler else scheduler
    look = At(14, lambda trainer: drawn.update(axes=trainer.plot_schedule().axes[0]))
    rates = Rates()
    Trainer(model, DataLoader(DATA, 8), DataLoader(VAL, 20), run=False, quiet=True, epochs=2, loss="cross_entropy", optimizer=optimizer, scheduler=given, callbacks=[rates, look]).train()
    title, line = drawn["axes"].get_title(), drawn["axes"].lines[0]
    first = 0 if scheduler == "cosine" else 14
    assert title == {"onecycle of torch": "OneCycleLR, from now on", "plateau": "plateau, from now on", "cosine": "cosine"}[scheduler]
    assert list(line.get_xdata()) == list(range(first, 26)) and list(line.get_ydata()) == pytest.approx([rates.seen[step + 1] for step in range(first, 26)])


def test_a_look_beyond_the_end_of_a_scheduler():
    """It stays at its last rate, and moves nobody's optimizer."""
    optimizer = torch.optim.AdamW(net().parameters(), lr=1e-2)
    one = Torched((S.OneCycleLR(optimizer, 1e-2, 26)), "update")
    before, rates = one.scheduler.state_dict() | {}, one.ahead(40)
    assert len(rates) == 40 and len(set(rates[26:])) == 1 and max(rates) == pytest.approx(1e-2, rel=1e-2) and one.scheduler.state_dict() == before


PLANS = {"milestones": {"scheduler": "multistep", "milestones": [2, 4], "gamma": 0.5}, "step and a long warm-up": {"scheduler": "step", "step_size": 1, "gamma": 0.5, "warmup": 2},
         "held, but not ended": {"scheduler": "multistep", "milestones": [2, 4], "gamma": 0.5, "after_end": "hold"}, "a long rise": {"scheduler": "cosine", "warmup": 2},
         "a long rise, held": {"scheduler": "cosine", "warmup": 2, "after_end": "hold"}, "plateau": {"scheduler": "plateau", "warmup": 2}}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("call", [1, "20 steps"])
def test_a_part_of_a_longer_plan(plan, call):
    """One epoch of five, then the rest: the same rates as in one go."""
    parts, whole = Rates(), Rates()
    trainer = make(5, callbacks=[parts], **PLANS[plan])
    trainer.train(num_epochs=call)
    assert trainer.step == (13 if call == 1 else 20)
    trainer.train()
    make(5, callbacks=[whole], **PLANS[plan]).train()
    assert parts.seen == pytest.approx(whole.seen) and len(parts.seen) == 65 and trainer.ends == (() if plan.startswith(("milestones", "step", "held")) else trainer.ends)


@pytest.mark.parametrize("plan", ["milestones", "held, but not ended", "a long rise, held"])
def test_a_part_of_a_longer_plan_in_another_life(plan, tmp_path):
    parts, whole = Rates(), Rates()
    make(5, tmp_path, **PLANS[plan]).train(num_epochs=1)
    make(5, tmp_path, callbacks=[parts], **PLANS[plan]).train()
    make(5, callbacks=[whole], **PLANS[plan]).train()
    assert list(parts.seen.values()) == pytest.approx([whole.seen[step] for step in range(14, 66)])


@pytest.mark.parametrize("words, says", [({"scheduler": "multistep", "milestones": [2, 6]}, "milestones  lie beyond the end"), ({"scheduler": "cosine", "warmup": 6}, "longer than the training"),
                                         ({"scheduler": "plateau", "warmup": 6}, "longer than the training")], ids=str)
def test_a_plan_beyond_its_own_end_is_an_error(words, says):
    """Also where it is changed: the end that is set is the config's own."""
    with pytest.raises(ConfigError, match=says): make(5, **words)
    with pytest.raises(ConfigError, match=says): make(7, **words).set(epochs=5)
    trainer = make(7, **words)
    trainer.train(num_epochs=1)
    with pytest.raises(ConfigError, match=says): trainer.set(epochs=5)


def test_another_milestone_in_added_epochs(tmp_path):
    make(2, tmp_path, scheduler="multistep", milestones=[1], gamma=0.5).train()
    rates = Rates()
    make(4, tmp_path, scheduler="multistep", milestones=[1, 3], gamma=0.5, callbacks=[rates]).train()
    assert [rates.seen[step] for step in (27, 39, 40, 52)] == [5e-3, 5e-3, 2.5e-3, 2.5e-3]


def test_an_optimizer_that_its_scheduler_has_moved_already():
    """The rate of the config is the one that it began with; the same number may be said."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = S.SequentialLR(optimizer, [S.LinearLR(optimizer, 0.1, total_iters=5), S.ExponentialLR(optimizer, 0.9)], [5])
    for said in ({}, {"lr": 1e-2}):
        trainer = Trainer(model, DataLoader(DATA, 8), run=False, quiet=True, epochs=1, loss="cross_entropy", optimizer=optimizer, scheduler=(scheduler, "update"), **said)
        assert trainer.config.training.lr == 1e-2 and trainer.updates[""].lr == pytest.approx(1e-3)
    with pytest.raises(ConfigError, match=r"lr  is 0.001, and the optimizer that was given has 0.01"): Trainer(model, DataLoader(DATA, 8), run=False, optimizer=optimizer, scheduler=(scheduler, "update"), lr=1e-3)


@pytest.mark.parametrize("change", [{"lr": 1e-3}, {"min_lr": 5e-4}], ids=str)
def test_a_group_below_the_floor_is_told(change, capsys):
    """In one line, when it is changed; while it trains, training goes on with what there was."""
    words = {"groups": [{"match": "0.*", "lr": 1e-4}], "scheduler": "cosine", "min_lr": 5e-5}
    with pytest.raises(ConfigError, match=r"^min_lr  \S+ would be above the rate of the group 0\.\* \(\S+\), which could never fall; lower min_lr, or choose another lr$"): make(**words).set(**change)
    trainer = make(1, callbacks=[At(5, lambda trainer: trainer.change({f"training.{key}": value for key, value in change.items()}))], **words)
    trainer.console.quiet = False
    trainer.train()
    assert "not changed: min_lr  " in capsys.readouterr().out and trainer.step == 13 and trainer.config.training.lr == 1e-2
    make(**words).set(lr=5e-3)  # to the floor itself
    make(**(words | {"scheduler": "constant"})).set(**change)


def test_the_kind_lies_beside_the_state(tmp_path):
    with_kind("step", folder=tmp_path).train()
    assert load_checkpoint(tmp_path/"r", quiet=True).state["trainer"]["followed"] == "StepLR per epoch"
