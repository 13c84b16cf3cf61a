"""Nothing in a step waits for the device, and what torch does around a step happens where somebody listens."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from exact import X, Y, net
from trainbook.model import Average
from trainbook.optim import Update, make_optimizer
from trainbook.trainer import Trainer

OPTIONS = [{}, {"clip": 0.3}, {"accumulate": 3}, {"precision": "bf16"}, {"optimizer": "sgd"}, {"nonfinite": "skip"},
           {"scheduler": "cosine", "warmup": "5 steps"}, {"scheduler": "onecycle"}, {"ema": 0.9}, {"clip_value": 0.1}, {"no_decay": True},
           {"groups": [{"match": "0.*", "lr": 1e-3}]}, {"freeze": {"0.*": 1}}, {"label_smoothing": 0.1}, {"nonfinite": 3}]


class NoWaiting(TorchDispatchMode):
    "Refuses what would wait for a device."
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default: raise AssertionError("a number was fetched inside a step")
        return function(*args, **kwargs or {})


def trained_under(refusal, monkeypatch, **words) -> tuple[Trainer, int]:
    "A training each step of which is taken under a refusal; and how many were."
    steps = []
    class Watched(Trainer):
        def _take_step(self, window):
            with refusal():
                steps.append(1)
                return super()._take_step(window)
    class Averaged(Average):
        def update(self):
            with refusal(): super().update()
    monkeypatch.setattr("trainbook.trainer.Average", Averaged)
    trainer = Watched(net(0.2, True), DataLoader(TensorDataset(X, Y), 8, shuffle=True), run=False, quiet=True, epochs=2,
                      config={"logging": {"every": "1000 steps"}}, **words)
    trainer.train()
    return trainer, len(steps)


@pytest.mark.parametrize("words", OPTIONS, ids=str)
def test_no_step_waits_for_the_device(words, monkeypatch):
    trainer, steps = trained_under(NoWaiting, monkeypatch, device="cpu", **words)
    assert steps == trainer.step > 8


def test_the_refusal_of_waiting_can_refuse():
    with NoWaiting(), pytest.raises(AssertionError): torch.ones(()).item()


class SyncIsAnError:
    "CUDA's own refusal."
    def __enter__(self): torch.cuda.set_sync_debug_mode("error")
    def __exit__(self, *_): torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("words", OPTIONS, ids=str)
def test_no_step_waits_for_cuda(words, monkeypatch):
    trainer, steps = trained_under(SyncIsAnError, monkeypatch, device="cuda", **words)
    assert steps == trainer.step > 8


def test_a_profiler_sees_the_optimizers_step():
    model = net()
    update = Update(make_optimizer("sgd", model.parameters(), lr=1e-2))
    def step():
        model(X).sum().backward()
        update()
    step()
    with torch.profiler.profile(acc_events=True) as profile: step()
    assert any(event.key == "Optimizer.step#SGD.step" for event in profile.key_averages())
