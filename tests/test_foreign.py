"""Checkpoints that others wrote: every form is understood, nothing that is in them runs, and what is refused says why in a line."""
import argparse
import io
import json
import os
import pickle
import re
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trainbook.checkpoint import CheckpointManager, import_checkpoint
from trainbook.foreign import export_checkpoint, is_ours, plain_path, read_foreign, wanted
from trainbook.load import load_checkpoint
from trainbook.stepfolder import Checkpoint, apart
from trainbook.tensorfile import CheckpointError, Damaged

OLD = {"_use_new_zipfile_serialization": False}
BOTH = pytest.mark.parametrize("form", [{}, OLD], ids=["zip", "old"])
NET = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
W = NET.state_dict()
ADAM = torch.optim.AdamW(NET.parameters(), lr=1e-3)
NET(torch.ones(2, 3)).sum().backward(); ADAM.step()
O = ADAM.state_dict()
S = torch.optim.lr_scheduler.CosineAnnealingLR(ADAM, 10).state_dict()
SCALER = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}
EMA = {key: tensor * 0.5 for key, tensor in W.items()}


class Bag(dict):
    "A dict with attributes, as configuration libraries have them."


def refused(path, **options) -> str:
    "The message of a refusal, which is one line unless it shows how to convert a module."
    with pytest.raises(CheckpointError) as caught: read_foreign(path, **options)
    text = str(caught.value)
    assert "\n" not in text or "whole module" in text
    return text


def same(a, b) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


FORMS = {  # what a file holds → parts beside the model, facts, notes
    "InkTrace structural": ({"epoch": 3, "model_state_dict": W, "optimizer_state_dict": O, "scheduler_state_dict": S, "loss": 0.5, "config": {"lr": 0.1}},
        {"optimizer": O, "scheduler": S}, {"epoch": 3, "metrics": {"loss": 0.5}, "config": {"lr": 0.1}}, []),
    "InkTrace dense": ({"epoch": 3, "model_state_dict": W, "optimizer_state_dict": O, "loss": torch.tensor(0.5)},
        {"optimizer": O}, {"epoch": 3, "metrics": {"loss": 0.5}}, []),
    "guide": ({"epoch": 1, "model_state_dict": W, "optimizer_state_dict": O, "val_loss": 0.25, "model_config": {"dim": 4}},
        {"optimizer": O}, {"epoch": 1, "metrics": {"val_loss": 0.25}, "model_config": {"dim": 4}}, []),
    "short": ({"model": W, "optimizer": O, "scheduler": S, "config": {"lr": 1}, "metric": 0.9}, {"optimizer": O, "scheduler": S}, {"config": {"lr": 1}, "metrics": {"metric": 0.9}}, []),
    "steps": ({"model": W, "optimizer": O, "total_steps": 70}, {"optimizer": O}, {"step": 70}, []),
    "state_dict": ({"state_dict": W}, {}, {}, []),
    "ImageNet": ({"epoch": 9, "arch": "resnet", "state_dict": W, "best_acc1": np.float64(0.5), "optimizer": O, "args": argparse.Namespace(lr=0.1, seed=None)},
        {"optimizer": O}, {"epoch": 9, "arch": "resnet", "metadata": {"arch": "resnet"}, "metrics": {"best_acc1": 0.5}, "config": {"lr": 0.1, "seed": None}}, []),
    "plain": (W, {}, {}, []),
    "metrics": ({"model": W, "metrics": {"val_auc": np.float32(0.5)}, "best_val_auc": 1, "scaler": SCALER},
        {"scaler": SCALER}, {"metrics": {"val_auc": 0.5, "best_val_auc": 1}}, []),
    "fastai": ({"model": W, "opt": {"state": [{"step": 1}], "hypers": [{"lr": 0.1}]}}, {"optimizer": {"state": [{"step": 1}], "hypers": [{"lr": 0.1}]}}, {}, []),
    "options": ({"model": W, "opt": argparse.Namespace(lr=0.1)}, {}, {"config": {"lr": 0.1}}, []),
    "extra parts": ({"model_state_dict": W, "frame_encoder_state_dict": EMA, "stage": 1}, {"frame_encoder": EMA}, {"stage": 1, "metadata": {"stage": 1}}, []),
    "facts of wrong types": ({"model": W, "timestamp": 5, "epoch": {"a": 1}, "metrics": [1], "code": 7, "metadata": [1], "step": -5}, {}, {}, ["unused: timestamp, epoch, metrics, code, metadata, step"]),
    "facts out of range": ({"model": W, "epoch": float("nan"), "step": 10**20, "iteration": 100.0}, {}, {"step": 100}, ["unused: epoch, step"]),
    "said by others": ({"model": W, "metric": 0.83, "arch": "r50", "stage": "s", "timestamp": "x", "code": {"git": 5}, "version": "2", "metadata": {"stage": "t"}},
        {}, {"code": {"git": 5}, "timestamp": "x", "arch": "r50", "stage": "s", "version": "2", "metrics": {"metric": 0.83},
             "metadata": {"stage": "t", "saved": "x", "code": {"git": 5}, "arch": "r50", "stage_before": "s", "version": "2"}}, []),
    "tensors in facts": ({"model": W, "config": {"mean": torch.ones(2), "std": [np.ones((1, 2)), 3], "big": torch.ones(1001), "mask": torch.eye(2).to_sparse(), "rows": np.zeros((2000, 0))}, "model_config": {"x": np.int64(3)}},
        {}, {"config": {"mean": [1.0, 1.0], "std": [[[1.0, 1.0]], 3]}, "model_config": {"x": 3}},
        ["left out: config.big, config.mask, config.rows (sparse, quantized or without data; in a config, more than 1,000 numbers)"]),
    "sparse": ({"model": W, "buffers_state_dict": {"mask": torch.eye(2).to_sparse(), "list": [torch.eye(2).to_sparse(), 1]}}, {"buffers": {"list": [None, 1]}}, {},
        ["left out: buffers.mask, buffers.list.0 (sparse, quantized or without data; in a config, more than 1,000 numbers)"]),
    "averaged": ({"model_ema": EMA, "model": W}, {"ema": EMA}, {}, ["the averaged weights, model_ema, are the part ema"]),
    "only averaged": ({"ema": W}, {}, {}, ["only averaged weights were found; they are the model"]),
    "odd name": ({"generator": W, "epoch": 1}, {}, {"epoch": 1}, ["the weights are generator, the only thing that looks like weights"]),
    "unused": ({"model": W, "rng": [1, 2], "note": "x", 7: "seven", "none": None}, {}, {}, ["unused: rng, note, 7"]),
    "DataParallel": ({"state_dict": {"module." + k: v for k, v in W.items()}}, {}, {}, ["stripped the prefix module. from the names of model"]),
    "nested": ({"model": {"_orig_mod.module._orig_mod." + k: v for k, v in W.items()}}, {}, {},
        [f"stripped the prefix {p} from the names of model" for p in ("_orig_mod.", "module.", "_orig_mod.")]),
    "Lightning": ({"pytorch-lightning_version": "1.9.5", "epoch": 2, "global_step": 50, "state_dict": W, "optimizer_states": [O, O], "lr_schedulers": [S],
                   "hyper_parameters": Bag(lr=0.1), "loops": {"fit": 1}, "MixedPrecisionPlugin": SCALER, "callbacks": {}},
        {"optimizer": O, "scheduler": S, "scaler": SCALER}, {"epoch": 2, "step": 50, "model_config": {"lr": 0.1}},
        ["of 2 optimizer_states the first is used", "unused: loops"])}


def plain(value):
    "A value with tensors as lists, to be compared."
    if isinstance(value, torch.Tensor): return value.tolist()
    if isinstance(value, dict): return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


@BOTH
@pytest.mark.parametrize("name", FORMS)
def test_forms(name, form, here):
    content, parts, facts, notes = FORMS[name]
    torch.save(content, "model_best.tar", **form)  # the name says nothing
    allow = [f"{__name__}.Bag"]
    found = read_foreign("model_best.tar", allow)
    assert same(found.state.pop("model"), W)
    assert plain(found.state) == plain(parts) and found.facts == facts and found.notes[1:] == notes
    apart(found.state)  # it can be written as a checkpoint of ours


def test_the_form_is_told(here):
    told = {}
    for name in ("plain", "fastai", "Lightning", "guide"):
        torch.save(FORMS[name][0], "a.pth", **(OLD if name == "guide" else {}))
        told[name] = read_foreign("a.pth", [f"{__name__}.Bag"]).notes[0]
    assert told == {"plain": "state dict (torch.save file)", "fastai": "fastai checkpoint (torch.save file)",
                    "Lightning": "Lightning checkpoint of 1.9.5 (torch.save file)", "guide": "torch.save file in the form before zip"}


def test_a_prefix_that_one_name_lacks_stays(here):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, "a.pth")
    assert list(read_foreign("a.pth").state["model"]) == ["module.a", "b"]


def test_several_weights_want_a_name(here):
    torch.save({"netG": W, "netD": EMA}, "gan.pth")
    assert refused("gan.pth") == "gan.pth has several weights (netG, netD); name one: part='netG', in a shell --part netG"
    found = read_foreign("gan.pth", part="netD")
    assert same(found.state["model"], EMA) and found.notes == ["torch.save file", "unused: netG"]
    assert refused("gan.pth", part="netX") == "gan.pth has no weights under 'netX'; it holds netG, netD"


HOSTILE = b"\x80\x02cbuiltins\neval\nX\x1c\x00\x00\x00open('witness', 'w').close()\x85R."


def rewritten(data_pkl: bytes, path="hostile.pth"):
    "A file of torch.save whose pickle is this one."
    torch.save(W, "good.pth")
    with zipfile.ZipFile("good.pth") as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist(): new.writestr(entry.filename, data_pkl if entry.filename.endswith("data.pkl") else old.read(entry))


def packed(writer) -> bytes:
    buffer = io.BytesIO(); writer(buffer)
    return buffer.getvalue()


def zipped(entries: dict, kind=zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, data in entries.items(): archive.writestr(name, data)
    return buffer.getvalue()


GOOD, GOOD_OLD = packed(lambda f: torch.save(W, f)), packed(lambda f: torch.save(W, f, **OLD))
ACCEPTED = "accepted are torch.save files, safetensors files, and folders of Hugging Face or Accelerate"
FILES = {
    b"": "is empty; copy or download it again",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0": "is a pointer of git-lfs, not the file itself; run: git lfs pull",
    b"\n <!DOCTYPE html>404": "is a web page, most likely an error that was saved; download it again",
    pickle.dumps(W): "is a raw pickle, which cannot be read without running it; where it was made, save it with torch.save",
    b"\x1f\x8b\x08": "is a gzip archive; unpack it (gunzip) and name what is in it",
    b"GGUF\x03": f"is a GGUF file; {ACCEPTED}",
    b"hello": f"is of a form that is not known (it begins with b'hello'); {ACCEPTED}",
    packed(lambda f: tarfile.open(fileobj=f, mode="w").addfile(tarfile.TarInfo("pickle"))) + bytes(1024):
        "is a tar archive; unpack it (tar -xf) and name a file in it, or, if a torch before 0.2 wrote it, save it anew there",
    packed(lambda f: np.savez(f, a=np.ones(2))): "is a zip that torch.save did not write (it holds a.npy); name a file that torch.save wrote",
    zipped({"m/data.pkl": b"\x80\x02N.", "m/constants.pkl": b"", "m/version": "3"}):
        "is a TorchScript archive, which is a program; where you trust it: torch.save(torch.jit.load(…).state_dict(), …)",
    zipped({"m/data.pkl": b"\x80\x02N." + bytes(1 << 20), "m/version": "3"}, zipfile.ZIP_DEFLATED): "is a compressed zip, which torch.save never writes; save it again with torch.save",
    GOOD[:len(GOOD) // 2]: "is cut short or damaged: File is not a zip file",
    GOOD_OLD[:300]: "is cut short or damaged: ", GOOD_OLD[:-40]: "cannot be read safely: ",
    packed(lambda f: torch.save({"a": 1, "b": [2]}, f)): "has nothing that looks like weights; it holds a, b",
    packed(lambda f: torch.save([W], f)): "has nothing that looks like weights; it holds a list",
    packed(lambda f: torch.save({"loss": torch.tensor(1.0)}, f)): "has nothing that looks like weights; it holds loss",
    packed(lambda f: torch.save({"model": W}, f, pickle_protocol=4)): "cannot be read safely: torch does not read its pickle protocol safely; where it was made, save it without pickle_protocol",
    packed(lambda f: torch.save({"m": W, "a": np.array([None])}, f)): "cannot be read safely: an array of dtype 'O8' is no plain data; accepted are numbers and text",
    packed(lambda f: torch.save({"w": torch.ones(1).expand(1 << 40)}, f)): "cannot be read safely: it claims 4,398,046,511,104 bytes, more than the file has",
    packed(lambda f: torch.save({"w": torch.eye(2).to_sparse()}, f)): "has no weights that can be kept; left out: model.w (sparse, quantized or without data; in a config, more than 1,000 numbers)",
    (1 << 40).to_bytes(8, "little") + b"{}": "is no safetensors file, or cut short",
    b"PK\x03\x04" + bytes(200): "is cut short or damaged: File is not a zip file"}


@pytest.mark.parametrize("data", FILES, ids=lambda data: re.sub(r"\W+", " ", FILES[data])[:40])
def test_what_cannot_be_read_says_what_it_is(data, here):
    (here/"a.pth").write_bytes(data)
    text = refused("a.pth", allow=["os.system"]).replace("a.pth  ", "a.pth ")
    expected = f"a.pth {FILES[data]}"
    assert text == expected or expected.endswith(": ") and text.startswith(expected) and len(text) > len(expected)


@pytest.mark.parametrize("path, said", [("gone.pth", "gone.pth cannot be read: No such file or directory"), ("pipe", f"pipe is no file; {ACCEPTED}")])
def test_what_is_no_file(path, said, here):
    os.mkfifo("pipe")
    assert refused(path) == said


def test_a_link_that_a_person_names_is_followed(here):
    torch.save(W, "a.pth"); save_file(W, "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        os.symlink(name, f"link to {name}")
        found = read_foreign(f"link to {name}").state["model"]
        assert same({key: found[key] for key in W}, W)
    assert wanted("a.safetensors") == []


def hugging_face(folder, ending="safetensors", **changes):
    "A folder in two shards."
    write = save_file if ending == "safetensors" else torch.save
    stem = "model" if ending == "safetensors" else "pytorch_model"
    names = [f"{stem}-0000{i}-of-00002.{ending}" for i in (1, 2)]
    folder.mkdir()
    halves = [{key: W[key] for i, key in enumerate(W) if i % 2 == half} for half in (0, 1)]
    for name, half in zip(names, halves): write(half, folder/name)
    index = {key: name for name, half in zip(names, halves) for key in half} | changes
    (folder/f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder/"config.json").write_text('{"hidden_size": 4}')
    return folder


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_hugging_face_in_shards(ending, here):
    folder = hugging_face(here/"bert", ending)
    torch.save(O, folder/"optimizer.pt"); torch.save(S, folder/"scheduler.pt")
    (folder/"trainer_state.json").write_text('{"epoch": 1.5, "global_step": 30, "best_metric": 0.5, "log_history": []}')
    (folder/"tokenizer.json").write_text("{}")
    found = read_foreign("bert")
    assert same({key: found.state["model"][key] for key in W}, W) and set(found.state) == {"model", "optimizer", "scheduler"}
    assert found.facts == {"step": 30, "epoch": 1.5, "model_config": {"hidden_size": 4}, "metrics": {"best_metric": 0.5}}
    assert found.notes == ["Hugging Face folder", "unused: tokenizer.json"]


@pytest.mark.parametrize("change, said", [
    ({"x": "../secret.safetensors"}, "bert/model.safetensors.index.json names '../secret.safetensors', which is no plain name of a file"),
    ({"x": "/etc/passwd"}, "bert/model.safetensors.index.json names '/etc/passwd', which is no plain name of a file"),
    ({"x": 3}, "bert/3 is missing; model.safetensors.index.json names it, copy or download it"),
    ({"x": "model-00003.safetensors"}, "bert/model-00003.safetensors is missing; model.safetensors.index.json names it, copy or download it"),
    ({"x": "model-00001-of-00002.safetensors"}, "bert/model.safetensors.index.json promises x, which its shards do not have; copy the folder again"),
    ({"x": "link.safetensors"}, "bert/link.safetensors is a link, and links inside a folder are not followed; copy the folder with cp -rL and name the copy")])
def test_an_index_leads_nowhere_else(change, said, here):
    folder = hugging_face(here/"bert", **change)
    os.symlink(here/"secret.safetensors", folder/"link.safetensors"); save_file(W, here/"secret.safetensors")
    assert refused("bert") == said


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_accelerate(weights, here):
    folder = here/"state"; folder.mkdir()
    (save_file if weights.endswith("safetensors") else torch.save)(W, folder/weights)
    for name, value in {"optimizer.bin": O, "optimizer_1.bin": O, "scheduler.bin": S, "scaler.pt": SCALER, "random_states_0.pkl": {"step": 1}}.items(): torch.save(value, folder/name)
    (folder/"custom_checkpoint_0.pkl").write_bytes(HOSTILE)
    found = read_foreign(folder)
    assert same({key: found.state["model"][key] for key in W}, W) and plain({key: value for key, value in found.state.items() if key != "model"}) == plain({"optimizer": O, "scheduler": S, "scaler": SCALER})
    assert found.notes == ["Accelerate folder", "unused: custom_checkpoint_0.pkl, optimizer_1.bin, random_states_0.pkl"] and not os.path.exists("witness")
    rewritten(HOSTILE, folder/"optimizer.bin")
    assert refused("state").startswith("state/optimizer.bin wants builtins.eval: a command") and not os.path.exists("witness")


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4", "F8_E4M3FNUZ", "F6_E2M3"])
def test_a_dtype_of_tomorrow_is_no_damage(dtype, here):
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}).encode()
    (here/"a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert refused("a.safetensors").startswith(f"a.safetensors has tensors of dtype {dtype}, which is not supported; accepted are F64, F32, ")
    for wrong in ('["x"]', '{"w": 1}', '{"w": {"dtype": "\\u001b[31m"}}', '{"w": {"dtype": 5}}'):
        (here/"a.safetensors").write_bytes(len(wrong).to_bytes(8, "little") + wrong.encode())
        text = refused("a.safetensors")
        assert ("is of a form" in text or "header that is not right" in text) and "\x1b" not in text


def test_a_manifest_of_others_is_no_damage(here):
    folder = hugging_face(here/"bert")
    for text in ('{"name": "bert", "files": ["a"]}', "[]", "{}"):
        (folder/"manifest.json").write_text(text)
        assert not is_ours("bert") and same({key: load_checkpoint("bert", quiet=True)["model_state_dict"][key] for key in W}, W)
    with CheckpointManager("c") as manager: manager.save({"model": W}, 1, wait=True)
    ours = (here/"c/step-00000001/manifest.json").read_bytes()
    os.rename("c/step-00000001", "kept")  # under a name of its own, only the manifest tells
    for damaged in (ours, ours[:-40], ours.replace(b'"self"', b'"salf"'), ours.replace(b'"files"', b'"fires"'), b""):
        (here/"kept/manifest.json").write_bytes(damaged)
        assert is_ours("kept")
        if damaged != ours:
            with pytest.raises(Damaged): load_checkpoint("kept", quiet=True)


def test_what_we_exported_comes_back_whole(here):
    state = {"model": {"w": torch.ones(2)}, "optimizer": {"g": {"lr": 1}}, "ema": {"w": torch.zeros(2)}, "callbacks": {"k": 1}, "rng": {"torch": torch.arange(3), "numpy": (1, np.arange(2))}, "opt": {"a": 1}, "losses": [1, 2]}
    with CheckpointManager("c", export={"latest": "l.pth"}) as manager: manager.save(state, 7, 2, {"val_loss": 0.5, "odd name": 3}, config={"lr": 1}, metadata={"stage": "s"}, wait=True)
    found = read_foreign("c/l.pth")
    assert set(found.state) == set(state) and plain(found.state["rng"]) == {"torch": [0, 1, 2], "numpy": [1, [0, 1]]} and found.state["opt"] == {"a": 1}
    facts = manager.load().facts
    assert found.facts["metrics"] == {"val_loss": 0.5, "odd name": 3} and (found.facts["step"], found.facts["epoch"]) == (7, 2)
    assert found.facts["metadata"]["saved"] == facts["timestamp"] and found.facts["metadata"]["stage"] == "s" and "version" not in found.facts["metadata"]
    assert not any(note.startswith("unused") for note in found.notes)
    import_checkpoint("c/l.pth", "again")
    again = CheckpointManager("again").load()
    assert set(again.state) == set(state) and again["metadata"]["saved"] == facts["timestamp"] and again["val_loss"] == 0.5


def test_nothing_is_lost_by_an_import(here):
    torch.save({"model": W, "metric": 0.83, "arch": "r50", "stage": "s", "timestamp": "x", "code": {"a": 1}, "config": {"mean": torch.ones(2)}}, "a.pth")
    import_checkpoint("a.pth", "new")
    new = CheckpointManager("new").load()
    assert new["metric"] == 0.83 and new["config"] == {"mean": [1.0, 1.0]}
    assert new["metadata"] == {"saved": "x", "code": {"a": 1}, "arch": "r50", "stage": "s", "imported": "a.pth"}


@pytest.mark.parametrize("name", ["X.PTH", "pytorch_model.bin", "a.pth.tar", "a.Ckpt"])
def test_plain_files_have_many_names(name, here):
    example = Checkpoint({"model": {"w": torch.ones(2)}}, {"step": 3}, "example")
    assert torch.load(export_checkpoint(example, name), weights_only=True)["step"] == 3
    assert list(read_foreign(export_checkpoint(example, "W.SAFETENSORS")).state["model"]) == ["w"]


@pytest.mark.parametrize("tensor, kind", [(torch.ones(2, dtype=torch.complex128), "complex128"), (torch.ones(2).to(torch.float8_e8m0fnu), "float8_e8m0fnu"), (torch.eye(2).to_sparse(), "sparse_coo")])
def test_what_safetensors_has_no_word_for(tensor, kind, here):
    with pytest.raises(CheckpointError) as caught: export_checkpoint(Checkpoint({"model": {"a\x1b": tensor}}, {}, "x"), "x.safetensors")
    assert str(caught.value) == rf"x.safetensors  a\x1b is {kind}, which safetensors has no word for; export to .pth, which keeps it" and not os.listdir()


def test_an_export_needs_its_folder(here):
    with pytest.raises(CheckpointError, match="nowhere/x.pth  there is no folder nowhere; make it first"): plain_path("nowhere/x.pth")


@pytest.mark.parametrize("name, said", [
    ("notes.txt", "x has no weights; expected one of model.safetensors.index.json, model.safetensors, pytorch_model.bin.index.json, pytorch_model.bin, found notes.txt"),
    ("manifest.json", "x is a checkpoint of trainbook itself; use read_step"),
    (".metadata", "x is a folder of torch.distributed.checkpoint, which runs code when it is read; where you made it, run: "
                  "python -m torch.distributed.checkpoint.format_utils dcp_to_torch x x.pth"),
    ("model.safetensors.index.json", "x/model.safetensors.index.json is no mapping in JSON, or longer than 64 MB; copy or download it again")])
def test_folders_that_are_none(name, said, here):
    (here/"x").mkdir(); (here/"x"/name).write_text("[")
    assert refused("x") == said
