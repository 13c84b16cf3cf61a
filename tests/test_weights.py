"""Weights into models that differ: every difference named, nothing changed by a refusal, nothing skipped in silence."""
import fnmatch

import pytest
import torch
from torch import nn

from trainbook.tensorfile import CheckpointError
from trainbook.weights import WeightsError, load_weights


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


class Extra(nn.Module):
    "A module with state that is no tensor, which it may refuse."
    said = "new"
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
    def get_extra_state(self): return {"said": self.said}
    def set_extra_state(self, state):
        if state["said"] == "bad": raise ValueError("this word is bad")
        self.said = state["said"]


class Versioned(nn.Linear):
    _version = 2
    def _load_from_state_dict(self, state, prefix, metadata, *more):
        if metadata.get("version", 1) < 2: state[prefix + "bias"] = -state[prefix + "bias"]
        super()._load_from_state_dict(state, prefix, metadata, *more)


def net(classes=3, depth=2, **parts):
    blocks = nn.Sequential(*(nn.Conv1d(4, 4, 3) for _ in range(depth)))
    return nn.ModuleDict({"encoder": blocks, "norm": nn.BatchNorm1d(4), "head": nn.Linear(4, classes), **parts})


def other(model): return {name: value + 1 for name, value in model.state_dict().items()}
def kept(model): return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in model.state_dict().items()}
def same(a, b): return list(a) == list(b) and all(torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name] for name in a)


def refusal(model, weights, **how):
    "The error; and the model is as it was."
    before = kept(model)
    with pytest.raises(WeightsError) as caught: load_weights(model, weights, **how)
    assert same(kept(model), before) and isinstance(caught.value, CheckpointError)
    return caught.value


def without(weights, pattern): return {name: value for name, value in weights.items() if not fnmatch.fnmatch(name, pattern)}


FULL = other(net())
DIFFER = {
    "missing": (without(FULL, "head.bias"), r"head.bias +missing +only in the model", ["head.bias"]),
    "a part is missing": (without(FULL, "norm.*"), r"norm\.\* +5 tensors +missing", ["norm.*"]),
    "unexpected": ({**FULL, "odd.w": torch.ones(1)}, r"odd.w +unexpected +only in the file", ["odd.w"]),
    "shape": (other(net(classes=5)), r"head.weight +shape +\(5, 4\) in the file, \(3, 4\) in the model", ["head.*"]),
    "a scalar is no vector": ({**FULL, "norm.num_batches_tracked": torch.ones(1, dtype=torch.long)}, r"num_batches_tracked +shape +\(1,\) in the file, \(\) in the model", ["norm.num_batches_tracked"]),
    "of all layers": (without(FULL, "encoder.*.bias"), r"encoder.1.bias +missing", ["encoder.*.bias"]),
    "no tensor": ({**FULL, "head.bias": [1, 2, 3]}, r"head.bias +no tensor +list in the file", ["head.bias"]),
    "sparse": ({**FULL, "head.bias": torch.ones(3).to_sparse()}, r"head.bias +no tensor +sparse", ["head.bias"]),
    "without values": ({**FULL, "head.bias": torch.ones(3, device="meta")}, r"head.bias +no tensor +sparse or without values", ["head.bias"]),
    "complex": ({**FULL, "head.bias": torch.ones(3, dtype=torch.complex64)}, r"head.bias +complex +torch.complex64 in the file", ["head.bias"]),
    "a strange name": ({**FULL, "a\nb <i>[x]": torch.ones(1)}, r'"a\\nb <i>\[x\]" +unexpected', ["a\nb <i>[[]x]"]),
}


@pytest.mark.parametrize("weights, row, allow", DIFFER.values(), ids=DIFFER)
def test_what_differs_is_named_and_what_it_offers_is_enough(weights, row, allow):
    model = net()
    error = refusal(model, weights)
    assert error.match.refused and error.allow == allow
    with pytest.raises(WeightsError, match=row): raise error
    before = kept(model)
    match = load_weights(model, weights, allow=error.allow)
    for name, value in model.state_dict().items(): assert torch.equal(value, weights[name] if name in match.loaded else before[name])
    assert 0 < len(match.loaded) and not match.refused and "allowed" in repr(match)


def test_equal_models_agree_whatever_is_allowed():
    for allow in ((), "*", ["haed.*"]):
        model = net()
        assert repr(load_weights(model, FULL, allow=allow)) == "11 of 11 tensors of ModuleDict fit" and same(kept(model), FULL)


def test_an_allowed_name_stays_and_a_pattern_is_no_list_of_letters():
    model, theirs = net(classes=5), FULL
    before = kept(model)
    assert refusal(model, theirs, allow="encoder*").match.refused == ["head.weight", "head.bias"]  # 'e', 'n', …, '*' would allow all
    assert load_weights(model, theirs, allow="head.*").of("shape") == ["head.weight", "head.bias"]
    assert torch.equal(model["head"].weight, before["head.weight"]) and torch.equal(model["norm"].bias, theirs["norm.bias"])


def test_nothing_at_all_is_never_loaded():
    for weights in ({"x.y": torch.ones(77)}, {}): assert "to load nothing is not allowed" in str(refusal(net(), weights, allow=["*"]))


def test_a_tied_weight_under_one_of_its_names():
    for names in (["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"]):
        model, value = Tied(), torch.randn(6, 4)
        assert load_weights(model, dict.fromkeys(names, value)).loaded == ["embed.weight", "head.weight"]
        assert torch.equal(model.head.weight, value) and model.head.weight is model.embed.weight
    two = {"embed.weight": torch.zeros(6, 4), "head.weight": torch.ones(6, 4)}
    error = refusal(Tied(), two)
    assert "head.weight  tied  one tensor with embed.weight in the model, not in the file" in " ".join(str(error).splitlines())
    load_weights(model, two, allow=error.allow)
    assert not model.head.weight.any()
    assert refusal(Tied(), {}).match.of("missing") == ["embed.weight", "head.weight"]


def test_what_has_no_values_yet_is_refused_with_words():
    lazy = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    with pytest.raises(WeightsError, match=r"0.weight +lazy +uninitialised in the model; run one batch through it first"): load_weights(lazy, other(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))))
    with pytest.raises(WeightsError, match=r"meta +without memory in the model; model.to_empty"): load_weights(net().to("meta"), FULL)


def test_dtypes_are_converted_and_told_where_numbers_change_their_kind():
    model = net()
    match = load_weights(model, {**{name: value.double() for name, value in FULL.items()}, "head.bias": torch.tensor([1, 2, 3])})
    assert match.of("dtype") == ["norm.num_batches_tracked", "head.bias"] and not match.refused
    assert "torch.int64 in the file, torch.float32 in the model  converted" in repr(match)
    assert model["head"].bias.tolist() == [1, 2, 3] and model["head"].bias.dtype == torch.float32 and model["norm"].num_batches_tracked.dtype == torch.int64


def test_the_optimizer_goes_on_with_the_same_parameters():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, flags = [id(p) for p in model.parameters()], [p.requires_grad for p in model.parameters()]
    load_weights(model, {name: value.requires_grad_(value.is_floating_point()) for name, value in kept(model).items()})
    assert [id(p) for p in model.parameters()] == before == [id(p) for p in optimizer.param_groups[0]["params"]]
    assert [p.requires_grad for p in model.parameters()] == flags and all(p.is_leaf for p in model.parameters())


def test_extra_state_is_passed_on_and_a_refusal_of_it_changes_nothing():
    model = nn.ModuleDict({"a": Extra(), "b": Extra()})
    theirs = {"a.weight": torch.ones(2), "a._extra_state": {"said": "old"}, "b.weight": torch.ones(2), "b._extra_state": {"said": "bad"}}
    assert "refuses what is in the file (nothing was loaded): " in str(refusal(model, theirs)) and model["a"].said == "new"
    load_weights(model, {**theirs, "b._extra_state": {"said": "fine"}})
    assert (model["a"].said, model["b"].said) == ("old", "fine") and model["a"].weight.tolist() == [1, 1]
    assert refusal(model, without(theirs, "a._e*")).match.of("missing") == ["a._extra_state"]
    assert refusal(nn.ModuleDict({"a": Tied(), "b": Extra()}), theirs).match.of("unexpected") == ["a.weight", "a._extra_state"]


@pytest.mark.parametrize("weights, says", [({"model_state_dict": FULL, "epoch": 3}, 'this is a whole checkpoint; pass checkpoint["model_state_dict"]'), ([1], "a dict of names and tensors, found list"), ({1: torch.ones(1)}, "found dict")])
def test_what_is_no_dict_of_tensors(weights, says): assert says in str(refusal(net(), weights))


def test_a_module_with_versions_is_not_taken_for_an_old_one():
    model = nn.ModuleDict({"a": Versioned(2, 2)})
    theirs = other(model)
    load_weights(model, dict(theirs))
    assert same(kept(model), theirs)
