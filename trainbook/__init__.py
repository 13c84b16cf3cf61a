"""A training workbook for PyTorch: read it as a book, run it as notebooks, import it as a library.

The page number is the layer; a module imports only from pages before its own.

    0x words      source  schema  spelling  layers  config     what a person wrote, and where
                  registry                                     names to builders
                  lock  ledger  run  trust                     the run folder, and whose code may run
    1x machine    device  dist  workers  plan                  what computes, and when
                  model  groups  losses  schedule              what learns, which part, towards what, how fast
                  console  order                               what is told, in which order
    2x ingredients  data  optim  metrics                       batches, updates, numbers
                  pickled  state  tensorfile  stepfolder       what a checkpoint is made of, which one is meant
                  foreign  weights  load                       what others wrote
    3x the run    checkpoint  events  loggers  trainer         save, listen, tell, train
                  beside  prove                                what differs, of two checkpoints, and under kills
                  cells  extract                               notebook code kept, outputs of a model kept
                  words  files                                 verbs that read and tidy
    4x doors      stages  launch  onward                       configs that train, here or elsewhere
                  series  curves  drawing  widgets             what there is to see of a run
                  compare  picker                              runs side by side; what one can go on from
    5x why        machine  doctor                               what there is to compute with
                  trial  gauges  probes                        steps that leave no trace; what is measured while it trains
                  memory  finders                              what a step takes; which rate, which batch size
                  examine  diagnose                            why the loss does not fall
                  culprit  replay                              where it became no number, and that step again
                  readings  diagnostics                        all of that, judged and shown
                  cli                                          the command line
    recipes       recipes.ink  recipes.ink_strokes             whole trainings of real systems

Start with `Trainer`; the pages are in nbs/, in reading order.
"""
import sys

__version__ = "0.1.0"

if sys.platform == "win32":
    sys.tracebacklimit = 0  # one clear line, not a page of Python's own
    raise ImportError("trainbook needs Linux or macOS (file locks, signals); on Windows use it inside WSL")

# name → module; resolved on first use, so that `import trainbook` stays fast and free of torch
_PUBLIC = {"Config": "config", "ConfigError": "source",
           "Run": "run", "RunError": "run", "runs": "run", "find_run": "run", "register": "registry",
           "CheckpointManager": "checkpoint", "load_checkpoint": "load", "load_model": "load", "CheckpointError": "state",
           "load_weights": "weights", "Trainer": "trainer", "Callback": "events", "History": "console", "KeyedLoader": "data",
           "Paused": "events", "BaseTrainer": "stages", "create_trainer": "stages", "train_stages": "stages", "resume": "onward",
           "branch": "onward", "launch": "launch", "launch_branch": "onward", "live": "widgets", "ResumePicker": "picker",
           "compare": "compare", "Doctor": "doctor", "memory": "memory", "find_lr": "finders", "find_batch_size": "finders",
           "diagnose": "diagnose", "replay": "replay", "Diagnostics": "diagnostics"}
__all__ = list(_PUBLIC)
# what other programs have as classes; an ImportError, as `from trainbook import …` swallows the words of an AttributeError
_ELSEWHERE = {"EarlyStopping": "early stopping is a keyword: "
                               "Trainer(early_stopping=True, patience=10, min_delta=0.001, monitor=\"val_loss\")",
              "ModelCheckpoint": "checkpoints are keywords: Trainer(save_interval=1, keep_last_n=3, monitor=\"val_loss\")"}


def __getattr__(name: str):
    if name in _ELSEWHERE: raise ImportError(f"trainbook has no {name}; {_ELSEWHERE[name]}")
    if name not in _PUBLIC: raise AttributeError(f"module 'trainbook' has no attribute {name!r}")
    from importlib import import_module
    return globals().setdefault(name, getattr(import_module(f"trainbook.{_PUBLIC[name]}"), name))


def __dir__() -> list[str]: return sorted([*globals(), *_PUBLIC])
