"""What a step costs in each training framework, beside the bare loop: one tiny task, one thread, everybody in turn.

    python benchmarks/peers.py [--rounds 5] [--steps 2000] [--only NAME ...] [--ours PYTHON]

Any Python 3.11 runs it; the peers of peers.txt go into benchmarks/.venv the first time (a GB, some minutes). The model is so
small that the figure is the framework's own work: Linear-ReLU-Linear, 32 rows a step from a plain DataLoader, AdamW, clipping
to 1, a schedule that moves at every step. Progress bars, logs and checkpoints are off where there is a switch, all else is as
each framework has it by default. Every figure comes from a process of its own: 200 steps to warm up, the mean of the rest; a
ratio is to the bare loop of the same round. Ours runs in the repository's own .venv, beside a bare loop there.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
VENV, PINS = HERE/".venv", HERE/"peers.txt"
PEERS = VENV/"bin/python"
TORCH = "torch==2.13.0"  # spelled so and first: a CPU build; other spellings bring gigabytes of CUDA
BATCH, WIDTH, CLASSES, LR, CLIP = 32, 64, 10, 1e-3, 1.0
WARM = 200
IMPORTS = ("torch", "fastai.basics", "lightning", "accelerate")


def task(steps: int):
    "The model, which notes the time of each call (a framework calls it once a step), and the rows it learns from."
    import torch
    torch.set_num_threads(1)
    torch.manual_seed(0)
    class Timed(torch.nn.Sequential):
        def forward(self, x):
            self.times.append(time.perf_counter())
            return super().forward(x)
    model = Timed(torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, CLASSES))
    model.times = []
    inputs = torch.randn(steps * BATCH, WIDTH)
    targets = (inputs @ torch.randn(WIDTH, CLASSES)).argmax(1)  # something to learn, so that a fallen loss means something
    return model, torch.utils.data.TensorDataset(inputs, targets)


def plain(rows):
    from torch.utils.data import DataLoader
    return DataLoader(rows, batch_size=BATCH, shuffle=True)


def adamw(model, steps: int):
    "The optimizer and the schedule of every loop that takes torch's own: linear, down to zero."
    import torch
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)


# Each takes the model, the rows and the number of steps, trains one epoch, and gives back the optimizer that did it.

def bare(model, rows, steps):
    from torch.nn.functional import cross_entropy
    from torch.nn.utils import clip_grad_norm_
    optimizer, scheduler = adamw(model, steps)
    losses = []
    for x, y in plain(rows):
        loss = cross_entropy(model(x), y)
        loss.backward()
        clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return optimizer


def bare_best(model, rows, steps):
    "The same work by hand: a fused optimizer that also divides by the clip factor, one gather a batch, no scheduler object."
    import torch
    from torch.nn.functional import cross_entropy
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    group, parameters, losses = optimizer.param_groups[0], list(model.parameters()), []
    (inputs, targets), limit = rows.tensors, torch.tensor(CLIP)
    for step, index in enumerate(torch.randperm(len(rows)).split(BATCH)):
        loss = cross_entropy(model(inputs.index_select(0, index)), targets.index_select(0, index))
        loss.backward()
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([p.grad for p in parameters])))
        optimizer.grad_scale = torch.maximum(norm, limit).div_(CLIP)  # gradients are divided by it
        optimizer.found_inf = (~torch.isfinite(norm)).float()  # and the step is left out where this is one
        group["lr"] = LR * (1 - step / steps)
        optimizer.step()
        for parameter in parameters: parameter.grad = None  # zero_grad without what surrounds it
        losses.append(loss.detach())
    return optimizer


def ignite(model, rows, steps):
    from ignite.engine import Engine, Events
    from torch.nn.functional import cross_entropy
    from torch.nn.utils import clip_grad_norm_
    optimizer, scheduler = adamw(model, steps)
    def update(engine, batch):
        model.train()
        optimizer.zero_grad()
        x, y = batch
        loss = cross_entropy(model(x), y)
        loss.backward()
        clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.item()
    trainer = Engine(update)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: scheduler.step())
    trainer.run(plain(rows), max_epochs=1)
    return optimizer


def fabric(model, rows, steps):
    from lightning.fabric import Fabric
    from torch.nn.functional import cross_entropy
    optimizer, scheduler = adamw(model, steps)
    fabric = Fabric(accelerator="cpu", devices=1)
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    losses = []
    for x, y in fabric.setup_dataloaders(plain(rows)):
        loss = cross_entropy(wrapped(x), y)
        fabric.backward(loss)
        fabric.clip_gradients(wrapped, wrapped_optimizer, max_norm=CLIP)
        wrapped_optimizer.step()
        scheduler.step()
        wrapped_optimizer.zero_grad()
        losses.append(loss.detach())
    return optimizer


def accelerate(model, rows, steps):
    from accelerate import Accelerator
    from torch.nn.functional import cross_entropy
    accelerator = Accelerator(cpu=True)
    own, schedule = adamw(model, steps)
    model, optimizer, loader, scheduler = accelerator.prepare(model, own, plain(rows), schedule)
    losses = []
    for x, y in loader:
        loss = cross_entropy(model(x), y)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return own


def hf_trainer(model, rows, steps):
    "With its default optimizer, which is the fused AdamW; its own loader is replaced by everybody's."
    from torch.nn.functional import cross_entropy
    from transformers import Trainer, TrainingArguments
    class Training(Trainer):
        def get_train_dataloader(self): return self.accelerator.prepare(plain(rows))
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            x, y = inputs
            return cross_entropy(model(x), y)
    arguments = TrainingArguments(
        "hf", num_train_epochs=1, per_device_train_batch_size=BATCH, learning_rate=LR, lr_scheduler_type="linear",
        max_grad_norm=CLIP, use_cpu=True, disable_tqdm=True, logging_strategy="no", save_strategy="no", report_to="none")
    trainer = Training(model, arguments, train_dataset=rows)
    trainer.train()
    return trainer.optimizer.optimizer


def skorch(model, rows, steps):
    import torch
    from skorch import NeuralNetClassifier
    from skorch.callbacks import GradientNormClipping, LRScheduler
    schedule = LRScheduler(policy=torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 - step / steps,
                           step_every="batch")
    net = NeuralNetClassifier(
        model, criterion=torch.nn.CrossEntropyLoss, optimizer=torch.optim.AdamW, lr=LR, max_epochs=1, batch_size=BATCH,
        iterator_train__shuffle=True, train_split=None, callbacks=[schedule, GradientNormClipping(CLIP)],
        callbacks__print_log=None, verbose=0)
    net.fit(rows, y=None)
    return net.optimizer_


def lightning(model, rows, steps):
    import lightning
    from torch.nn.functional import cross_entropy
    class Training(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model
        def training_step(self, batch, index):
            x, y = batch
            return cross_entropy(self.model(x), y)
        def configure_optimizers(self):
            optimizer, scheduler = adamw(self, steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, gradient_clip_val=CLIP, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Training(), plain(rows))
    return trainer.optimizers[0]


def fastai(model, rows, steps, torchs=False):
    """With its default optimizer, an AdamW of its own in Python; `torchs`: with torch's.

    fastai asks for torchvision and spaCy; they are not installed (peers.txt), nothing used here imports them.
    """
    from fastai.basics import Adam, CrossEntropyLossFlat, DataLoaders, Learner, OptimWrapper
    from fastai.callback.schedule import ParamScheduler, SchedLin
    from fastai.callback.training import GradientClip
    from torch.optim import AdamW
    def wrapped(parameters, lr, **others): return OptimWrapper(parameters, AdamW, lr=lr)
    learner = Learner(DataLoaders(plain(rows), []), model, loss_func=CrossEntropyLossFlat(), lr=LR,
                      opt_func=wrapped if torchs else Adam)
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, cbs=[ParamScheduler({"lr": SchedLin(LR, 0)}), GradientClip(CLIP)])
    return learner.opt.opt if torchs else learner.opt


def fastai_wrapped(model, rows, steps): return fastai(model, rows, steps, torchs=True)


def trainbook(model, rows, steps):
    from trainbook.trainer import Trainer
    Trainer(model, plain(rows), optimizer="adamw", lr=LR, clip=CLIP, scheduler="cosine", epochs=1, run=False).train()


FRAMEWORKS = {  # what it is called: how it trains, and the package whose version is told
    "bare loop": (bare, "torch"),
    "bare best": (bare_best, "torch"),
    "Ignite": (ignite, "pytorch-ignite"),
    "Fabric": (fabric, "lightning"),
    "Accelerate": (accelerate, "accelerate"),
    "HF Trainer": (hf_trainer, "transformers"),
    "skorch": (skorch, "skorch"),
    "Lightning": (lightning, "lightning"),
    "fastai": (fastai, "fastai"),
    "fastai, torch's AdamW": (fastai_wrapped, "fastai"),
}
OURS = {"bare loop (our venv)": (bare, "torch"), "trainbook": (trainbook, "trainbook")}


def one(name: str, steps: int) -> None:
    "Trains once in this process, makes sure that it did, and prints one line of JSON."
    import torch
    train, package = (FRAMEWORKS | OURS)[name]
    model, rows = task(steps)
    layers, (inputs, targets) = torch.nn.Sequential(*model), rows.tensors  # the same weights, the time not noted
    def loss():
        with torch.no_grad(): return float(torch.nn.functional.cross_entropy(layers(inputs), targets))
    before = loss()
    optimizer = train(model, rows, steps)
    after = loss()
    assert torch.get_num_threads() == 1, "somebody changed the number of threads"
    assert after < 0.8 * before, f"the loss went from {before:.3f} to {after:.3f}: that is no training"
    assert len(model.times) == steps, f"{len(model.times)} calls of the model in {steps} steps"
    if optimizer is not None:  # ours keeps its own
        done = {int(state["step"]) for state in optimizer.state.values()}
        assert done == {steps}, f"{done} optimizer steps instead of {steps}"
        rates = [group["lr"] for group in optimizer.param_groups]
        assert max(rates) < 2 * LR / steps, f"the schedule did not move at every step: it ended at {rates}"
    times = model.times[-(steps - WARM):]
    print(json.dumps({"us": (times[-1] - times[0]) / (len(times) - 1) * 1e6, "version": version(package)}))


def python(interpreter: Path, *words: str) -> str:
    "The last line that a fresh process prints; what it complained of, where it fails."
    paths = {"PYTHONPATH": str(HERE.parent)} if interpreter != PEERS else {}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([interpreter, *words], cwd=folder, capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **paths})
    if done.returncode: sys.exit(f"{' '.join(words)}:\n{done.stderr[-3000:]}")
    return done.stdout.strip().rpartition("\n")[2]


def make_venv() -> None:
    "The peers, as pinned; again when the pins have changed. peers.txt is a whole set, so that nothing is resolved."
    stamp = VENV/".set-up"
    if stamp.exists() and stamp.read_text() == PINS.read_text(): return
    print(f"making {VENV}", file=sys.stderr)
    venv.create(VENV, clear=True, symlinks=True, with_pip=True)
    pip = [PEERS, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, TORCH], check=True)
    subprocess.run([*pip, "--no-deps", "-r", PINS], check=True)
    stamp.write_text(PINS.read_text())


def there(interpreter: Path, module: str) -> bool:
    code = f"from importlib.util import find_spec; print(find_spec({module!r}) is not None)"
    return interpreter.exists() and python(interpreter, "-c", code) == "True"


def steps_table(names: list, ours: Path, rounds: int, steps: int) -> None:
    "All in turn, round by round; then one line each."
    rows = {name: [] for name in names}
    versions = {}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        for name in names:
            interpreter = ours if name in OURS else PEERS
            told = json.loads(python(interpreter, __file__, "--one", name, "--steps", str(steps)))
            rows[name].append(told["us"])
            versions[name] = told["version"]
    for name, mine in rows.items():
        ratios = sorted(a / b for a, b in zip(mine, rows["bare loop (our venv)" if name in OURS else "bare loop"]))
        print(f"{name:22} {statistics.median(mine):8.0f} µs   ratio {statistics.median(ratios):5.2f} "
              f"({ratios[0]:.2f}–{ratios[-1]:.2f})   {versions[name]}", flush=True)


def imports_table(modules: list, rounds: int) -> None:
    "Each in a fresh process; the first round warms the page cache."
    rows = {row: [] for row in modules}
    for _ in range(rounds + 1):
        for interpreter, module in modules:
            code = f"import time; began = time.perf_counter(); import {module}; print(time.perf_counter() - began)"
            rows[interpreter, module].append(float(python(interpreter, "-c", code)))
    for (interpreter, module), (_, *seconds) in rows.items():
        where = "" if interpreter == PEERS else " (our venv)"
        print(f"import {module + where:26} {statistics.median(seconds):6.2f} s   ({min(seconds):.2f}–{max(seconds):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[*FRAMEWORKS, *OURS], help="and the bare loop")
    parser.add_argument("--ours", type=Path, default=HERE.parent/".venv/bin/python", help="the Python that has trainbook")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 3 * WARM: parser.error(f"--steps: {WARM} are for warming up, give some {10 * WARM}")
    if args.one: return one(args.one, args.steps)
    make_venv()
    ours = args.ours.absolute()  # not resolved: a venv's python is a link
    have = there(ours, "trainbook.trainer")
    asked = args.only or [*FRAMEWORKS, *OURS]
    names = [name for name in FRAMEWORKS if name in asked or name == "bare loop"]
    names += [name for name in OURS if set(asked) & set(OURS) and (have if name == "trainbook" else ours.exists())]
    print(f"{args.steps} steps of {BATCH} rows, {args.rounds} rounds, {TORCH}, Python {sys.version.split()[0]}, "
          f"{os.cpu_count()} cores, one thread")
    steps_table(names, ours, args.rounds, args.steps)
    if "trainbook" in asked and not have: print(f"{'trainbook':22} not there yet ({ours})")
    if args.only: return
    mine = [(ours, "torch")] * ours.exists() + [(ours, "trainbook.trainer")] * have
    imports_table([(PEERS, module) for module in IMPORTS] + mine, args.rounds)


if __name__ == "__main__": main()
