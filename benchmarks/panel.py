"""What the live panel costs a training, how soon a click is obeyed, and how soon a panel of a long run is there.

    make bench        (or python benchmarks/panel.py [many])

A small MLP trains in a kernel alone (nbclient, nobody looks), by turns with the panel and without, in runs whose log has
already so many rows. Beside it stand what everybody has: fastprogress' graph, a figure of matplotlib's that is drawn anew, and
livelossplot where it is installed (pip install --no-deps livelossplot). Each has 100,000 points and is asked to draw at most
four times a second, as the panel is.
"""
import json
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

SETUP = """
import json, statistics, time, torch
from pathlib import Path
from torch.utils.data import DataLoader, TensorDataset
from trainbook import Callback, Trainer
from trainbook.run import Run
torch.set_num_threads(1)
x = torch.randn(64 * 500, 16); y = (x.sum(1) > 0).long()
ROW = '{"event": "step", "stage": "train", "step": %d, "time": %.3f, "epoch": %s, "lr": 0.001, "loss": %r, "grad_norm": 0.5}\\n'
class Clock(Callback):
    def __init__(self, draw=None): self.took, self.draw, self.at, self.until = [], draw, 0.0, 10**9
    def step_end(self, trainer):
        now = time.perf_counter()
        if trainer.step % 100 == 0: self.took.append(now)
        if trainer.step >= self.until: trainer.stop()
        if self.draw and now - self.at > 0.25: self.draw(trainer); self.at = time.perf_counter()
def made(name, panel, draw=None):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2)]
    clock = Clock(draw)
    trainer = Trainer(torch.nn.Sequential(*layers), DataLoader(TensorDataset(x, y), 64), num_epochs=10**5, lr=1e-3,
                      run={"name": name}, loss="cross_entropy", callbacks=[clock], panel=panel, save_interval=None,
                      config={"logging": {"every": "1 step"}})
    return trainer, clock
"""


def cells(folder: Path, *sources: str, timeout: int = 600) -> list[str]:
    "What these cells print in a kernel alone."
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(book, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return ["".join(one.get("text", "") for one in cell.outputs if one.get("name") == "stdout") for cell in book.cells]


TURNS = """
def speed(trainer, clock, steps):
    clock.took, clock.until = [], trainer.step + steps
    trainer.train()
    return 100 * (len(clock.took) - 1) / (clock.took[-1] - clock.took[0])
def long(name, panel, earlier):
    "A run that has a log of so many rows behind it."
    trainer, clock = made(name, panel)
    trainer.step = earlier
    clock.until = earlier + 20
    trainer.train()
    log = trainer.run.folder/"events.jsonl"
    first, *rest = log.read_text().splitlines(keepends=True)
    with open(log, "w") as file:
        file.write(first)
        for at in range(0, earlier, 10_000):
            steps = range(at, min(at + 10_000, earlier))
            file.write("".join(ROW % (i, 1.8e9 + i / 1700, i / 500, 2 / (i + 1) ** .3) for i in steps))
        file.writelines(rest)
    return trainer, clock
def turns(one, two, steps=STEPS, many=MANY):
    "The speeds by turns: the first, the second, and the median of their ratios, of each turn."
    found = []
    for turn in range(many):
        pair = {where: speed(*(one, two)[where], steps) for where in ((0, 1) if turn % 2 else (1, 0))}
        found.append((pair[0], pair[1], pair[1] / pair[0]))
    *speeds, shares = zip(*found)
    print(json.dumps([*map(statistics.median, speeds), statistics.median(shares), min(shares), max(shares)]))
"""
EVERYDAY = """
from IPython.display import Image, display
from io import BytesIO
from matplotlib.figure import Figure
place, kept = display("", display_id=True), list(torch.rand(100_000).tolist())
def matplotlib(trainer):
    figure = Figure(figsize=(8.6, 3.1))
    figure.subplots().plot(kept)
    figure.savefig(buffer := BytesIO(), format="png", dpi=110)
    place.update(Image(buffer.getvalue()))
import matplotlib as _; _.use("agg")
from fastprogress.fastprogress import NBMasterBar
bar = NBMasterBar(range(10)); bar.on_iter_begin()
def fastprogress(trainer): bar.update_graph([[range(len(kept)), kept]])
try: from livelossplot import PlotLosses
except ImportError: plot = None
else:
    plot = PlotLosses(outputs=["MatplotlibPlot"])
    for value in kept: plot.update({"loss": value})
def livelossplot(trainer): plot.send()
"""
CLICKS = """
from trainbook.widgets import LivePanel
trainer, clock = made("clicks", True)
trainer.train(background=True)
panel, took = LivePanel(trainer.run), []
time.sleep(1)
for i in range(20):
    before = panel.run.folder.joinpath("events.jsonl").stat().st_size
    began = time.perf_counter()
    panel.save.click()
    with open(panel.run.folder/"events.jsonl", "rb") as log:
        log.seek(before); seen = b""
        while b'"control"' not in seen:
            seen += log.read()
            time.sleep(0.0005)
    took.append(1e3 * (time.perf_counter() - began))
    time.sleep(0.2)
trainer.run.tell("stop"); trainer.wait()
print(json.dumps([statistics.median(took), min(took), max(took)]))
"""
FIRST = """
run, took = off[0].run, []
began = time.perf_counter(); LivePanel(run); first = 1e3 * (time.perf_counter() - began)
for i in range(5):
    began = time.perf_counter(); LivePanel(run); took.append(1e3 * (time.perf_counter() - began))
print(json.dumps([first, statistics.median(took), min(took), max(took)]))
"""


def main(many: int = 10, steps: int = 5000) -> None:
    setup = SETUP.replace("STEPS", str(steps)) + TURNS.replace("STEPS", str(steps)).replace("MANY", str(many))
    lengths = (10**3, 10**5, 10**6)
    sources = [setup, CLICKS]
    for rows in lengths: sources.append(f"off, on = long('off', False, {rows}), long('on', True, {rows})\nturns(off, on)")
    sources += [FIRST, EVERYDAY, "turns(made('off', False), made('fastprogress', False, fastprogress))",
                "turns(made('off', False), made('matplotlib', False, matplotlib))",
                "turns(made('off', False), made('livelossplot', False, livelossplot)) if plot else None"]
    with tempfile.TemporaryDirectory() as name:
        last = [one.splitlines()[-1] if one else "" for one in cells(Path(name), *sources)]  # behind a training's own lines
    said = [json.loads(one) if one.startswith("[") else None for one in last]
    print(f"click to log       {said[1][0]:6.1f} ms ({said[1][1]:.1f}–{said[1][2]:.1f})   promise ≤ 150 ms or one step")
    names = [f"{rows:,} rows" for rows in lengths] + ["", "", "fastprogress", "matplotlib", "livelossplot"]
    for label, row in zip(names, said[2:]):
        if not label or row is None: continue
        off, on, share, low, high = row
        slower = f"{100 * (1 - share):5.1f} % slower ({100 * (1 - high):.1f} to {100 * (1 - low):.1f})"
        promise = "   promise ≤ 2 %" * ("rows" in label)
        print(f"{label:16} {off:7,.0f} → {on:7,.0f} steps/s: {slower}{promise}")
    first = said[2 + len(lengths)]
    print(f"first paint      {first[1]:.0f} ms ({first[2]:.0f}–{first[3]:.0f}), {first[0]:.0f} without a cache; promise ≤ 500")


if __name__ == "__main__": main(*map(int, sys.argv[1:]))
