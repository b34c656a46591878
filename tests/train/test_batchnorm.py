"""`reestimate_batchnorm`: against numpy's moments of what the layers read, and the model as it was."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from models import FrozenBatchNorm, OwnTrainMethod
from small import clip, convert
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qconvert import InputError, ModelError, QConv3d
from qconvert.train import reestimate_batchnorm


def batches(n: int = 3) -> list[Tensor]:
    return [torch.randn(4, 2, 3, 5, 5) * (i + 1) + i for i in range(n)]


def network() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm3d(2, momentum=0.3), QConv3d(2, 3, 1), nn.Dropout(0.5), nn.BatchNorm3d(3))


def state(model: nn.Module) -> dict[str, Any]:
    """Return everything that is to be as it was: tensors, modes, momentum and requires_grad."""
    tensors = {
        name: (tensor.detach().clone(), tensor.requires_grad) for name, tensor in model.state_dict(keep_vars=True).items()
    }
    modules = dict(model.named_modules())
    modes = {name: (module.training, vars(module).get("momentum")) for name, module in modules.items()}
    return {"tensors": tensors, "modes": modes}


def assert_unchanged(model: nn.Module, before: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    now = state(model)
    assert now["modes"] == before["modes"]
    for name, (tensor, requires_grad) in before["tensors"].items():
        assert now["tensors"][name][1] == requires_grad
        if not name.startswith(but or "-"):
            assert torch.equal(now["tensors"][name][0], tensor), name


def moments(data: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Return the average over the batches of mean and unbiased variance of each channel."""
    channels = [batch.detach().double().transpose(0, 1).flatten(1).numpy() for batch in data]
    return np.mean([c.mean(1) for c in channels], 0), np.mean([c.var(1, ddof=1) for c in channels], 0)


def assert_moments(norm: nn.BatchNorm3d, data: list[Tensor]) -> None:
    mean, variance = moments(data)
    assert np.allclose(norm.running_mean, mean, atol=1e-6)
    assert np.allclose(norm.running_var, variance, rtol=1e-5)
    assert norm.num_batches_tracked == len(data)


@pytest.mark.parametrize("training", [True, False])
def test_is_the_average_over_the_batches(training: bool):
    model, data = network().train(training), batches()
    model[1].weight.requires_grad_(requires_grad=False)
    before = state(model)
    reestimate_batchnorm(model, data)
    assert_moments(model[0], data)
    read = [model[1].eval()(torch.batch_norm(x, *model[0].parameters(), None, None, True, 0, 1e-5, False)) for x in data]
    assert_moments(model[3], read)  # and no dropout
    model[1].train(training)
    assert_unchanged(model, before, but=("0.running", "0.num", "3.running", "3.num"))


def test_batches_as_loaders_yield_them():
    data = batches()
    expected = network()
    reestimate_batchnorm(expected, data)

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, *, x: Tensor, scale: float) -> Tensor:
            return self.inner(x * scale)

    dataset = TensorDataset(torch.cat(data), torch.arange(12))
    for loader in (DataLoader(dataset, batch_size=4), [(x, 0) for x in data], [[x] for x in data], iter(data)):
        model = network()
        reestimate_batchnorm(model, loader)
        assert torch.equal(model[0].running_var, expected[0].running_var)
    named = Named()
    reestimate_batchnorm(named, [{"x": x, "scale": 1.0} for x in data])
    assert torch.equal(named.inner[0].running_var, expected[0].running_var)


@pytest.mark.parametrize("build", [FrozenBatchNorm, OwnTrainMethod])
def test_a_frozen_one_keeps_its_statistics(build: type[nn.Module]):
    model = convert(build())
    nn.init.constant_(model.frozen.running_mean, 0.25)
    assert model.training
    assert not model.frozen.training
    before = state(model)
    reestimate_batchnorm(model, [clip()])
    assert_unchanged(model, before, but=("live.running", "live.num"))
    assert model.live.num_batches_tracked == 1


def test_one_that_no_batch_reaches_keeps_its_statistics():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.other = nn.BatchNorm3d(2), nn.BatchNorm3d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    model = Skipping()
    nn.init.constant_(model.other.running_mean, 0.25)
    model.other.num_batches_tracked.fill_(7)
    before = state(model)
    reestimate_batchnorm(model, batches())
    assert_unchanged(model, before, but=("norm.running", "norm.num"))


def test_of_a_compiled_model():
    model = network()
    reestimate_batchnorm(torch.compile(model), data := batches())
    assert_moments(model[0], data)


def broken_loader() -> Iterator[Tensor]:
    yield torch.randn(4, 2, 3, 5, 5)
    raise OSError("the disk is gone")


FAILURES = {
    "empty": (list, InputError, r"^loader has no batch: an iterator that was used up\? Pass a list or a DataLoader"),
    "used up": (lambda: iter(()), InputError, r"^loader has no batch"),
    "a number": (lambda: 3, InputError, r"^loader is no iterable of batches but 3: pass a list of batches \[x\], a Dat"),
    "one batch": (clip, InputError, r"^loader is one batch, \(2, 2, 4, 6, 6\) torch.float32: pass a list"),
    "another shape half way": (
        lambda: [clip(), clip()[:, :1]],
        InputError,
        r"^Sequential does not run on batch 2, \(2, 1, 4, 6, 6\) torch.float32: RuntimeError: .*\. A batch is a ten",
    ),
    "an empty tuple": (lambda: [clip(), ()], InputError, r"^Sequential does not run on batch 2, \(\): TypeError"),
    "NaN": (
        lambda: [clip(), clip() / 0],
        InputError,
        r"^statistics that are not finite: 0\. NaN or infinity in the",
    ),
    "a loader that fails": (broken_loader, OSError, r"the disk is gone"),
}


@pytest.mark.parametrize(("make", "error", "message"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("training", [True, False])
def test_a_failure_changes_nothing(make: Any, error: type[Exception], message: str, training: bool):
    model = network().train(training)
    model(clip())
    before = state(model)
    with pytest.raises(error, match=message):
        reestimate_batchnorm(model, make())
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv3d(2, 2, 1)),
        nn.Sequential(nn.BatchNorm3d(2, track_running_stats=False)),
        nn.Sequential(nn.BatchNorm3d(2).eval()),
    ],
    ids=["none", "without statistics", "frozen"],
)
def test_a_model_without_running_statistics(model: nn.Module):
    with pytest.raises(ModelError, match=r"^Sequential has no BatchNorm that collects running statistics \(a frozen one"):
        reestimate_batchnorm(model, batches())
