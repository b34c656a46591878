"""What a loop may do to a step of training: autocast, checkpointing, accumulation, compilation."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint_sequential
from torchvision.models.video.resnet import BasicBlock, Conv3DSimple
from transnetv2_pytorch.transnetv2_pytorch import StackedDDCNNV2

import qconvert

BINARY = {
    "weight": {"quantizer": "sign", "scale": "channel"},
    "input": {"quantizer": "approxsign", "threshold": "channel"},
    "min_in_channels": 4,
}
FOUR_BITS = {"weight": "lsq", "input": "lsq", "gradient_cancellation_threshold": 0, "min_in_channels": 4}
every_rule = pytest.mark.parametrize("rule", [BINARY, FOUR_BITS], ids=["w1a1", "w4a4"])


def residual() -> nn.Sequential:
    """Return torchvision's r3d, narrow: 8 channels, so that the sums of a binary layer are below 256."""
    first = nn.Conv3d(3, 8, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False)
    stem = nn.Sequential(first, nn.BatchNorm3d(8), nn.ReLU(inplace=True))
    shortcut = nn.Sequential(nn.Conv3d(8, 8, 1, 2, bias=False), nn.BatchNorm3d(8))
    blocks = [BasicBlock(8, 8, Conv3DSimple), BasicBlock(8, 8, Conv3DSimple, 2, shortcut)]
    return nn.Sequential(stem, *blocks, *_head(8))


def transnet() -> nn.Sequential:
    """Return a stage of TransNetV2, narrow: two blocks of dilated (2+1)D convolutions, an addition in place."""
    return nn.Sequential(StackedDDCNNV2(3, 2, 2), *_head(8))


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(channels, 3)]


every_model = pytest.mark.parametrize("build", [residual, transnet])


def converted(build: Callable[[], nn.Sequential], rule: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return qconvert.binarize(build(), {"rule": [rule]}, report=False).train()


def clip() -> Tensor:
    return torch.randn(4, 3, 8, 16, 16, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor | None = None) -> dict[str, Tensor]:
    """Return output and gradients."""
    model.zero_grad()
    y = forward(clip() if x is None else x)
    F.cross_entropy(y.float(), torch.arange(len(y)) % 3).backward()
    return {"output": y.detach()} | {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@contextlib.contextmanager
def signs_are_checked(model: nn.Module) -> Iterator[None]:
    """Check that every layer puts out what the signs of its float32 weight and of what it reads come to."""
    layers = [module for module in model.modules() if isinstance(module, qconvert.QConv3d)]
    seen: list[tuple[Any, Tensor, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda layer, args, y: seen.append((layer, args[0].detach(), y.detach())))
        for layer in layers
    ]
    yield
    for hook in hooks:
        hook.remove()
    assert {layer for layer, *_ in seen} == set(layers)
    for layer, x, y in seen:
        column = partial(torch.reshape, shape=(-1, 1, 1, 1))
        codes = torch.where(x < column(layer.activation.threshold), -1.0, 1.0)
        width = [size for size in reversed(layer.padding) for _ in range(2)]
        signs = torch.where(layer.weight < 0, -1.0, 1.0)
        exact = F.conv3d(F.pad(codes, width, value=-1.0), signs, None, layer.stride, 0, layer.dilation)
        assert_close(y, column(layer.scale) * exact + column(layer.offset), rtol=1e-5, atol=1e-5)


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
        assert value.isfinite().all(), name


# --- autocast ---


@every_model
def test_bfloat16_autocast_has_the_same_signs(build):
    model = converted(build, BINARY)
    with signs_are_checked(model), torch.autocast("cpu", torch.bfloat16):
        model(clip()).sum().backward()


@every_model
@every_rule
def test_bfloat16_autocast_has_finite_gradients(build, rule):
    model = converted(build, rule)
    expected = step(model, model)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(clip())
    model.zero_grad()
    F.cross_entropy(y.float(), torch.arange(4) % 3).backward()
    assert_close(y.float(), expected["output"], rtol=0, atol=0.3)
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


# --- checkpointing ---


@every_model
@every_rule
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["plain", "reentrant"])
def test_checkpointing_changes_no_gradient(build, rule, use_reentrant: bool):
    model = converted(build, rule)
    expected = step(model, model)
    x = clip().requires_grad_()  # else a reentrant first segment has no gradient
    forward = partial(checkpoint_sequential, model, 3, use_reentrant=use_reentrant)
    assert_equal(step(model, forward, x), expected)


def test_checkpointing_has_the_same_signs():
    model = converted(residual, BINARY)
    with signs_are_checked(model):
        step(model, partial(checkpoint_sequential, model, 3, use_reentrant=False))


# --- accumulation ---


def dyadic() -> tuple[nn.Module, Tensor]:
    """Return a network and its input of which every value and every gradient is a short sum of powers of 2."""
    first = qconvert.QConv3d(4, 4, 3, padding=1, bias=True, threshold=0.25, spread=0.5, scale=1 / 32, offset=0.25)
    second = qconvert.QConv3d(4, 2, 3, threshold=-0.5, scale=0.25, input_quantization="approxsign")
    model = nn.Sequential(first, nn.ReLU(), second)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.round(parameter * 64) / 64)
    return model.train(), torch.randint(-16, 17, (4, 4, 3, 4, 4)) / 8


def test_parts_of_a_batch_add_up_to_the_gradients_of_the_whole():
    model, x = dyadic()
    model(x).sum().backward()
    whole = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    for part in x.split([1, 3]):
        model(part).sum().backward()
    assert_equal({name: parameter.grad for name, parameter in model.named_parameters()}, whole)
    assert all(gradient.any() for gradient in whole.values())


@every_model
@every_rule
def test_parts_of_a_batch_add_up_where_batchnorm_is_frozen(build, rule):
    model = converted(build, rule).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.eval()
    x, labels = clip().double(), torch.arange(4) % 3
    F.cross_entropy(model(x), labels).backward()
    whole = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    for part, part_labels in zip(x.chunk(2), labels.chunk(2), strict=True):
        (F.cross_entropy(model(part), part_labels) / 2).backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, whole[name], rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


# --- compilation ---


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("build", "rule"),
    [(residual, BINARY), (residual, FOUR_BITS), (transnet, BINARY)],
    ids=["residual-w1a1", "residual-w4a4", "transnet-w1a1"],
)
@pytest.mark.usefixtures("dynamo")
def test_a_compiled_step_changes_no_gradient(build, rule):
    model = converted(build, rule)
    expected = step(model, model)
    assert_equal(step(model, torch.compile(model, backend="aot_eager", fullgraph=True)), expected)


@every_model
@every_rule
@pytest.mark.usefixtures("dynamo")
def test_a_step_compiled_under_autocast_changes_no_gradient(build, rule):
    model = converted(build, rule)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def under_autocast(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(x)

    assert_equal(step(model, partial(under_autocast, compiled)), step(model, partial(under_autocast, model)))


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.usefixtures("dynamo")
def test_a_step_compiled_to_cpp_has_the_same_signs_and_gradients():
    few = lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.Conv3d(4, 4, 3), *_head(4))  # noqa: E731 (compiling is slow)
    model = converted(few, BINARY).double()
    x = clip().double()
    expected = step(model, model, x)
    for name, value in step(model, torch.compile(model, fullgraph=True), x).items():
        assert_close(value, expected[name], rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
