"""`QConv3d` and `QConv3d_NoAct`: equal to bitorch's, and what differs from it on purpose.

After bitorch's tests/layers/test_qconv.py and test_qconv_noact.py. Against numpy: test_qconv3d_oracle.py.
"""

import bitorch.layers
import bitorch.quantizations
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import nn

from qconvert.errors import QuantizerError
from qconvert.layers import QConv3d, QConv3d_NoAct
from qconvert.layers.qconv3d import conv3d
from qconvert.quantizations import Sign, quantizer

BOTH = pytest.mark.parametrize("cls", [QConv3d, QConv3d_NoAct])
FLOAT_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FLOAT = {"input_quantization": "identity", "weight_quantization": "identity", "gradient_cancellation_threshold": None}


GEOMETRIES = {
    "default": {},
    "padding1": {"padding": 1},
    "padding-of-each": {"padding": (0, 1, 2)},
    "pad0.5": {"padding": 1, "pad_value": 0.5},
    "pad+1": {"padding": 1, "pad_value": 1.0},
    "stride2": {"stride": 2, "padding": 1},
    "stride-of-each": {"stride": (1, 2, 3)},
    "dilation2": {"dilation": 2, "padding": 1},
    "dilation-of-each": {"dilation": (1, 2, 1)},
    "groups2": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "padding": 1},
    "kernel1": {"kernel_size": 1},
    "kernel2": {"kernel_size": 2, "padding": 1},
    "kernel-temporal": {"kernel_size": (3, 1, 1), "padding": (1, 0, 0)},
    "kernel-spatial": {"kernel_size": (1, 3, 3), "padding": (0, 1, 1)},
    "everything": {"kernel_size": (3, 2, 1), "stride": (2, 1, 1), "padding": (1, 1, 0), "dilation": (1, 2, 1), "groups": 2},
}


def exactly_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def pair(ours, theirs, **settings):
    """A layer of each library with the same weight."""
    settings = {"kernel_size": 3} | settings
    mine, bitorchs = ours(4, 8, **settings), theirs(4, 8, **settings)
    bitorchs.load_state_dict(mine.state_dict())
    return mine, bitorchs


def assert_same_forward_and_backward(mine, bitorchs, x):
    results = []
    for layer in (mine, bitorchs):
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        # eighths, of which sums are exact: the order in which a gradient is added up is no part of the semantics
        y.backward((torch.arange(y.numel()) * 5 % 17 - 8).view_as(y).to(y.dtype) / 8)
        results.append((y.detach(), inputs.grad, layer.weight.grad))
    for actual, expected in zip(*results, strict=True):
        exactly_equal(actual, expected)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_geometry_equal_to_bitorch(geometry):
    layers = pair(QConv3d, bitorch.layers.QConv3dBase, gradient_cancellation_threshold=1.0, **GEOMETRIES[geometry])
    assert_same_forward_and_backward(*layers, torch.randn(2, 4, 5, 6, 7))


@pytest.mark.parametrize("window", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", ["identity", "sign", "approxsign", "swishsign", "progressive_sign", "inputdorefa"])
def test_input_quantization_equal_to_bitorch(name, window):
    settings = {"input_quantization": name, "gradient_cancellation_threshold": window, "padding": 1, "pad_value": -1.0}
    assert_same_forward_and_backward(*pair(QConv3d, bitorch.layers.QConv3dBase, **settings), torch.randn(2, 4, 3, 4, 5))


@pytest.mark.parametrize("name", ["identity", "sign", "approxsign", "swishsign", "progressive_sign", "weightdorefa"])
def test_weight_quantization_equal_to_bitorch(name):
    settings = {"weight_quantization": name, "gradient_cancellation_threshold": 1.0, "padding": 1}
    assert_same_forward_and_backward(*pair(QConv3d, bitorch.layers.QConv3dBase, **settings), torch.randn(2, 4, 3, 4, 5))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_without_activation_equal_to_bitorch(geometry):
    layers = pair(QConv3d_NoAct, bitorch.layers.QConv3d_NoAct, **GEOMETRIES[geometry])
    assert_same_forward_and_backward(*layers, torch.randn(2, 4, 5, 6, 7).sign())


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_dtype_equal_to_bitorch(dtype):
    settings = {"padding": 1, "gradient_cancellation_threshold": 1.0, "dtype": dtype}
    layers = pair(QConv3d, bitorch.layers.QConv3dBase, **settings)
    assert_same_forward_and_backward(*layers, torch.randn(1, 4, 3, 4, 5, dtype=dtype))


@pytest.mark.parametrize("quantization", ["sign", Sign()], ids=["by name", "module"])
def test_layer_is_its_parts_one_after_the_other(quantization):
    # bitorch's own test of its layer
    layer = QConv3d(2, 2, 3, padding=1, weight_quantization=quantization, gradient_cancellation_threshold=0.5)
    x = torch.rand(1, 2, 4, 4, 4) * 2 - 1
    activated = layer.activation(x)
    padded = F.pad(activated, [1] * 6, value=-1)
    exactly_equal(layer._apply_padding(activated), padded)
    exactly_equal(layer(x), F.conv3d(padded, layer._weight_quantize(layer.weight)))


def test_every_learned_parameter_gets_its_gradient():
    layer = QConv3d(3, 2, 3, padding=1, bias=True, threshold=0.1, scale="channel")
    x, grad_output = torch.randn(2, 3, 3, 4, 4), torch.randn(2, 2, 3, 4, 4)
    layer(x).backward(grad_output)
    unscaled = F.conv3d(layer._apply_padding(layer.activation(x)), layer.weight.sign()).detach()
    torch.testing.assert_close(layer.bias.grad, grad_output.sum((0, 2, 3, 4)))
    torch.testing.assert_close(layer.scale.grad, (grad_output * unscaled).sum((0, 2, 3, 4)))
    assert layer.weight.grad.count_nonzero() == layer.weight.numel()
    assert layer.activation.threshold.grad.count_nonzero() == 3


# --- what differs from bitorch on purpose ---


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [("sign", -1), ("steheaviside", -1), ("progressive_sign", -1), ("identity", 0), ("lsq", 0), ("ternary", 0)],
)
def test_default_pad_value_is_minus_one_for_one_bit_inputs_only(quantization, expected):
    assert QConv3d(1, 1, 3, input_quantization=quantization).pad_value == expected


def test_default_pad_value_follows_the_bits_of_the_quantizer_given():
    assert QConv3d(1, 1, 3, input_quantization=quantizer("inputdorefa", bits=2)).pad_value == 0
    assert QConv3d_NoAct(1, 1, 3).pad_value == -1


@BOTH
@pytest.mark.parametrize("pad_value", [0, 0.0, -0.0, 0.5])
def test_pad_value_means_what_it_says(cls, pad_value):
    layer = cls(1, 1, 3, padding=1, pad_value=pad_value)  # bitorch takes 0.0 for "not given"
    assert layer.pad_value == pad_value
    bordered = layer._apply_padding(torch.ones(1, 1, 1, 1, 1))
    assert bordered.sum().item() == 1 + 26 * pad_value


@pytest.mark.parametrize("window", [None, 0, 0.0])
def test_gradient_cancellation_is_off(window):
    layer = QConv3d(1, 1, 1, gradient_cancellation_threshold=window)
    nn.init.ones_(layer.weight)
    x = torch.tensor([-1e6, -2.0, 0.5, 3.0]).view(1, 1, 1, 1, 4).requires_grad_()
    layer(x).sum().backward()
    assert x.grad.flatten().tolist() == [1, 1, 1, 1]


def test_gradient_cancellation_is_one_by_default():
    assert QConv3d(1, 1, 1).activation.gradient_cancellation_threshold == 1.0


@BOTH
def test_bias_is_off_by_default_and_kept_when_asked_for(cls):
    assert cls(1, 2, 1).bias is None
    layer = cls(1, 2, 1, bias=True)
    assert layer.bias.tolist() == [0, 0]
    nn.init.constant_(layer.bias, 0.25)
    assert set((layer(torch.ones(1, 1, 2, 2, 2)) % 1).flatten().tolist()) == {0.25}


@BOTH
@pytest.mark.parametrize("kernel", [(1, 2, 3), 3, 41], ids=str)  # the last one: several slices of 2**18 weights
@pytest.mark.parametrize("name", ["sign", "approxsign", "swishsign", "steheaviside", "progressive_sign"])
def test_scale_of_a_sign_starts_at_the_mean_magnitude_of_the_weight(cls, name, kernel):
    layer = cls(5, 3, kernel, weight_quantization=name, scale="channel")
    expected = np.abs(layer.weight.detach().double().numpy()).mean(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(layer.scale.detach().numpy(), expected, rtol=1e-5)
    assert layer.scale.requires_grad


@pytest.mark.parametrize("name", ["ternary", "weightdorefa", "lsq"])
def test_scale_starts_at_the_least_squares_fit(name):
    layer = QConv3d(4, 3, 3, weight_quantization=name, scale="channel")
    weight = layer.weight.detach().flatten(1).double().numpy()
    quantized = layer._weight_quantize(layer.weight).detach().flatten(1).double().numpy()
    fits = [np.linalg.lstsq(q[:, None], w, rcond=None)[0][0] for q, w in zip(quantized, weight, strict=True)]
    np.testing.assert_allclose(layer.scale.detach().numpy(), fits, rtol=1e-5)


def test_scale_of_a_float_weight_is_one():
    layer = QConv3d(4, 3, 3, weight_quantization="identity", scale="channel")
    torch.testing.assert_close(layer.scale.detach(), torch.ones(3))


def test_scale_of_weights_that_quantize_to_zero_is_one():
    conv = nn.Conv3d(2, 3, 3)
    nn.init.zeros_(conv.weight)
    assert QConv3d.from_float(conv, weight_quantization="ternary", scale="channel").scale.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.5, [0.5] * 3), (0.0, [0.0] * 3), (1, [1.0] * 3), (torch.tensor([1.0, 2.0, 3.0]), [1.0, 2.0, 3.0])],
    ids=["number", "zero", "int", "tensor"],
)
def test_threshold_is_learned_per_input_channel(threshold, expected):
    learned = QConv3d(3, 1, 1, threshold=threshold).activation.threshold
    assert learned.tolist() == expected
    assert isinstance(learned, nn.Parameter)
    assert learned.is_contiguous()


def test_threshold_given_as_a_tensor_is_copied():
    start = torch.zeros(2)
    layer = QConv3d(2, 1, 1, threshold=start)
    start += 1
    assert layer.activation.threshold.tolist() == [0, 0]


def test_no_threshold_by_default():
    assert QConv3d(3, 1, 1).activation.threshold is None


# --- a layer that quantizes nothing is a Conv3d ---


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("padding", [0, (0, 1, 2), "same", "valid"], ids=str)
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's remark on its own copy
def test_float_layer_is_bit_identical_to_conv3d(padding_mode, padding, bias):
    conv = nn.Conv3d(4, 6, (3, 2, 3), padding=padding, padding_mode=padding_mode, groups=2, bias=bias)
    layer = QConv3d.from_float(conv, **FLOAT)
    x = torch.randn(2, 4, 4, 5, 6)
    exactly_equal(layer(x), conv(x))


@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES, torch.complex64], ids=str)
# torch says so of every module that is moved to a complex dtype
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_float_layer_is_bit_identical_to_conv3d_in(dtype):
    conv = nn.Conv3d(3, 4, 3, padding=1, dtype=dtype)
    layer, x = QConv3d.from_float(conv, **FLOAT), torch.randn(1, 3, 3, 4, 5, dtype=dtype)
    exactly_equal(layer(x), conv(x))


def refuse_to_pad(*_, **__):
    raise AssertionError("the input was copied to pad it")


@pytest.mark.parametrize(
    "settings", [FLOAT, {"input_quantization": "lsq"}, {"pad_value": 0.0}], ids=["float", "lsq", "sign"]
)
@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_border_of_zeros_costs_no_copy(monkeypatch, settings, padding):
    layer = QConv3d(2, 2, 3, padding=padding, **settings)
    monkeypatch.setattr(torch.nn.functional, "pad", refuse_to_pad)
    assert layer(torch.randn(1, 2, 4, 4, 4)).shape[1] == 2


@pytest.mark.parametrize("padding", [0, (0, 0, 0), "valid"], ids=str)
def test_no_border_costs_no_copy(monkeypatch, padding):
    layer = QConv3d(2, 2, 1, padding=padding)
    monkeypatch.setattr(torch.nn.functional, "pad", refuse_to_pad)
    assert layer(torch.randn(1, 2, 4, 4, 4)).shape[1] == 2


def test_other_borders_are_padded(monkeypatch):
    layer = QConv3d(2, 2, 3, padding=1, pad_value=0.5)
    monkeypatch.setattr(torch.nn.functional, "pad", refuse_to_pad)
    with pytest.raises(AssertionError, match=r"copied to pad"):  # so the test above can fail
        layer(torch.randn(1, 2, 4, 4, 4))


# --- start of the weight, shapes, messages ---


@BOTH
def test_weight_starts_xavier_normal(cls):
    torch.manual_seed(3)
    expected = nn.init.xavier_normal_(torch.empty(4, 3, 3, 3, 3))
    torch.manual_seed(3)
    exactly_equal(cls(3, 4, 3, bias=True).weight.detach(), expected)


@pytest.mark.parametrize("name", ["sign", "lsq"])
def test_reset_starts_weight_bias_scale_and_step_anew(name):
    settings = {"weight_quantization": name, "scale": "channel", "bias": True}
    layer = QConv3d(3, 4, 3, **settings)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 7.0)
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    fresh = QConv3d(3, 4, 3, **settings)
    assert layer.state_dict().keys() == fresh.state_dict().keys()
    for key, value in fresh.state_dict().items():
        exactly_equal(layer.state_dict()[key], value)


@pytest.mark.parametrize("name", ["sign", "lsq"])
def test_reset_keeps_the_parameters_that_an_optimizer_holds(name):
    layer = QConv3d(3, 4, 3, weight_quantization=name, scale="channel", bias=True, threshold=0.0)
    before = dict(layer.named_parameters())
    layer.reset_parameters()
    replaced = [key for key, parameter in layer.named_parameters() if parameter is not before[key]]
    assert not replaced


@BOTH
def test_unknown_scale(cls):
    with pytest.raises(QuantizerError, match=r"^scale must be .channel., a number, a tensor or None, got 'tensor'$"):
        cls(1, 1, 1, scale="tensor")


@pytest.mark.parametrize("role", ["input_quantization", "weight_quantization"])
def test_unknown_quantizer(role):
    with pytest.raises(QuantizerError, match=r"^unknown quantizer 'sgn'\. .* Did you mean 'sign'\?$"):
        QConv3d(1, 1, 1, **{role: "sgn"})


def test_negative_window():
    with pytest.raises(QuantizerError, match=r"^gradient_cancellation_threshold must be None .* got -1$"):
        QConv3d(1, 1, 1, gradient_cancellation_threshold=-1)


def test_wrong_number_of_channels_is_torchs_own_error():
    with pytest.raises(RuntimeError, match="to have 2 channels, but got 3 channels"):
        QConv3d(2, 1, 1)(torch.randn(1, 3, 2, 2, 2))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 2, 2, 2), (1, 2, 2, 2)])
def test_one_channel_is_not_spread_to_all_by_the_thresholds(training, shape, groups):
    with pytest.raises(RuntimeError, match=r"channels, but got 1 channels"):
        QConv3d(2, 2, 1, groups=groups, threshold=0.1).train(training)(torch.randn(shape))


def test_bitorchs_constructor_arguments_are_taken():
    settings = {
        "stride": 2,
        "padding": 1,
        "input_quantization": "sign",
        "weight_quantization": "approxsign",
        "pad_value": 0.5,
    }
    layer = QConv3d(2, 4, kernel_size=3, bias=False, gradient_cancellation_threshold=0.7, **settings)
    assert (layer.stride, layer.padding, layer.pad_value) == ((2, 2, 2), (1, 1, 1), 0.5)
    assert layer._weight_quantize.name == "approxsign"
    assert layer.activation.gradient_cancellation_threshold == 0.7


def test_constructor_on_the_meta_device():
    layer = QConv3d(
        3, 4, 3, device="meta", weight_quantization="lsq", input_quantization="lsq", threshold=0.5, scale="channel"
    )
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    assert layer(torch.empty(2, 3, 5, 5, 5, device="meta")).shape == (2, 4, 3, 3, 3)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_everything_learned_has_the_dtype_of_the_layer(dtype):
    settings = {
        "weight_quantization": "lsq",
        "input_quantization": "lsq",
        "threshold": 0.5,
        "scale": "channel",
        "bias": True,
    }
    layer = QConv3d(3, 4, 3, dtype=dtype, **settings)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert layer(torch.randn(1, 3, 3, 3, 3, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("name", ["sign", "weightdorefa"])
def test_scale_of_a_large_half_layer(name):
    conv = nn.Conv3d(2500, 1, 3, dtype=torch.float16)  # 67500 weights: more than the largest half, 65504
    scale = QConv3d.from_float(conv, weight_quantization=name, scale="channel").scale.item()
    assert scale == pytest.approx(conv.weight.float().abs().mean().item(), rel=1e-2)


@BOTH
def test_repr_shows_border_and_scale(cls):
    assert cls(1, 2, 3, scale="channel").extra_repr().endswith("pad_value=-1, scale=per channel")
    assert (
        cls(1, 2, 3, pad_value=0.5).extra_repr()
        == "1, 2, kernel_size=(3, 3, 3), stride=(1, 1, 1), bias=False, pad_value=0.5"
    )


# --- the function ---


def test_function_without_pad_value_is_torchs():
    x, weight, bias = torch.randn(1, 4, 4, 4, 4), torch.randn(6, 2, 3, 3, 3), torch.randn(6)
    settings = {"stride": (1, 2, 1), "padding": (1, 0, 2), "dilation": (1, 1, 2), "groups": 2}
    exactly_equal(conv3d(x, weight, bias, **settings), F.conv3d(x, weight, bias, **settings))


def test_function_takes_one_number_for_all_three_sizes():
    x, weight = torch.randn(1, 2, 5, 5, 5), torch.randn(3, 2, 3, 3, 3)
    expected = F.conv3d(F.pad(x, [2] * 6, value=-1), weight, stride=2, dilation=2)
    exactly_equal(conv3d(x, weight, stride=2, padding=2, dilation=2, pad_value=-1), expected)
    exactly_equal(
        conv3d(x, weight, dilation=2, padding="same", pad_value=-1),
        F.conv3d(F.pad(x, [2] * 6, value=-1), weight, dilation=2),
    )


@pytest.mark.parametrize("spread", [0.0, -2.0, float("nan")])
def test_a_spread_is_above_0(spread):
    with pytest.raises(QuantizerError, match=rf"^spread must be above 0, got {spread}$"):
        QConv3d(4, 4, 1, spread=spread)
