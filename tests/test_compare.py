"""Two checkpoints side by side: any two, with whatever in them."""
import numpy as np
import pytest
import torch

from trainbook.beside import about, compare_two, held_state
from trainbook.stepfolder import Checkpoint, read_manifest

ESCAPE = "\x1b[31m\nHACK"


def of(weights=None, **facts): return Checkpoint({"model": weights or {}}, facts, "a.pth")


@pytest.mark.parametrize("a, b, differ", [
    (torch.ones(3), torch.ones(3), False), (np.ones(3), torch.ones(3), False), (np.ones(3), [1.0, 1.0, 1.0], False), (torch.ones(3), torch.zeros(3), True), (np.ones((2, 2)), np.ones(3), True),
    ([torch.ones(2), 1], [torch.ones(2), 1], False), ([torch.ones(2)], [torch.zeros(2)], True), (torch.eye(2).to_sparse(), torch.eye(2), False), (np.float32(1), 1.0, False), (float("nan"), float("nan"), False),
    ((1, 2), [1, 2], False), (torch.ones(2), None, True)], ids=range(12))
def test_settings_of_any_kind(a, b, differ):
    found = compare_two(of(config={"x": {"y": a}}), of(config={"x": {"y": b}}))
    assert bool(found.settings) == differ and ("x.y" in str(found)) == differ


@pytest.mark.parametrize("config", ["text", [1, 2], torch.ones(2), {}, None])
def test_a_config_that_is_no_mapping(config):
    assert not compare_two(of(config=config), of(config=config)).settings
    assert bool(compare_two(of(config=config), of(config={"a": 1})).settings)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "bfloat16", "half", "int64", "bool", "uint16", "complex128", "complex64"])
def test_dtypes_of_any_kind(kind):
    one = torch.ones(3).to(getattr(torch, kind))
    assert [moved.by for moved in compare_two(of({"w": one}), of({"w": one.clone()})).moved] == [0]
    assert [moved.by for moved in compare_two(of({"w": one}), of({"w": torch.ones(3)})).moved] == [0]
    assert compare_two(of({"w": one}), of({"w": 2 * torch.ones(3)})).moved[0].by == pytest.approx(1)


def test_tensors_of_odd_kinds():
    four = torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    assert compare_two(of({"w": four}), of({"w": four.clone()})).moved[0].by == 0 and compare_two(of({"w": four}), of({"w": torch.ones(2)})).moved[0].by == float("inf")
    for a in (torch.eye(2).to_sparse(), torch.full((2, 2), float("nan")), torch.zeros(0, 3), torch.tensor(1.0), torch.ones(2, dtype=torch.complex64).conj(), torch.ones(4)[::2]):
        assert compare_two(of({"w": a}), of({"w": a.clone()})).moved[0].by == 0
    assert compare_two(of({"w": torch.tensor([float("nan"), 1])}), of({"w": torch.tensor([1.0, 1])})).moved[0].by == float("inf")


def test_no_word_of_a_file_commands_the_terminal():
    a = Checkpoint({"model": {"w" + ESCAPE: torch.ones(2), "only" + ESCAPE: torch.ones(1), "shape" + ESCAPE: torch.ones(1), "same" + ESCAPE: torch.ones(1)}},
                   {"metrics": {ESCAPE: 0.1}, "timestamp": ESCAPE, "model_config": ESCAPE, "config": {ESCAPE: ESCAPE}, "metadata": {"stage" + ESCAPE: ESCAPE}}, "a" + ESCAPE)
    b = Checkpoint({"model": {"w" + ESCAPE: torch.zeros(2), "shape" + ESCAPE: torch.ones(2), "same" + ESCAPE: torch.ones(1)}}, {}, "b.pth")
    for text in (str(compare_two(a, b)), str(compare_two(b, a))): assert "\x1b" not in text and "\nHACK" not in text and text.count("HACK") >= 10


def test_what_the_metadata_repeat_is_said_once():
    a = of(timestamp="x", code={"git": None}, metadata={"saved": "x", "code": {"git": None}, "note": "n"})
    assert list(compare_two(a, of()).facts) == ["timestamp", "metadata.note", "code.git"] and list(compare_two(of(timestamp="x", metadata={"saved": "x"}), of()).facts) == ["timestamp"]


@pytest.mark.parametrize("facts", [{"timestamp": 5, "code": {"git": 5}, "metadata": [1]}, {"code": {"versions": 1, "module": 7}}, {"metadata": {"stage": {}, "run": 1}}, {"code": {"git": {"commit": 5}}, "model_config": np.ones(2)[:1]}, {}])
def test_about_takes_whatever_stands_there(facts): assert all(isinstance(text, str) for text in about(facts).values())


def test_after_an_error_within_a_step_it_is_not_exact(here):
    from trainbook import Callback, Trainer
    from trainbook.events import CallbackError
    data = [(torch.ones(4, 2), torch.zeros(4, dtype=torch.long))] * 4
    class Slip(Callback):
        slips = True
        def state_dict(self): return {"slips": self.slips}
        def load_state_dict(self, state): ...
        def step_end(self, trainer):
            if trainer.step == 2 and self.slips: raise ValueError("a slip")
    trainer = Trainer(torch.nn.Linear(2, 2), data, loss="cross_entropy", num_epochs=2, quiet=True, save_dir="r", save_interval=1, callbacks=[slip := Slip()])
    with pytest.raises(CallbackError, match="a slip"): trainer.train()
    slip.slips = False
    trainer.train()
    exact, words = held_state(read_manifest(sorted((here/"r/train").glob("step-*"))[-1]).state)
    assert not exact and "bit for bit" in words and "CallbackError in step 2" in words and "; not " not in words
