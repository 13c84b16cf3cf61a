"""Killed, interrupted, steered, branched: a training comes to the same bits and the same rows as one that nobody touched."""
import math
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import exact
from exact import RECIPES, X, Y, Augmented, Noisy, at_event, at_step, last_step, loader, make, net, outcome
from trainbook.data import KeyedLoader
from trainbook.device import seed_everything
from trainbook.ledger import read_rows
from trainbook.run import Run
from trainbook.state import split
from trainbook.stepfolder import steps
from trainbook.tensorfile import CheckpointError
from trainbook.trainer import Trainer


def said(folder: Path, life: int) -> str: return (folder/f"out-{life}").read_text()


def check_same(found: dict, wanted: dict) -> None:
    "The same bits and rows; names what is not."
    assert found["tree"] == wanted["tree"]
    assert found["tensors"].keys() == wanted["tensors"].keys()
    assert not [name for name in wanted["tensors"] if found["tensors"][name] != wanted["tensors"][name]]
    assert found["rows"] == wanted["rows"]


def state_of(trainer: Trainer, *without: str) -> tuple:
    "All that a trainer is, as something that can be compared."
    tree, tensors = split({key: value for key, value in trainer.state_dict().items() if key not in without})
    return tree, {name: one.clone().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, one in tensors.items()}


# --- SIGKILL at any instant -----------------------------------------------------------------------------------------------------------

def wait_for(there, pid: int, folder: Path, life: int):
    "Until something is so, or the process that should bring it is done."
    for _ in range(120_000):
        if there() or (folder/"end.bin").exists(): return
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z": return
        time.sleep(0.0005)
    raise AssertionError(f"nothing came: {said(folder, life)}")


def killed(server, folder: Path, recipe: str, life: int, step: int, seconds: float = 0.0, **words) -> int | None:
    "A life that is killed so long after this step; the last step that it made, None if it was over before."
    pid = server.start(folder, recipe, life=life, **words)
    wait_for(lambda: last_step(folder, life) >= step and steps(folder/"run"/"train"), pid, folder, life)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    code = server.ended(pid)
    assert code in (0, -signal.SIGKILL), said(folder, life)
    return last_step(folder, life) if code else None


def finish(server, folder: Path, recipe: str, life: int, **words) -> dict:
    assert server.live(folder, recipe, life=life, **words) == 0, said(folder, life)
    return outcome(folder)


def kills(server, unhurt, folder: Path, recipe: str, fractions: list[float]) -> list[float]:
    "A training that is killed at these fractions of the way from its first commit to its last step; where each kill hit."
    wanted, there, first = unhurt(recipe)
    times, last, hits = dict(there), there[-1][0], []
    for life, fraction in enumerate(sorted(fractions)):
        step, part = divmod(first + fraction * (last - first), 1)
        gap = (times.get(int(step) + 1, times[last]) - times[int(step)]) / 1e9
        hit = killed(server, folder, recipe, life, int(step), part * gap)
        if hit is not None: hits.append((hit - first) / (last - first))
    check_same(finish(server, folder, recipe, len(fractions)), wanted)
    return hits


def check_spread(hits: list[float], number: int) -> None:
    "Nearly all hit something, and early, middle and late had their share."
    thirds = [sum(third / 3 <= hit < (third + 1) / 3 or third == 2 and hit >= 1 for hit in hits) for third in range(3)]
    print(f"{len(hits)} kills of {number}; in the first, second and last third {thirds}")
    assert len(hits) >= 0.8 * number and min(thirds) >= number // 6


def spread(number: int, each: int, seed: int = 0) -> list[list[float]]:
    "Fractions that cover the whole, dealt out: so many to each."
    rng = random.Random(seed)
    all_of = [(n + rng.random()) / number for n in range(number)]
    rng.shuffle(all_of)
    return [all_of[at:at + each] for at in range(0, number, each)]


QUICK = ("accumulate", "changed_workers", "callbacks", "iterable", "everything", "sgd")


def test_killed_at_any_instant(server, unhurt, tmp_path):
    """Two kills each, at instants that are spread over the whole training."""
    dealt = spread(2 * len(QUICK), 2)
    check_spread([hit for recipe, own in zip(QUICK, dealt) for hit in kills(server, unhurt, tmp_path/recipe, recipe, own)], 2 * len(QUICK))


@pytest.mark.soak
def test_killed_at_any_instant_many_times(server, unhurt, tmp_path):
    """All recipes, twice three kills each."""
    dealt = spread(6 * len(RECIPES), 3, 1)
    hits = [hit for number, own in enumerate(dealt) for recipe in [[*RECIPES][number // 2]]
            for hit in kills(server, unhurt, tmp_path/f"{recipe}-{number}", recipe, own)]
    check_spread(hits, 6 * len(RECIPES))
    assert len(hits) >= 60


@pytest.mark.parametrize("recipe", sorted(RECIPES.keys() - {*QUICK}))
def test_killed_once(server, unhurt, recipe, tmp_path):
    """Every other recipe: one kill, somewhere that its name decides."""
    kills(server, unhurt, tmp_path/"main", recipe, [random.Random(recipe).random()])


@pytest.mark.parametrize("recipe, die", [("held", ("step", 40)), ("held", ("fit_start", 2)), ("stretched", ("step", 51)), ("restarted", ("step", 20)),
                                         ("restarted", ("step", 27)), ("restarted", ("step", 40)), ("restarted", ("epoch_end", 2))], ids=str)
def test_a_script_that_trains_on_is_run_again(server, unhurt, recipe, die, tmp_path):
    """Its first calls of train() say ends that lie behind: nothing is evaluated there, and no end counts twice."""
    assert server.live(tmp_path, recipe, die=die) == -signal.SIGKILL, said(tmp_path, 0)
    check_same(finish(server, tmp_path, recipe, 1), unhurt(recipe)[0])


def test_the_count_of_steps_left_out_survives(server, unhurt, tmp_path):
    """Killed after the first of them, the next life ends at the same third as one that was not killed."""
    assert unhurt("left_out")[0]["tree"]["trainer"]["numbers"]["skipped"] == 4
    for folder, die in ((tmp_path/"whole", None), (tmp_path/"killed", ("step", 24))):
        if die: assert server.live(folder, "left_out", die=die, nonfinite=2) == -signal.SIGKILL
        assert server.live(folder, "left_out", life=1, nonfinite=2) == 1
    ends = [[line for line in said(folder, 1).splitlines() if "it is number 3, and nonfinite: 2" in line] for folder in (tmp_path/"whole", tmp_path/"killed")]
    assert ends[0] and ends[0] == ends[1]


def test_an_end_by_the_clock_counts_all_lives(server, tmp_path):
    """It stops by time, whatever was killed: both lives together last as long as one would, and no step is missing."""
    words = {"epochs": "1.5 s", "scheduler": "constant"}
    assert killed(server, tmp_path, "intervals", 0, 1, seconds=1.0, **words), said(tmp_path, 0)
    outcome = finish(server, tmp_path, "intervals", 1, **words)
    steps = [row["step"] for row in outcome["rows"] if "loss" in row]
    assert steps == [*range(3, steps[-1] + 1, 3)] and len(steps) > 3
    lasted = [(times[-1] - times[0]) / 1e9 for life in range(2) if (times := [time for _, time in exact.pulses(tmp_path, life)])]
    assert len(lasted) == 2 and lasted[0] > 0.8 and sum(lasted) < 2.2 and outcome["tree"]["trainer"]["spent"] >= 1.5


def test_resumed_by_its_name(server, unhurt, tmp_path):
    """resume_from_checkpoint() by hand comes to the same as run.on_existing: resume."""
    wanted, _, _ = unhurt("intervals")
    assert killed(server, tmp_path, "intervals", 0, 30) is not None
    trainer = make("intervals", tmp_path, on_existing="new").resume_from_checkpoint()
    trainer.train()
    assert trainer.run.folder == tmp_path/"run"
    exact.leave_end(trainer, tmp_path)
    check_same(outcome(tmp_path), wanted)


# --- SIGKILL at chosen instants -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("event, number", [("fit_start", 1), ("epoch_start", 1), ("epoch_start", 2), ("step_end", 1), ("step_end", 7), ("step_end", 13), ("step_end", 52),
                                           ("eval_end", 2), ("epoch_end", 1), ("epoch_end", 2), ("epoch_end", 4), ("saved", 1), ("saved", 3), ("fit_end", 1),
                                           ("validation", 2), ("validation", 8), ("step", 3)])
@pytest.mark.parametrize("recipe", ["callbacks", "stream_accumulate"])
def test_killed_in_an_event(server, unhurt, recipe, event, number, tmp_path):
    """In each of the seven, at the last step of an epoch, between it and the epoch's row, before the first commit, in an evaluation, at the very end."""
    wanted, there, _ = unhurt(recipe)
    number = min(number, there[-1][0]) if event == "step_end" else number
    assert server.live(tmp_path, recipe, die=(event, number)) == -signal.SIGKILL, said(tmp_path, 0)
    check_same(finish(server, tmp_path, recipe, 1), wanted)


def test_killed_inside_a_save(server, unhurt, tmp_path):
    """The disk is slow, and the kill comes when a part of a checkpoint is there."""
    wanted, _, first = unhurt("everything")
    stage = tmp_path/"run"/"train"
    torn = lambda: stage.is_dir() and [name for name in os.listdir(stage) if name.startswith(".tmp-step-")]
    for life, step in enumerate((first, 5 * first, 10 * first)):
        pid = server.start(tmp_path, "everything", life=life, slow_disk=0.02)
        wait_for(lambda life=life, step=step: last_step(tmp_path, life) >= step and torn(), pid, tmp_path, life)
        os.kill(pid, signal.SIGKILL)
        assert server.ended(pid) == -signal.SIGKILL and torn(), said(tmp_path, life)
    check_same(finish(server, tmp_path, "everything", 3), wanted)


def test_a_finished_training_is_made_again(server, unhurt, tmp_path):
    """Nothing is left to do, and nothing changes."""
    wanted, _, _ = unhurt("intervals")
    for life in range(3): check_same(finish(server, tmp_path, "intervals", life), wanted)


# --- signals --------------------------------------------------------------------------------------------------------------------------

def lines(path: Path) -> int: return path.read_bytes().count(b"\n") if path.exists() else 0


def interrupted(server, unhurt, folder: Path, recipe: str, number: int, seed: int, interactive: bool, **words) -> int:
    "A process that is interrupted up to so many times and goes on each time; how many pauses it made."
    rng, sent = random.Random(seed), 0
    wanted, _, _ = unhurt(recipe)
    pid = server.start(folder, recipe, interrupts=True, interactive=interactive, **words)
    wait_for(lambda: last_step(folder, 0) >= 1, pid, folder, 0)
    while sent < number and not (folder/"end.bin").exists():
        time.sleep(rng.random() * 0.03)
        os.kill(pid, signal.SIGINT)
        sent += 1
        wait_for(lambda: lines(folder/"pauses") + lines(folder/"outside") >= sent, pid, folder, 0)  # noqa: B023
    assert server.ended(pid) == 0, said(folder, 0)
    check_same(outcome(folder), wanted)
    return lines(folder/"pauses")


@pytest.mark.parametrize("recipe, interactive", [("callbacks", True), ("stream_accumulate", False)])
def test_interrupted_and_gone_on(server, unhurt, recipe, interactive, tmp_path):
    assert interrupted(server, unhurt, tmp_path, recipe, 6, 0, interactive) >= 2


@pytest.mark.soak
def test_200_interrupts(server, unhurt, tmp_path):
    pauses, number = 0, 0
    while pauses < 200 and number < 80:
        recipe = [*RECIPES][number % len(RECIPES)]
        pauses += interrupted(server, unhurt, tmp_path/str(number), recipe, 12, number, number % 2 == 0)
        number += 1
    print(f"{pauses} pauses in {number} trainings")
    assert pauses >= 200


@pytest.mark.parametrize("recipe, step", [("plain", 13), ("intervals", 10), ("plain", 52)],
                         ids=["at the end of an epoch", "inside an epoch", "the last one of all"])
def test_interrupted_in_an_evaluation(server, unhurt, recipe, step, tmp_path):
    """It is given up, and made again when training goes on: one row."""
    wanted, _, _ = unhurt(recipe)
    pid = server.start(tmp_path, recipe, interrupts=True, slow_validation=0.1)
    evals = lambda: len([row for row in read_rows(tmp_path/"run")[0] if row["event"] == "epoch"]) if (tmp_path/"run").is_dir() else 0
    wait_for(lambda: last_step(tmp_path, 0) == step, pid, tmp_path, 0)
    time.sleep(0.1)
    assert evals() == (step - 1) // 13
    os.kill(pid, signal.SIGINT)
    wait_for(lambda: lines(tmp_path/"pauses"), pid, tmp_path, 0)
    assert (tmp_path/"pauses").read_text().split()[0] == str(step)
    assert server.ended(pid) == 0, said(tmp_path, 0)
    check_same(outcome(tmp_path), wanted)


SCRIPT = """
import exact, sys
from pathlib import Path
from torch.utils.data import DataLoader, TensorDataset
exact.Slow.lasts = 0.05
trainer = exact.make("plain", Path(sys.argv[1]), kind=exact.Slow)
from trainbook.data import KeyedLoader
trainer.val_loader = KeyedLoader(DataLoader(TensorDataset(exact.X.repeat(10, 1), exact.Y.repeat(10)), 1))
trainer.listeners.of["step_end"].append(exact.Pulse(Path(sys.argv[1])/"pulse-0").step_end)
trainer.train()
"""


def test_sigterm_to_a_script_in_a_long_evaluation(server, unhurt, tmp_path):
    """An evaluation of 50 s: saved, 143, within seconds; then it goes on exactly."""
    script = subprocess.Popen([sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path)], stderr=subprocess.PIPE, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(exact.__file__).parent), *sys.path])})
    wait_for(lambda: last_step(tmp_path, 0) == 13, script.pid, tmp_path, 0)
    time.sleep(0.3)
    began = time.monotonic()
    script.send_signal(signal.SIGTERM)
    _, errors = script.communicate(timeout=60)
    assert script.returncode == 143 and time.monotonic() - began < 5, errors
    assert "paused at step 13" in errors and steps(tmp_path/"run"/"train") == [13]
    assert Run(tmp_path/"run").status == "paused"
    wanted, _, _ = unhurt("plain")
    check_same(finish(server, tmp_path, "plain", 1), wanted)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_a_script(server, unhurt, number, code, tmp_path):
    wanted, _, _ = unhurt("stream_accumulate")
    pid = server.start(tmp_path, "stream_accumulate")
    wait_for(lambda: last_step(tmp_path, 0) >= 6, pid, tmp_path, 0)
    os.kill(pid, number)
    assert server.ended(pid) == code, said(tmp_path, 0)
    assert last_step(tmp_path, 0) == steps(tmp_path/"run"/"train")[-1]
    check_same(finish(server, tmp_path, "stream_accumulate", 1), wanted)


class Impatient(Noisy):
    "Is interrupted twice inside one step."
    at, where = 17, "before"
    def training_step(self, batch):
        found = super().training_step(batch)
        if self.step == self.at:
            type(self).at = 0
            for _ in range(2): os.kill(os.getpid(), signal.SIGINT)
        return found


def test_a_second_interrupt_stops_at_once(unhurt, tmp_path):
    """In the middle of a step: nothing is saved, train() refuses, a checkpoint helps."""
    wanted, _, _ = unhurt("intervals")
    trainer = make("intervals", tmp_path, kind=Impatient)
    with pytest.raises(KeyboardInterrupt): trainer.train()
    assert steps(tmp_path/"run"/"train")[-1] < 17
    with pytest.raises(RuntimeError, match="resume_from_checkpoint"): trainer.train()
    trainer.resume_from_checkpoint().train()
    exact.leave_end(trainer, tmp_path)
    check_same(outcome(tmp_path), wanted)


def test_an_interrupt_while_a_callback_evaluates(tmp_path):
    """It is paused, not failed; the callback gets its numbers."""
    got, sent = [], []
    class Watched(Noisy):
        def validation_step(self, batch):
            if not sent: sent.append(os.kill(os.getpid(), signal.SIGINT))
            return super().validation_step(batch)
    trainer = make("plain", tmp_path, callbacks=[at_event("epoch_end", 1, lambda trainer: got.append(trainer.evaluate(DataLoader(Augmented(20), 8))))], kind=Watched, eval_every=None)
    with pytest.raises(SystemExit): trainer.train()
    assert got and Run(tmp_path/"run").status == "paused"


# --- errors ---------------------------------------------------------------------------------------------------------------------------

class FailsOnce(exact.Stream):
    fail_at = 0
    def __iter__(self):
        for x, y in super().__iter__():
            if self.at == type(self).fail_at:
                type(self).fail_at = 0
                raise OSError("the share is gone")
            yield x, y


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_source_that_fails_loses_nothing(accumulate, tmp_path):
    """The window that it failed in is not taken for trained: the same end as without the failure."""
    ends = []
    for fail_at in (0, 91):
        def train():
            return make("stream_accumulate", tmp_path/str(fail_at), accumulate=accumulate, save_interval="2 steps", epochs=3)  # noqa: B023
        FailsOnce.fail_at = fail_at
        RECIPES["failing"] = (lambda workers: DataLoader(FailsOnce(), 8), *RECIPES["stream_accumulate"][1:])
        made = lambda: make("failing", tmp_path/str(fail_at), accumulate=accumulate, save_interval="2 steps", epochs=3)  # noqa: B023
        try:
            trainer = made()
            if fail_at:
                with pytest.raises(OSError, match="share"): trainer.train()
                with pytest.raises(RuntimeError, match="resume_from_checkpoint"): trainer.train()
                trainer = made()
            trainer.train()
        finally: del RECIPES["failing"]
        ends.append(state_of(trainer))
    assert ends[0] == ends[1]


class Exploding(Noisy):
    at = 16
    def training_step(self, batch):
        found = super().training_step(batch)
        if self.step == self.at:
            type(self).at = 0
            found["loss"] = found["loss"] * math.nan
        return found


def test_after_a_gradient_that_is_not_finite(unhurt, tmp_path):
    """train() does not go on as if nothing were; from a checkpoint it does, and really trains."""
    wanted, _, _ = unhurt("intervals")
    trainer = make("intervals", tmp_path, kind=Exploding)
    with pytest.raises(RuntimeError, match="not finite|is nan"): trainer.train()
    with pytest.raises(RuntimeError, match="resume_from_checkpoint"): trainer.train()
    trainer.resume_from_checkpoint().train()
    exact.leave_end(trainer, tmp_path)
    found = outcome(tmp_path)
    assert found["tree"] == wanted["tree"] and found["tensors"] == wanted["tensors"]


# --- parity ---------------------------------------------------------------------------------------------------------------------------

PARITY = {"plain": {}, "accumulate": {"accumulate": 3}, "clip": {"clip": 0.3}, "cosine": {"scheduler": "cosine", "warmup": "10 steps", "min_lr": 1e-4},
          "bf16": {"precision": "bf16"}, "all": {"accumulate": 3, "clip": 0.3, "scheduler": "cosine", "warmup": "5 steps", "precision": "bf16"}}


def lr_at(step: int, total: int, warmup: int = 0, scheduler: str = "constant", min_lr: float = 0.0, **_) -> float:
    if step < warmup: return 1e-2 * (step + 1) / warmup
    return 1e-2 if scheduler == "constant" else min_lr + (1e-2 - min_lr) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def by_hand(model: torch.nn.Module, wanted: dict, textbook: bool, epochs: int = 3) -> None:
    "The loop that one writes: with the same fused optimizer, or as textbooks have it."
    settings = wanted | ({"warmup": int(wanted["warmup"].split()[0])} if "warmup" in wanted else {})
    count, clip = wanted.get("accumulate", 1), wanted.get("clip")
    batches, trained = KeyedLoader(DataLoader(TensorDataset(X, Y), 8, shuffle=True)), list(model.parameters())
    total = epochs * math.ceil(len(batches) / count)
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.01, **({"foreach": False, "fused": False} if textbook else {"fused": True}))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_at(step, total, **settings) / 1e-2) if textbook else None
    seed_everything(42)
    model.train()
    step = 0
    for epoch in range(epochs):
        each = batches.batches(epoch)
        while window := list(islice(each, count)):
            samples = sum(n for n, _ in window)
            for n, (x, y) in window:
                with torch.autocast("cpu", torch.bfloat16, enabled="precision" in wanted): loss = F.cross_entropy(model(x), y)
                (loss * (n / samples) if count > 1 and len(window) > 1 else loss).backward()
            if textbook:
                if clip: torch.nn.utils.clip_grad_norm_(trained, clip)
            else:
                optimizer.param_groups[0]["lr"] = lr_at(step, total, **settings)
                norm = torch.nn.utils.get_total_norm([one.grad for one in trained])
                optimizer.grad_scale = torch.clamp(norm / clip, min=1.0) if clip else None
                optimizer.found_inf = torch.zeros(())
            optimizer.step()
            if schedule: schedule.step()
            optimizer.zero_grad()
            step += 1
    assert step == total


@pytest.mark.parametrize("name", PARITY)
def test_parity_with_a_loop_by_hand(name):
    """Equal bit for bit with the fused optimizer; within a millionth with the textbook's calls. Dropout included; BatchNorm in the
    first alone: it makes the gradient of a bias before it pure rounding, which Adam divides by its own size."""
    for norm in (True, False): check_parity(name, norm)


def check_parity(name, norm):
    models = [net(0.2, norm) for _ in range(4)]
    trainer = Trainer(models[0], DataLoader(TensorDataset(X, Y), 8, shuffle=True), run=False, quiet=True, epochs=3, lr=1e-2,
                      **({"scheduler": "constant"} | PARITY[name]))
    trainer.train()
    by_hand(models[1], PARITY[name], textbook=False)
    by_hand(models[2], PARITY[name], textbook=True)
    by_hand(models[3], {}, textbook=False)
    for key, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[key]), key
        assert norm or torch.allclose(value, models[2].state_dict()[key], rtol=0, atol=1e-6 if "bf16" not in PARITY[name].values() else 1e-3), key
    assert name == "plain" or not torch.equal(models[0][0].weight, models[3][0].weight)  # what was asked for did something


# --- controls -------------------------------------------------------------------------------------------------------------------------

def controls(folder: Path) -> list[tuple]: return [(row["step"], row["values"]) for row in Run(folder/"run").story().of("control")]


@pytest.mark.parametrize("say, die", [
    ([("step_end", 10, {"lr": 5e-3})], 12), ([("step_end", 10, {"lr": 5e-3})], 11), ([("step_end", 14, {"lr": 5e-3, "clip": 0.2})], 16),
    ([("step_end", 10, {"epochs": 5})], 12), ([("step_end", 9, {"weight_decay": 0.3}), ("step_end", 11, {"lr": 1e-3})], 12),
    ([("step_end", 13, {"eval_every": 1})], 14), ([("epoch_end", 1, {"eval_every": "4 steps"})], 14), ([("epoch_end", 1, {"lr": 1e-3})], 14),
    ([("step_end", 10, {"min_lr": 1e-3})], 12), ([("step_end", 10, {"eval_every": "3 steps"})], 12)], ids=str)
def test_a_control_is_made_again_at_its_step(server, tmp_path, say, die):
    """It took effect, and then the process was killed before the next checkpoint. The next life is not told again."""
    recipe, words = "intervals", {"scheduler": "cosine"}
    assert server.live(tmp_path/"unhurt", recipe, say=say, **words) == 0, said(tmp_path/"unhurt", 0)
    assert server.live(tmp_path/"killed", recipe, say=say, die=("step", die), **words) == -signal.SIGKILL
    found = finish(server, tmp_path/"killed", recipe, 1, **words)
    assert len(controls(tmp_path/"killed")) == len(say) and controls(tmp_path/"killed") == controls(tmp_path/"unhurt")
    check_same(found, outcome(tmp_path/"unhurt"))
    untouched = finish(server, tmp_path/"untouched", recipe, 0, **words)
    assert untouched["tensors"] != found["tensors"] or "eval_every" in say[0][2]


@pytest.mark.parametrize("values", [{"momentum": 0.5}, {"weight_decay": 0.5}, {"lr": 1e-3}])
def test_what_may_be_set_has_an_effect(values, tmp_path):
    trainer = make("sgd", tmp_path, scheduler="constant")
    trainer.set(**values)
    trainer.train(num_epochs=1)
    key, value = *values, *values.values()
    assert trainer.updates[""].optimizer.param_groups[0][key] == value


@pytest.mark.parametrize("values", [{"eval_every": "5 min"}, {"ema": 0.9}, {"epochs": "1 step"}], ids=str)
def test_a_control_that_cannot_be_harms_nothing(server, values, tmp_path):
    """It is refused, and does not kill this life and all later ones."""
    assert server.live(tmp_path, "schedule", say=[("step_end", 10, values)], die=("step", 20)) == -signal.SIGKILL, said(tmp_path, 0)
    assert server.live(tmp_path, "schedule", life=1) == 0, said(tmp_path, 1)


# --- branches, changes, other ways ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("existing", ["new", "resume", "error"])
def test_going_back_makes_a_branch(unhurt, existing, tmp_path):
    """From a step that is not the latest: another run with a parent, the same end; the old one is not touched."""
    wanted, _, _ = unhurt("plain")
    make("plain", tmp_path, keep_last_n=None).train()
    before = (tmp_path/"run"/"events.jsonl").read_bytes()
    trainer = make("plain", tmp_path, keep_last_n=None, on_existing=existing).resume_from_checkpoint("epoch 2")
    assert trainer.step == 26
    trainer.train()
    assert trainer.run.folder != tmp_path/"run" and (tmp_path/"run"/"events.jsonl").read_bytes() == before
    assert (trainer.run.parent["name"], trainer.run.parent["stage"], trainer.run.parent["step"]) == ("run", "train", 26)
    exact.leave_end(trainer, tmp_path)
    tree, tensors = outcome(tmp_path)["tree"], outcome(tmp_path)["tensors"]
    assert tree == wanted["tree"] and tensors == wanted["tensors"]


@pytest.mark.parametrize("data, words, says", [(TensorDataset(X[:90], Y[:90]), {}, "samples  was 100, is 90"), (None, {"size": 10}, "batch_size  was 8, is 10"),
                                               (None, {"seed": 7}, "seed  was 42, is 7"), (None, {"shuffle": False}, "order")])
def test_other_data_is_refused(data, words, says, tmp_path):
    size, shuffle = words.pop("size", 8), words.pop("shuffle", True)
    again = lambda **more: Trainer(net(), DataLoader(data or TensorDataset(X, Y), size, shuffle=shuffle), save_dir=str(tmp_path/"run"), quiet=True, epochs=3,
                                   config={"run": {"on_existing": "resume"}}, **words)
    make("plain", tmp_path).train(num_epochs=2)
    with pytest.raises(CheckpointError, match=says) as told: again().train()
    assert "\n" not in str(told.value) and "allow_drift" in str(told.value)
    trainer = again().resume_from_checkpoint(allow_drift=True)
    trainer.train()
    assert trainer.epoch == 3


@pytest.mark.parametrize("same_process", [True, False])
@pytest.mark.parametrize("scheduler", ["constant", "cosine"])
def test_a_finished_run_is_trained_on(same_process, scheduler, tmp_path, capsys):
    """With a constant rate as if it had been meant from the beginning; a cosine is stretched, and says so."""
    first = make("plain", tmp_path, scheduler=scheduler)
    first.train(num_epochs=2)
    trainer = first if same_process else make("plain", tmp_path, scheduler=scheduler, epochs=2)
    trainer.console.quiet = False
    trainer.train(num_epochs=5)
    assert trainer.epoch == 5 and trainer.run.folder == tmp_path/"run" and Run(tmp_path/"run").status == "finished"
    if scheduler == "cosine": assert "training goes on after its end at step 26, to step 65: stretch, the cosine schedule is drawn over all 65 steps" in capsys.readouterr().out
    else:
        whole = make("plain", tmp_path/"whole", scheduler=scheduler)
        whole.train(num_epochs=5)
        assert state_of(trainer, "trainer") == state_of(whole, "trainer")


def test_epochs_by_hand_and_things_beside_change_nothing(tmp_path):
    """train_epoch() by hand, evaluate() and predict() between, evaluations on and off: the same weights and random numbers."""
    def ended(name: str, work, **words):
        trainer = make("dropout_norm", tmp_path/name, **words)
        trainer.listeners = type(trainer.listeners)([])  # Steering looks at evaluations
        work(trainer)
        return state_of(trainer, "trainer")
    def by_hand(trainer):
        while not trainer.done: trainer.train_epoch()
    def with_things_beside(trainer):
        while not trainer.done:
            trainer.train_epoch()
            trainer.evaluate()
            trainer.evaluate(DataLoader(Augmented(), 9, shuffle=True))
            assert trainer.predict(DataLoader(Augmented(30), 9)).shape == (30, 3)
    wanted = ended("whole", lambda trainer: trainer.train())
    assert ended("by hand", by_hand) == wanted
    assert ended("beside", with_things_beside) == wanted
    assert ended("never", lambda trainer: trainer.train(), eval_every=None) == wanted
    assert ended("often", lambda trainer: trainer.train(), eval_every="2 steps") == wanted
    assert ended("saved", lambda trainer: trainer.train(), save_interval="1 step") == wanted
    assert ended("no run", lambda trainer: trainer.train(), seed=43) != wanted


def test_evaluations_from_a_callback_change_nothing(unhurt, tmp_path):
    wanted, _, _ = unhurt("sgd")
    trainer = make("sgd", tmp_path, callbacks=[at_step(9, lambda trainer: trainer.evaluate()), at_event("epoch_end", 2, lambda trainer: trainer.predict(loader(Augmented())))])
    trainer.train()
    exact.leave_end(trainer, tmp_path)
    check_same(outcome(tmp_path), wanted)
