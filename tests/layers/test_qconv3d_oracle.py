"""`QConv3d` against the numpy oracle: integers, so exactly equal."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from qconvert.layers import QConv3d, QConv3d_NoAct

CHANNELS = [1, 63, 64, 65, 127, 128]  # around the 64 bits of a machine word
PAD_VALUES = [-1.0, 0.0, 1.0, 0.5]
MODES = ["zeros", "reflect", "replicate", "circular"]


def expected_of(layer, x):
    """Signs and sums in int64 (float64 only for a border of 0.5)."""
    weight = oracle.sign(layer.weight.detach().double().numpy())
    pad_value = int(layer.pad_value) if layer.pad_value == int(layer.pad_value) else layer.pad_value
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return oracle.conv3d(oracle.sign(x.double().numpy()), weight, None, *geometry, pad_value, layer.padding_mode)


def assert_exact(layer, x):
    y = layer(x).detach()
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y.double().numpy(), expected_of(layer, x))


@pytest.mark.parametrize("pad_value", PAD_VALUES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_channels(channels, pad_value):
    assert_exact(QConv3d(channels, 3, 3, padding=1, pad_value=pad_value), torch.randn(1, channels, 2, 3, 4))


@pytest.mark.parametrize(("channels", "groups"), [(2, 2), (6, 3), (64, 4), (65, 5), (126, 2), (128, 128)], ids=str)
def test_groups(channels, groups):
    assert_exact(QConv3d(channels, 2 * groups, (2, 3, 1), padding=1, groups=groups), torch.randn(1, channels, 2, 2, 2))


@pytest.mark.parametrize("dilation", [1, 2, (1, 2, 1)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, (1, 2, 3)], ids=str)
def test_stride_and_dilation(stride, dilation):
    assert_exact(QConv3d(3, 2, 3, stride=stride, dilation=dilation, padding=(1, 2, 3)), torch.randn(2, 3, 5, 6, 7))


@pytest.mark.parametrize("pad_value", PAD_VALUES)
@pytest.mark.parametrize("padding", [0, 1, (0, 1, 2), "valid", "same"], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_padding_mode(mode, padding, pad_value):
    # only padding_mode="zeros" has a pad_value; the other modes take the border from the quantized input
    assert_exact(QConv3d(3, 2, 3, padding=padding, padding_mode=mode, pad_value=pad_value), torch.randn(1, 3, 3, 4, 5))


@pytest.mark.parametrize("pad_value", PAD_VALUES)
@pytest.mark.parametrize("dilation", [1, 2, (1, 2, 3)], ids=str)
@pytest.mark.parametrize("kernel", [1, 2, 4, (1, 2, 3)], ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's remark on its own copy
def test_padding_same(kernel, dilation, pad_value):
    layer, x = QConv3d(2, 3, kernel, dilation=dilation, padding="same", pad_value=pad_value), torch.randn(1, 2, 3, 4, 5)
    assert layer(x).shape[2:] == x.shape[2:]
    assert_exact(layer, x)


@pytest.mark.parametrize("mode", MODES[1:])
def test_padding_same_of_an_even_kernel_in_mode(mode):
    assert_exact(QConv3d(2, 3, (2, 3, 4), padding="same", padding_mode=mode), torch.randn(1, 2, 3, 4, 5))


@st.composite
def layers_and_inputs(draw):
    """Any geometry whose border is narrower than the input, as reflect needs it."""
    torch.manual_seed(0)  # an example that fails is the same when hypothesis runs it again
    each = lambda low, high: st.tuples(*[st.integers(low, high)] * 3)  # noqa: E731 (one line, used five times)
    groups, kernel, dilation = draw(st.integers(1, 3)), draw(each(1, 3)), draw(each(1, 2))
    padding, size = draw(each(0, 2) | st.sampled_from(["valid"])), draw(each(3, 5))
    border = (0, 0, 0) if padding == "valid" else padding
    assume(all(n + 2 * p > d * (k - 1) for n, p, d, k in zip(size, border, dilation, kernel, strict=True)))
    channels, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 2))
    settings = {"padding_mode": draw(st.sampled_from(MODES)), "pad_value": draw(st.sampled_from(PAD_VALUES))}
    layer = QConv3d(channels, outputs, kernel, draw(each(1, 3)), padding, dilation, groups, **settings)
    return layer, torch.randn(draw(st.integers(0, 2)), channels, *size)


@given(layers_and_inputs())
def test_any_geometry(layer_and_input):
    assert_exact(*layer_and_input)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pad_value", [-1.0, 0.0])
def test_dtype(dtype, pad_value):
    # at most 3 * 27 ones: an exact integer in bfloat16 too
    assert_exact(QConv3d(3, 2, 3, padding=1, dtype=dtype, pad_value=pad_value), torch.randn(1, 3, 3, 4, 5, dtype=dtype))


@pytest.mark.parametrize("mode", MODES)
def test_unbatched(mode):
    assert_exact(QConv3d(3, 2, 3, padding=1, padding_mode=mode, threshold=0.0), torch.randn(3, 3, 4, 5))


@pytest.mark.parametrize("scale", [None, "channel"])
@pytest.mark.parametrize("pad_value", [-1.0, 0.0])
def test_empty_batch(pad_value, scale):
    layer = QConv3d(3, 2, 3, padding=1, pad_value=pad_value, bias=True, threshold=0.0, scale=scale)
    x = torch.empty(0, 3, 4, 5, 6, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 2, 4, 5, 6)
    assert x.grad.shape == x.shape
    assert layer.weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("pad_value", [-1.0, 0.0])
def test_channels_last_3d(pad_value):
    layer = QConv3d(4, 6, 3, padding=1, pad_value=pad_value, threshold=0.0).to(memory_format=torch.channels_last_3d)
    x = torch.randn(2, 4, 3, 4, 5).to(memory_format=torch.channels_last_3d)
    assert_exact(layer, x)
    assert layer(x).is_contiguous(memory_format=torch.channels_last_3d)


def test_threshold_shifts_each_channel():
    threshold = torch.tensor([-0.5, 0.0, 0.5])
    layer, x = QConv3d(3, 2, 3, padding=1, threshold=threshold), torch.randn(2, 3, 3, 4, 5)
    shifted = x - threshold.view(3, 1, 1, 1)
    np.testing.assert_array_equal(layer(x).detach().numpy(), expected_of(layer, shifted))  # and the border stays -1


def test_scale_and_bias_come_after_the_convolution():
    layer = QConv3d(3, 2, 3, padding=1, scale="channel", bias=True, dtype=torch.float64)
    nn.init.normal_(layer.bias)
    x = torch.randn(1, 3, 3, 4, 5, dtype=torch.float64)
    scale, bias = (parameter.detach().numpy().reshape(2, 1, 1, 1) for parameter in (layer.scale, layer.bias))
    np.testing.assert_array_equal(layer(x).detach().numpy(), expected_of(layer, x) * scale + bias)


def test_bias_is_added_to_an_exact_integer():
    layer = QConv3d(64, 2, 3, padding=1, bias=True)
    nn.init.constant_(layer.bias, 1 / 3)
    x = torch.randn(1, 64, 2, 3, 3)
    expected = expected_of(layer, x).astype(np.float32) + np.float32(1 / 3)
    np.testing.assert_array_equal(layer(x).detach().numpy(), expected)


def test_without_activation_the_input_is_taken_as_it_comes():
    layer, x = QConv3d_NoAct(3, 2, 3, padding=1), torch.randint(-5, 6, (1, 3, 3, 4, 5))
    expected = oracle.conv3d(x.numpy(), oracle.sign(layer.weight.detach().numpy()), padding=1, pad_value=-1)
    np.testing.assert_array_equal(layer(x.float()).detach().numpy(), expected)


def test_heaviside_inputs():
    layer, x = QConv3d(3, 2, 3, input_quantization="steheaviside"), torch.randint(0, 2, (1, 3, 3, 4, 5))
    expected = oracle.conv3d(oracle.heaviside(x.numpy()), oracle.sign(layer.weight.detach().numpy()))
    np.testing.assert_array_equal(layer(x.float()).detach().numpy(), expected)


def test_inputs_and_weights_of_zero_and_nan_are_plus_one():
    layer = QConv3d(1, 1, 1)
    for value in (0.0, -0.0, float("nan")):
        nn.init.constant_(layer.weight, value)
        assert layer(torch.full((1, 1, 1, 1, 1), value)).item() == 1
