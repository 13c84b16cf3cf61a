"""States come back as they were; files of tensors are what was written, or are refused."""
import json
import os
import random
import subprocess
import sys
from collections import OrderedDict

import numpy
import pytest
import torch

from trainbook.state import SAFETENSORS, StateError, join, split
from trainbook.tensorfile import Damaged, read_tensors, write_tensors


def same(a, b) -> bool:
    "Equal to the last bit, and of the same types all the way down."
    if type(a) is not type(b): return False
    if isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or not a.numel(): return a.dtype == b.dtype and a.shape == b.shape
        return torch.equal(*(t.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
    if isinstance(a, numpy.ndarray): return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict): return list(a) == list(b) and all(same(x, y) for x, y in zip([*a, *a.values()], [*b, *b.values()]))
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b


def there_and_back(state, tmp_path):
    "Through JSON and a file, as a checkpoint does it."
    tree, tensors = split(state)
    about = write_tensors(tmp_path/"a.safetensors", tensors)
    back = join(json.loads(json.dumps(tree, allow_nan=False)), read_tensors(tmp_path/"a.safetensors", about))
    (tmp_path/"a.safetensors").unlink()
    return back


def from_bytes(dtype: torch.dtype, shape: tuple) -> torch.Tensor | None:
    "A tensor of any dtype, out of counted bytes; None where torch makes none like this."
    count = int(numpy.prod(shape))
    try: return torch.arange(max(1, count) * 16, dtype=torch.uint8).view(dtype)[:count].reshape(shape)
    except RuntimeError: return None


DTYPES = sorted({dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype) and not str(dtype).startswith("torch.q") and from_bytes(dtype, (1,)) is not None}, key=str)


def test_there_are_many_dtypes(): assert len(DTYPES) > 30 and set(SAFETENSORS) < set(DTYPES)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (7,), (2, 3)], ids=str)
def test_every_dtype_and_shape(dtype, shape, tmp_path):
    """Those that safetensors has a word for, and those that travel as bytes."""
    tensor = from_bytes(dtype, shape)
    back = there_and_back({"x": tensor, "again": [tensor]}, tmp_path)
    assert same(back["x"], tensor) and back["again"][0] is back["x"] or not tensor.numel()


def test_our_list_of_dtypes_is_what_safetensors_reads(tmp_path):
    from safetensors.torch import load_file
    write_tensors(tmp_path/"a", {str(dtype): torch.zeros(2, dtype=dtype) for dtype in SAFETENSORS})
    assert {tensor.dtype for tensor in load_file(tmp_path/"a").values()} == set(SAFETENSORS)


def test_types_stay_types(tmp_path):
    state = {"int": 1, "float": 1.0, "bool": True, "none": None, "big": 10 ** 40, "minus zero": -0.0, "tiny": 5e-324, "inf": float("inf"), "-inf": -float("inf"), "nan": float("nan"),
             "tuple": (1, (2.0, [3])), "empty": [(), [], {}, set()], "set": {1, "a", (2, 3)}, "complex": 1 + 2j, "complex nan": complex(float("nan"), 1), "bytes": b"\0\xff", "text": "é\0\ud7ff$",
             "$tensor": "not a tag", "keys": {1: "int", "1": "text", None: 0, False: 1, (1, 2): 3, 1.5: 4}, "ordered": OrderedDict([("b", 1), (2, 3)]),
             "numpy": [numpy.float32(0.1), numpy.int64(-3), numpy.bool_(True), numpy.arange(6).reshape(2, 3).T, numpy.zeros((0, 2)), numpy.array(3 + 1j)]}
    assert same(there_and_back(state, tmp_path), state)


def test_views_and_layouts(tmp_path):
    base = torch.arange(24.).reshape(2, 3, 4)
    state = {"t": base.transpose(0, 2), "slice": base[:, 1], "step": base[..., ::2], "wide": torch.ones(1).expand(5), "conj": torch.complex(base, base).conj(), "neg": torch.complex(base, base).conj().imag,
             "last": base.to(memory_format=torch.contiguous_format), "image": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), "grad": torch.ones(2, requires_grad=True)}
    back = there_and_back(state, tmp_path)
    assert all(torch.equal(back[key], value.detach()) and back[key].dtype == value.dtype for key, value in state.items())


def test_one_tensor_under_two_names_is_one(tmp_path):
    weight = torch.randn(3, 3)
    back = there_and_back({"a": weight, "b": weight, "c": weight.detach(), "other": weight.clone(), "turned": weight.T}, tmp_path)
    assert back["a"] is back["b"] is back["c"] and back["a"] is not back["other"] and torch.equal(back["turned"], weight.T)


@pytest.mark.parametrize("name", ["Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "LBFGS", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"])
def test_every_optimizer_goes_on_bit_for_bit(name, tmp_path):
    def made():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        return net, getattr(torch.optim, name)(net.parameters(), lr=1e-2, **({"momentum": 0.9} if name == "SGD" else {}))
    def step(net, optimizer, seed):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
        def closure(): optimizer.zero_grad(); loss = net(x).square().mean(); loss.backward(); return loss
        optimizer.step(closure)
    net, optimizer = made()
    for seed in range(3): step(net, optimizer, seed)
    back = there_and_back({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path)
    twin, other = made()
    twin.load_state_dict(back["net"]); other.load_state_dict(back["optimizer"])
    for seed in range(3, 6): step(net, optimizer, seed); step(twin, other, seed)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), twin.state_dict().values()))


def test_random_generators(tmp_path):
    state = {"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state(), "modern": numpy.random.default_rng(3).bit_generator.state}
    back = there_and_back(state, tmp_path)
    assert same(back, state)
    want = random.random(), numpy.random.rand(), torch.rand(1)
    random.setstate(back["python"]); numpy.random.set_state(back["numpy"]); torch.set_rng_state(back["torch"])
    assert (random.random(), numpy.random.rand(), torch.rand(1)) == want


@pytest.mark.parametrize("wrong, says", [(lambda: print, "a.b.0  cannot be kept, found builtin_function_or_method"), (lambda: torch.eye(2).to_sparse(), "a.b.0  cannot be kept, found a tensor of layout torch.sparse_coo; call .to_dense"),
                                         (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "a quantized tensor; call .dequantize"),
                                         (lambda: torch.eye(2).to_sparse_csr(), "layout torch.sparse_csr"), (lambda: torch.empty(1, device="meta"), "without data"), (lambda: object(), "found object"),
                                         (lambda: numpy.array(["a"]), "found ndarray"), (lambda: numpy.array([object()]), "found ndarray"), (lambda: type("MyInt", (int,), {})(3), "found MyInt")])
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_kept_is_refused_by_name(wrong, says):
    with pytest.raises(StateError, match=says): split({"a": {"b": [wrong()]}})


def test_a_tag_of_tomorrow_is_refused():
    with pytest.raises(StateError, match="tag '.future' is unknown"): join({"$future": 1}, {})


# --- files ----------------------------------------------------------------------------------------------------------------------------

def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path):
    tensors = {"a": torch.arange(10.), "b": torch.ones(3, dtype=torch.int8)}
    about = write_tensors(tmp_path/"a", tensors)
    raw = (tmp_path/"a").read_bytes()
    for i in range(len(raw)):
        hurt = bytearray(raw); hurt[i] ^= 1 << (i % 8)
        (tmp_path/"b").write_bytes(hurt)
        with pytest.raises(Damaged): read_tensors(tmp_path/"b", about)
        (tmp_path/"b").write_bytes(raw[:i])
        with pytest.raises(Damaged): read_tensors(tmp_path/"b", about)
        with pytest.raises(Damaged): read_tensors(tmp_path/"b")


def test_a_file_is_never_overwritten_and_links_are_not_followed(tmp_path):
    write_tensors(tmp_path/"a", {})
    with pytest.raises(FileExistsError): write_tensors(tmp_path/"a", {})
    (tmp_path/"link").symlink_to(tmp_path/"a")
    with pytest.raises(OSError): read_tensors(tmp_path/"link")
    with pytest.raises(OSError): write_tensors(tmp_path/"link", {})


def test_a_disk_without_room_is_known_before_a_byte_is_written(tmp_path):
    """A limit on the size of files stands for the full disk; posix_fallocate meets it first."""
    code = f"""
import os, resource, signal, torch
from trainbook.tensorfile import write_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
os.pwrite = None  # nobody comes here
try: write_tensors({str(tmp_path/'a')!r}, {{"x": torch.zeros(10_000)}})
except OSError as error: print("refused", error.errno)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.startswith("refused")


def test_short_writes_are_completed(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:7], at))
    tensors = {"x": torch.arange(100.)}
    about = write_tensors(tmp_path/"a", tensors)
    assert torch.equal(read_tensors(tmp_path/"a", about)["x"], tensors["x"])


def test_large_tensors_go_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("trainbook.tensorfile._PIECE", 1000)
    tensors = {"x": torch.arange(5000), "y": torch.randn(333)}
    back = read_tensors(tmp_path/"a", write_tensors(tmp_path/"a", tensors))
    assert all(torch.equal(back[key], value) for key, value in tensors.items())
