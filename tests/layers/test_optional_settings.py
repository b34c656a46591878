"""The optional settings of a layer: RPReLU, the shortcut, standardized weights, and the clip that training asks for."""

import copy
import pickle
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from models import ResidualBlock
from small import convert
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models.video.resnet import Conv3DSimple

import qconvert
from qconvert.errors import ModelError, QuantizerError
from qconvert.layers import QConv3d, QConv3d_NoAct, RPReLU, standardized
from qconvert.quantizations import LSQ

BOTH = pytest.mark.parametrize("cls", [QConv3d, QConv3d_NoAct])
ALL = {"standardize": True, "shortcut": True, "rprelu": True}
LEARNED = {"threshold": 0.25, "spread": 0.5, "scale": "channel", "offset": -0.5, "bias": True}
RPRELU = {"rprelu.shift", "rprelu.slope", "rprelu.summand"}
CHANNELS = 4


def layer(cls: type = QConv3d, **settings: Any) -> Any:
    """Return a layer whose shapes allow a shortcut, its RPReLU, if any, away from the identity."""
    made = cls(CHANNELS, CHANNELS, 3, **({"padding": 1} | settings))
    if made.rprelu is not None:
        for parameter in made.rprelu.parameters():
            nn.init.uniform_(parameter, -1, 1)
    return made


def clip(*shape: int) -> Tensor:
    return torch.randn(shape or (2, CHANNELS, 3, 5, 4))


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def column(values: Tensor) -> np.ndarray:
    return array(values).reshape(-1, 1, 1, 1)


def standardized_by_hand(weight: np.ndarray) -> np.ndarray:
    flat = weight.reshape(len(weight), -1)
    mean, std = flat.mean(1), np.sqrt(flat.var(1) + 1e-8)
    return ((flat - mean[:, None]) / std[:, None]).reshape(weight.shape)


def by_hand(made: QConv3d_NoAct, x: Tensor) -> np.ndarray:
    """Return the output of a sign layer, in numpy."""
    weight = array(made.weight)
    codes = array(x)
    if isinstance(made, QConv3d):
        codes = oracle.sign(codes if made.activation.threshold is None else codes - column(made.activation.threshold))
    quantized = oracle.sign(standardized_by_hand(weight) if made.standardize else weight)
    geometry = (made.stride, made.padding, made.dilation, made.groups, made.pad_value, made.padding_mode)
    y = oracle.conv3d(codes, quantized, None, *geometry)
    y = y if made.scale is None else y * column(made.scale)
    for summand in (made.offset, made.bias):
        y = y if summand is None else y + column(summand)
    y = y + array(x) if made.shortcut else y
    if made.rprelu is None:
        return y
    moved = y - column(made.rprelu.shift)
    return np.where(moved > 0, moved, column(made.rprelu.slope) * moved) + column(made.rprelu.summand)


def one_operator(made: nn.Module, x: Tensor) -> bool:
    with torch.profiler.profile() as profile:
        made(x)
    return any(event.key == "qconvert::quantized_conv3d" for event in profile.key_averages())


def gradients(made: nn.Module, x: Tensor) -> dict[str, Tensor]:
    made.zero_grad()
    x = x.detach().requires_grad_()
    y = made(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {"input": x.grad} | {name: parameter.grad for name, parameter in made.named_parameters()}


# --- what they compute ---


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("settings", [*({name: True} for name in ALL), ALL, ALL | LEARNED], ids="-".join)
@BOTH
def test_output_by_hand(cls: type, settings: dict[str, Any], training: bool):
    if cls is QConv3d_NoAct:
        settings = {name: value for name, value in settings.items() if name not in ("threshold", "spread")}
    made, x = layer(cls, **settings).train(training), clip()
    np.testing.assert_allclose(array(made(x)), by_hand(made, x), atol=1e-4)


@pytest.mark.parametrize(
    "geometry",
    [
        {"groups": 2},
        {"groups": CHANNELS},
        {"padding": "same"},
        {"padding": 2, "dilation": 2},
        {"padding_mode": "circular"},
        {"pad_value": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(2, CHANNELS, 3, 5, 4), (CHANNELS, 3, 5, 4)], ids=["batch", "single"])
def test_every_geometry_by_hand(geometry: dict[str, Any], shape: tuple[int, ...]):
    made, x = layer(**ALL, **LEARNED, **geometry), clip(*shape)
    y = made(x)
    assert y.shape == x.shape
    np.testing.assert_allclose(array(y), by_hand(made, x), atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 2, 4, 5), (3, 2, 4, 5)], ids=["batch", "single"])
def test_rprelu_by_hand(shape: tuple[int, ...]):
    made, x = RPReLU(3).double(), torch.randn(shape, dtype=torch.float64)
    for parameter in made.parameters():
        nn.init.uniform_(parameter, -1, 1)
    moved = array(x) - column(made.shift)
    expected = np.where(moved > 0, moved, column(made.slope) * moved) + column(made.summand)
    np.testing.assert_allclose(array(made(x)), expected, rtol=1e-12)
    inputs = (x.requires_grad_(), *made.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: made(x), inputs)


def test_rprelu_starts_as_the_identity():
    x = torch.tensor([-1e30, -1.5, -0.0, 0.0, 1e-30, 2.5, float("inf")]).expand(1, 2, 1, 1, 7)
    made = RPReLU(2)
    assert torch.equal(made(x), x)
    nn.init.constant_(made.slope, 0.25)
    made.reset_parameters()
    assert torch.equal(made(x), x)


def test_a_fresh_rprelu_changes_no_output():
    plain, x = layer(**LEARNED), clip()
    bent = QConv3d.from_float(plain, rprelu=True, scale=plain.scale, offset=plain.offset, threshold=0.25, spread=0.5)
    assert torch.equal(bent(x), plain(x))


def test_the_shortcut_is_what_the_convolution_reads_before_its_quantizer():
    x = clip()
    plain = layer(scale=0.5)
    around = QConv3d.from_float(plain, scale=0.5, shortcut=True)
    assert torch.equal(around(x), plain(x) + x)


# --- standardized weights ---


@pytest.mark.parametrize("shape", [(4, 3, 3, 3, 3), (2, 1, 1, 1, 2), (1, 8, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e4])
def test_standardized_by_hand(shape: tuple[int, ...], size: float):
    weight = size * (torch.randn(shape) + 3)
    np.testing.assert_allclose(array(standardized(weight)), standardized_by_hand(array(weight)), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 0.1, -0.1, 1000.0])
@pytest.mark.parametrize("shape", [(2, 3, 3, 3, 3), (2, 1, 1, 1, 1)], ids=["equal weights", "one weight"])
def test_a_channel_without_spread_is_finite(shape: tuple[int, ...], value: float, dtype: torch.dtype):
    weight = torch.full(shape, value, dtype=dtype, requires_grad=True)
    y = standardized(weight)
    assert (y.abs() < 1).all()
    y.backward(torch.randn(shape).to(dtype))
    assert weight.grad.isfinite().all()
    made = QConv3d_NoAct.from_float(nn.Conv3d(3, 2, 3, dtype=dtype), standardize=True, scale="channel")
    with torch.no_grad():
        made.weight.fill_(value)
    assert all(gradient.isfinite().all() for gradient in gradients(made, clip(1, 3, 3, 3, 3).to(dtype)).values())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_gradient_passes_the_standardization(training: bool):
    made, x = layer(standardize=True, gradient_cancellation_threshold=None).double().train(training), clip().double()
    weight = made.weight.detach().clone().requires_grad_()
    flat = weight.flatten(1)
    latent = ((flat - flat.mean(1, keepdim=True)) / (flat.var(1, correction=0, keepdim=True) + 1e-8).sqrt()).view_as(weight)
    quantized = latent + (torch.where(latent < 0, -1.0, 1.0) - latent).detach()  # straight through
    codes = torch.where(x < 0, -1.0, 1.0).double()
    y = nn.functional.conv3d(nn.functional.pad(codes, [1] * 6, value=-1.0), quantized)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    assert_close(gradients(made, x)["weight"], weight.grad)


@pytest.mark.parametrize("quantizer", ["sign", "ternary", "lsq", "identity"])
def test_the_scale_starts_at_the_fit_to_the_weight_itself(quantizer: str):
    conv = nn.Conv3d(3, 4, 3)
    with torch.no_grad():
        conv.weight.add_(0.05)
    made = QConv3d.from_float(conv, weight_quantization=quantizer, standardize=True, scale="channel")
    q = array(made._weight_quantize(standardized(conv.weight))).reshape(4, -1)
    w = array(conv.weight).reshape(4, -1)
    fits = [np.linalg.lstsq(q[n][:, None], w[n], rcond=None)[0][0] for n in range(4)]
    np.testing.assert_allclose(array(made.scale), fits, rtol=1e-5)
    nn.init.constant_(made.scale, 7.0)
    made.reset_parameters()
    q = array(made._weight_quantize(standardized(made.weight))).reshape(4, -1)
    w = array(made.weight).reshape(4, -1)
    np.testing.assert_allclose(array(made.scale), (q * w).sum(1) / (q * q).sum(1), rtol=1e-5)


def test_the_step_of_lsq_starts_at_the_standardized_weight():
    conv = nn.Conv3d(3, 4, 3)
    made = QConv3d.from_float(conv, weight_quantization="lsq", standardize=True)
    expected = LSQ()
    expected.start_from(torch.from_numpy(standardized_by_hand(array(conv.weight))))
    assert made._weight_quantize.step.item() == pytest.approx(expected.step.item(), rel=1e-5)


def test_equal_negative_weights_get_a_negative_scale():
    conv = nn.Conv3d(1, 2, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([-0.5, 0.25]).view(2, 1, 1, 1, 1))
    made = QConv3d_NoAct.from_float(conv, standardize=True, scale="channel")
    x = clip(1, 1, 2, 2, 2)
    assert_close(made(x), conv(x))


# --- training ---


@pytest.mark.parametrize(
    "settings", [ALL, ALL | LEARNED, ALL | LEARNED | {"weight_quantization": "lsq"}], ids=["plain", "learned", "lsq"]
)
def test_every_parameter_gets_a_gradient(settings: dict[str, Any]):
    found = gradients(layer(**settings), clip())
    assert found.keys() >= RPRELU
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        assert gradient.count_nonzero() > 0, name


def test_a_step_is_one_operator_still_and_equal_to_the_formula_written_out():
    made, x = layer(**ALL, **LEARNED).train(), clip()
    assert one_operator(made, x)
    one = gradients(made, x)
    made.activation.register_forward_hook(lambda *_: None)
    assert not one_operator(made, x)
    for name, expected in gradients(made, x).items():
        assert_close(one[name], expected, msg=lambda text, name=name: f"{name}: {text}")


def test_bfloat16_autocast():
    made, x = layer(**ALL, **LEARNED).train(), clip()
    expected = gradients(made, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(made, x)
        assert made(x).dtype == torch.float32
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        assert gradient.dtype == torch.float32
        assert_close(gradient, expected[name], rtol=0.05, atol=0.05 * expected[name].abs().max().item())


def test_tied_weights_stay_tied():
    first, second = nn.Conv3d(4, 4, 3, padding=1), nn.Conv3d(4, 4, 3, padding=1)
    second.weight = first.weight
    model = convert(
        nn.Sequential(first, nn.Tanh(), second),
        {"rule": [{"weight": {"quantizer": "sign", "standardize": True}, "shortcut": True, "rprelu": True}]},
    )
    assert model[0].weight is model[2].weight
    assert model[0].rprelu is not model[2].rprelu
    assert all(gradient.count_nonzero() for gradient in gradients(model, clip()).values())


def test_vmap():
    made, x = layer(**ALL, **LEARNED).train(), clip(3, 2, CHANNELS, 3, 4, 4)
    assert_close(torch.vmap(made)(x), torch.stack([made(each) for each in x]))
    weights = torch.randn(3, *made.weight.shape)
    call = lambda weight: torch.func.functional_call(made, {"weight": weight}, (x[0],))  # noqa: E731 (used twice)
    assert_close(torch.vmap(call)(weights), torch.stack([call(weight) for weight in weights]))


# --- where a shortcut is allowed ---


@pytest.mark.parametrize(
    "sizes",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (1, 3, 5), "padding": (0, 1, 2)},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": (2, 4, 3), "padding": "same"},
        {"kernel_size": 1, "padding": "valid"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": 1, "groups": 2},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_equal_shapes(sizes: dict[str, Any]):
    made, x = QConv3d(CHANNELS, CHANNELS, shortcut=True, **sizes), clip(1, CHANNELS, 5, 6, 7)
    assert made(x).shape == x.shape


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"out_channels": 8, "padding": 1}, "4 -> 8 channels"),
        ({"padding": 1, "stride": 2}, "stride 2 x 2 x 2"),
        ({"padding": 1, "stride": (1, 2, 2)}, "stride 1 x 2 x 2"),
        ({}, "the size changes by -2 x -2 x -2"),
        ({"padding": (1, 1, 0)}, "the size changes by 0 x 0 x -2"),
        ({"padding": 1, "dilation": (1, 2, 1)}, "the size changes by 0 x -2 x 0"),
        ({"kernel_size": 1, "padding": 1}, "the size changes by 2 x 2 x 2"),
        ({"padding": "valid"}, "the size changes by -2 x -2 x -2"),
        ({"padding": 2, "padding_mode": "circular"}, "the size changes by 2 x 2 x 2"),
        ({"kernel_size": (2, 3, 3), "padding": 1}, "the size changes by 1 x 0 x 0"),
    ],
    ids=str,
)
@BOTH
def test_unequal_shapes_are_refused(cls: type, sizes: dict[str, Any], message: str):
    settings = {"in_channels": CHANNELS, "out_channels": CHANNELS, "kernel_size": 3} | sizes
    with pytest.raises(QuantizerError, match=f"^no shortcut: the input cannot be added to the output, {message}"):
        cls(**settings, shortcut=True)
    conv = nn.Conv3d(**settings)
    with pytest.raises(QuantizerError, match=message):
        cls.from_float(conv, shortcut=True)
    assert type(conv) is nn.Conv3d


class Causal(nn.Conv3d):
    """As diffusers' WanCausalConv3d: takes its padding into its own hands after it was built."""

    def __init__(self):
        super().__init__(CHANNELS, CHANNELS, 3, padding=1)
        self.padding = (0, 0, 0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1, 2, 0)))


def test_a_subclass_that_pads_by_hand_has_no_shortcut():
    with pytest.raises(QuantizerError, match="the size changes by -2 x -2 x -2"):
        QConv3d.from_float(Causal(), shortcut=True)
    made = QConv3d.from_float(Causal(), rprelu=True, standardize=True)
    assert made(clip()).shape == clip().shape


# --- latent_clip ---


@BOTH
def test_latent_clip_is_held(cls: type):
    assert layer(cls).latent_clip is None
    assert layer(cls, latent_clip=1.5).latent_clip == 1.5
    assert cls.from_float(nn.Conv3d(1, 2, 3), latent_clip=1).latent_clip == 1


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "1"])
def test_latent_clip_must_be_above_0(value: Any):
    with pytest.raises(QuantizerError, match=f"^latent_clip must be a number above 0 or None, got {value!r}$"):
        layer(latent_clip=value)


# --- the layer as a module ---


@BOTH
def test_all_are_off_by_default(cls: type):
    for made in (layer(cls), cls.from_float(nn.Conv3d(4, 4, 3))):
        assert (made.standardize, made.shortcut, made.rprelu, made.latent_clip) == (False, False, None, None)
        assert not RPRELU & made.state_dict().keys()
        assert not {"standardize", "shortcut", "latent_clip"} & set(made.extra_repr().replace("=", " ").split())


@BOTH
def test_state_dict(cls: type):
    made, bare = layer(cls, **ALL), layer(cls)
    assert made.state_dict().keys() - bare.state_dict().keys() == RPRELU
    twin = layer(cls, **ALL)
    twin.weight = made.weight
    twin.load_state_dict(made.state_dict())
    assert torch.equal(twin(clip(1, 4, 3, 3, 3).fill_(0.5)), made(clip(1, 4, 3, 3, 3).fill_(0.5)))


def test_extra_repr():
    assert (
        layer(**ALL, scale=1.0, latent_clip=1)
        .extra_repr()
        .endswith("pad_value=-1, scale=per channel, standardize=True, shortcut=True, latent_clip=1")
    )
    assert "(rprelu): RPReLU(4)" in repr(layer(**ALL))


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda made: pickle.loads(pickle.dumps(made))}  # noqa: S301 (our own bytes)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("conv", [nn.Conv3d(4, 4, 3, padding=1), Conv3DSimple(4, 4)], ids=["Conv3d", "subclass"])
def test_copies(conv: nn.Conv3d, copied: Any):
    made = QConv3d.from_float(conv, **ALL, latent_clip=2.0, scale="channel")
    twin, x = copied(made), clip()
    assert type(twin) is type(made)
    assert twin.latent_clip == 2.0
    assert twin.rprelu.slope is not made.rprelu.slope
    assert torch.equal(twin(x), made(x))


def test_a_subclass_computes_the_same():
    conv = Conv3DSimple(4, 4)
    plain = nn.Conv3d(4, 4, (3, 3, 3), padding=1, bias=False)
    plain.weight = conv.weight
    x = clip()
    one, other = (QConv3d.from_float(each, **ALL, scale="channel") for each in (conv, plain))
    assert isinstance(one, Conv3DSimple)
    assert torch.equal(one(x), other(x))


def test_quantizing_again_takes_the_settings_off():
    conv, x = nn.Conv3d(4, 4, 3, padding=1), clip()
    off = {"input_quantization": "identity", "weight_quantization": "identity", "gradient_cancellation_threshold": None}
    again = QConv3d.from_float(QConv3d.from_float(conv, **ALL, latent_clip=1.0), **off, pad_value=0)
    assert torch.equal(again(x), conv(x))
    assert again.latent_clip is None
    assert again.state_dict().keys() == conv.state_dict().keys()


def test_rprelu_of_a_frozen_layer_is_frozen():
    conv = nn.Conv3d(4, 4, 3, padding=1).requires_grad_(requires_grad=False)
    assert not any(parameter.requires_grad for parameter in QConv3d.from_float(conv, **ALL).parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype(dtype: torch.dtype):
    made = QConv3d.from_float(nn.Conv3d(4, 4, 3, padding=1, dtype=dtype), **ALL, scale="channel", weight_quantization="lsq")
    assert {parameter.dtype for parameter in made.parameters()} == {dtype}
    assert made(clip().to(dtype)).dtype == dtype


def test_meta_device():
    conv = nn.Conv3d(4, 4, 3, padding=1, device="meta")
    made = QConv3d.from_float(conv, **ALL, scale="channel", weight_quantization="lsq")
    assert {parameter.device.type for parameter in made.parameters()} == {"meta"}
    assert made(clip().to("meta")).shape == clip().shape


def test_reset_parameters_starts_rprelu_anew():
    made = layer(**ALL)
    made.reset_parameters()
    assert [parameter.unique().tolist() for parameter in made.rprelu.parameters()] == [[0.0], [1.0], [0.0]]


@pytest.mark.parametrize("name", ["standardize", "shortcut", "rprelu", "latent_clip"])
def test_a_subclass_with_an_attribute_of_that_name_is_refused(name: str):
    conv = type("Own", (Conv3DSimple,), {})(2, 4)
    setattr(conv, name, nn.Identity())
    with pytest.raises(ModelError, match=f"attributes of its own named {name}, which"):
        QConv3d.from_float(conv)


def test_hooks_of_rprelu_are_called():
    made, seen = layer(**ALL), []
    made.rprelu.register_forward_hook(lambda *_: seen.append(1))
    made(clip())
    assert seen == [1]


class Functional(nn.Module):
    """Its convolution is no module."""

    def __init__(self, outputs: int):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outputs, CHANNELS, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv3d(x, self.kernel, padding=1)


def test_a_functional_convolution_has_them_too():
    rules = {"rule": [{"weight": {"quantizer": "sign", "standardize": True}, "shortcut": True, "rprelu": True}]}
    model, x = convert(Functional(CHANNELS), rules), clip()
    assert model.state_dict().keys() == {"kernel", *(f"conv3d.{name}" for name in RPRELU)}
    np.testing.assert_allclose(array(model(x)), by_hand(model.conv3d, x), atol=1e-4)
    assert all(gradient.count_nonzero() for gradient in gradients(model, x).values())
    (decision,) = qconvert.plan(Functional(7), rules).decisions
    assert (decision.shortcut, decision.rprelu) == (False, True)
    assert decision.reason == "selected; no shortcut: 4 -> 7 channels"


def test_in_a_residual_block():
    rules = {
        "rule": [{"weight": {"quantizer": "sign", "scale": "channel"}, "input": "sign", "shortcut": True, "rprelu": True}]
    }
    found = gradients(convert(ResidualBlock(CHANNELS), rules), clip())
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found.values())
