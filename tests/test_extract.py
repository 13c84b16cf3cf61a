"""An extraction is killed at any instant, cut from power, and runs out of disk: what counted stays, and the file ends up the same to the bit."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from disk import Disk, show
from test_kill import ended, fork

from trainbook import extract
from trainbook.extract import Extraction, as_rows, read_arrays
from trainbook.source import ConfigError
from trainbook.state import CheckpointError
from trainbook.tensorfile import Damaged, map_tensors

FORMATS = [".npz", ".safetensors"]
ABOUT = {"model": "encoder", "step": 1200}


@pytest.fixture(autouse=True)
def no_wait(monkeypatch): monkeypatch.setattr(os, "fsync", lambda fd: None)  # a kill loses nothing that was written; the power cut has a disk of its own


def batch(number: int, rows: int = 4, width: int = 3) -> dict:
    generator = torch.Generator().manual_seed(number)
    return {"features": torch.randn(rows, width, generator=generator), "half": torch.randn(rows, generator=generator).bfloat16(),
            "label": torch.randint(0, 9, (rows, 2), generator=generator), "seen": torch.rand(rows, generator=generator) > 0.5}


def run(folder: Path, suffix: str, batches: int = 7, every: int = 2, **shape) -> Path:
    "All of it, from where it stands."
    extraction = Extraction(folder, folder/f"out{suffix}", ABOUT, every)
    for split, count in (("train", batches), ("val", 3)):
        for number in range(extraction.first(split), count): extraction.add(batch(number + 100 * (split == "val"), **shape), split)
    return extraction.finish()


def expected(batches: int = 7, float_half: bool = False, **shape) -> dict:
    found = {}
    for split, begin, count in (("train", 0, batches), ("val", 100, 3)):
        for name in batch(0): found[f"{split}/{name}"] = torch.cat([batch(begin + n, **shape)[name] for n in range(count)])
    return {name: value.float() if float_half and value.dtype == torch.bfloat16 else value for name, value in found.items()}


def same(found: dict, wanted: dict) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted)


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_was_put_in_comes_out_and_others_can_read_it(tmp_path, suffix):
    path, wanted = run(tmp_path, suffix), expected(float_half=suffix == ".npz")
    assert same(read_arrays(path), wanted)
    if suffix == ".safetensors": assert same(safetensors.torch.load_file(path), wanted)
    else:
        with numpy.load(path, allow_pickle=False) as theirs: assert same({name: torch.from_numpy(theirs[name]) for name in theirs}, wanted)
    assert sorted(os.listdir(tmp_path)) == ["extraction.json", f"out{suffix}"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_killed_at_random_it_ends_the_same_to_the_bit(tmp_path, suffix):
    shape = {"rows": 512, "width": 64}
    wanted, rng, kills, stood, inside_the_end = run(tmp_path/"whole", suffix, 40, 3, **shape).read_bytes(), random.Random(0), 0, set(), 0
    began = time.monotonic()
    run(tmp_path/"timed", suffix, 40, 3, **shape)
    took, folder, life = time.monotonic() - began, None, 0
    while kills < 24 or folder is not None:
        folder, life = folder or tmp_path/f"life-{kills}", life + 1
        child = fork(lambda folder=folder: run(folder, suffix, 40, 3, **shape))
        time.sleep(rng.random() * took * (1.5 if life > 2 else 0.9))
        os.kill(child, signal.SIGKILL)
        killed = ended(child) == -signal.SIGKILL
        kills += killed
        if killed and folder.exists():
            inside_the_end += (folder/f".tmp-out{suffix}").exists()
            if (folder/"extraction.json").exists(): stood.add(json.loads((folder/"extraction.json").read_text())["splits"].get("train", {}).get("batches", 0))
            assert not (folder/f"out{suffix}").exists() or (folder/f"out{suffix}").read_bytes() == wanted
        if not killed:
            assert (folder/f"out{suffix}").read_bytes() == wanted and sorted(os.listdir(folder)) == ["extraction.json", f"out{suffix}"]
            folder, life = None, 0
    print(f"{kills} kills, {inside_the_end} inside the end, found at {sorted(stood)}")
    assert len(stood) >= 4


@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename", "write", "open", "posix_fallocate", "unlink"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_killed_before_each_call_it_ends_the_same(tmp_path, suffix, call):
    wanted = run(tmp_path/"whole", suffix).read_bytes()
    real, n = getattr(os, call), 0
    while True:
        def life(folder=tmp_path/f"{n}", n=n):
            count = [0]
            def deadly(*args, **kwargs):
                if count[0] == n: os.kill(os.getpid(), signal.SIGKILL)
                count[0] += 1
                return real(*args, **kwargs)
            setattr(os, call, deadly)
            run(folder, suffix)
        if ended(fork(life)) == 0: break
        assert run(tmp_path/f"{n}", suffix).read_bytes() == wanted and sorted(os.listdir(tmp_path/f"{n}")) == ["extraction.json", f"out{suffix}"]
        n += 1 if n < 8 or call != "open" else 7
    assert n >= {"posix_fallocate": suffix == ".safetensors", "unlink": 2}.get(call, 3)


def test_after_a_power_cut_it_ends_the_same(tmp_path):
    wanted = run(tmp_path/"whole", ".safetensors", 3, 2).read_bytes()
    (tmp_path/"disk"/"x").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(tmp_path/"disk", patch)
        assert run(tmp_path/"disk"/"x", ".safetensors", 3, 2).read_bytes() == wanted
    cuts = 0
    for _, tree in disk.cuts(random.Random(0), 2):
        show(tree, tmp_path/"after")
        (tmp_path/"after"/"x").mkdir(exist_ok=True)
        file = tmp_path/"after"/"x"/"out.safetensors"
        assert not file.exists() or file.read_bytes() == wanted
        note = json.loads(tree.get("x/extraction.json") or b"{}")
        extraction = Extraction(file.parent, file, ABOUT, 2)  # what is said to be there is there
        assert [extraction.first(split) for split in note.get("splits", {})] == [split["batches"] for split in note.get("splits", {}).values()]
        assert extraction.finished == (note.get("done") is not None)
        assert run(tmp_path/"after"/"x", ".safetensors", 3, 2).read_bytes() == wanted
        cuts += 1
    assert cuts > 200


# --- disk and memory ------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", FORMATS)
def test_a_full_disk_is_one_line_and_what_counted_stays(tmp_path, suffix):
    code = f"""
import resource, signal, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_extract import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try: run(Path("x"), {suffix!r}, 40, width=32)
except CheckpointError as error: print(error)
extraction = Extraction("x", "x/out{suffix}", ABOUT); print(extraction.first("train"), sorted(os.listdir("x")))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == (f"x/out{suffix}  cannot be written: File too large; 4 batches are kept, mend that and extract again\n"
                           "4 ['extraction.json', 'rows-000', 'rows-001', 'rows-002', 'rows-003']\n"), done
    assert run(tmp_path/"x", suffix, 40, width=32).read_bytes() == run(tmp_path/"whole", suffix, 40, width=32).read_bytes()


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_disk_that_is_full_at_the_end_keeps_all_rows(tmp_path, suffix):
    extraction = Extraction(tmp_path, tmp_path/f"out{suffix}", ABOUT, every=100)
    for number in range(5): extraction.add(batch(number, 100))
    code = f"""
import resource, signal, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_extract import *
extraction = Extraction({str(tmp_path)!r}, {str(tmp_path/f'out{suffix}')!r}, ABOUT)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
extraction.finish()"""
    extraction._commit()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "5 batches are kept" in done.stderr.splitlines()[-1] and not list(tmp_path.glob(".tmp*")) and not list(tmp_path.glob("out*"))
    assert read_arrays(Extraction(tmp_path, tmp_path/f"out{suffix}", ABOUT).finish())["features"].shape == (500, 3)


def test_in_the_same_process_it_goes_on_after_a_full_disk(tmp_path, monkeypatch):
    extraction, real, full = Extraction(tmp_path, tmp_path/"out.npz", ABOUT, every=2), os.pwrite, [False]
    def pwrite(fd, data, at):
        if full[0] and at: raise OSError(28, "No space left on device")
        return real(fd, data[:5], at)  # short writes are completed
    monkeypatch.setattr(os, "pwrite", pwrite)
    for number in range(3): extraction.add(batch(number))
    full[0] = True
    with pytest.raises(CheckpointError, match="No space left on device; 2 batches are kept"): extraction.add(batch(3))
    full[0] = False
    for number in range(extraction.first(), 4): extraction.add(batch(number))
    assert torch.equal(read_arrays(extraction.finish())["features"], torch.cat([batch(n)["features"] for n in range(4)]))


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_large_extraction_takes_little_memory(tmp_path, suffix):
    code = f"""
import resource, sys, torch
from trainbook.extract import Extraction, read_arrays
extraction = Extraction("x", "x/out{suffix}", {{}}, every=5)
part = torch.ones(1024, 1024)
extraction.add({{"a": part, "b": part[:, :200]}})
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "linux" else 1 / 1024) / 1024
before = peak()
for _ in range(39): extraction.add({{"a": part, "b": part[:, :200]}})
extraction.finish()
arrays = read_arrays("x/out{suffix}")
assert arrays["a"].shape == (40960, 1024) and arrays["b"][-1, -1] == 1
print(peak() - before)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert (tmp_path/f"x/out{suffix}").stat().st_size > 190 << 20 and float(done.stdout) < 40, done.stdout  # MB


# --- what is refused ------------------------------------------------------------------------------

@pytest.mark.parametrize("change, says", [
    (lambda b: b.pop("label"), "batch 1  has features, half, seen, expected features, half, label, seen; label must be in every batch, or in none"),
    (lambda b: b.update(more=torch.ones(4)), "more must be in every batch, or in none"),
    (lambda b: b.update(features=torch.ones(4, 2)), "batch 1  features is float32 [rows, 2], the batches before had float32 [rows, 3]"),
    (lambda b: b.update(features=torch.ones(4)), "batch 1  features is float32 [rows], the batches before had float32 [rows, 3]"),
    (lambda b: b.update(features=torch.ones(4, 3).double()), "batch 1  features is float64 [rows, 3], the batches before had float32 [rows, 3]"),
    (lambda b: b.update(seen=torch.ones(3).bool()), "batch 1  seen has 3 rows, features has 4; each sample is a row in every array"),
    (lambda b: b.update(features=[[1, 2], [3]]), "features  found list; give a dense tensor"),
    (lambda b: b.update(features=numpy.array([1, "a"], dtype=object)), "features  found an array of object; give a dense tensor"),
    (lambda b: b.update(features=numpy.ones((4, 3), numpy.longdouble)), "features  found an array of"),
    (lambda b: b.update(features=torch.ones(4, 3).to_sparse()), "features  found a sparse or nested tensor"),
    (lambda b: b.update(features=torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)), "features  found a sparse or nested tensor"),
    (lambda b: b.update(features=torch.tensor(3.)), "features  found a single number"),
    (lambda b: b.update(features=3), "features  found int")])
def test_a_batch_unlike_the_others_is_refused_and_nothing_of_it_is_kept(tmp_path, change, says):
    extraction = Extraction(tmp_path, tmp_path/"out.npz", ABOUT)
    extraction.add(batch(0))
    changed = batch(1)
    change(changed)
    with pytest.raises(ConfigError) as caught: extraction.add(changed)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    extraction.add(batch(1))
    assert torch.equal(read_arrays(extraction.finish())["features"], torch.cat([batch(0)["features"], batch(1)["features"]]))


@pytest.mark.parametrize("name", ["", "a b", "/x", "x/", "a\0b", "a//b", "x\n", "é/" * 2])
def test_names_that_no_file_should_hold(tmp_path, name):
    with pytest.raises(ConfigError, match="is no name for an array"): Extraction(tmp_path, tmp_path/"a.npz", {}).add({name: torch.ones(2)})


def test_two_arrays_of_one_name_are_refused(tmp_path):
    extraction = Extraction(tmp_path, tmp_path/"a.npz", {})
    extraction.add({"b/c": torch.ones(2)}, "a")
    with pytest.raises(ConfigError, match="a/b/c  is no name for an array, or taken"): extraction.add({"c": torch.ones(2)}, "a/b")
    with pytest.raises(ConfigError, match="val  has no arrays"): extraction.add({}, "val")


def test_what_an_extraction_is_opened_with_is_checked(tmp_path):
    with pytest.raises(ConfigError, match="a.npy  is neither .npz nor .safetensors, did you mean .npz"): Extraction(tmp_path, tmp_path/"a.npy", {})
    with pytest.raises(ConfigError, match="about  cannot be kept: .*give plain data"): Extraction(tmp_path, tmp_path/"a.npz", {"model": torch.nn.Linear(1, 1)})
    (tmp_path/"a.npz").write_text("mine")
    with pytest.raises(ConfigError, match="a.npz  is there already and no extraction wrote it"): Extraction(tmp_path, tmp_path/"a.npz", {})
    assert (tmp_path/"a.npz").read_text() == "mine"
    with pytest.raises(ConfigError, match="nothing was extracted"): Extraction(tmp_path/"b", tmp_path/"b"/"a.npz", {}).finish()
    (tmp_path/"b"/"extraction.json").write_text("{")
    with pytest.raises(CheckpointError, match="extraction.json  is damaged"): Extraction(tmp_path/"b", tmp_path/"b"/"a.npz", {})


# --- what lies there ------------------------------------------------------------------------------

def begun(folder: Path, about: dict, every: int = 1, file: str = "out.npz") -> Extraction: return Extraction(folder, folder/file, about, every)


def test_another_about_begins_anew_and_says_in_what_it_differs(tmp_path, capsys):
    begun(tmp_path, ABOUT).add(batch(0))
    assert begun(tmp_path, dict(reversed(ABOUT.items()))).first() == 1 and not capsys.readouterr().err  # the order of keys is nothing
    assert begun(tmp_path, {**ABOUT, "step": 1300}).first() == 0
    assert capsys.readouterr().err == f"{tmp_path}: what lies there is of step 1200, now 1300; it begins anew\n"
    assert not list(tmp_path.glob("rows-*"))
    other = begun(tmp_path, {**ABOUT, "step": 1300})
    other.add(batch(1))
    assert begun(tmp_path, {**ABOUT, "step": 1300}, file="b.npz").first() == 0 and "file out.npz, now b.npz" in capsys.readouterr().err


def test_the_file_of_before_stays_until_the_new_one_is_whole(tmp_path):
    one = begun(tmp_path, ABOUT)
    one.add(batch(0))
    before = one.finish().read_bytes()
    other = begun(tmp_path, {})
    other.add(batch(1))
    assert (tmp_path/"out.npz").read_bytes() == before
    assert torch.equal(read_arrays(other.finish())["features"], batch(1)["features"])


def test_finished_is_finished(tmp_path):
    one = begun(tmp_path, ABOUT)
    one.add(batch(0))
    before = one.finish().stat()
    again = begun(tmp_path, ABOUT)
    assert again.finished and again.first() == 1 and again.finish() == tmp_path/"out.npz" and (tmp_path/"out.npz").stat() == before
    with pytest.raises(CheckpointError, match="is finished"): again.add(batch(1))
    os.truncate(tmp_path/"out.npz", 100)
    assert begun(tmp_path, ABOUT).first() == 0


def test_a_run_that_was_moved_goes_on(tmp_path):
    begun(tmp_path/"a", ABOUT).add(batch(0))
    os.rename(tmp_path/"a", tmp_path/"b")
    assert begun(tmp_path/"b", ABOUT).first() == 1


def test_rows_that_changed_on_the_disk_are_noticed(tmp_path):
    extraction = begun(tmp_path, ABOUT)
    for number in range(2): extraction.add(batch(number))
    data = bytearray((tmp_path/"rows-000").read_bytes())
    data[3] ^= 1
    (tmp_path/"rows-000").write_bytes(data)
    with pytest.raises(Damaged, match=r"rows-000  is not what was written; remove .* and extract again"): extraction.finish()
    assert not (tmp_path/"out.npz").exists() and not (tmp_path/".tmp-out.npz").exists()
    (tmp_path/"rows-000").unlink()
    assert begun(tmp_path, ABOUT).first() == 0


def test_an_interrupt_inside_a_batch_leaves_no_half_of_it(tmp_path, monkeypatch):
    extraction, real, count = begun(tmp_path, ABOUT, every=10), os.pwrite, [0]
    extraction.add(batch(0))
    def pwrite(*args):
        count[0] += 1
        if count[0] == 3: raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(KeyboardInterrupt): extraction.add(batch(1))
    assert extraction.first() == 1
    extraction.add(batch(1))
    assert torch.equal(read_arrays(extraction.finish())["label"], torch.cat([batch(0)["label"], batch(1)["label"]]))


# --- values ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", FORMATS)
def test_every_dtype_comes_back(tmp_path, suffix):
    extraction = begun(tmp_path, {}, file=f"a{suffix}")
    values = {str(dtype)[6:]: torch.tensor([[1, 0, 3]]).to(dtype).expand(2, 3) for dtype in extract._KNOWS[suffix]}
    extraction.add(values)
    extraction.add({name: value[:0] for name, value in values.items()})  # an empty batch
    found = read_arrays(extraction.finish())
    assert len(values) >= 14 and all(torch.equal(found[name].to(torch.complex128), value.to(torch.complex128)) and found[name].dtype == value.dtype for name, value in values.items())
    assert all(array.data_ptr() % array.element_size() == 0 for array in found.values())
    if suffix == ".safetensors":
        raw = (tmp_path/"a.safetensors").read_bytes()
        header = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])
        assert all(header[name]["data_offsets"][0] % value.element_size() == 0 for name, value in values.items())  # nobody needs to copy them


def test_only_empty_batches_and_gradients_and_views(tmp_path):
    for suffix in FORMATS:
        extraction = begun(tmp_path/suffix, {}, file=f"a{suffix}")
        extraction.add({"x": torch.ones(0, 3), "y": torch.ones(0).bool()})
        assert read_arrays(extraction.finish())["x"].shape == (0, 3)
    turned = torch.arange(6.).reshape(2, 3).requires_grad_().T
    assert torch.equal(as_rows("x", turned, ".npz"), turned) and not as_rows("x", turned, ".npz").requires_grad
    assert torch.equal(as_rows("x", torch.ones(2, dtype=torch.complex64).mul(1j).conj(), ".npz"), torch.full((2,), -1j))
    numbers = numpy.arange(6, dtype=">i4").reshape(2, 3)[::-1]
    numbers.flags.writeable = False
    assert as_rows("x", numbers, ".npz").tolist() == [[3, 4, 5], [0, 1, 2]]
    with pytest.raises(ConfigError, match="has dtype torch.complex128, which .safetensors has no word for; convert it, or write .npz"): as_rows("x", torch.ones(2).to(torch.complex128), ".safetensors")


def test_what_others_wrote_is_read(here):
    arrays = {"scalar": numpy.float32(3), "fortran": numpy.asfortranarray(numpy.arange(6.).reshape(2, 3)), "big": numpy.arange(3, dtype=">i2"), "none": numpy.ones((0, 2)), "odd": numpy.ones(3, bool)}
    numpy.savez("plain.npz", **arrays)
    numpy.savez_compressed("packed.npz", **arrays)
    for name in ("plain.npz", "packed.npz"):
        found = read_arrays(name)
        assert all(numpy.array_equal(found[key].numpy(), value) for key, value in arrays.items()) and found.keys() == arrays.keys()
        found["fortran"].zero_()  # in memory only
        assert read_arrays(name)["fortran"].sum() == 15
    safetensors.torch.save_file({"a": torch.ones(3, dtype=torch.bool), "b": torch.arange(5.), "c": torch.arange(3)}, "theirs.safetensors")
    assert same(read_arrays("theirs.safetensors"), safetensors.torch.load_file("theirs.safetensors"))


def test_a_packed_safetensors_file_without_gaps_is_read(here):
    entries = {"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}, "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]}}
    text = json.dumps(entries).encode()
    Path("odd.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"abc" + numpy.array([1, 2], "<f4").tobytes())
    assert map_tensors("odd.safetensors")["b"].tolist() == [1, 2]


def test_what_is_no_plain_numbers_is_refused_in_one_line(here):
    numpy.savez("objects.npz", x=numpy.array([print], dtype=object))
    numpy.savez("words.npz", x=numpy.array(["a"]))
    numpy.savez("good.npz", x=numpy.arange(1000.))
    Path("cut.npz").write_bytes(Path("good.npz").read_bytes()[:500])
    Path("none.npz").write_bytes(b"")
    raw = Path("good.npz").read_bytes()
    Path("claims.npz").write_bytes(raw.replace(b"(1000,)", b"(9999,)"))
    os.symlink("good.npz", "link.npz")
    for name, says in (("objects", "holds object, not numbers|does not fit"), ("words", "holds <U1, not numbers"), ("cut", "is no .npz file"), ("none", "is no .npz file"), ("claims", "x.npy does not fit")):
        with pytest.raises(CheckpointError, match=says) as caught: read_arrays(f"{name}.npz")
        assert "\n" not in str(caught.value)
    with pytest.raises(OSError): read_arrays("link.npz")


@pytest.mark.parametrize("change", [{"of": 5}, {"splits": []}, {"splits": {"": 5}}, {"done": "x"}, {"file": "../victim"}, {"file": "rows-000/../../victim"}, {"bytes": -8}, {"bytes": "8"}, {"dtype": "nosuch"}, {"shape": [2.5]}])
def test_a_note_from_elsewhere_makes_it_write_nowhere_else(tmp_path, change):
    "A run may come from anybody, with a note that names a file of the person who goes on with it."
    (tmp_path/"victim").write_bytes(b"mine, and as long as what is said to count" * 9)
    work = Extraction(tmp_path/"a", tmp_path/"a"/"a.npz", {}, every=1)
    work.add(batch(0))
    path = tmp_path/"a"/"extraction.json"
    note = json.loads(path.read_text())
    for array in note["splits"][""]["arrays"].values(): array |= {key: value for key, value in change.items() if key not in note}
    path.write_text(json.dumps(note | {key: value for key, value in change.items() if key in note}))
    with pytest.raises(CheckpointError, match="extraction.json  is damaged"): Extraction(tmp_path/"a", tmp_path/"a"/"a.npz", {}).add(batch(1))
    assert (tmp_path/"victim").read_bytes() == b"mine, and as long as what is said to count" * 9
