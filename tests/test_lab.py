"""Training in a notebook, as a person sees it: in a real JupyterLab, in a real browser (lab.py)."""
import os
import subprocess
import sys
from pathlib import Path

import nbformat
from lab import notebook

from trainbook.run import Run

NETS = """%%module nets
import time
from pathlib import Path
import torch

class Net(torch.nn.Sequential):
    def __init__(self, width: int = 8): super().__init__(torch.nn.Linear(2, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))

class Points(torch.utils.data.Dataset):
    "Slow until a file is there, so that a test is never too late."
    def __init__(self, count, seed, gate):
        self.x, self.gate = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed)), Path(gate)
        self.y = (self.x.prod(1) > 0).long()
    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        if not self.gate.exists(): time.sleep(0.05)
        return self.x[i], self.y[i]

def points(gate: str): return Points(32, 0, gate), Points(8, 1, gate)"""

STAGES = """from trainbook import Config, create_trainer
config = Config.from_dict({
    "model": {"name": "nets:Net"}, "data": {"name": "nets:points"}, "loss": "cross_entropy", "save_dir": "SAVE_DIR",
    "training": {"epochs": 5, "batch_size": 8, "lr": 1e-2}, "run": {"on_existing": "resume"}, "logging": {"panel": False},
    "stages": [{"name": "first", "data": {"gate": "gate-1", "num_workers": 1}},
               {"name": "second", "init_from": "first", "data": {"gate": "gate-2"}}]})"""
LOOP = "for stage in config.stages: create_trainer(stage).train()"


def last_line(text: str) -> str: return text.splitlines()[-1]


def test_the_stop_button_pauses_and_the_cell_run_again_goes_on(lab):
    run = lab.folder/"two"
    fresh = "from trainbook import resume\nfrom trainbook.onward import trained\nresume('two'); two = trained('two@best')\ntwo.evaluate(two.splits['val'])"
    with lab.open("two.ipynb", "import trainbook.cells", NETS, STAGES.replace("SAVE_DIR", "two"), LOOP, fresh) as page:
        for cell in range(3): assert page.run(cell) == ""
        page.begin(3)
        page.bar(3).wait_for()
        page.stop()
        page.wait()
        assert last_line(page.text(3)).startswith("paused at step") and "Traceback" not in page.text(3)
        assert Run(run).status == "paused" and not (run/"second").exists()
        (lab.folder/"gate-1").touch()
        page.begin(3)
        page.until(3, "second/step-00000004")
        assert page.text(3).startswith("goes on at step")
        page.stop()
        page.wait()
        assert last_line(page.text(3)).startswith("paused at step") and Run(run).status == "paused"
        (lab.folder/"gate-2").touch()
        page.run(3)
        assert "(epoch 5) is the end" in page.text(3) and "second/step-00000020" in page.text(3)
        assert Run(run).status == "finished" and [one.name for one in lab.folder.glob("two*")] == ["two", "two.ipynb"]
        page.restart_kernel()
        assert "two has finished" in page.run(4) and "'test_loss': " in page.text(4)


def test_what_was_stopped_shows_its_bar_then_its_history(lab):
    train = "import nets\nfrom trainbook import Trainer\ntrain, val = nets.points('gate-3')\n" \
            "trainer = Trainer(nets.Net(), train, val, loss='cross_entropy', epochs=5, batch_size=8, save_dir='alone', panel=False)\ntrainer.train()"
    with lab.open("alone.ipynb", "import trainbook.cells", NETS, train, "print('it ran all')", "trainer.train()") as page:
        page.begin()
        page.bar(2).wait_for()
        page.until(2, "Epoch 1/5")
        page.stop()
        page.wait()
        assert last_line(page.text(2)).startswith("paused at step") and Run(lab.folder/"alone").status == "paused"
        assert not page.bar(2).is_visible() and page.text(3) == page.text(4) == ""  # Run All stopped there
        (lab.folder/"gate-3").touch()
        assert page.run(4).startswith("goes on at step")
        assert page.output(4).locator("img").bounding_box()["height"] > 100
        page.save()
    [shown] = [one.data for one in nbformat.read(page.file, 4).cells[4].outputs if one.output_type == "execute_result"]
    assert {"image/png", "text/plain"} <= shown.keys() and len(shown["text/plain"].splitlines()) == 6  # the table, where no picture is shown


def test_a_shell_goes_on_without_the_notebook(here):
    stop = """import glob, os, signal, threading, time
def stop():
    while not glob.glob("shell/second/step-*"): time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=stop).start()
"""
    Path("gate-1").touch()
    shown = notebook("import trainbook.cells", NETS, STAGES.replace("SAVE_DIR", "shell"), stop + LOOP)
    assert last_line(shown[3]).startswith("paused at step") and Run("shell").status == "paused"
    Path("gate-2").touch()
    gone_on = subprocess.run([sys.executable, "-m", "trainbook", "resume", "shell"], capture_output=True, text=True)
    assert gone_on.returncode == 0 and Run("shell").status == "finished", gone_on.stderr
    assert gone_on.stdout.startswith("goes on at step") and os.listdir("shell/code") == ["nets.py"]
