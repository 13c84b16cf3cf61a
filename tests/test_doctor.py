"""The doctor: real faults of a machine, each named in its line with its mend; and facts of machines that are not here."""
import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from trainbook import Doctor, cli, console, doctor, machine

ROOT = Path(__file__).resolve().parent.parent


# A machine with a card where all is well; tests change one thing.
WELL = {
    "program": {"trainbook": "0.1.0", "python": "3.12.4", "system": "Linux x86_64", "led": False, "needs": [["numpy", "2.4.0", "1.26"]]},
    "torch": {"torch": {"version": "2.13.0", "seconds": 2.4, "threads": 8, "cuda": "13.0", "hip": None},
              "cards": {"there": True, "mps": False, "cudnn": 91501, "built_for": ["sm_80", "sm_90", "compute_90"],
                        "cards": [{"name": "NVIDIA H100", "total": 80 << 30, "capability": [9, 0], "uuid": "a"}]},
              "numbers": {"device": "cuda", "auto": "bf16", "fp32": "highest"}, "many": {"ways": ["nccl", "gloo"]}},
    "compile": {"compiler": "g++", "header": True, "triton": "3.7.0"},
    "nvidia": {"driver": "580.95", "knows": "13.0", "cards": [{"name": "NVIDIA H100", "uuid": "GPU-a", "total": 80 << 30, "free": 79 << 30, "users": []}]},
    "cpu": {"all": 16, "cores": 16, "allowed": None, "omp": None, "bf16": False, "hidden": None},
    "memory": {"total": 64 << 30, "free": 50 << 30, "limit": None, "shm": [32 << 30, 32 << 30]},
    "disk": {"folder": "runs", "new": False, "file": False, "free": 2.4e11, "speed": 1.1e9},
    "beside": {"files": [1024, 4096], "notebook": {"ipywidgets": "8.1.9", "jupyterlab": "4.6.6", "ipykernel": "7.4.0"}}}
NO_CARD = {"torch.cards": {"there": False, "mps": False, "why": ""}, "nvidia": {}, "torch.torch.cuda": None,
           "torch.numbers": {"device": "cpu", "auto": "fp32", "fp32": "highest"}}


def given(**changes) -> Doctor:
    "The healthy machine with other facts; a place is written with __ or as a key with points."
    facts = copy.deepcopy(WELL)
    for place, value in changes.items():
        *folders, last = re.split(r"__|\.", place)
        inside = facts
        for one in folders: inside = inside[int(one) if one.isdigit() else one]
        inside[last] = value
    return Doctor(facts=facts)


def shell(*words, path="", **env):
    "`trainbook doctor …` in a process of its own."
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(path), str(ROOT)))), **env}
    done = subprocess.run([sys.executable, "-m", "trainbook", "doctor", *words], capture_output=True, text=True, env=env, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def fake_torch(folder: Path, text: str) -> Path:
    (folder/"fake"/"torch").mkdir(parents=True)
    (folder/"fake"/"torch"/"__init__.py").write_text(text)
    return folder/"fake"


# a torch that imports and knows its version; is_available is the test's
IMPORTS = """
import os, time, warnings
from types import SimpleNamespace as N
__version__ = "2.13.0"; version = N(cuda={cuda!r}, hip=None)
def get_num_threads(): return 2
def is_available(): {body}
cuda = N(is_available=is_available); backends = N(mps=N(is_available=lambda: False))
"""


def fake_smi(folder: Path, monkeypatch, text: str, code: int = 0) -> None:
    (folder/"bin").mkdir()
    (folder/"bin"/"said").write_text(text)
    (folder/"bin"/"nvidia-smi").write_text(f"#!/bin/sh\ncat {folder}/bin/said\nexit {code}\n")
    (folder/"bin"/"nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}/bin{os.pathsep}{os.environ['PATH']}")


SMI = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
  <driver_version>535.104.05</driver_version><cuda_version>12.2</cuda_version><attached_gpus>1</attached_gpus>
  <gpu id="00000000:00:04.0">
    <product_name>NVIDIA A100-SXM4-40GB</product_name><uuid>GPU-0a1b</uuid>
    <fb_memory_usage><total>40960 MiB</total><reserved>600 MiB</reserved><used>20004 MiB</used><free>20356 MiB</free></fb_memory_usage>
    <bar1_memory_usage><total>65536 MiB</total><free>1 MiB</free></bar1_memory_usage>
    <processes>
      <process_info><pid>4711</pid><type>C</type><process_name>/opt/anna/env/bin/python train.py</process_name><used_memory>20000 MiB</used_memory></process_info>
      <process_info><pid>12</pid><type>G</type><process_name>/usr/lib/xorg/Xorg</process_name><used_memory>4 MiB</used_memory></process_info>
      <process_info><pid>13</pid><type>C</type><process_name></process_name><used_memory>N/A</used_memory></process_info>
    </processes>
  </gpu>
</nvidia_smi_log>
"""


def line(found: Doctor, name: str) -> doctor.Line: return next(one for one in found.lines if one.name == name)


# --- this machine --------------------------------------------------------------------------------

def test_it_looks_at_everything_in_five_seconds_and_leaves_nothing(here):
    began = time.monotonic()
    found = Doctor()
    assert time.monotonic() - began < 5
    assert {one.group for one in found.lines} == {"program", "GPU", "numbers", "CPU", "disk", "processes", "notebook"}
    assert not [one for one in found.lines if "could not be looked at" in one.value]
    assert [*here.iterdir()] == []
    assert {one.verdict for one in found.lines} <= {"ok", "note", "problem"} and all(one.fix for one in found.problems)
    assert found.facts["torch"]["torch"]["version"] == torch.__version__


def test_lines_follow_from_facts_alone(here):
    found = Doctor()
    assert Doctor(facts=json.loads(json.dumps(found.facts))).lines == found.lines


def test_it_is_asked_without_torch():
    code = "import sys, trainbook.doctor, trainbook.machine; assert not {'torch', 'numpy', 'ipywidgets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_the_verb_and_its_exit_codes(here, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "look", lambda folder: copy.deepcopy(WELL) | {"disk": WELL["disk"] | {"folder": folder}})
    assert cli.main(["doctor"]) == 0 and "NVIDIA H100: all is well" in capsys.readouterr().out
    assert cli.main(["doctor", "elsewhere"]) == 0 and "✓ elsewhere" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "look", lambda folder: WELL | {"beside": WELL["beside"] | {"files": [64, 64]}})
    assert cli.main(["doctor"]) == 1 and "✕ open files" in capsys.readouterr().out
    assert cli.main(["doctor", "a", "b"]) == 2
    assert cli.main(["doctor", "--help"]) == 0 and "trainbook doctor [FOLDER]" in capsys.readouterr().out
    assert cli.main(["--help"]) == 0 and "\n  doctor " in capsys.readouterr().out


def test_in_a_shell(here):
    done = shell()
    assert "precision: auto" in done.stdout and done.returncode == int("✕" in done.stdout), done


# --- torch that is broken ------------------------------------------------------------------------

@pytest.mark.parametrize("text, says, mend", [
    ("raise ImportError('libtorch_cuda.so: cannot open shared object file')", "ImportError: libtorch_cuda.so", "LD_LIBRARY_PATH"),
    ("import os; os.abort()", "crashes (SIGABRT)", "faulthandler"),
    ("import os; os._exit(3)", "ends with 3", "--force-reinstall"),
    ("raise SystemExit('no licence')", "SystemExit: no licence", "--force-reinstall"),
    ("raise ModuleNotFoundError(\"No module named 'torch'\")", "No module named 'torch'", "pip install torch"),
    ("raise ModuleNotFoundError(\"No module named 'sympy.core'\")", "No module named 'sympy.core'", "pip install sympy"),
    ("", "is imported in its place", "another name"),
], ids=["library", "abort", "exit", "SystemExit", "missing", "part missing", "not torch"])
def test_a_torch_that_does_not_import(here, text, says, mend):
    done = shell(path=fake_torch(here, text), LD_LIBRARY_PATH="/elsewhere")
    assert done.returncode == 1 and done.stdout.startswith("CPU, ")
    broken = done.stdout[done.stdout.index("✕ torch"):].splitlines()[:2]
    assert says in broken[0] and mend in broken[1], done.stdout
    assert all(name in done.stdout for name in ("cores", "/dev/shm", "write speed", "open files", "Jupyter"))  # the rest is looked at


def test_a_torch_that_hangs_is_given_up_and_killed(here, monkeypatch):
    monkeypatch.syspath_prepend(fake_torch(here, f"import os, time; open({str(here/'pid')!r}, 'w').write(str(os.getpid())); time.sleep(100)"))
    monkeypatch.setattr(machine, "_PATIENCE", 2.0)
    said = []
    monkeypatch.setattr(console.Bar, "at", lambda bar, done, note="", last=False: said.append(note))
    found = Doctor()
    assert line(found, "torch").value == "does not import: no answer in 2 s" and "importtime" in line(found, "torch").fix
    assert said.count("torch") > 5  # a person sees what it waits for
    with pytest.raises(ProcessLookupError): os.kill(int((here/"pid").read_text()), 0)


@pytest.mark.parametrize("body, says", [("os.abort()", "crashes (SIGABRT)"), ("time.sleep(100)", "no answer in 3 s")])
def test_a_driver_that_takes_torch_along(here, monkeypatch, body, says):
    monkeypatch.syspath_prepend(fake_torch(here, IMPORTS.format(cuda="13.0", body=body)))
    monkeypatch.setattr(machine, "_PATIENCE", 3.0)
    found = Doctor()
    assert line(found, "torch").verdict == "ok" and "built for CUDA 13.0" in line(found, "torch").value  # what came before is known
    assert says in line(found, "torch, GPU").value and line(found, "torch, GPU") in found.problems


def test_a_part_of_torch_that_raises_costs_its_own_line_only(here, monkeypatch):
    monkeypatch.syspath_prepend(fake_torch(here, IMPORTS.format(cuda=None, body="raise RuntimeError('odd')")))
    found = Doctor()
    assert line(found, "torch, GPU")[2:4] == ("RuntimeError: odd", "note") and line(found, "torch, number formats").verdict == "note"
    assert line(found, "threads").verdict == "ok"


# --- the driver ----------------------------------------------------------------------------------

def test_a_card_and_a_torch_without_cuda(here, monkeypatch):
    fake_smi(here, monkeypatch, SMI)
    done = shell(path=fake_torch(here, IMPORTS.format(cuda=None, body="return False")))
    assert done.returncode == 1
    assert "✕ CUDA" in done.stdout and "but this PyTorch has no CUDA" in done.stdout and "install PyTorch for CUDA 12" in done.stdout
    assert "NVIDIA A100-SXM4-40GB, 19.9 GiB of 40 GiB free" in done.stdout and "none here" not in done.stdout
    assert "python (pid 4711) 19.5 GiB" in done.stdout and "Xorg" not in done.stdout and "anna" not in done.stdout


def test_a_driver_that_is_older_than_torch(here, monkeypatch):
    fake_smi(here, monkeypatch, SMI)
    body = "warnings.warn('The NVIDIA driver on your system is too old (found version 12020).'); return False"
    monkeypatch.syspath_prepend(fake_torch(here, IMPORTS.format(cuda="13.0", body=body)))
    found = Doctor()
    assert line(found, "CUDA")[2:] == ("driver 535.104.05, for CUDA up to 12.2 is too old: torch is built for 13.0", "problem",
                                       "update the driver, or install PyTorch for CUDA 12 (pytorch.org/get-started/locally tells how)")
    assert "too old" in found.facts["torch"]["cards"]["why"]


@pytest.mark.parametrize("text, code, verdict", [
    ("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.95\n", 18, "problem"),
    ("", 1, "problem"), ("No devices were found\n", 6, None)])
def test_an_nvidia_smi_that_fails(here, monkeypatch, text, code, verdict):
    fake_smi(here, monkeypatch, text, code)
    monkeypatch.syspath_prepend(fake_torch(here, IMPORTS.format(cuda=None, body="return False")))
    found = Doctor()
    driver = [one for one in found.lines if one.name == "driver"]
    if verdict is None: assert not driver and line(found, "card").verdict == "ok"
    else:
        assert not [one for one in found.lines if one.name == "card"]  # nobody knows
        assert driver[0].verdict == verdict and driver[0].value == f"nvidia-smi says: {(text.splitlines() or ['not a word'])[0]}"


def test_an_nvidia_smi_that_writes_nonsense(here, monkeypatch):
    fake_smi(here, monkeypatch, "<nvidia_smi_log><gpu>")
    found = Doctor()
    assert "could not be looked at" in line(found, "nvidia").value and line(found, "cores").verdict == "ok"


# --- cores, memory, disk -------------------------------------------------------------------------

def test_little_shared_memory(here, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(total=64 << 20, free=64 << 20) if path == machine._SHM else real(path))
    if not machine._SHM.is_dir(): pytest.skip("there is no /dev/shm")
    small = line(Doctor(facts=WELL | {"memory": machine._look_memory()}), "/dev/shm")
    assert small.verdict == "problem" and "--shm-size" in small.fix and small.value.startswith("64 MiB of 64 MiB")


def test_a_container_of_the_first_generation(here, monkeypatch):
    monkeypatch.setattr(machine, "_PROC", here/"proc"); monkeypatch.setattr(machine, "_GROUPS", here/"cgroup")
    for path, text in {"proc/self/cgroup": "5:memory:/docker/x\n3:cpu:/\n0::/\n", "proc/meminfo": "MemTotal: 67108864 kB\nMemAvailable: 60000000 kB\n",
                       "cgroup/cpu/cpu.cfs_quota_us": "150000\n", "cgroup/cpu/cpu.cfs_period_us": "100000\n",
                       "cgroup/memory/memory.limit_in_bytes": f"{4 << 30}\n", "cgroup/memory/memory.usage_in_bytes": f"{3 << 30}\n",
                       "cgroup/memory/memory.stat": "cache 5\n"}.items():
        (here/path).parent.mkdir(parents=True, exist_ok=True); (here/path).write_text(text)
    cpu, memory = machine._look_cpu(), machine._look_memory()
    assert (cpu["allowed"], cpu["cores"], memory["limit"], memory["free"]) == (1.5, 1, 4 << 30, 1 << 30)
    (here/"cgroup/cpu/cpu.cfs_quota_us").write_text("-1\n"); (here/"cgroup/memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert machine._look_cpu()["allowed"] is None and machine._look_memory()["limit"] is None
    shutil.rmtree(here/"proc")  # as on macOS
    assert machine._look_cpu()["cores"] >= 1 and machine._look_memory()["total"] > 0


def test_a_folder_that_cannot_be_written():
    "In a process that is nobody, since root may write anywhere."
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o555)
        code = f"""
import os, sys; sys.path.insert(0, {str(ROOT)!r})
from trainbook import doctor, machine
from pathlib import Path
if not os.getuid(): os.setgid(65534); os.setuid(65534)
facts = machine._look_disk(Path({folder!r}, "runs"))
print(*next(doctor._disk_lines({{"disk": facts}}))[2:], sep="|")"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    value, verdict, fix = done.stdout.strip().split("|")
    assert "writing fails: Permission denied" in value and verdict == "problem" and "chmod u+w" in fix


def test_a_disk_that_is_full(here):
    code = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))
from trainbook import doctor, machine
from pathlib import Path
print(*next(doctor._disk_lines({"disk": machine._look_disk(Path("runs"))}))[2:], sep="|")"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    value, verdict, fix = done.stdout.strip().split("|")
    assert "writing fails: File too large" in value and verdict == "problem" and "trainbook du" in fix and "chmod" not in fix
    assert [*here.iterdir()] == []


def test_a_file_where_runs_go(here):
    (here/"runs").write_text("")
    for folder in ("runs", "runs/deeper"):
        assert line(Doctor(facts=WELL | {"disk": machine._look_disk(Path(folder))}), folder)[2:4] == ("is a file, or lies below one", "problem")


def test_so_little_room_that_nothing_is_written(here, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=5))
    found = Doctor(facts=WELL | {"disk": machine._look_disk(Path("runs"))})
    assert line(found, "runs").verdict == "problem" and line(found, "write speed").value == "not measured, for lack of room"


def test_few_open_files(here):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", f"ulimit -n 200; exec {sys.executable} -m trainbook doctor"], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 1 and re.search(r"✕ open files +up to 200\n +→ ulimit -n 4096", done.stdout), done


def test_threads_that_are_set_reach_the_answer(here, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    facts = WELL | {"torch": machine.ask(), "cpu": machine._look_cpu() | {"all": 16, "cores": 16}, "nvidia": {}}
    if facts["torch"]["cards"]["there"]: pytest.skip("with a card one thread is enough")
    assert line(Doctor(facts=facts), "threads")[2:] == ("torch uses 1 (OMP_NUM_THREADS=1)", "note", "export OMP_NUM_THREADS=16, before Jupyter or the training starts")


# --- machines that are not here ------------------------------------------------------------------

def test_a_machine_where_all_is_well():
    found = given()
    assert not found.problems and {one.verdict for one in found.lines} == {"ok"} and not [one for one in found.lines if one.fix]
    assert repr(found).startswith("NVIDIA H100: all is well\n") and line(found, "cuDNN").value == "9.15.1"
    assert line(found, "formats").value == "bf16 yes, fp16 yes, TF32 off, fp8 yes"


@pytest.mark.parametrize("changes, name, verdict, says", [
    ({"torch.torch.seconds": 31.0}, "torch", "note", "imported in 31.0 s"),
    ({"program.needs": [["numpy", "1.20", "1.26"], ["pyyaml", "", "6"]]}, "packages", "problem", "numpy 1.20, pyyaml is missing"),
    ({"compile.compiler": ""}, "torch.compile", "note", "compiler not found"),
    ({"compile.triton": ""}, "torch.compile", "note", "no Triton"),
    ({"compile.header": False}, "torch.compile", "note", "Triton 3.7.0"),
    ({"compile.triton": "", "compile.header": False, **NO_CARD}, "torch.compile", "ok", "no Triton, which is for GPUs"),
    (NO_CARD, "card", "ok", "none here; trainings run on the CPU"),
    (NO_CARD, "precision: auto", "ok", "fp32: on most CPUs bf16 is slower"),
    (NO_CARD, "formats", "ok", "bf16, emulated"),
    ({**NO_CARD, "cpu.bf16": True}, "formats", "ok", "bf16 in hardware"),
    ({**NO_CARD, "torch.cards.mps": True, "torch.numbers.device": "mps"}, "card", "ok", "an Apple GPU (device: mps)"),
    ({"torch.cards": {"there": False, "mps": False, "why": ""}, "cpu.hidden": ""}, "CUDA", "note", "CUDA_VISIBLE_DEVICES= hides the cards"),
    ({"torch.cards": {"there": False, "mps": False, "why": "CUDA unknown error"}}, "CUDA", "problem", "torch finds no card: CUDA unknown error"),
    ({"nvidia.knows": "12.8", "torch.torch.cuda": "12.9"}, "driver", "ok", "for CUDA up to 12.8; torch is built for 12.9"),
    ({"nvidia.knows": "12.8"}, "driver", "ok", "for CUDA up to 12.8; torch is built for 13.0"),  # it works: compatibility libraries
    ({"torch": {"torch": {"error": "ImportError: x"}}}, "driver", "ok", "580.95, for CUDA up to 13.0"),
    ({"nvidia": {}}, "cuda:0", "ok", "NVIDIA H100, capability 9.0, 80 GiB"),
    ({"nvidia.cards.0.free": 5 << 20}, "cuda:0", "problem", "5 MiB of 80 GiB free"),
    ({"nvidia.cards.0.users": [{"pid": 7, "name": "python", "held": 9 << 30}]}, "cuda:0, shared", "note", "python (pid 7) 9 GiB"),
    ({"torch.cards.built_for": ["sm_75", "sm_80", "sm_100", "compute_100"]}, "cuda:0, kernels", "problem", "none for capability 9.0"),
    ({"torch.cards.cards.0.capability": [8, 0], "torch.cards.built_for": ["sm_75", "sm_86", "compute_86"]}, "cuda:0, kernels", "problem", "none for capability 8.0"),
    ({"torch.cards.cudnn": None}, "cuDNN", "note", "not there"),
    ({"torch.cards.cards.0.capability": [7, 5], "torch.numbers.auto": "fp16", "torch.cards.built_for": ["sm_75"]}, "precision: auto", "ok", "fp16: with a loss scale; a card of capability 7.5 has no bf16"),
    ({"torch.cards.cards.0.capability": [7, 5], "torch.cards.built_for": ["sm_75"]}, "formats", "ok", "bf16 no, fp16 yes, TF32 no, fp8 no"),
    ({"torch.numbers.fp32": "high"}, "formats", "ok", "TF32 on"),
    ({"cpu.cores": 2, "cpu.allowed": 2.0}, "threads", "problem", "torch uses 8"),
    ({"cpu.cores": 1, "torch.torch.threads": 2}, "threads", "ok", "torch uses 2"),
    ({"cpu.cores": 8}, "cores", "ok", "8 of 16: this process is given no more"),
    ({**NO_CARD, "torch.torch.threads": 1, "cpu.omp": "1"}, "threads", "note", "torch uses 1 (OMP_NUM_THREADS=1)"),
    ({"torch.torch.threads": 1, "cpu.omp": "1"}, "threads", "ok", "torch uses 1 (OMP_NUM_THREADS=1)"),  # the card computes
    ({"memory.free": 1 << 30}, "memory", "note", "1 GiB of 64 GiB free"),
    ({"memory.free": 1 << 28, "memory.limit": 1 << 33}, "memory", "problem", "256 MiB of 8 GiB free; the machine has 64 GiB"),
    ({"memory.shm": [32 << 30, 1 << 20]}, "/dev/shm", "problem", "1 MiB of 32 GiB free"),
    ({"memory.shm": [512 << 20, 512 << 20]}, "/dev/shm", "note", "512 MiB of 512 MiB free"),
    ({"disk.free": 4e9}, "runs", "note", "4.0 GB free"),
    ({"disk.speed": 1e7}, "write speed", "note", "a checkpoint of 1 GB is safe after 100.0 s"),
    ({"disk.new": True}, "runs", "ok", "not made yet"),
    ({"beside.files": [512, 4096]}, "open files", "note", "up to 512"),
    ({"beside.files": [-1, -1]}, "open files", "ok", "no limit"),
    ({"torch.many.ways": ["gloo"]}, "distributed", "ok", "gloo"),
    ({"torch.many.ways": []}, "distributed", "note", "not built in"),
    ({"beside.notebook.ipykernel": "6.29.5"}, "Jupyter", "note", "clicks are heard between cells only"),
    ({"beside.notebook": {"ipywidgets": "", "jupyterlab": "", "ipykernel": ""}}, "Jupyter", "ok", "none here"),
])
def test_what_is_said_of_a_machine(changes, name, verdict, says):
    found = given(**changes)
    assert line(found, name).verdict == verdict and says in line(found, name).value, line(found, name)
    assert bool(line(found, name).fix) == (verdict != "ok")
    assert not [one for one in found.lines if "could not be looked at" in one.value]


def test_two_cards_and_the_one_with_room():
    cards = [{"name": "T4", "total": 16 << 30, "capability": [7, 5], "uuid": uuid} for uuid in "xy"]
    known = [{"name": "T4", "uuid": f"GPU-{uuid}", "total": 16 << 30, "free": free << 20, "users": []} for uuid, free in (("y", 15000), ("x", 100))]
    found = given(**{"torch.cards.cards": cards, "torch.cards.built_for": ["sm_75"], "nvidia.cards": known, "torch.many.ways": ["gloo"]})
    assert line(found, "cuda:0")[3:] == ("problem", "device: cuda:1 has more room") and line(found, "cuda:1").verdict == "ok"  # by uuid, not by order
    assert line(found, "distributed").verdict == "note" and repr(found).startswith("T4 and 1 more: 1 problem, 1 note\n")


# --- what can go wrong with the doctor itself ----------------------------------------------------

def test_a_look_or_a_judgement_that_fails_is_a_line(here, monkeypatch):
    def fails(): raise PermissionError("/proc/meminfo")
    monkeypatch.setattr(machine, "_look_memory", fails)
    monkeypatch.setattr(machine, "_look_cpu", fails)
    found = Doctor()
    assert line(found, "memory")[2:4] == ("could not be looked at: PermissionError: /proc/meminfo", "note")
    assert line(found, "cpu").verdict == "note" and line(found, "write speed") and line(found, "formats")
    assert found._repr_html_() and repr(found).startswith("CPU, ? cores") or found.facts["torch"]["cards"]["there"]
    for part in WELL:  # each alone, as an error and as nonsense
        for broken in ({"error": "odd"}, {"odd": 1}, {}):
            found = Doctor(facts=WELL | {part: broken})
            assert len(found.lines) > 8 and repr(found) and found._repr_html_(), (part, broken)


def test_the_report_names_neither_person_nor_machine(monkeypatch):
    import getpass
    import platform
    monkeypatch.setenv("HOME", "/data/people/anna")
    monkeypatch.setattr(getpass, "getuser", lambda: "anna"); monkeypatch.setattr(platform, "node", lambda: "ibex-7")
    why = f"ImportError: /{'home'}/bob/env/lib/libtorch.so: needed by anna on ibex-7, /data/people/anna/x"
    found = given(**{"disk.folder": "/data/people/anna/runs", "torch": {"torch": {"error": why}}})
    assert "/data/people/anna/runs" in repr(found)
    assert not re.search("anna|bob|ibex", found.report()) and "~/runs" in found.report() and "~/env/lib/libtorch.so" in found.report()
    monkeypatch.setattr(getpass, "getuser", lambda: 1 / 0)  # a number without a name
    assert "~/runs" in found.report()


def test_the_picture_is_plain_html(monkeypatch):
    found = given(**{"disk.folder": "<b>&", "memory.free": 1 << 20})
    html = found._repr_html_()
    assert "&lt;b&gt;&amp;" in html and "<b>&" not in html and "script" not in html and "class=" not in html and "<style" not in html
    assert html.count('aria-label="problem"') == 1 == len(found.problems) and html.count("<tr ") == len(found.lines)
    monkeypatch.setitem(sys.modules, "trainbook.widgets", None)  # ipywidgets is missing: text it is
    assert found._repr_html_() is None


def test_a_name_cannot_steer_a_terminal():
    assert "\x1b" not in repr(given(**{"disk.folder": "runs\x1b[2J"}))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_machine_with_a_card(here):
    found = Doctor()
    assert line(found, "cuda:0").value.startswith(torch.cuda.get_device_name(0)) and line(found, "cuDNN").verdict == "ok"
    assert "GiB free" in line(found, "cuda:0").value or not shutil.which("nvidia-smi")
    assert line(found, "precision: auto").value.split(":")[0] == ("bf16" if torch.cuda.is_bf16_supported(False) else "fp16")
