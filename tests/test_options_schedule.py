"""Schedules where something changes: a rate that is not theirs to change, another kind after a resume, a part of a longer plan, a picture on the way."""
import re

import pytest
import torch
from torch.utils.data import DataLoader

from exact import DATA, VAL, Rates, net
from trainbook.events import Callback
from trainbook.load import load_checkpoint
from trainbook.schedule import Torched, followed
from trainbook.source import ConfigError
from trainbook.trainer import Trainer

S = torch.optim.lr_scheduler


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
    assert parts.seen == pytest.approx(whole.seen) and len(parts.seen) == 65 and trainer.ends == ((13 if call == 1 else 20,) if "rise" in plan else ())


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


# --- a step schedule where epochs differ ------------------------------------------------------------------------------------------------

def with_phases(epochs, seen, **words) -> Trainer:
    "Two epochs of 2 updates, then of 10."
    words = {"scheduler": "step", "gamma": 0.5, "lr": 1.0, "optimizer": "sgd", "loss": "cross_entropy", "run": False, "quiet": True} | words
    return Trainer(net(), DataLoader(DATA, 10), curriculum={0: range(20), 2: "all"}, epochs=epochs, callbacks=[seen], **words)


def rates_by_epoch(seen: Rates, *lengths) -> list[list[float]]:
    "The rates of each epoch, those that differ."
    values = iter(seen.seen.values())
    return [[*dict.fromkeys(next(values) for _ in range(length))] for length in lengths]


@pytest.mark.parametrize("words, expected", [
    ({"step_size": 1}, [[1], [0.5], [0.25], [0.125]]), ({"step_size": 9}, [[1], [1], [1], [1]]), ({"step_size": 4}, [[1], [1], [1], [1]]), ({"step_size": 3}, [[1], [1], [1], [0.5]]),
    ({"step_size": "2 steps"}, [[1], [0.5], [0.5**n for n in range(2, 7)], [0.5**n for n in range(7, 12)]]), ({"step_size": 1, "warmup": 2}, [[0.25, 0.5], [0.75, 1], [1], [0.5]])], ids=str)
def test_a_step_schedule_with_a_curriculum(words, expected):
    """Epochs are those of the curriculum; a size beyond the end drops never; it is still called step."""
    trainer = with_phases(4, seen := Rates(), **words)
    trainer.train()
    assert rates_by_epoch(seen, 2, 2, 10, 10) == expected and repr(trainer.schedule).startswith("Schedule(kind='step'") and followed(trainer.schedule) == "step"


@pytest.mark.parametrize("after_end, expected", [(None, [0.125, 0.0625]), ("hold", [0.25, 0.25]), ("restart", [1, 0.5])])
def test_a_step_schedule_with_a_curriculum_after_its_end(after_end, expected):
    """It is held, drawn on, or begins anew, counted in the epochs that run by then."""
    trainer = with_phases(3, seen := Rates(), step_size=1, after_end=after_end)
    trainer.train()
    trainer.train(num_epochs=5)
    assert rates_by_epoch(seen, 2, 2, 10, 10, 10) == [[1], [0.5], [0.25], *([one] for one in expected)]


def test_many_small_drops_are_all_there():
    """Of a factor near one the last drops count as much as the first."""
    trainer = with_phases(150, Rates(), step_size=0.1, gamma=0.9999)
    assert trainer.schedule.milestones == tuple(range(1, 4 + 148 * 10))


# --- which way is better ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode, words, says", [
    ("min", {"monitor": "val_acc"}, r"^scheduler  ReduceLROnPlateau waits for less \(mode min\), and val_acc is better when it is more; make it with mode=\"max\"$"),
    ("max", {}, r"^scheduler  ReduceLROnPlateau waits for more \(mode max\), and val_loss is better when it is less; make it with mode=\"min\"$"),
    ("min", {"monitor": "val_quality", "monitor_mode": "max"}, "val_quality is better when it is more"), ("max", {"monitor": "val_acc"}, None), ("min", {}, None)], ids=str)
@pytest.mark.parametrize("pair", [False, True])
def test_a_plateau_of_torchs_waits_for_what_is_better(mode, words, says, pair):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    one = S.ReduceLROnPlateau(optimizer, mode)
    make = lambda: Trainer(model, DataLoader(DATA, 8), DataLoader(VAL, 20), run=False, quiet=True, loss="cross_entropy", optimizer=optimizer, scheduler=(one, "evaluation") if pair else one, **words)
    if not says: assert make().schedule.hears
    else:
        with pytest.raises(ConfigError, match=says): make()


# --- what is told of the rate is what happens -------------------------------------------------------------------------------------------

def rate(text: str) -> float: return pytest.approx(float(text), rel=1e-2)


@pytest.mark.parametrize("change", [{}, {"lr": 5e-3}, {"lr": 5e-3, "epochs": 3}], ids=str)
def test_the_rate_that_is_told_is_the_next_one(change, tmp_path, capsys):
    """Also where a change waits in the inbox: in the middle, before the end that was meant; and after it, from the rate that was used."""
    rates = Rates()
    trainer = make(6, tmp_path, callbacks=[rates, At(20, lambda trainer: trainer.stop())])
    trainer.train()
    trainer.console.quiet = False
    if change: trainer.set(**change)
    trainer.train(num_epochs=3)
    said = re.findall(r"the learning rate goes on at (\S+)", capsys.readouterr().out)
    assert len(said) == 1 and rates.seen[21] == rate(said[0])
    if change: trainer.set(lr=2e-3)
    trainer.train(num_epochs=5)
    was, now = re.search(r"training goes on after its end at step 39, to step 65: stretch, .* the learning rate goes from (\S+) to (\S+);", capsys.readouterr().out).groups()
    assert (rates.seen[39], rates.seen[40]) == (rate(was), rate(now))


def test_an_end_that_is_moved_while_it_trains_is_told_at_once(capsys):
    trainer = make(4, callbacks=[rates := Rates(), At(5, lambda trainer: trainer.set(epochs=2, lr=5e-3))])
    trainer.console.quiet = False
    trainer.train()
    said = re.findall(r"the cosine schedule ends at step 26 instead of 52: the learning rate goes on at (\S+)", capsys.readouterr().out)
    assert len(said) == 1 and rates.seen[6] == rate(said[0]) and trainer.step == 26
