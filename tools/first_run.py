"""What `make train` shows: a config is resolved, a run is made, and what a person would want next is told."""
import os
import sys
from pathlib import Path

from trainbook import Config, Run

config = Config.from_yaml(sys.argv[1])
print(config, end="\n\n")
for stage in config.stages:
    print(f"stage {stage.name:12} {stage.training.epochs} epochs, lr {stage.training.lr}, "
          f"batches of {stage.training.batch_size}")
run = Run.create(config, command=["make", "train"])
print(f"\nThe run is made (the trainer is not built yet, so nothing is trained):\n  {run.folder}/")
for name in sorted(os.listdir(run.folder)): print(f"    {name}{'/' if (run.folder/name).is_dir() else ''}")
trainbook = (Path(sys.executable).parent.relative_to(Path.cwd())/"trainbook"
             if Path(sys.executable).is_relative_to(Path.cwd()) else "trainbook")
print(f"""
Next:
  {trainbook} show {run.folder}
  {trainbook} runs
  {trainbook} config show {sys.argv[1]} --origin""")
