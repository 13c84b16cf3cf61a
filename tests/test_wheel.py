"""The wheel holds the package and nothing else, and works where no development tool is installed."""
import os
import subprocess
import sys
import zipfile

import pytest
from pages import ROOT, module_of, pages


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder/"source"
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT/name).exists():
            (source/name).parent.mkdir(parents=True, exist_ok=True)
            (source/name).write_bytes((ROOT/name).read_bytes())
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", folder, source], check=True, capture_output=True, timeout=300)
    return next(folder.glob("*.whl"))


def test_contents(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {f"trainbook/{module_of(page).replace('.', '/')}.py" for page in pages() if module_of(page)}
    assert names == modules | {f"trainbook/{name}" for name in ("__init__.py", "__main__.py", "_modidx.py", "py.typed", "recipes/__init__.py")}


def test_requirements_are_those_of_the_readme_and_no_tool(wheel):
    meta = next(zipfile.ZipFile(wheel).read(name).decode() for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/METADATA"))
    required = {line.split(":")[1].strip().split(">")[0].split("<")[0] for line in meta.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line}
    assert required == {"torch", "numpy", "pyyaml", "pydantic", "safetensors", "fastprogress", "matplotlib", "ipywidgets"}
    assert {line.split(": ")[1] for line in meta.splitlines() if line.startswith("Provides-Extra")} == {"tensorboard", "wandb", "tune", "recipes", "all", "dev"}
    assert "Requires-Python: >=3.11" in meta and "torch>=2.10" in meta


def test_it_installs_in_a_clean_environment_and_works_there(wheel, tmp_path):
    """With everything that it requires and no tool; PyTorch is unpacked once more for this, half a minute."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path/"env"], check=True)
    python = tmp_path/"env"/"bin"/"python"
    pinned = next(line.strip() for line in (ROOT/"constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", "-c", ROOT/"constraints.txt", pinned, wheel], check=True, timeout=900, stdout=subprocess.DEVNULL)
    installed = set(subprocess.run([python, "-c", "from importlib.metadata import distributions as d; print(*{x.name.lower() for x in d()})"], capture_output=True, text=True, check=True).stdout.split())
    assert {"trainbook", "torch", "pydantic"} <= installed and not {"nbdev", "execnb", "jupyterlab", "notebook", "ipykernel", "pytest", "ruff"} & installed
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    def run(*words): return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True, env=alone).stdout
    assert run(python, "-c", "import trainbook; from trainbook import *; print(Config.from_dict({'lr': 0.5}).training.lr, trainbook.__file__)").startswith(f"0.5 {tmp_path}")
    (tmp_path/"a.yaml").write_text("training: {learning_rate: 5e-4}\n")
    assert "lr: 0.0005" in run(tmp_path/"env"/"bin"/"trainbook", "config", "show", "a.yaml", "--origin")
    assert run(tmp_path/"env"/"bin"/"trainbook", "runs") == "runs has no runs\n"
