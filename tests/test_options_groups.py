"""Groups, no decay and freezing in a training: exact under kill and resume, equal to a loop by hand, with an effect, and refused in one line."""
import signal

import pytest
import torch
import torch.nn.functional as F
from exact import RECIPES, X, Y, at_event, make, net, outcome
from torch.utils.data import DataLoader, TensorDataset

from trainbook.events import Callback
from trainbook.source import ConfigError
from trainbook.trainer import Trainer

OURS = {"groups", "freeze", "thaw", "thaw_groups"}


# --- exact ----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("die", [("step", 8), ("step", 12), ("step", 15), ("epoch_start", 2), ("epoch_start", 3), ("epoch_end", 2), ("eval_end", 3)], ids=str)
@pytest.mark.parametrize("recipe", ["groups", "thaw"])
def test_killed_around_a_thawing(server, unhurt, recipe, die, tmp_path):
    """In an epoch before it, at its beginning, in the epoch after; test_resume kills the other recipes too."""
    assert server.live(tmp_path, recipe, die=die) == -signal.SIGKILL, (tmp_path/"out-0").read_text()
    assert server.live(tmp_path, recipe, life=1) == 0, (tmp_path/"out-1").read_text()
    assert outcome(tmp_path) == unhurt(recipe)[0]


@pytest.mark.parametrize("recipe", sorted(OURS))
def test_killed_late(server, unhurt, recipe, tmp_path):
    step = 20 if RECIPES[recipe][3].get("accumulate") else 40
    assert server.live(tmp_path, recipe, die=("step", step)) == -signal.SIGKILL, (tmp_path/"out-0").read_text()
    assert server.live(tmp_path, recipe, life=1) == 0, (tmp_path/"out-1").read_text()
    assert outcome(tmp_path) == unhurt(recipe)[0]


# --- effect, and the same as by hand --------------------------------------------------------------------------------------------------

def trainer_of(model=None, optimizer="adamw", **words) -> Trainer:
    return Trainer(net(norm=True) if model is None else model, DataLoader(TensorDataset(X, Y), 10), loss="cross_entropy", optimizer=optimizer, run=False, quiet=True,
                   **({"epochs": 4, "lr": 1e-2, "scheduler": "constant"} | words))


def by_hand(optimizer_of, before=lambda model, epoch: None) -> torch.nn.Module:
    model = net(norm=True)
    optimizer = optimizer_of(model)
    for epoch in range(4):
        model.train()
        before(model, epoch)
        for x, y in zip(X.split(10), Y.split(10)):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def adamw(parameters, **words): return torch.optim.AdamW(parameters, lr=1e-2, fused=True, **words)


def thaws(model, epoch):
    model[0].requires_grad_(epoch >= 2)
    model[1].requires_grad_(epoch >= 2).train(epoch >= 2)


def rests(model, epoch): model[1].requires_grad_(False).eval()


OPTIONS = {
    "groups": ({"groups": [{"match": "0.*", "lr": 1e-3, "weight_decay": 0}]}, (lambda model: adamw([{"params": model[0].parameters(), "lr": 1e-3, "weight_decay": 0}, {"params": model[1:].parameters()}]),)),
    "no_decay": ({"no_decay": True, "weight_decay": 0.3},
                 (lambda model: adamw([{"params": [one for one in model.parameters() if one.dim() > 1], "weight_decay": 0.3},
                                       {"params": [one for one in model.parameters() if one.dim() < 2], "weight_decay": 0}]),)),
    "freeze": ({"freeze": "1.*"}, (lambda model: adamw(model.parameters()), rests)),
    "thaw": ({"freeze": {"[01].*": 2}}, (lambda model: adamw(model.parameters()), thaws))}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_as_by_hand(name):
    words, wanted = OPTIONS[name]
    trainer = trainer_of(**words)
    trainer.train()
    found, wanted, plain = trainer.model.state_dict(), by_hand(*wanted).state_dict(), by_hand(lambda model: adamw(model.parameters())).state_dict()
    assert not [key for key in wanted if not torch.equal(found[key], wanted[key])]
    assert [key for key in wanted if not torch.equal(found[key], plain[key])]


def test_the_optimizers_state_appears_at_the_thawing():
    seen = []
    class Looks(Callback):
        def epoch_start(self, trainer): seen.append((len(trainer.updates[""].optimizer.state), trainer.model[1].training, trainer.model[1].num_batches_tracked.item()))
    trainer_of(freeze={"0.*": 2, "1.*": 1}, callbacks=[Looks()], val_loader=DataLoader(TensorDataset(X, Y), 50)).train()
    assert seen == [(0, False, 0), (2, True, 0), (4, True, 10), (6, True, 20)]


def test_a_model_in_eval_mode_and_a_second_trainer_of_it():
    model = net(norm=True).eval()
    trainer_of(model, freeze=["1.*"], epochs=1).train()
    assert model[1].num_batches_tracked == 0 and not model[1].weight.requires_grad
    trainer_of(model, epochs=1).train()
    assert model[1].num_batches_tracked == 10 and model[1].weight.requires_grad


def test_the_rate_that_is_logged_is_the_configs_and_a_groups_own_keeps_its_ratio():
    trainer = trainer_of(groups=[{"match": "0.*", "lr": 1e-3}], scheduler="linear")
    trainer.train_epoch()
    trainer.set(lr=5e-3)
    trainer.train()
    assert trainer.history["lr"][:2] == pytest.approx([1e-2 * (1 - 9 / 40), 5e-3 * (1 - 19 / 40)])
    assert [group["lr"] / 5e-3 for group in trainer.updates[""].optimizer.param_groups] == pytest.approx([0.1 / 40, 1 / 40])


def test_other_numbers_of_a_group_are_followed_by_a_resume(tmp_path):
    words = {"groups": [{"match": "0.*", "lr": 1e-3}], "scheduler": "constant", "epochs": 1}
    make("plain", tmp_path, **words).train()
    again = make("plain", tmp_path, callbacks=[at_event("fit_start", 1, lambda trainer: seen.append([group["initial_lr"] for group in trainer.updates[""].optimizer.param_groups]))],
                 **(words | {"groups": [{"match": "0.*", "lr": 1e-4}], "epochs": 2}))
    seen = []
    again.train()
    assert seen == [[1e-4, 1e-2]]


def test_a_checkpoint_from_before_there_were_names_goes_on(tmp_path):
    make("plain", tmp_path, epochs=1).train()
    state = make("plain", tmp_path, epochs=1).resume_from_checkpoint().state_dict()
    del state["optimizer"]["param_groups"][0]["name"], state["trainer"]["groups"]
    again = make("plain", tmp_path/"again", epochs=1)
    again.load_state_dict(state)
    assert again.updates[""].optimizer.param_groups[0]["name"] == "the rest"
    data, _, model, _ = RECIPES["plain"]
    model = model()
    chosen = Trainer(model, data(), optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01), loss="cross_entropy", run=False, quiet=True)
    chosen.load_state_dict(again.state_dict())
    assert "name" not in chosen.updates[""].optimizer.param_groups[0]


@pytest.mark.parametrize("now, says", [({"groups": [{"match": "3.*", "lr": 1e-3}]}, "has the groups .'3..', 'the rest'., the checkpoint .'0..', 'the rest'."), ({}, "groups of .4. parameters, the checkpoint of .2, 2."),
                                       ({"groups": [{"match": "0.*", "lr": 1e-3}], "no_decay": True}, "groups of .1, 1, 1, 1. parameters")])
def test_other_groups_than_in_the_checkpoint_are_refused(now, says, tmp_path):
    model = lambda: torch.nn.ModuleDict({"0": torch.nn.Linear(6, 3), "3": torch.nn.Linear(6, 3)})
    class Both(Trainer):
        def training_step(self, batch): return F.cross_entropy(self.model["0"](batch[0]) + self.model["3"](batch[0]), batch[1])
    def make(**words): return Both(model(), DataLoader(TensorDataset(X, Y), 10), quiet=True, save_dir=str(tmp_path/"run"), config={"run": {"on_existing": "resume"}}, epochs=1, **words)
    make(groups=[{"match": "0.*", "lr": 1e-3}]).train()
    with pytest.raises(ConfigError, match=says): make(**now).train()


# --- refused --------------------------------------------------------------------------------------------------------------------------

REFUSED = {
    "frozen model": ({"freeze": "*"}, "leaves nothing to train; let"), "frozen at first": ({"freeze": {"*": 2}}, "leaves nothing to train before epoch 3"),
    "no such part": ({"freeze": ["backbone.*"]}, "backbone.. matches no parameter of the model; it has 0, 1, 3"), "a part": ({"freeze": "0"}, "did you mean 0..[?]"),
    "steps": ({"freeze": {"0.*": "200 steps"}}, "expected a whole number of epochs, or null for ever, found 200 steps"), "half": ({"freeze": {"0.*": 1.5}}, "whole number of epochs"),
    "twice": ({"freeze": ["0.*", "0.bias"]}, "0.bias finds only what 0.. before it has"),
    "no such group": ({"groups": [{"match": "1.wieght", "lr": 1}]}, "did you mean 1.weight"), "frozen group": ({"groups": [{"match": "0.*", "lr": 1}], "freeze": "0.*"}, "only frozen parameters"),
    "no match": ({"groups": [{"lr": 1}]}, "does not say whom it means"), "empty group": ({"groups": [{"match": "0.*"}]}, "nothing of its own"),
    "a slip": ({"groups": [{"match": "0.*", "learn_rat": 1}]}, "unknown learn_rat"), "negative": ({"groups": [{"match": "0.*", "lr": -1}]}, "expected at least 0, found -1"),
    "below the floor": ({"groups": [{"match": "0.*", "lr": 1e-6}], "min_lr": 1e-5, "scheduler": "cosine"}, "lr 1e-06 is below min_lr 1e-05"),
    "not of this optimizer": ({"groups": [{"match": "0.*", "momentum": 0.5}]}, "adamw has no momentum"), "no decay at all": ({"no_decay": True, "optimizer": "rprop"}, "no_decay  rprop has no weight_decay"),
    "an instance": ({"no_decay": True, "optimizer": torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2, weight_decay=0.01, momentum=0.9)}, "no_decay  is for an optimizer by name")}


@pytest.mark.parametrize("words, says", REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(words, says):
    with pytest.raises(ConfigError, match=says) as caught: trainer_of(**words)
    assert len(str(caught.value).splitlines()) == 1
