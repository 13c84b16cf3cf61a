"""The verbs about checkpoints, with files that mean no good, vanish, or are of others."""
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trainbook import cli, files, load
from trainbook.checkpoint import CheckpointManager

ESCAPE = "\x1b[31m\nHACK"


def shell(capsys, *words) -> tuple[int, str, str]:
    code = cli.main(["checkpoint", *words])
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and "\nHACK" not in said.out
    return code, said.out, said.err


def hostile(path="e.pth"):
    torch.save({"model": {"w" + ESCAPE: torch.ones(2)}, "epoch": 3, "arch": ESCAPE, "model_config": ESCAPE, "timestamp": ESCAPE, "metrics": {ESCAPE: 0.1}, "metadata": {"stage": ESCAPE, "run": ESCAPE},
                ESCAPE + "_state_dict": {"a": 1}, "code": {"git": {"commit": ESCAPE}, "module": ESCAPE, "versions": {ESCAPE: ESCAPE}}, "config": {ESCAPE: ESCAPE, "é": ("ü", 1j)}, ESCAPE: b"unused"}, path)


def test_no_word_of_a_file_commands_the_terminal(here, capsys):
    hostile()
    torch.save({"model": {"w": torch.ones(2)}}, "b.pth")
    for words in (["show", "e.pth", "--config"], ["compare", "e.pth", "b.pth"], ["import", "e.pth", "new"], ["show", "new", "--config"], ["ls", "new"], ["export", "new", "n.pth"], ["show", "n.pth", "--config"], ["verify", "new"]):
        code, out, err = shell(capsys, *words)
        assert code == 0 and ("HACK" in out + err or words[0] in ("export", "verify")), words
    assert "é:" in shell(capsys, "show", "e.pth", "--config")[1]
    os.rename("e.pth", f"e{ESCAPE}.pth"); os.rename("new", f"new{ESCAPE}")
    for words in (["show", f"e{ESCAPE}.pth"], ["verify", f"e{ESCAPE}.pth"], ["show", "x" + ESCAPE], ["import", f"e{ESCAPE}.pth"], ["ls", f"new{ESCAPE}"], ["show", f"new{ESCAPE}"], ["compare", f"new{ESCAPE}", "b.pth"]): shell(capsys, *words)
    torch.save({"netG" + ESCAPE: {"w": torch.ones(2)}, "netD": {"w": torch.ones(2)}}, "gan.pth")
    assert "part='netG" in shell(capsys, "show", "gan.pth")[2]


def test_one_part_of_several(here, capsys):
    torch.save({"generator": {"w": torch.ones(2)}, "discriminator": {"v": torch.ones(2)}, "epoch": 3}, "gan.pth")
    code, _, err = shell(capsys, "import", "gan.pth")
    assert code == 1 and err == "gan.pth has several weights (generator, discriminator); name one: part='generator', in a shell --part generator\n"
    for words in (["show", "gan.pth"], ["import", "gan.pth", "new"], ["compare", "gan.pth", "gan.pth"]): assert shell(capsys, *words, "--part", "discriminator")[0] == 0
    assert list(CheckpointManager("new").load()["model_state_dict"]) == ["v"]
    assert shell(capsys, "show", "gan.pth", "--part", "x")[2] == "gan.pth has no weights under 'x'; it holds generator, discriminator, epoch\n"


def test_mistakes_that_were_tracebacks(here, capsys):
    torch.save({"model": {"w": torch.ones(2)}, "timestamp": 5, "epoch": {}, "metrics": [1], "code": {"git": 5}, "metadata": [1], "state": [1], "config": ({"a": np.ones(2)}, 1)}, "odd.pth")
    for words in (["show", "odd.pth", "--config"], ["import", "odd.pth", "new"], ["show", "new", "--config"], ["ls", "new"], ["compare", "odd.pth", "new"]): assert shell(capsys, *words)[0] == 0, words
    torch.save({"w": torch.eye(3).to_sparse(), "v": torch.ones(2)}, "sparse.pth")
    assert "left out: model.w (sparse" in shell(capsys, "import", "sparse.pth")[1]
    torch.save({"w": torch.ones(2, dtype=torch.complex128)}, "c.pth")
    code, _, err = shell(capsys, "export", "c.pth", "c.safetensors")
    assert code == 1 and err.endswith("\nc.safetensors  w is complex128, which safetensors has no word for; export to .pth, which keeps it\n")


def test_verify_is_for_checkpoints_of_ours(here, capsys):
    torch.save({"w": torch.ones(2)}, "x.pth"); os.mkdir("bert"); save_file({"w": torch.ones(2)}, "bert/model.safetensors"); Path("bert/manifest.json").write_text("{}")
    for name in ("x.pth", "bert"):
        assert shell(capsys, "verify", name) == (1, "", f"{name}  is not in trainbook's own form, which verify is for; it has no hashes to compare with\n")
    assert "is no file here" in shell(capsys, "verify", "gone.pth")[2] and shell(capsys, "show", "bert")[0] == 0


def test_export_knows_before_it_loads(here, capsys, monkeypatch):
    with CheckpointManager("c") as manager: manager.save({"model": {"w": torch.ones(2)}}, 1, wait=True)
    with monkeypatch.context() as patch:
        patch.setattr("trainbook.load.load_checkpoint", None)
        assert shell(capsys, "export", "c", "nowhere/x.pth") == (1, "", "nowhere/x.pth  there is no folder nowhere; make it first\n")
    for name in ("X.PTH", "model.bin"): assert shell(capsys, "export", "c", name)[0] == 0 and torch.load(name, weights_only=True)["step"] == 1


def test_what_vanishes_meanwhile(here, capsys, monkeypatch):
    assert files._weigh(Path("gone")) == 0
    with CheckpointManager("c") as manager: manager.save({"model": {"w": torch.ones(2)}}, 1, wait=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_file", lambda path: True)
        patch.setattr(Path, "iterdir", lambda path: iter([path/"gone"]))
        assert files._weigh(Path("c")) == 0
    real = load.listing
    monkeypatch.setattr("trainbook.load.listing", lambda folder: [{}, *real(folder)])
    assert shell(capsys, "ls", "c")[1].count("step-") == 1


def test_one_tensor_two_tensors(here, capsys):
    with CheckpointManager("c") as manager: manager.save({"model": {"w": torch.ones(2)}, "ema": {"a": torch.ones(1), "b": torch.zeros(1)}, "none": {}}, 1, wait=True)
    assert "model (1 tensor), ema (2 tensors), none\n" in shell(capsys, "show", "c")[1]


def test_no_torch_for_words_that_need_none():
    code = "import sys; from trainbook import cli, words; cli.main(['runs']); cli.main(['checkpoint', '--help']); print(words.safe('a\\x1b')); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.endswith("a\\x1b\n")


@pytest.mark.parametrize("verb", ["show", "import", "verify"])
def test_a_pickle_runs_nothing(verb, here, capsys):
    class Hostile:
        def __reduce__(self): return os.system, ("touch witness",)
    Path("raw.pth").write_bytes(pickle.dumps(Hostile())); torch.save(Hostile(), "h.pth")
    for name in ("raw.pth", "h.pth"): assert shell(capsys, verb, name)[0] == 1 and not os.path.exists("witness")
