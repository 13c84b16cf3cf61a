"""Names that differ: folded, renamed, below a part, behind a wrapper."""
import pytest
import torch
from test_weights import FULL, kept, net, other, refusal, same
from torch import nn

from trainbook.weights import load_weights


def test_a_table_of_thousands_fits_a_screen_and_is_escaped():
    many = {**FULL, **{f"extra{i % 40}.layer{i}<b>": torch.ones(1) for i in range(5000)}}
    error = refusal(net(), many)
    assert len(str(error).splitlines()) < 30 and "more lines" in str(error) and "(40 patterns, all of them in error.allow)" in str(error)
    assert load_weights(net(), many, allow=error.allow).loaded == list(FULL)
    page = refusal(net(), {**FULL, "<script>": torch.ones(1)}).match._repr_html_()
    assert "&lt;script&gt;" in page and "<script>" not in page and "<table>" in page


def renamed(**parts): return {".".join([parts.get(name.partition(".")[0], name.partition(".")[0]), name.partition(".")[2]]): value for name, value in FULL.items()}

HINTS = {
    "a prefix": ({f"model.{name}": value for name, value in FULL.items()}, {"model.": ""}, 'all names in the file begin with "model."'),
    "a long prefix": ({f"a.b.{name}": value for name, value in FULL.items()}, {"a.b.": ""}, 'all names in the file begin with "a.b."'),
    "another part": (renamed(encoder="backbone"), {"backbone": "encoder"}, "backbone.0.weight → encoder.0.weight?"),
    "two parts": (renamed(encoder="body", head="top"), {"body": "encoder", "top": "head"}, "top.weight → head.weight?"),
    "a slip": ({name.replace("head.we", "head.ew"): value for name, value in FULL.items()}, {"head.ewight": "head.weight"}, "head.ewight → head.weight?"),
}


@pytest.mark.parametrize("weights, rename, says", HINTS.values(), ids=HINTS)
def test_a_rename_that_would_help_is_offered_and_helps(weights, rename, says):
    model = net()
    error = refusal(model, weights)
    assert error.rename == rename and says in str(error)
    load_weights(model, weights, rename=error.rename)
    assert same(kept(model), FULL)


def test_a_prefix_that_the_model_has_and_one_that_a_part_lacks():
    error = refusal(nn.ModuleDict({"net": net()}), FULL)
    assert error.rename == {"": "net."} and 'the model has "net." before the names of the file' in str(error)
    model = nn.ModuleDict({"vision": net(), "text": nn.Linear(2, 2)})
    error = refusal(model, other(model), into="vision")
    assert error.rename == {"vision": ""}
    assert load_weights(model, other(model), into="vision", rename=error.rename, allow="text.*").of("unexpected") == ["text.weight", "text.bias"]


def test_another_shape_is_no_hint_and_a_hint_keeps_what_was_renamed():
    assert refusal(net(), {f"x.{name}": torch.ones(9, 9) for name in FULL}).rename == {}
    both = renamed(encoder="body", head="top")
    error = refusal(net(), both, rename={"top": "head"})
    assert error.rename == {"top": "head", "body": "encoder"} and not load_weights(net(), both, rename=error.rename).differences
    six = {f"{name}x" if name.startswith("norm") or name == "head.bias" else name: value for name, value in FULL.items()}
    assert refusal(net(), six).rename == {}  # a page of guesses is no hint
    assert refusal(net(), FULL, rename={"encoder": "body"}).rename == {}  # "body" is in no file


def test_a_pattern_that_would_allow_more_is_not_offered():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.ModuleDict({"deep": nn.Linear(1, 1)}))
    theirs = {name: value for name, value in other(model).items() if name not in ("0.bias", "1.bias")}
    assert refusal(model, theirs).allow == ["0.bias", "1.bias"]  # *.bias is 2.deep.bias too


RENAMES = [({"encodr": "x"}, "rename encodr  matches no name in the file, did you mean encoder?"), ({"head.wight": "x"}, "rename head.wight  matches no name in the file, did you mean head.weight?"),
           ({"enc": "x"}, "rename enc  matches no name in the file; it has encoder, norm, head"), ({"encoder.0": "encoder.1"}, "rename  encoder.0.weight and encoder.1.weight both become encoder.1.weight"),
           ({"head.bias": ""}, "rename head.bias  nothing is left of the name")]


@pytest.mark.parametrize("rename, says", RENAMES)
def test_a_rename_that_is_wrong(rename, says): assert says in str(refusal(net(), FULL, rename=rename))


def test_the_longest_rename_wins_once_and_two_parts_can_swap_in_place():
    model, before = net(), FULL
    load_weights(model, FULL)
    load_weights(model, model.state_dict(), rename={"encoder.0": "encoder.1", "encoder.1.": "encoder.0."})  # the model's own memory
    assert torch.equal(model["encoder"][0].weight, before["encoder.1.weight"]) and torch.equal(model["encoder"][1].weight, before["encoder.0.weight"])
    theirs = {name.replace("encoder.0", "old.first").replace("encoder", "old"): value for name, value in FULL.items()}
    load_weights(model, theirs, rename={"old": "encoder", "old.first": "encoder.0"})
    assert same(kept(model), FULL)


def test_into_a_part():
    model, theirs = net(), other(net()["encoder"])
    before = kept(model)
    assert len(load_weights(model, theirs, into="encoder").loaded) == 4
    assert torch.equal(model["encoder"][1].bias, theirs["1.bias"]) and torch.equal(model["head"].bias, before["head.bias"])
    assert "into encodr  ModuleDict has no such part, did you mean encoder?" in str(refusal(model, theirs, into="encodr"))
    assert "into zzz  ModuleDict has no such part; it has encoder, norm, head" in str(refusal(model, theirs, into="zzz"))


def compiled(model): return torch.compile(model, backend="eager")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, lambda m: nn.DataParallel(compiled(m)), lambda m: compiled(nn.DataParallel(m))], ids=["compile", "parallel", "both", "compiled outside"])
def test_wrappers_are_seen_through(wrap):
    model = net()
    load_weights(wrap(model), FULL)
    assert same(kept(model), FULL)
    load_weights(wrap(model), other(model["head"]), into="head")
    assert torch.equal(model["head"].bias, FULL["head.bias"] + 1)
    named = nn.ModuleDict({"module": nn.Linear(2, 2)})  # a part that a person called so
    assert load_weights(named, other(named)).loaded == ["module.weight", "module.bias"]
