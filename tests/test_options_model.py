"""Options that change the model, its groups and its loss, where they meet: an average asked for inside itself, a loss that is another in a second life, what cannot be."""
import os
import signal

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from exact import DATA, VAL, X, Y, blocks, net
from test_options import make
from trainbook.source import ConfigError
from trainbook.trainer import Trainer

cross_entropy = torch.nn.functional.cross_entropy


def life(folder, model=None, kind=Trainer, **words) -> Trainer:
    "A trainer that goes on with what is in the folder."
    words = {"lr": 1e-2, "loss": "cross_entropy", "quiet": True, "save_dir": str(folder/"r"), "config": {"run": {"on_existing": "resume"}}} | words
    return kind(model or net(), DataLoader(DATA, 8, shuffle=True), DataLoader(VAL, 20), **words)


def same(one: Trainer, other: Trainer) -> bool:
    averages = [a.average.values if a.average else [] for a in (one, other)]
    return all(map(torch.equal, one.model.parameters(), other.model.parameters())) and all(map(torch.equal, *averages))


# --- an average of the weights ----------------------------------------------------------------------------------------------------------

def test_an_average_inside_itself():
    """Whatever is asked for in there sees the average, and afterwards the weights that train are back."""
    trainer = make(ema=0.9, epochs=1)
    trainer.train()
    raw, loss, outputs, state = trainer.model[0].weight.clone(), trainer.evaluate(), trainer.predict(DataLoader(DATA, 100)), trainer.state_dict()
    with trainer.averaged():
        assert trainer.evaluate() == loss and torch.equal(trainer.predict(DataLoader(DATA, 100)), outputs)
        within = trainer.state_dict()
        for name in ("model", "trained"): assert all(map(torch.equal, state[name].values(), within[name].values()))
    assert torch.equal(trainer.model[0].weight, raw) and torch.equal(within["trained"]["0.weight"], raw) and not torch.equal(within["model"]["0.weight"], raw)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_checkpoint_of_the_middle_of_an_evaluation(ema, tmp_path):
    """It goes on exactly, with the average where it belongs and with the random numbers of the training."""
    class Saves(Trainer):
        def validation_step(self, batch):
            if self.step == 20 and not (tmp_path/"model.pth").exists(): self.save_checkpoint(tmp_path/"model.pth")
            return super().validation_step(batch)
    made = lambda kind: kind(net(0.2), DataLoader(DATA, 8, shuffle=True), DataLoader(VAL, 20), run=False, quiet=True, lr=1e-2, epochs=3, loss="cross_entropy", ema=ema, eval_every="20 steps")
    whole, again = made(Saves), made(Trainer)
    whole.train()
    assert again.resume_from_checkpoint(tmp_path/"model.pth").step == 20
    again.train()
    assert same(whole, again)


@pytest.mark.parametrize("back", [False, True], ids=["in", "out"])
def test_a_second_interrupt_while_they_change_places(back, tmp_path):
    """Nothing is saved of the mixture; the next life goes on from whole weights, and so does this one."""
    class Torn(list):
        "Two signals in the middle of an exchange at step 20: of the first, or of the one that brings the weights back."
        def __setitem__(self, number, value):
            if trainer.step == 20 and number == 2 and (not back or self.swaps == 1) and trainer.wishes and not trainer.wishes.asked:
                for _ in range(2): os.kill(os.getpid(), signal.SIGINT)
            list.__setitem__(self, number, value)
            if trainer.step == 20 and number == 3: self.swaps += 1
    whole = make(ema=0.9, eval_every="20 steps")
    whole.train()
    words = {"ema": 0.9, "eval_every": "20 steps", "epochs": 3, "save_interval": "7 steps"}
    trainer = life(tmp_path, **words)
    trainer.train_epoch()
    trainer.average.values = Torn(trainer.average.values)
    trainer.average.values.swaps = 0
    with pytest.raises(KeyboardInterrupt): trainer.train()
    assert trainer.average.inside and "changed places" in trainer.torn
    with pytest.raises(RuntimeError, match="changed places; resume_from_checkpoint"): trainer.train()
    for again in (trainer.resume_from_checkpoint(), life(tmp_path, **words)):
        again.train()
        assert same(again, whole)


def test_an_average_begins_with_the_weights_there_are(tmp_path):
    """Weights that were put in by hand, or came from another program, are evaluated as they are, and averaged from there."""
    other = net()
    with torch.no_grad():
        for one in other.parameters(): one.mul_(3)
    torch.save(other.state_dict(), tmp_path/"other.pth")
    byhand, adopted, plain = make(ema=0.9), make(ema=0.9), make(other)
    byhand.model.load_state_dict(other.state_dict())
    adopted.resume_from_checkpoint(tmp_path/"other.pth")
    later = make(ema=0.9, epochs=1)
    later.train()
    later.resume_from_checkpoint(tmp_path/"other.pth")
    assert byhand.evaluate() == adopted.evaluate() == later.evaluate() == plain.evaluate()
    for trainer in (byhand, adopted): trainer.train()
    assert all(map(torch.equal, byhand.average.values, adopted.average.values))


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = torch.nn.Linear(6, 6, bias=False), torch.nn.Linear(6, 6, bias=False), torch.nn.Linear(6, 3)
        self.b.weight = self.a.weight
    def forward(self, x): return self.c(self.b(self.a(x).relu()))


@pytest.mark.parametrize("model", [Tied, net])
def test_an_average_given_up_in_a_second_life(model, tmp_path):
    """Training goes on from the weights that trained; taken up again, the average begins anew."""
    first, second = life(tmp_path, model(), ema=0.9, epochs=1), life(tmp_path, model(), epochs=1)
    first.train()
    second.resume_from_checkpoint()
    assert all(map(torch.equal, first.model.parameters(), second.model.parameters())) and len({*map(id, second.model.parameters())}) == len([*model().parameters()])
    life(tmp_path, model(), epochs=2).train()
    third = life(tmp_path, model(), ema=0.9, epochs=3)
    third.train()
    assert third.average.count == 13


def test_a_model_without_shapes():
    lazy = lambda: torch.nn.Sequential(torch.nn.LazyLinear(8), torch.nn.Linear(8, 3))
    with pytest.raises(ConfigError, match=r"^ema  0\.weight has no shape before the first batch; call the model once"): make(lazy(), ema=0.9)
    text = make(lazy()).summary()
    assert "(? parameters)" in text and "LazyLinear           ?          ?" in text and "weights ?, gradients ?, optimizer ?, in all ?" in text
    assert ["the", "rest", "?", "0.01", "0.01"] in [line.split() for line in text.splitlines()]
    model = lazy()
    model(X)
    trainer = make(model, ema=0.9)
    trainer.train()
    assert trainer.average.count == 39 and "optimizer 664 B, average 332 B" in trainer.summary()


# --- how the model computes -------------------------------------------------------------------------------------------------------------

def test_one_model_in_two_trainers_is_wrapped_once():
    models = [blocks() for _ in range(2)]
    make(models[0], gradient_checkpointing=True)
    make(models[0], gradient_checkpointing=True).train()
    make(models[1]).train()
    assert all(map(torch.equal, *[model.state_dict().values() for model in models]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in its own compiler
def test_a_second_trainer_takes_back_the_switches_of_the_first():
    """Each computes as it was told, one after the other; what a person has set stays."""
    counted = []
    class Counted(torch.nn.Linear):
        def forward(self, x): return counted.append(1) or super().forward(x)
    model = torch.nn.Sequential(*[torch.nn.Sequential(Counted(6, 6), torch.nn.ReLU()) for _ in range(2)], torch.nn.Linear(6, 3))
    forward = model[1].forward
    model[1].forward = lambda x: forward(x)
    for on, times in ((True, 2), (False, 1), (True, 2)):
        counted.clear()
        make(model, gradient_checkpointing=on).objective((X[:8], Y[:8]))["loss"].backward()
        assert len(counted) == 2 * times
    make(model)
    assert "forward" not in vars(model[0]) and vars(model[1])["forward"].__name__ == "<lambda>"
    make(model, compile=True)
    assert model._compiled_call_impl is not None
    make(model)
    assert model._compiled_call_impl is None
    model._compiled_call_impl = own = lambda x: model._call_impl(x)
    make(model)
    assert model._compiled_call_impl is own


def test_norms_that_do_not_count_are_left_alone():
    def model():
        torch.manual_seed(1)
        block = lambda: torch.nn.Sequential(torch.nn.Conv1d(1, 1, 3, padding=1), torch.nn.InstanceNorm1d(1, track_running_stats=True))
        return torch.nn.Sequential(torch.nn.Unflatten(1, (1, 6)), block(), block(), torch.nn.Flatten(), torch.nn.Linear(6, 3))
    models = [model() for _ in range(2)]
    for one, on in zip(models, (False, True)): make(one, gradient_checkpointing=on).train()
    assert all(map(torch.equal, *[one.state_dict().values() for one in models]))


def test_compiled_blocks_are_not_computed_twice():
    with pytest.raises(ConfigError, match=r"^compile  cannot look into blocks that gradient_checkpointing computes twice; say one of them$"): make(blocks(), compile=True, gradient_checkpointing=True)


# --- the loss ---------------------------------------------------------------------------------------------------------------------------

def test_class_weights_are_those_of_today(tmp_path):
    """Others in a second life, or none: as if they had been changed by hand between two steps."""
    def by_hand(*weights):
        model, state = net(), {}
        for n, weight in enumerate(weights):
            trainer = Trainer(model, DataLoader(DATA, 8, shuffle=True), run=False, quiet=True, lr=1e-2, epochs=n + 1, loss=torch.nn.CrossEntropyLoss(weight=weight and torch.tensor(weight)), scheduler="constant")
            if n: trainer.load_state_dict(state)
            trainer.train()
            state = trainer.state_dict()
        return model
    for n, second in enumerate(([1.0, 1.0, 50.0], None)):
        (folder := tmp_path/str(n)).mkdir()
        words = {"scheduler": "constant", "save_interval": 1}
        life(folder, epochs=1, class_weights=[1, 2, 3], **words).train()
        trainer = life(folder, epochs=2, class_weights=second, **words)
        trainer.train()
        assert (trainer.loss.weight is None) == (second is None) and "loss" not in trainer.state_dict()
        for one, other in zip(trainer.model.parameters(), by_hand([1.0, 2.0, 3.0], second).parameters()): assert torch.equal(one, other)


def test_class_weights_follow_the_data():
    """Another loader between two trainings has other classes; what was said as numbers stays."""
    rare = DataLoader(TensorDataset(X, torch.where(torch.arange(100) < 90, 0, 1 + torch.arange(100) % 2)), 10)
    for loss in ("cross_entropy", None):
        trainer, wanted = make(class_weights="balanced", loss=loss), make(class_weights="balanced")
        if loss is None: trainer.train()
        before = trainer.loss.weight
        trainer.train_loader = rare
        wanted = Trainer(net(), rare, run=False, loss="cross_entropy", class_weights="balanced")
        assert torch.equal(trainer.loss.weight, wanted.loss.weight) and not torch.equal(before, wanted.loss.weight)
    trainer = make(class_weights="balanced", loss=None)
    trainer.train_loader = rare
    trainer.train()
    assert torch.equal(trainer.loss.weight, wanted.loss.weight)
    trainer = make(class_weights=[1, 2, 3])
    trainer.train_loader = rare
    assert trainer.loss.weight.tolist() == [1, 2, 3]


def test_a_loss_of_ones_own_is_part_of_the_state(tmp_path):
    class Learns(torch.nn.CrossEntropyLoss):
        def __init__(self):
            super().__init__()
            self.heat = torch.nn.Parameter(torch.ones(()))
            self.register_buffer("calls", torch.zeros(()))
        def forward(self, outputs, targets):
            self.calls += self.training
            return super().forward(outputs * self.heat, targets)
    life(tmp_path, loss=Learns(), epochs=1).train()
    again = life(tmp_path, loss=Learns(), epochs=2)
    again.train()
    assert again.loss.calls == 26 and again.loss.heat != 1


def test_a_mapping_of_class_weights_counts_the_classes():
    """What it does not name weighs one, where the targets tell how many there are."""
    models = [net() for _ in range(2)]
    for model, weights in zip(models, ({1: 5}, [1, 5, 1])): make(model, class_weights=weights).train()
    assert torch.equal(models[0][0].weight, models[1][0].weight)


class Opaque(torch.utils.data.Dataset):
    def __len__(self): return 100
    def __getitem__(self, i): return X[i], Y[i]


def data(targets) -> TensorDataset: return TensorDataset(X, targets)


IGNORED = torch.where(torch.arange(100) % 5 == 0, -100, Y)
ONE_HOT = torch.nn.functional.one_hot(Y, 3).float()


def test_targets_that_are_left_out_are_no_class():
    models = [net() for _ in range(2)]
    counts = torch.bincount(Y[IGNORED >= 0]).double()
    for model, weights in zip(models, ("balanced", (80 / (3 * counts)).tolist())):
        Trainer(model, DataLoader(data(IGNORED), 10), run=False, quiet=True, lr=1e-2, epochs=2, loss="cross_entropy", class_weights=weights).train()
    assert torch.equal(models[0][0].weight, models[1][0].weight)


@pytest.mark.parametrize("words, dataset, says", [
    ({"class_weights": {}}, DATA, "class_weights  has no class"), ({"class_weights": []}, DATA, "class_weights  has no class"), ({"class_weights": {-1: 5}}, DATA, "class_weights  expected {class: weight}"),
    ({"class_weights": [1, -1, 1]}, DATA, "class_weights  expected numbers of at least 0"), ({"class_weights": [0, 0, 0]}, DATA, "class_weights  expected numbers of at least 0"),
    ({"class_weights": [1, 2]}, DATA, "class_weights  has 2 weights, and the model has scores for 3 classes"), ({"class_weights": {1: 5}}, Opaque(), "class_weights  has 2 weights, and the model has scores for 3"),
    ({"class_weights": "balanced"}, data(Y.clamp(max=1)), "class_weights  has 2 weights, and the model has scores for 3"), ({"class_weights": "balanced"}, Opaque(), "class_weights  balanced cannot count in a Opaque"),
    ({"class_weights": "balanced"}, data(ONE_HOT), "class_weights  balanced counts class numbers, and the targets are torch.float32"), ({"class_weights": [1, 2, 3], "loss": "mse"}, data(ONE_HOT), "class_weights  is for cross_entropy and nll, and the loss is mse"),
    ({"class_weights": [1, 9], "loss": "bce_with_logits"}, data(ONE_HOT), "class_weights  is for cross_entropy and nll, and the loss is bce_with_logits"), ({"class_weights": [1, 2, 3], "loss": None}, data(ONE_HOT), "class_weights  is for cross_entropy and nll, and the loss is mse"),
    ({"label_smoothing": 0.1, "loss": "nll"}, DATA, "label_smoothing  is for cross_entropy, and the loss is nll"), ({"label_smoothing": 0.1, "loss": torch.nn.CrossEntropyLoss()}, DATA, "label_smoothing  is for a loss by name"),
    ({"class_weights": [1, 2, 3], "loss": {"name": "cross_entropy", "weight": [1, 2, 3]}}, DATA, "class_weights  is said in loss too")], ids=lambda value: str(value)[:40])
def test_what_cannot_be_of_a_loss_is_one_line(words, dataset, says):
    with pytest.raises(ConfigError) as told: Trainer(net(), DataLoader(dataset, 10), run=False, quiet=True, epochs=1, **({"loss": "cross_entropy"} | words)).train()
    assert str(told.value).startswith(says) and "\n" not in str(told.value)


# --- groups, and what it is made of -----------------------------------------------------------------------------------------------------

def test_groups_made_by_hand_keep_their_own():
    """set() changes what was the config's, and what a person gave a group otherwise stays."""
    model = net()
    optimizer = torch.optim.AdamW([{"params": model[0].parameters()}, {"params": model[2].parameters(), "weight_decay": 0.0}], lr=1e-2, weight_decay=0.05)  # the config follows the first
    trainer = Trainer(model, DataLoader(DATA, 8), run=False, quiet=True, epochs=1, loss="cross_entropy", optimizer=optimizer)
    trainer.set(weight_decay=0.3)
    trainer.train()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


@pytest.mark.parametrize("words, way, kept", [({"optimizer": "sgd", "momentum": 0}, "SGD, fused", ""), ({"optimizer": "sgd", "momentum": 0.9}, "SGD, fused", "optimizer 652 B, "), ({}, "AdamW, fused", "optimizer 1.3 KB, "),
                                              ({"optimizer": "rmsprop", "momentum": 0}, "RMSprop, foreach", "optimizer 652 B, "), ({"ema": 0.9}, "AdamW, fused", "optimizer 1.3 KB, average 652 B, ")], ids=str)
def test_the_summary_follows_the_optimizer(words, way, kept):
    text = make(**words).summary()
    assert f"\noptimizer: {way}\n" in text and f"weights 652 B, gradients 652 B, {kept}in all" in text


def test_the_summary_of_several_optimizers():
    class Two(Trainer):
        def training_step(self, batch): return {}
        def validation_step(self, batch): return {}
    model = net()
    text = Two(model, DataLoader(DATA, 8), run=False, optimizer={"a": torch.optim.SGD(model[0].parameters(), lr=0.1), "b": torch.optim.Adam(model[2].parameters())}).summary()
    assert "\na: SGD, one by one\n" in text and "\nb: Adam, one by one\n" in text and "optimizer 408 B, in all" in text
