"""Probes: what they measure is so, what they look at stays as it was, and a training that nobody probes is not touched."""
import json
import math
import subprocess
import sys
import time

import exact
import pytest
import torch
from exact import Augmented, at_step, make
from torch.utils.data import DataLoader, TensorDataset

from trainbook import Trainer
from trainbook.gauges import PHASES, Watch, machine, peak_of
from trainbook.ledger import read_rows
from trainbook.probes import Inside, Probes, blocks_of, clip, profile
from trainbook.registry import find
from trainbook.run import Run
from trainbook.trial import trial
from test_trial import rows, taken_apart


class Always(Probes):
    "Whatever it costs."
    def __init__(self, trainer):
        super().__init__(trainer, share=1e9)
        self._first = 0

    def _write(self):
        super()._write()
        self._due = 0


def net(**more): return Trainer(exact.net(), exact.loader(), loss="cross_entropy", **({"epochs": 3, "run": False, "quiet": True} | more))


@pytest.mark.parametrize("recipe", [name for name in exact.RECIPES if name != "compiled"])
def test_a_probed_training_ends_like_one_that_is_not(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(exact.Noisy, "pause", 0)
    ends = []
    for probed in (False, True):
        trainer = make(recipe, tmp_path/str(probed))
        if probed: probes = Always(trainer).on()
        try:
            for end in exact.ENDS.get(recipe, (None,)): trainer.train(end)
        finally: torch.use_deterministic_algorithms(False)
        ends.append((taken_apart(trainer), rows(tmp_path/str(probed))))
    assert ends[0] == ends[1] and len(probes.rows) >= 2
    story, _ = read_rows(tmp_path/"True/run", 0, "probe")
    assert [row["step"] for row in story] == [row["step"] for row in probes.rows]
    for row in story: assert set(row["phases"]) == set(PHASES) and row["blocks"] and row["memory"]["allocated"] > 1e6


def test_nothing_is_left_of_probes_that_are_off():
    trainer = net()
    trainer.train_epoch()
    before = {*vars(trainer)}
    probes = clip(trainer)
    assert clip(trainer) is probes and {*vars(trainer)} == before | {"_attend", "land", "save"}
    trainer.train_epoch()
    probes.off()
    assert {*vars(trainer)} == before


class Slow(Trainer):
    "Each phase takes its time."
    def training_step(self, batch):
        x, y = batch
        time.sleep(0.02)
        return self.loss(self.model(x), y)


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, grad):
        time.sleep(0.03)
        return grad


class SlowData(Augmented):
    def __getitem__(self, i):
        time.sleep(0.005)
        return super().__getitem__(i)


def test_phases_are_those_of_the_clock():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = exact.net()
        def forward(self, x): return SlowBackward.apply(self.inner(x))

    class SGD(torch.optim.SGD):
        def step(self, closure=None):
            time.sleep(0.01)
            return super().step(closure)

    model = Model()
    trainer = Slow(model, DataLoader(SlowData(40), 8), loss="cross_entropy", optimizer=SGD(model.parameters(), lr=0.1), epochs=4, run=False, quiet=True)
    probes = Always(trainer).on()
    trainer.train()
    for row in probes.rows:
        found = row["phases"]
        assert 38 < found["data"] < 80 and 19 < found["forward"] < 60 and 29 < found["backward"] < 70 and 9 < found["optimizer"] < 50, found
        assert found["transfer"] == found["checkpoint"] == 0 and found["logging"] < 20
    assert len(probes.rows) >= 3


def test_the_evaluation_between_two_epochs_is_no_phase():
    class Validated(Trainer):
        def validation_step(self, batch):
            time.sleep(0.2)
            return super().validation_step(batch)

    trainer = Validated(exact.net(), DataLoader(exact.DATA, 50), DataLoader(exact.VAL, 20), loss="cross_entropy", epochs=8, run=False, quiet=True)
    probes = Always(trainer).on()
    trainer.train()
    assert trainer.step == 16 and all(row["phases"]["data"] < 100 for row in probes.rows)


def test_gradients_and_updates_by_block(tmp_path):
    trainer = net(optimizer="sgd", lr=0.1, scheduler="constant", clip=0.01)
    with trial(trainer) as inside:
        window = next(inside.windows())
        x, y = window[0][1]
        loss = torch.nn.functional.cross_entropy(trainer.model(x), y)
        grads = dict(zip(dict(trainer.model.named_parameters()), torch.autograd.grad(loss, [*trainer.model.parameters()])))
        before = {name: one.detach().clone() for name, one in trainer.model.named_parameters()}
        look = Inside(trainer)
        with look.looking(): inside.step(window)
        for block, norm, ratio in look.found()["blocks"]:
            mine = [name for name in grads if name.startswith(block + ".")]
            length = lambda some: math.sqrt(sum(float(one.square().sum()) for one in some))
            assert norm == pytest.approx(length(grads[name] for name in mine), rel=1e-3)  # before it is clipped
            moved = [dict(trainer.model.named_parameters())[name].detach() - before[name] for name in mine]
            assert ratio == pytest.approx(length(moved) / length(before[name] for name in mine), rel=1e-3)


def test_a_loss_with_weights_and_parts_without_gradient():
    class Weighted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = torch.nn.Parameter(torch.ones(()))
        def forward(self, outputs, targets): return torch.nn.functional.cross_entropy(outputs * self.factor, targets)

    model = exact.net()
    model[2].bias.requires_grad_(False)
    model.add_module("unused", torch.nn.Linear(3, 3))
    model.forward = lambda x: model[2](model[1](model[0](x)))
    trainer = Trainer(model, exact.loader(), loss=Weighted(), epochs=2, run=False, quiet=True)
    probes = Always(trainer).on()
    trainer.train()
    assert [name for name, *_ in probes.rows[-1]["blocks"]] == ["0", "2", "loss"]


def test_blocks_are_as_fine_as_is_useful():
    names = [f"encoder.layers.{i}.{part}.weight" for i in range(12) for part in ("attention", "mlp")] + ["head.weight"]
    assert len(set(blocks_of(names))) == 13 and blocks_of(names)[0] == "encoder.layers.0" and blocks_of(names)[-1] == "head"
    assert blocks_of(["weight", "bias"]) == ["weight", "bias"]
    many = [f"{i}.{j}.weight" for i in range(40) for j in range(3)]
    assert len(set(blocks_of(many))) == 40


def test_units_of_convolutions_are_channels_and_ends_are_seen():
    model = torch.nn.Sequential(torch.nn.Unflatten(1, (1, 2, 3)), torch.nn.Conv2d(1, 4, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8, 3), torch.nn.Sigmoid(),
                                torch.nn.Linear(3, 3))
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([-100.0, 9.0, 9.0, 9.0]))
        model[4].bias.fill_(100.0)
    trainer = Trainer(model, exact.loader(), loss="cross_entropy", epochs=1, run=False, quiet=True)
    look = Inside(trainer)
    with trial(trainer) as inside, look.looking(): inside.step(next(inside.windows()))
    assert look.found()["dead"] == [["2", 0.25]] and look.found()["saturated"] == [["5", 1.0]]


def test_number_formats_of_modules():
    class Full(torch.nn.Linear):
        "Does not trust in half."
        def forward(self, x):
            with torch.autocast("cpu", enabled=False): return super().forward(x.float())

    model = torch.nn.Sequential(torch.nn.Linear(6, 16), Full(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    trainer = Trainer(model, exact.loader(), loss="cross_entropy", precision="bf16", epochs=1, run=False, quiet=True)
    look = Inside(trainer)
    with trial(trainer) as inside, look.looking(): inside.step(next(inside.windows()))
    found = look.found()
    assert found["types"] == {"bfloat16": 2, "float32": 1} and found["full"] == ["1"]


def test_workers_that_have_batches_ready(tmp_path):
    trainer = Slow(exact.net(), DataLoader(Augmented(100), 4, num_workers=2), loss="cross_entropy", epochs=1, run=False, quiet=True)
    probes = Always(trainer).on()
    trainer.train()
    ready = [row["workers"] for row in probes.rows if "workers" in row]
    assert ready and all(0 <= have <= may == 4 for have, may in ready) and max(have for have, _ in ready) >= 1


def test_pace_keeps_to_its_share():
    trainer = net(epochs=60)
    probes = clip(trainer)
    trainer.train()
    assert 1 <= len(probes.rows) < trainer.step / 50


def test_an_error_in_a_measured_step_is_the_persons_own(tmp_path):
    class Fails(Trainer):
        def training_step(self, batch):
            if self.step == 5: raise ValueError("planted")
            return super().training_step(batch)

    trainer = Fails(exact.net(), exact.loader(), loss="cross_entropy", epochs=2, run=False, quiet=True)
    Always(trainer).on()
    with pytest.raises(ValueError, match="planted"): trainer.train()
    assert vars(trainer.updates[""]).get("_update") is None and trainer.step == 5


def test_answers_to_a_run_and_an_answer_that_fails(tmp_path, monkeypatch):
    def ask(*questions): return lambda trainer: [trainer.run.tell(one) for one in questions]
    trainer = net(run=None, save_dir=str(tmp_path/"asked"), callbacks=[at_step(3, ask("profile", "probe"))], epochs=20)
    trainer.train()
    found, _ = read_rows(tmp_path/"asked", 0, "answer", "probe")
    first = found[0]
    assert first["event"] == "answer" and first["to"] == "profile" and first["found"]["operations"] and (tmp_path/"asked"/first["found"]["trace"]).exists()
    assert any(row["event"] == "probe" for row in found) and trainer.step == 260
    alone = net(epochs=20)
    alone.train()
    assert all(torch.equal(one, other) for one, other in zip(alone.model.parameters(), trainer.model.parameters()))

    def broken(trainer, steps=20): raise RuntimeError("planted")
    monkeypatch.setattr("trainbook.probes.profile", broken)
    trainer = net(run=None, save_dir=str(tmp_path/"broken"), callbacks=[at_step(3, ask("profile"))])
    trainer.train()
    [row], _ = read_rows(tmp_path/"broken", 0, "answer")
    assert row["text"] == "profile: no answer: RuntimeError: planted" and trainer.step == 39


def test_a_run_in_another_process_is_probed(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(exact.Path(exact.__file__).parent)!r})
import exact, time
class Slow(exact.Trainer):
    def training_step(self, batch):
        time.sleep(0.005)
        return super().training_step(batch)
Slow(exact.net(), exact.loader(), loss="cross_entropy", epochs=10000, save_dir={str(tmp_path/'far')!r}).train()"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        def until(holds, seconds=60):
            end = time.monotonic() + seconds
            while not (found := holds()):
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.05)
            return found
        until(lambda: (tmp_path/"far/events.jsonl").exists() and Run(tmp_path/"far").progress().get("step", 0) > 10)
        done = subprocess.run([sys.executable, "-m", "trainbook", "tell", str(tmp_path/"far"), "probe"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        [row, *_] = until(lambda: read_rows(tmp_path/"far", 0, "probe")[0])
        assert row["phases"]["forward"] > 4.9 and json.dumps(row)
        Run(tmp_path/"far").tell("stop")
        assert process.wait(60) == 0
    finally: process.kill()


def test_profile_of_a_trainer_at_rest_leaves_no_trace():
    trainer = net()
    trainer.train_epoch()
    was = taken_apart(trainer)
    found = profile(trainer, 5)
    assert taken_apart(trainer) == was and found.trace is None and found.steps == 5
    assert sum(share for *_, share in found.operations) <= 1.001 and any("addmm" in name for name, *_ in found.operations)
    assert found.text.startswith("a step takes") and "addmm" in repr(found) and json.loads(json.dumps(found.row())) == found.row()


def test_every_question_has_its_answer():
    from trainbook.ledger import QUESTIONS
    from trainbook.probes import _ANSWERS
    assert {*QUESTIONS} == {*_ANSWERS, "probe"}
    for name in _ANSWERS.values(): assert callable(find("answer", name))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    torch.manual_seed(0)
    x = torch.randn(4096, 512)
    model = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 10))
    trainer = Trainer(model, DataLoader(TensorDataset(x, torch.randint(0, 10, (4096,))), 256), loss="cross_entropy", precision="fp16", epochs=30, run=False, quiet=True)
    probes = Always(trainer).on()
    torch.cuda.set_sync_debug_mode("error")
    try: trainer.train()
    finally: torch.cuda.set_sync_debug_mode("default")
    row = probes.rows[-1]
    assert row["scale"] > 1 and row["memory"]["peak"] >= row["memory"]["allocated"] > 0 and row["types"].get("float16") and row["flops_s"] > 1e9
    assert all(row["phases"][name] > 0 for name in ("forward", "backward", "optimizer"))
    watch = Watch(torch.device("cuda"))
    watch.now("forward")
    torch.cuda.synchronize()
    assert watch.over() and machine(torch.device("cuda"))["memory"]["total"] > 1e9 and (peak_of(trainer) or 1) > 0


def test_an_activation_of_nothing_and_a_step_that_reads_once(tmp_path):
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.act, self.two = torch.nn.Linear(6, 3), torch.nn.ReLU(), torch.nn.Linear(6, 3)
        def forward(self, x): return torch.cat([self.one(x), self.act(self.two(x[:0]))])

    trainer = Trainer(Experts(), exact.loader(), loss="cross_entropy", epochs=2, run=False, quiet=True)
    Always(trainer).on()
    trainer.train()
    assert trainer.step == 26

    class ReadsOnce(Trainer):
        calls = 0
        def training_step(self, batch):
            type(self).calls += 1
            return super().training_step(batch)

    trainer = ReadsOnce(exact.net(), exact.loader(), loss="cross_entropy", epochs=2, run=False, quiet=True)
    Always(trainer).on()
    trainer.train()
    assert ReadsOnce.calls == trainer.step == 26


def test_an_evaluation_is_no_logging_and_an_answer_no_time_of_training(tmp_path):
    class Validated(Trainer):
        def validation_step(self, batch):
            time.sleep(0.05)
            return super().validation_step(batch)

    trainer = Validated(exact.net(), exact.loader(), DataLoader(exact.VAL, 20), loss="cross_entropy", epochs=4, eval_every="4 steps", run=False, quiet=True)
    probes = Always(trainer).on()
    trainer.train()
    assert max(row["phases"]["logging"] for row in probes.rows) < 5

    def ask(trainer): trainer.run.tell("profile")
    trainer = net(run=None, save_dir=str(tmp_path/"clock"), callbacks=[at_step(3, ask)], epochs=8)
    began = time.monotonic()
    trainer.train()
    [row], _ = read_rows(tmp_path/"clock", 0, "answer")
    assert trainer.seconds < time.monotonic() - began - 0.05


def test_phases_with_several_optimizers():
    class Two(Trainer):
        def training_step(self, batch):
            x, y = batch
            for name in ("first", "second"):
                time.sleep(0.02)
                loss = self.loss(self.model(x), y)
                self.backward(loss, name)
                self.update(name)
            return {"loss": loss}

    model = exact.net()
    optimizers = {"first": torch.optim.Adam(model[0].parameters()), "second": torch.optim.SGD(model[2].parameters(), lr=0.1)}
    trainer = Two(model, exact.loader(), optimizer=optimizers, loss="cross_entropy", epochs=2, run=False, quiet=True)
    probes = Always(trainer).on()
    trainer.train()
    assert all(row["phases"]["forward"] > 39 and row["phases"]["backward"] < 20 for row in probes.rows)


def test_a_question_in_a_pause_is_answered_there(tmp_path):
    import threading
    trainer = net(run=None, save_dir=str(tmp_path/"waits"), callbacks=[at_step(3, lambda trainer: trainer.run.tell("pause"))])
    thread = threading.Thread(target=trainer.train)
    thread.start()
    def until(holds):
        end = time.monotonic() + 30
        while not holds():
            assert time.monotonic() < end
            time.sleep(0.02)
    until(lambda: trainer.run and any(row.get("command") == "pause" for row in read_rows(tmp_path/"waits")[0]))
    trainer.run.tell("profile")
    until(lambda: read_rows(tmp_path/"waits", 0, "answer")[0])
    trainer.run.tell("resume")
    thread.join()
    assert trainer.step == 39
