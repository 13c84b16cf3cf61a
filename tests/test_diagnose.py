"""Each fault that is planted is found, and first; healthy trainings have none; nothing is left behind."""
import json
import random
import time

import exact
import numpy
import pytest
import torch
import torch.nn.functional as F
from exact import Augmented, Stream, at_step
from test_trial import taken_apart
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from trainbook import Trainer, diagnose
from trainbook.cli import main
from trainbook.examine import Diagnosis, Examination, Finding, shown

G = torch.Generator().manual_seed(1)
X, NOISE = torch.randn(512, 8, generator=G), torch.randn(512, generator=G)
LABELS, NUMBERS = (X[:, 0] + X[:, 1] > 0).long(), X @ torch.linspace(-1, 1, 8)
THREE = torch.bucketize(X[:, 0] + X[:, 1], torch.tensor([-0.6, 0.6]))


def net(out=3, into=8, *more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(into, 32), nn.ReLU(), *more, nn.Linear(32, out))


def loader(x=X, y=THREE, size=32, **more): return DataLoader(TensorDataset(x, y), size, **({"shuffle": True} | more))


def made(model=None, data=None, val=None, kind=Trainer, **words):
    words = {"lr": 1e-2, "epochs": 5, "run": False, "quiet": True} | words
    return kind(model or net(), data if data is not None else loader(), val, **words)


class Flat(nn.Module):
    "The last dimension away."
    def forward(self, x): return x.squeeze(-1)


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 2))

    def forward(self, x): return self.body(x)


class Words(nn.Module):
    "A small transformer: the sum of a sequence's tokens, above or below the middle."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 16)
        self.block, self.head = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 2)

    def forward(self, x): return self.head(self.block(self.embed(x)).mean(1))


TOKENS = torch.randint(0, 10, (512, 6), generator=G)


class Halves(nn.Module):
    "A body and a head; what lies between may be cut."
    def __init__(self, cut=False, unused=False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.cut = nn.Linear(8, 32), nn.Linear(32, 3), cut
        if unused: self.other = nn.Linear(32, 3)

    def forward(self, x):
        x = self.body(x).relu()
        return self.head(x.detach() if self.cut else x)


def some_of(model): return made(model, optimizer=torch.optim.Adam(model.head.parameters(), lr=1e-2))


class Wrapped(nn.Module):
    def __init__(self, before=None, after=None):
        super().__init__()
        self.inner, self.before, self.after = net(), before or (lambda x: x), after or (lambda x: x)

    def forward(self, x): return self.after(self.inner(self.before(x)))


class Knows(nn.Module):
    "The answer is among its inputs, and goes straight to the output."
    def __init__(self):
        super().__init__()
        self.inner = net()
    def forward(self, x): return self.inner(x) + 20 * F.one_hot(torch.bucketize(x[:, 0] + x[:, 1], torch.tensor([-0.6, 0.6])), 3)


class Own(Trainer):
    "A training_step of one's own."
    def training_step(self, batch):
        self.model.train()
        return F.cross_entropy(self.model(batch[0]), batch[1])


class Quiet(Own):
    def training_step(self, batch):
        self.model.eval()
        return F.cross_entropy(self.model(batch[0]), batch[1])


class Root(nn.Module):
    "The square root of something that is zero."
    def forward(self, x): return (x.relu() * 0).sqrt() + x


class Logs(nn.Module):
    def forward(self, x): return (x - 1).log()


class Drops(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()
    def forward(self, x): return self.inner(F.dropout(x, 0.2))


class Seeded(Dataset):
    "Noise that is the same for every sample."
    def __init__(self, how): self.how, self.deep = how, [type("Bag", (), {})()]
    def __len__(self): return 256

    def __getitem__(self, i):
        if self.how == "global": numpy.random.seed(0)
        noise = numpy.random.default_rng(3).normal(size=8) if self.how == "local" else numpy.random.randn(8)
        return X[i] + 0.1 * torch.tensor(noise, dtype=torch.float32), THREE[i]


class Deep(Seeded):
    "Its generator lies where no key reaches it."
    def __init__(self):
        super().__init__("deep")
        self.deep[0].rng = random.Random(0)

    def __getitem__(self, i): return X[i] + 0.1 * self.deep[0].rng.gauss(0, 1), THREE[i]


class Slow(Dataset):
    def __len__(self): return 96

    def __getitem__(self, i):
        time.sleep(0.002)
        return X[i], THREE[i]


def sigmoids():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), *[one for _ in range(20) for one in (nn.Linear(16, 16), nn.Sigmoid())], nn.Linear(16, 3))


def biased(scale):
    model = net()
    with torch.no_grad(): model[2].weight.mul_(scale)
    return model


def nan_in(x):
    x = x.clone()
    x[3, 2] = float("nan")
    return x


def dead():
    model = net()
    with torch.no_grad(): model[0].bias.fill_(-100)
    return model


def shuffled(y): return y[torch.randperm(len(y), generator=torch.Generator().manual_seed(5))]


def mostly_frozen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    model[0].requires_grad_(False), model[2].requires_grad_(False)
    return model


FAULTS = {
    "softmax twice": ("outputs", lambda: made(Wrapped(after=lambda x: x.softmax(1)))),
    "sigmoid twice": ("outputs", lambda: made(net(1, 8, nn.Linear(32, 32)).append(nn.Sigmoid()).append(Flat()), loader(y=LABELS.float()), loss="bce_with_logits")),
    "broadcast": ("outputs", lambda: made(net(1), loader(y=NUMBERS), loss="mse")),
    "probabilities for nll": ("outputs", lambda: made(Wrapped(after=lambda x: x.softmax(1)), loss="nll")),
    "labels from one": ("outputs", lambda: made(data=loader(y=THREE + 1), loss="cross_entropy")),
    "logits too large": ("loss at start", lambda: made(biased(100))),
    "targets far off": ("loss at start", lambda: made(net(1).append(Flat()), loader(y=NUMBERS + 1000), loss="mse", lr=1e-3)),
    "the answer is known": ("loss at start", lambda: made(Knows())),
    "no learning": ("one batch", lambda: made(Wrapped(after=lambda x: x * 0 + x.detach() * 0 + 0 * x), lr=1e-2)),
    "constant labels": ("labels", lambda: made(data=loader(y=THREE * 0))),
    "two labels for one": ("labels", lambda: made(data=loader(X[:256].repeat(2, 1), torch.cat([THREE[:256], (THREE[:256] + 1) % 3])))),
    "shuffled labels": ("labels", lambda: made(net(3, 8, nn.Linear(32, 32), nn.ReLU()), loader(y=shuffled(THREE)))),
    "pixels": ("inputs", lambda: made(Pictures(), loader(torch.randint(0, 256, (512, 1, 8, 8), generator=G).float(), LABELS))),
    "divided twice": ("inputs", lambda: made(data=loader(X / 255))),
    "scales": ("inputs", lambda: made(data=loader(X * torch.logspace(-2, 3, 8)))),
    "constant inputs": ("inputs", lambda: made(data=loader(X * 0 + 1))),
    "NaN in the data": ("inputs", lambda: made(data=loader(nan_in(X)))),
    "a constant feature": ("inputs", lambda: made(data=loader(torch.cat([X[:, :7], torch.ones(512, 1)], 1)))),
    "integers": ("step", lambda: made(data=loader((X * 50).long()))),
    "validation in training": ("overlap", lambda: made(val=loader(X[:100], THREE[:100]))),
    "one class": ("balance", lambda: made(net(2), loader(y=(X[:, 0] > 1.9).long()))),
    "detached": ("gradients", lambda: made(Halves(cut=True))),
    "unused head": ("gradients", lambda: made(Halves(unused=True))),
    "dead units": ("gradients", lambda: made(dead())),
    "vanishing": ("gradients", lambda: made(sigmoids(), lr=1e-3)),
    "lr too low": ("learning rate", lambda: made(lr=1e-8)),
    "lr too high": ("learning rate", lambda: made(lr=100.0)),
    "lr of an optimizer": ("learning rate", lambda: Trainer(model := net(), loader(), optimizer=torch.optim.SGD(model.parameters(), lr=1e-7), run=False, quiet=True)),
    "slow data": ("loading", lambda: made(data=DataLoader(Slow(), 16))),
    "frozen by mistake": ("frozen", lambda: made(mostly_frozen())),
    "not in the optimizer": ("frozen", lambda: some_of(Halves())),
    "evaluation mode": ("modes", lambda: made(net(3, 8, nn.Dropout(0.1)), kind=Quiet)),
    "two samples in a batch norm": ("modes", lambda: made(net(3, 8, nn.BatchNorm1d(32)), loader(X[:64], THREE[:64], 2))),
    "momentum": ("modes", lambda: made(net(3, 8, nn.BatchNorm1d(32, momentum=0.0)))),
    "dropout in validation": ("modes", lambda: made(Drops(), val=loader(X[:64] + 1, THREE[:64]))),
    "train() in validation": ("modes", lambda: made(net(3, 8, nn.BatchNorm1d(32)), val=loader(X[:64] + 1, THREE[:64]), kind=Own)),
    "log of what is negative": ("not finite", lambda: made(net(3, 8, Logs()))),
    "root of zero": ("not finite", lambda: made(net(3, 8, Root()))),
    "weight decay": ("settings", lambda: made(weight_decay=20.0)),
    "always clipped": ("settings", lambda: made(clip=1e-3)),
    "seeded in getitem": ("augmentation", lambda: made(data=DataLoader(Seeded("global"), 32))),
    "a generator of its own": ("augmentation", lambda: made(data=DataLoader(Seeded("local"), 32))),
    "one generator for all workers": ("augmentation", lambda: made(data=DataLoader(Deep(), 32, num_workers=2))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_first(fault):
    name, make = FAULTS[fault]
    found = diagnose(make(), seconds=30)
    assert name in [one.name for one in found.findings[:2]], found
    assert all(one.what and one.evidence and one.fix and 0 < one.weight <= 1 for one in found.findings)
    assert json.loads(json.dumps(found.row())) == found.row()


HEALTHY = {
    "classes": lambda: made(val=loader(torch.randn(128, 8, generator=G), THREE[:128])),
    "numbers": lambda: made(net(1).append(Flat()), loader(y=NUMBERS + 0.3 * NOISE), loss="mse"),
    "yes or no": lambda: made(net(1).append(Flat()), loader(y=LABELS.float()), loss="bce_with_logits"),
    "sequences": lambda: made(Words(), loader(TOKENS, (TOKENS.sum(1) > 27).long()), lr=3e-3),
    "a few of a class": lambda: made(net(2), loader(y=(X[:, 0] > 1).long())),
    "batch norm and dropout": lambda: made(net(3, 8, nn.BatchNorm1d(32), nn.Dropout(0.2)), val=loader(torch.randn(128, 8, generator=G), THREE[:128]), lr=3e-3),
    "pictures": lambda: made(Pictures(), loader(torch.randn(512, 1, 8, 8, generator=G) + LABELS[:, None, None, None], LABELS), optimizer="sgd", lr=0.05),
    "frozen on purpose": lambda: made(Halves(), freeze=["body.*"]),
    "a rare feature": lambda: made(net(3, 9), loader(torch.cat([X, (NOISE > 2.2).float()[:, None]], 1))),
    "fine-tuned": lambda: made(lr=3e-4, epochs=50, weight_decay=0.05, clip=1.0),
    "a step of one's own": lambda: made(kind=Own),
    "augmented": lambda: made(exact.net(), DataLoader(Augmented(), 8, shuffle=True, num_workers=2), lr=1e-3, epochs=10),
    "clipped and accumulated": lambda: made(accumulate=2, clip=1.0, warmup="5 steps"),
}


@pytest.mark.parametrize("training", HEALTHY)
def test_a_healthy_training_has_none(training):
    found = diagnose(HEALTHY[training](), seconds=30)
    assert not found.findings and len(found.fine) > 8, found


@pytest.mark.parametrize("recipe", ["plain", "dropout", "ema", "iterable", "several"])
def test_nothing_is_left_behind(recipe, tmp_path):
    """Before a training, in the middle, at its end: the same bits as one that nobody looked at."""
    ends = []
    for looks in (False, True):
        trainer = TRAININGS[recipe]()
        objects = [*trainer.model.parameters(), *trainer.model.buffers()]
        for end in (1, 2):
            was = taken_apart(trainer)
            if looks: diagnose(trainer, seconds=20)
            assert taken_apart(trainer) == was
            trainer.train(end)
        if looks: diagnose(trainer, seconds=20)
        assert all(one is other for one, other in zip(objects, [*trainer.model.parameters(), *trainer.model.buffers()]))
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in trainer.model.modules())
        ends.append(taken_apart(trainer))
    assert ends[0] == ends[1]


class Two(Trainer):
    def training_step(self, batch):
        for name in ("body", "head"):
            self.backward(F.cross_entropy(self.model(batch[0]), batch[1]), name)
            self.update(name)
        return {"loss": F.cross_entropy(self.model(batch[0]), batch[1])}

    def validation_step(self, batch): return {"loss": F.cross_entropy(self.model(batch[0]), batch[1])}


def two():
    model = Halves()
    return made(model, kind=Two, optimizer={"body": torch.optim.Adam(model.body.parameters()), "head": torch.optim.SGD(model.head.parameters(), lr=0.1)}, lr=1e-3)


TRAININGS = {
    "plain": lambda: made(val=loader(X[:64] + 1, THREE[:64]), epochs=2),
    "dropout": lambda: made(exact.net(0.2, True), DataLoader(Augmented(), 8, shuffle=True), epochs=2),
    "ema": lambda: made(ema=0.9, accumulate=2, epochs=2, freeze={"0.*": 1}),
    "iterable": lambda: Trainer(exact.net(), DataLoader(Stream(), 8), loss="cross_entropy", epochs=2, run=False, quiet=True, scheduler="constant"),
    "several": two,
}


def test_several_optimizers_are_looked_at_as_far_as_that_goes():
    found = diagnose(two(), seconds=20)
    assert not found.findings and {"gradients", "frozen", "modes"} <= {*found.fine} and "several optimizers" in found.left_out["learning rate"]


def test_between_two_steps_of_a_training():
    ends, said = [], []
    for looks in (False, True):
        trainer = made(epochs=1, callbacks=[at_step(5, lambda trainer: said.append(diagnose(trainer, seconds=20)))] if looks else [])
        trainer.train()
        ends.append(taken_apart(trainer))
    assert ends[0] == ends[1] and said[0].step == 5 and not said[0].findings


@pytest.mark.parametrize("step", [1, 6, 40, 150])
def test_an_interrupt_in_the_middle_leaves_nothing(step, monkeypatch):
    from trainbook.trial import Trial
    trainer, steps, real = made(lr=1e-8), [], Trial.step
    trainer.train(1)
    was = taken_apart(trainer)

    def stopped(self, *inputs):
        steps.append(1)
        if len(steps) == step: raise KeyboardInterrupt
        return real(self, *inputs)

    monkeypatch.setattr(Trial, "step", stopped)
    with pytest.raises(KeyboardInterrupt): diagnose(trainer, seconds=20)
    assert taken_apart(trainer) == was and not trainer.console.bar
    assert not any(one._post_accumulate_grad_hooks for one in trainer.model.parameters())


def test_a_check_that_fails_is_a_line(monkeypatch):
    def fails(ex):
        yield Finding("odd", 0.1, "a", "b", "c")
        raise ValueError("no\nsuch thing")

    def only_fails(ex):
        raise ValueError("no\nsuch thing")
        yield

    monkeypatch.setattr(diagnose, "_CHECKS", (("odd", fails), ("even", only_fails), *diagnose._CHECKS[:2]))
    found = diagnose(made())
    assert [one.name for one in found.findings] == ["odd"] and found.left_out == {"even": "ValueError: no"}
    assert "- even not looked at: ValueError: no" in repr(found) and found.fine == ["outputs", "step"]


class Tardy(Own):
    def training_step(self, batch):
        time.sleep(0.03)
        return super().training_step(batch)


def test_its_time_holds():
    began = time.monotonic()
    found = diagnose(made(kind=Tardy, lr=1e-8), seconds=1.5)
    assert time.monotonic() - began < 3 and any("time" in why for why in found.left_out.values())


def test_what_was_found_is_text_a_row_and_html():
    found = diagnose(made(Wrapped(after=lambda x: x.softmax(1)), lr=1e-2))
    assert found.text.startswith("1 finding: outputs (") and "✕ outputs: softmax is applied twice" in repr(found) and "→ take the softmax" in repr(found)
    row = json.loads(json.dumps(found.row()))
    assert len(json.dumps(row)) < 4000 and shown(row) == found._repr_html_()
    page = shown(row)
    assert "softmax is applied twice" in page and "✕" in page and "✓" in page and "<script" not in page and "class=" not in page
    odd = Diagnosis([Finding("<b>", 0.1, "<i>", "<u>", "<s>")], [], {"a": "<q>", "b": "<q>"}, 1.0)
    assert not any(tag in odd._repr_html_() for tag in ("<i>", "<u>", "<s>", "<q>")) and "△" in repr(odd) and "- a, b not looked at: <q>" in repr(odd)
    assert Diagnosis([], ["a"], {}, 2.0).text == "nothing found in 1 checks (2.0 s)"


def test_what_cannot_be_looked_at_says_so():
    from trainbook import ConfigError
    once = made()
    once.train_loader = iter([(X[:8], THREE[:8])] * 9)
    with pytest.raises(ConfigError, match="can be read once"): diagnose(once)
    lazy = made(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ConfigError, match="call it once"): diagnose(lazy)
    once.updates = {}
    with pytest.raises(ConfigError, match="a stage that trains"): diagnose(once)


def test_data_that_cannot_be_read_is_a_finding():
    class Missing(Seeded):
        def __getitem__(self, i): raise FileNotFoundError(f"pictures/{i}.png")
    found = diagnose(made(data=DataLoader(Missing(""), 32)))
    assert [one.name for one in found.findings] == ["data"] and "FileNotFoundError: pictures/" in found.text + repr(found) and not found.fine
    assert len(found.unseen()) == 1


def test_batches_without_tensors_are_no_error():
    class Texts(Trainer):
        def training_step(self, batch): return self.model(torch.tensor([[float(len(one))] * 8 for one in batch])).square().mean()
    found = diagnose(made(data=[["a", "bb"], ["ccc", "d"]] * 4, val=[["a", "b"]], kind=Texts))
    assert found.left_out["overlap"] == "samples are no tensors" and "gradients" in found.fine


def test_validation_that_can_be_read_once_is_not_read():
    batches = iter([(X[:8] + 1, THREE[:8])] * 3)
    found = diagnose(made(val=batches))
    assert "can be read once" in found.left_out["overlap"] and len([*batches]) == 3


def test_a_dataset_that_seeds_itself_by_index_is_fine():
    class Made(Seeded):
        def __getitem__(self, i):
            numpy.random.seed(i)
            return torch.tensor(numpy.random.default_rng(i).normal(size=8), dtype=torch.float32) + float(numpy.random.randn()), THREE[i]
    assert "augmentation" in diagnose(made(data=DataLoader(Made(""), 32))).fine


def test_generators_that_are_looked_at_stay_where_they_are():
    data = Deep()
    was = data.deep[0].rng.getstate()
    ex = Examination(made(data=DataLoader(Seeded("x"), 32)), 10)
    ex.trainer.train_loader.source.dataset.deep[0].rng = data.deep[0].rng
    assert not [*diagnose._augmentation(ex)] and data.deep[0].rng.getstate() == was


PROJECT = """
import torch
from torch.utils.data import TensorDataset

def net(): return torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))

def points():
    x = torch.randn(576, 2, generator=torch.Generator().manual_seed(0))
    y = (x.sum(1) > 0).long()
    return {"train": TensorDataset(x[:512], y[:512]), "val": TensorDataset(x[512:], y[512:])}
"""


def test_the_verb(here, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(here))
    (here/"looked_at.py").write_text(PROJECT)
    (here/"a.yaml").write_text('model: {name: "looked_at:net"}\ndata: {name: "looked_at:points"}\ntraining: {lr: 1e-2, epochs: 3, loss: cross_entropy}\nstages:\n'
                               '- {name: first}\n- {name: second, training: {lr: 1e-9}}\n')
    assert main(["diagnose", "a.yaml"]) == 0 and "nothing found" in capsys.readouterr().out
    assert main(["diagnose", "a.yaml", "--stage", "second"]) == 1 and "→ lr: 0." in capsys.readouterr().out
    assert main(["diagnose", "--config", "a.yaml", "--seconds", "20", "training.lr=1e-9"]) == 1
    assert main(["diagnose", "a.yaml", "--seconds", "soon"]) == 2 and main(["diagnose"]) == 2 and main(["diagnose", "a.yaml", "--stage", "fourth"]) == 2
    assert sorted(one.name for one in here.iterdir() if one.name != "__pycache__") == ["a.yaml", "looked_at.py"]
