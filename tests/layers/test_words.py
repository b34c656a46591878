"""A step of training forward in words of 64 bits: whole numbers, equal to those of a float convolution of the codes."""

import math
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qconvert import QActivation, QConv3d
from qconvert.kernels import operators
from qconvert.kernels.signs import is_worth_it, signs_conv3d
from qconvert.layers import step_forward

pytestmark = pytest.mark.skipif(operators.kernel is None, reason="words are compiled by numba")

ONE, NONE = (1, 1, 1), (0,) * 6
FACTORS = (None, None, None)


def signs(values: Tensor, thresholds: Tensor, *, above: bool) -> Tensor:
    return torch.where(values > thresholds if above else ~(values < thresholds), 1.0, -1.0)


def by_numpy(x: Tensor, weight: Tensor, thresholds: Tensor, moved: tuple[Any, ...], above: tuple[bool, bool]) -> Any:
    stride, border, dilation, groups = moved
    codes = signs(x, thresholds.view(-1, 1, 1, 1), above=above[0])
    codes = torch.nn.functional.pad(codes, border, value=-1.0)
    of_weight = signs(weight, torch.tensor(0.0), above=above[1])
    return oracle.conv3d(codes.numpy(), of_weight.numpy(), None, stride, (0, 0, 0), dilation, groups, 0.0, "zeros")


def operands(channels: int, outputs: int, groups: int, kernel: Any, *size: int) -> tuple[Tensor, Tensor, Tensor]:
    x, thresholds = torch.randn(*size[:1], channels, *size[1:]), torch.randn(channels)
    x[0, :, 0, 0, 0] = thresholds
    weight = torch.randn(outputs, channels // groups, *kernel)
    weight.flatten()[::5] = 0.0
    return x, weight, thresholds


@pytest.mark.parametrize("above", [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(
    ("channels", "outputs", "groups"),
    [
        (1, 1, 1),
        (31, 5, 1),
        (33, 16, 1),
        (63, 5, 1),
        (64, 32, 1),
        (65, 3, 1),
        (127, 2, 1),
        (128, 8, 4),
        (6, 6, 6),
        (130, 34, 2),
    ],
)
@pytest.mark.parametrize(
    ("kernel", "stride", "border", "dilation"),
    [
        ((3, 3, 3), ONE, (1,) * 6, ONE),
        ((1, 1, 1), ONE, NONE, ONE),
        ((3, 2, 1), (2, 1, 3), (1, 0, 0, 0, 2, 2), (2, 3, 1)),
    ],
)
def test_is_the_convolution_of_the_signs(channels, outputs, groups, kernel, stride, border, dilation, memory_format, above):
    x, weight, thresholds = operands(channels, outputs, groups, kernel, 2, 3, 4, 5)
    moved = (stride, border, dilation, groups)
    x = x.contiguous(memory_format=memory_format)
    output = signs_conv3d(x, weight, thresholds, *FACTORS, *moved, above=above, memory_format=memory_format)
    assert output.is_contiguous(memory_format=memory_format)
    assert np.array_equal(output.numpy(), by_numpy(x, weight, thresholds, moved, above))


@st.composite
def cases(draw: Any) -> tuple[Any, ...]:
    def triple(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(3))

    groups, kernel, dilation = draw(st.integers(1, 3)), triple(1, 3), triple(1, 2)
    border = tuple(draw(st.integers(0, 2)) for _ in range(6))
    spans = [
        d * (k - 1) + 1 - before - after
        for k, d, before, after in zip(kernel, dilation, border[-2::-2], border[::-2], strict=True)
    ]
    size = (draw(st.integers(1, 3)), *(max(1, span) + draw(st.integers(0, 4)) for span in spans))
    return (
        groups * draw(st.integers(1, 70)),
        groups * draw(st.integers(1, 35)),
        groups,
        kernel,
        triple(1, 3),
        border,
        dilation,
        size,
    )


@given(cases())
@settings(deadline=None, max_examples=60)
def test_whatever_the_layer(case: tuple[Any, ...]):
    channels, outputs, groups, kernel, stride, border, dilation, size = case
    x, weight, thresholds = operands(channels, outputs, groups, kernel, *size)
    moved, above = (stride, border, dilation, groups), (False, False)
    output = signs_conv3d(x, weight, thresholds, *FACTORS, *moved, above=above, memory_format=torch.contiguous_format)
    assert np.array_equal(output.numpy(), by_numpy(x, weight, thresholds, moved, above))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same(threads: int):
    x, weight, thresholds = operands(70, 40, 1, (3, 3, 3), 2, 5, 9, 9)
    moved, above = (ONE, (1,) * 6, ONE, 1), (False, False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        output = signs_conv3d(x, weight, thresholds, *FACTORS, *moved, above=above, memory_format=torch.contiguous_format)
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(output.numpy(), by_numpy(x, weight, thresholds, moved, above))


LEARNED = {"threshold": 0.3, "spread": 0.7, "scale": "channel", "offset": 0.1, "bias": True}


def large(**others: Any) -> tuple[QConv3d, Tensor]:
    """Return a layer that computes in words, and an input."""
    layer = QConv3d(32, 48, 3, padding=1, **{"input_quantization": "approxsign"} | LEARNED | others).train()
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias)
    return layer, torch.randn(2, 32, 5, 7, 6)


def in_words(x: Tensor, layer: QConv3d) -> bool:
    return is_worth_it(x, layer.weight, layer.stride, (1,) * 6, layer.dilation, layer.groups)


@pytest.fixture
def in_floats(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs a layer in floats."""

    def run(layer: QConv3d, x: Tensor) -> Tensor:
        with monkeypatch.context() as patched:
            patched.setattr(step_forward, "is_worth_it", lambda *_: False)
            return layer(x)

    return run


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("given", [(), *([name] for name in LEARNED), list(LEARNED)], ids=str)
@pytest.mark.parametrize("inputs", ["sign", "approxsign", "steheaviside", "swishsign"])
def test_a_layer_puts_out_the_same_as_in_floats(inputs, given, memory_format, is_training, in_floats):
    settings = dict.fromkeys(LEARNED) | {"bias": False} | {name: LEARNED[name] for name in given}
    layer, x = large(input_quantization=inputs, **settings)
    layer.train(is_training)
    x = x.contiguous(memory_format=memory_format)
    assert in_words(x, layer)
    output, expected = layer(x), in_floats(layer, x)
    assert torch.equal(output, expected)
    assert output.stride() == expected.stride()
    assert torch.equal(layer(x[0]), expected[0])


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-45, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("inputs", ["sign", "approxsign", "steheaviside"])
def test_every_float_has_the_sign_that_the_quantizer_gives_it(inputs, value, in_floats):
    layer, x = large(input_quantization=inputs, threshold=None, spread=None)
    x[:, ::3] = value
    layer.weight.data[::3] = value
    assert torch.equal(layer(x), in_floats(layer, x))


def test_an_input_whose_channels_are_not_side_by_side_in_memory(in_floats):
    layer, x = large()
    for each in (x.transpose(2, 4), x[:, :, ::2, 1:], x.expand(2, -1, -1, -1, -1), x.flip(1)):
        assert torch.equal(layer(each), in_floats(layer, each))


def test_gradients_are_those_of_floats_also_where_the_forward_pass_runs_again(in_floats):
    layer, x = large()
    layer(x).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    checkpoint(layer, x.requires_grad_(), use_reentrant=False).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name
    layer.zero_grad()
    in_floats(layer, x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_a_step_changes_the_words(in_floats):
    layer, x = large()
    before = layer(x)
    layer.weight.data.neg_()
    assert torch.equal(layer(x), in_floats(layer, x))
    assert not torch.equal(layer(x), before)


def test_parameters_can_be_freed_and_filled_again_as_fsdp_does():
    layer, x = large()
    layer(x)
    for parameter in layer.parameters():
        parameter.untyped_storage().resize_(0)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_cast", [False, True])
@pytest.mark.parametrize("given", [(), ("scale",), tuple(LEARNED)], ids=str)
def test_under_autocast_sums_are_exact(given, is_cast, autocast, in_floats):
    layer, x = large(**dict.fromkeys(LEARNED) | {"bias": False} | {name: LEARNED[name] for name in given})
    layer.weight.data.abs_()[::2, ::3].neg_()
    x = x.add(1).to(autocast if is_cast else torch.float32)
    expected = in_floats(layer, x.float())
    assert expected.abs().max() > 256 * (1 if layer.scale is None else layer.scale.min())  # rounded in bfloat16
    with torch.autocast("cpu", autocast):
        output, rounded = layer(x), in_floats(layer, x)
    assert output.dtype == rounded.dtype == (torch.float32 if given else autocast)
    assert torch.equal(output, expected.to(output.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_do_not_run_in_words(dtype):
    layer, x = large()
    assert in_words(x, layer)
    with pytest.raises(RuntimeError, match="should be the same"):  # torch's own error for a convolution
        layer(x.to(dtype))
    assert not in_words(x.to(dtype), layer.to(dtype))


@pytest.mark.parametrize("shape", [(4, 4, 3, 3, 3), (64, 1, 3, 3, 3), (1, 64, 3, 3, 3)])
def test_few_channels_do_not_run_in_words(shape):
    groups = 64 if shape[1] == 1 else 1
    assert not is_worth_it(torch.randn(1, shape[1] * groups, 5, 5, 5), torch.randn(shape), ONE, NONE, ONE, groups)


def test_without_numba_it_runs_in_floats(monkeypatch):
    layer, x = large()
    output = layer(x)
    monkeypatch.setattr(operators, "kernel", None)
    assert not in_words(x, layer)
    assert torch.equal(layer(x), output)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 31, 5, 7, 6), "to have 32 channels"), ((1, 32, 5, 7, 0), "Kernel size can't be greater|Calculated")],
)
def test_what_cannot_be_convolved_says_why_as_in_float(shape, message):
    layer = QConv3d(32, 48, 3, padding=(1, 1, 0)).train()
    with pytest.raises(RuntimeError, match=message):
        layer(torch.randn(shape))


def test_an_empty_batch():
    layer, x = large()
    assert layer(x[:0]).shape == (0, 48, 5, 7, 6)


def test_padding_below_0_crops() -> None:
    layer, x = QConv3d(64, 64, 3, padding=-1), torch.randn(1, 64, 7, 6, 5)
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_one_threshold_for_all_channels() -> None:
    layer, x = QConv3d(64, 64, 3), torch.randn(1, 64, 3, 4, 5)
    layer.activation = QActivation("sign", threshold=torch.full((1,), 0.5))
    assert torch.equal(layer.train()(x), layer.eval()(x))
