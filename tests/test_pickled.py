"""What others pickled: known names and allowed ones become plain data, and whatever a file asks for, nothing of it runs."""
import argparse
import collections
import datetime
import enum
import io
import os
import pathlib
import pickle
import re
import struct
import types
import zipfile
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from test_foreign import BOTH, NET, W, Bag, packed, refused, rewritten
from trainbook.foreign import read_foreign, wanted
from trainbook.pickled import _beyond_torch


class Color(enum.Enum): RED = "red"


@dataclass
class Config:
    width: int = 8
    path: pathlib.Path = pathlib.Path("a/b")


class Slots:
    __slots__ = ("a",)


class Calls:
    "An object whose pickle calls something."
    def __init__(self, function, *words): self.function, self.words = function, words
    def __reduce__(self): return self.function, self.words


@BOTH
def test_known_names_become_plain_data(form, here):
    array = np.arange(6, dtype=">i2").reshape(2, 3)
    values = {"float": (np.float32(0.5), 0.5), "int": (np.int64(-3), -3), "bool": (np.bool_(True), True), "complex": (np.complex128(1j), 1j), "text": (np.str_("ink"), "ink"),
              "array": (np.asfortranarray(np.eye(2)), np.eye(2)), "swapped": (array, array.astype("i2")), "empty": (np.zeros((0, 3)), np.zeros((0, 3))), "words": (np.array(["a", "bc"]), ["a", "bc"]),
              "dtype": (np.dtype("f4"), "float32"), "kind": (np.float32, "numpy.float32"), "tuple": ((1, (2,)), (1, (2,))), "set": ({1}, {1}), "frozen": (frozenset({1}), {1}), "bytes": (b"\xff", b"\xff"),
              "space": (argparse.Namespace(a=argparse.Namespace(b=1)), {"a": {"b": 1}}), "simple": (types.SimpleNamespace(a=1), {"a": 1}), "default": (collections.defaultdict(list, a=[1]), {"a": [1]}),
              "counter": (collections.Counter("aab"), {"a": 2, "b": 1}), "ordered": (collections.OrderedDict(a=1), {"a": 1}), "deque": (collections.deque([1, 2], 5), [1, 2]),
              "path": (pathlib.PurePosixPath("/a/b"), "/a/b"), "windows": (pathlib.PureWindowsPath("c:/a"), "c:\\a"), "keys": ({pathlib.PurePosixPath("a"): np.int8(1), np.int64(2): 3}, {"a": 1, 2: 3}),
              "moment": (datetime.datetime(2026, 1, 2, 3, 4, 5, 6), "2026-01-02T03:04:05.000006"), "day": (datetime.date(2026, 1, 2), "2026-01-02"), "clock": (datetime.time(1, 2, 3, 4), "01:02:03.000004"),
              "utc": (datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc), "2026-01-02T00:00:00+00:00"), "span": (datetime.timedelta(1, 2), 86402.0),
              "size": (torch.Size([1, 2]), (1, 2)), "dtype of torch": (torch.bfloat16, "torch.bfloat16"), "device": (torch.device("cpu"), "cpu"), "version": (torch.torch_version.TorchVersion("2.1"), "2.1")}
    torch.save({"model": W, "known_state_dict": {key: value for key, (value, _) in values.items()}}, "a.pth", **form)
    assert wanted("a.pth") == []
    found = read_foreign("a.pth").state["known"]
    for key, (_, expected) in values.items():
        assert type(found[key]) is type(expected), key
        assert (found[key].dtype == expected.dtype and np.array_equal(found[key], expected)) if isinstance(expected, np.ndarray) else found[key] == expected, key


def test_parameters_are_tensors_and_shared_ones_stay_shared(here):
    torch.save({"a": NET[0].weight, "b": NET[0].weight.detach()}, "a.pth")
    found = read_foreign("a.pth").state["model"]
    assert type(found["a"]) is torch.Tensor and not found["a"].requires_grad and found["a"].data_ptr() == found["b"].data_ptr()


@BOTH
def test_allowed_names_become_plain_data_and_are_never_imported(form, here, monkeypatch):
    slots = Slots(); slots.a = 1
    bag = Bag(x=1); bag.y = 2
    torch.save({"model": W, "config": {"c": Config(), "color": Color.RED, "slots": slots, "bag": bag, "class": Config}}, "a.pth", **form)
    names = sorted(f"{kind.__module__}.{kind.__name__}" for kind in (Bag, Color, Config, Slots))
    assert wanted("a.pth") == names
    for kind in ("Color", "Config", "Slots"): monkeypatch.delitem(globals(), kind)  # not here any more
    text = refused("a.pth", allow=names[1:])
    assert text == (f"a.pth wants {names[0]}, beyond tensors and plain data; to have that as plain data (nothing is imported, nothing runs): "
                    f"allow=['{names[0]}'], in a shell --allow {names[0]}")
    assert read_foreign("a.pth", names).facts["config"] == {"c": {"width": 8, "path": "a/b"}, "color": "red", "slots": {"a": 1}, "bag": {"x": 1, "y": 2}, "class": f"{__name__}.Config"}


def old_form(*pickles: bytes) -> bytes:
    "A file in torch's format before zip."
    return b"".join([pickle.dumps(0x1950a86a20f9469cfc6c, 2), pickle.dumps(1001, 2), *pickles])


TOUCH = "open('witness', 'w').close()"
PAYLOADS = {"reduce": b"\x80\x02cposix\nsystem\nX\x0d\x00\x00\x00touch witness\x85R.",
            "eval": pickle.dumps(Calls(eval, TOUCH), 2), "exec": pickle.dumps({"model": Calls(exec, TOUCH)}, 2),
            "inst": b"\x80\x02(X\x0d\x00\x00\x00touch witnessiposix\nsystem\n.", "object": b"\x80\x02(cposix\nsystem\nX\x0d\x00\x00\x00touch witnesso.",
            "stack global": pickle.dumps(Calls(os.system, "touch witness"), 4),
            "memo": b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x940h\x00h\x01\x93\x8c\x0dtouch witness\x85R.",
            "import": b"\x80\x02cbuiltins\n__import__\nX\x09\x00\x00\x00antigravi\x85R.", "numpy": b"\x80\x02cnumpy.testing._private.utils\nrunstring\nX\x14\x00\x00\x00open('witness', 'w')}\x86R."}


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("form", ["zip", "old", "old, before", "old, after"])
def test_a_hostile_pickle_runs_nothing_even_if_allowed(payload, form, here):
    data, empty = PAYLOADS[payload], pickle.dumps({}, 2)
    if form == "zip": rewritten(data)
    else: (here/"hostile.pth").write_bytes(old_form(*{"old": (empty, data, empty), "old, before": (data, empty, empty), "old, after": (empty, empty, data)}[form]))
    names = wanted("hostile.pth")
    assert len(names) == 1 and names[0] in ("posix.system", "builtins.eval", "builtins.exec", "builtins.__import__", "numpy.testing._private.utils.runstring")
    for allow in ([], names, [name.replace("builtins", "__builtin__") for name in names]):
        assert refused("hostile.pth", allow=allow).startswith("hostile.pth ")
    assert not os.path.exists("witness")
    if names[0].startswith("numpy"): return
    assert refused("hostile.pth", allow=names) == f"hostile.pth wants {names[0]}: a command, not data; it is not read, allowed or not; ask whoever sent it"


def test_the_payloads_do_run_elsewhere(here):
    """Or the test above would prove nothing."""
    for payload in ("reduce", "eval", "exec", "inst", "object", "stack global", "memo"):
        pickle.loads(PAYLOADS[payload])
        assert os.path.exists("witness"), payload
        os.unlink("witness")


def test_what_others_told_torch_to_trust_is_out_of_sight_and_comes_back(here):
    ran = []
    def real(*words): ran.append(words)
    trusted = [(real, "mypkg.Thing"), (real, "numpy._core.multiarray.scalar")]
    torch.save({"model": W, "best_acc": np.float64(1)}, "a.pth")
    with torch.serialization.safe_globals(trusted):
        assert read_foreign("a.pth").facts["metrics"] == {"best_acc": 1.0}
        assert _beyond_torch({"mypkg Thing"}) == ["mypkg.Thing"] and set(trusted) <= set(torch.serialization.get_safe_globals())
    assert not ran


@BOTH
@pytest.mark.parametrize("content", [NET, {"epoch": 1, "model": NET}, torch.nn.DataParallel(NET)], ids=["whole", "inside", "parallel"])
def test_a_whole_module_is_refused_with_what_converts_it(content, form, here):
    torch.save(content, "net.pth", **form)
    text = refused("net.pth", allow=wanted("net.pth"))
    assert text.startswith("net.pth holds a whole module (torch.nn.modules.") and text.splitlines()[1:] == [
        "    import torch", '    model = torch.load("net.pth", weights_only=False)  # only where you made it yourself', '    torch.save(model.state_dict(), "net_weights.pth")']


class Own(torch.nn.Module):
    def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.ones(2))


def test_a_module_of_ones_own_class_is_one_too(here):
    torch.save(Own(), "net.pth")
    assert "holds a whole module" in refused("net.pth", allow=[f"{__name__}.Own"])


def nested(cycle: bool):
    nest = [1] * 10
    if cycle: nest.append(nest)
    for _ in range(20): nest = [nest] * 10
    return {"model": W, "nest": nest}


@pytest.mark.parametrize("cycle, said", [(False, "it claims more values than are believed"), (True, "something in it holds itself, which no plain data can")])
def test_little_files_that_claim_a_lot(cycle, said, here):
    torch.save(nested(cycle), "a.pth")
    assert refused("a.pth") == f"a.pth cannot be read safely: {said}"


@pytest.mark.parametrize("kind", ["S1", "U1"])
def test_an_array_of_text_with_no_text_in_it(kind, here):
    """Twenty million empty rows take no byte in the file, and gigabytes as lists."""
    data = zipfile.ZipFile(io.BytesIO(packed(lambda f: torch.save({"model": W, "a": np.zeros((3, 0), kind)}, f)))).read("archive/data.pkl")
    rewritten(data.replace(b"K\x03K\x00\x86", b"J" + struct.pack("<i", 20_000_000) + b"K\x00\x86"))
    assert os.path.getsize("hostile.pth") < 5000 and refused("hostile.pth") == "hostile.pth cannot be read safely: it claims more values than are believed"


@BOTH
def test_many_tensors_share_one_budget(form, here):
    torch.save({"model": {f"w{i}": torch.zeros(1).expand(20_000_000) for i in range(8)}}, "a.pth", **form)
    assert re.fullmatch(r"a.pth cannot be read safely: it claims \d{3},000,000 bytes, more than the file has", refused("a.pth"))
    one = torch.zeros(1).expand(20_000_000)
    torch.save({"model": {f"w{i}": one for i in range(8)} | {"flat": torch.ones(8), "part": torch.ones(8)[2:]}}, "b.pth", **form)  # one tensor under many names is one
    assert len(read_foreign("b.pth").state["model"]) == 10


def test_bytes_are_in_the_budget(here):
    rewritten(b"\x80\x02cbuiltins\nbytearray\nJ" + struct.pack("<i", 1 << 30) + b"\x85R.")
    assert refused("hostile.pth") == "hostile.pth cannot be read safely: it claims 1,073,741,824 bytes, more than the file has"


def test_a_storage_that_lies_about_its_size(here):
    data = zipfile.ZipFile(io.BytesIO(packed(lambda f: torch.save({"w": torch.arange(4.)}, f)))).read("archive/data.pkl")
    rewritten(data.replace(b"K\x04tq", b"J" + struct.pack("<i", 1 << 28) + b"tq"))
    assert "record size" in refused("hostile.pth")


def test_a_flipped_bit_is_noticed_and_missing_checksums_are_no_damage(here):
    torch.save(W, "a.pth")
    data = bytearray((here/"a.pth").read_bytes())
    at = data.index(W["0.weight"].numpy().tobytes())
    data[at + 5] ^= 1; (here/"a.pth").write_bytes(data)
    torch.load("a.pth", weights_only=True)  # does not see it
    assert re.fullmatch(r"a.pth cannot be read safely: \w+/data/0 is not what was written \(its checksum differs\)", refused("a.pth"))
    torch.serialization.set_crc32_options(False)
    try: torch.save(W, "b.pth")
    finally: torch.serialization.set_crc32_options(True)
    assert read_foreign("b.pth").state["model"]["0.bias"].equal(W["0.bias"])


def test_control_characters_of_a_file_do_not_reach_the_terminal(here):
    rewritten(b"\x80\x04\x8c\x09a\x1b[31m\nb.\x8c\x01C\x93.")
    text = refused("hostile.pth")
    assert text.startswith(r"hostile.pth wants a\x1b[31m\nb..C, beyond tensors") and "\x1b" not in text
