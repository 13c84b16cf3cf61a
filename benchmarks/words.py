"""What the first layer costs: starting, reading a config, listing runs, looking into the inbox.

    make bench        (or python benchmarks/words.py)

Each figure stands beside something everybody has: the bare interpreter, PyYAML's safe_load, os.stat. Rounds are
interleaved, medians are told with their spread; the last column is the promise, where there is one.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from trainbook import Config, Run
from trainbook.ledger import Ledger

CONFIGS = Path(__file__).resolve().parent.parent/"configs"


def seconds(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def python(*words): return lambda: subprocess.run([sys.executable, *words], check=True, capture_output=True)


def beside(name, ours, theirs_name, theirs, rounds, promise="", times=1):
    "Ours and theirs in turn; the median of each, and of the ratio and the difference round by round."
    ours(), theirs()
    pairs = [(seconds(lambda: [ours() for _ in range(times)]) / times,
              seconds(lambda: [theirs() for _ in range(times)]) / times) for _ in range(rounds)]
    mine, other, more = (statistics.median(column) * 1e3
                         for column in ([a for a, _ in pairs], [b for _, b in pairs], [a - b for a, b in pairs]))
    ratios = sorted(a / b for a, b in pairs)
    print(f"{name:34} {mine:9.3f} ms   {theirs_name:20} {other:9.3f} ms   more {more:8.3f} ms   "
          f"ratio {statistics.median(ratios):6.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})   {promise}", flush=True)


def five_hundred_runs(root: Path) -> None:
    first = Run.create(Config.from_dict({"run": {"name": "demo", "root": str(root)}}), command=["x"])
    info, text = json.loads((first.folder/"run.json").read_text()), (first.folder/"config.yaml").read_bytes()
    rows = b"".join(b'{"event": "step", "stage": "m", "step": %d, "time": 0.0, "loss": 0.5}\n' % step
                    for step in range(1000))
    for i in range(499):
        (folder := root/f"many-{i:03}").mkdir()
        (folder/"inbox").mkdir()
        (folder/"run.json").write_text(json.dumps(info | {"id": str(i), "name": folder.name}))
        (folder/"config.yaml").write_bytes(text)
        (folder/"events.jsonl").write_bytes(rows)
        (folder/".lock").touch()


def main() -> None:
    bare = python("-c", "pass")
    beside("import trainbook", python("-c", "import trainbook"), "bare interpreter", bare, 15, "≤ 300 ms more")
    beside("trainbook --help", python("-m", "trainbook", "--help"), "bare interpreter", bare, 15, "≤ 300 ms more")
    beside("import trainbook.config", python("-c", "import trainbook.config"),
           "import pydantic, yaml", python("-c", "from pydantic import BaseModel; import yaml"), 15)
    texts = [(CONFIGS/name).read_text() for name in ("demo.yaml", "default.yaml")]
    beside("demo.yaml, resolved, two stages", lambda: Config.from_yaml(CONFIGS/"demo.yaml", ["--lr", "1e-3"]).stages,
           "yaml.safe_load of it", lambda: [yaml.safe_load(text) for text in texts], 30, "≤ 30 ms")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        five_hundred_runs(Path("runs"))
        beside("trainbook runs, of 500", python("-m", "trainbook", "runs"), "bare interpreter", bare, 7, "≤ 1000 ms")
        run = Run.create(Config.from_dict({"run": {"name": "log", "root": "logs"}}))
        with Ledger(run.folder) as ledger:
            ledger.start("m"); time.sleep(0.2)
            beside("a look into an empty inbox", ledger.commands,
                   "os.stat of it", lambda: os.stat(run.folder/"inbox"), 20, times=1000)
            def row(): ledger.log("step", 1, loss=0.5)
            beside("one row, in memory", row, "json.dumps of it",
                   lambda: json.dumps({"event": "step", "stage": "m", "step": 1, "time": 0.0, "loss": 0.5}),
                   20, times=1000)
        (run.folder/"events.jsonl").write_bytes(
            b'{"event": "step", "stage": "m", "step": 7, "loss": 0.5}\n' * 1_000_000)
        beside("status, of a log of 1e6 rows", lambda: run.status,
               "os.stat of it", lambda: os.stat(run.folder/"events.jsonl"), 20, times=20)
        os.chdir("/")


if __name__ == "__main__": main()
