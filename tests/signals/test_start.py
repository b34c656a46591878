"""Where thresholds, scales and offsets start without data, against samples; and the warning about constant inputs."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from models import TwoConvs
from small import binary_layers, convert
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models.video import r3d_18

import qconvert
from qconvert import QConv3d
from qconvert.errors import ConstantInputWarning
from qconvert.quantizations import quantizer
from qconvert.signals.distribution import UNKNOWN, Distribution
from qconvert.signals.propagation import USUAL_SIZE, Signal
from qconvert.signals.start import InputStart, input_start, output_start

SIGN, FOUR_BITS = quantizer("sign"), quantizer("lsq", bits=4)


def signal(x: Distribution, otherwise: Distribution | None = None) -> Signal:
    return Signal(x, x, otherwise)


SYMMETRIC = Distribution.normal(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0]))
SHIFTED = Distribution.normal(torch.tensor([0.0, 2.0, -4.0]), torch.tensor([1.0, 2.0, 3.0]))


def options(**settings: Any) -> dict[str, Any]:
    weight = {"quantizer": "sign", "scale": "channel", "standardize": settings.pop("standardize", False)}
    return {"rule": [{"weight": weight, "input": {"quantizer": "sign", "threshold": "channel"}} | settings]}


def test_shortcut_and_rprelu_change_no_start():
    model = nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 4, 3, padding=1))
    plain, around = (convert(model, options(**on)).state_dict() for on in ({}, {"shortcut": True, "rprelu": True}))
    assert around.keys() - plain.keys() == {f"{n}.rprelu.{key}" for n in (0, 3) for key in ("shift", "slope", "summand")}
    for key, value in plain.items():
        assert torch.equal(around[key], value), key


@pytest.mark.parametrize("quantizer_of_weights", ["sign", "ternary", "lsq"])
def test_the_output_of_standardized_weights_starts_with_the_float_mean_and_spread(quantizer_of_weights: str):
    model = nn.Sequential(nn.BatchNorm3d(8), nn.Conv3d(8, 6, 3)).eval()
    with torch.no_grad():
        model[1].weight.add_(0.05 * torch.randn(6, 1, 1, 1, 1))
    rules = options(standardize=True)
    rules["rule"][0]["weight"]["quantizer"] = quantizer_of_weights
    model[0].running_mean.fill_(0.5)  # trained
    converted = convert(model, rules)
    half = torch.randn(4, 8, 8, 8, 8)
    x = 0.5 + torch.cat([half, -half])  # of exactly that mean
    with torch.no_grad():
        wanted, got = (each(x).movedim(1, 0).flatten(1) for each in (model, converted))
    assert_close(got.std(1), wanted.std(1), rtol=0.1, atol=0)
    assert_close(got.mean(1), wanted.mean(1), rtol=0, atol=0.02 * wanted.std().item())


# --- input_start ---


@pytest.mark.parametrize("setting", [None, 0.0, 0.25, -3])
@pytest.mark.parametrize("inputs", [SIGN, FOUR_BITS], ids=["1 bit", "4 bits"])
@pytest.mark.parametrize("known", [signal(SHIFTED), None], ids=["known", "unknown"])
def test_a_number_and_none_stand_as_they_are(setting: float | None, inputs: nn.Module, known: Signal | None):
    assert input_start(setting, inputs, known) == InputStart(setting, None)


@pytest.mark.parametrize("inputs", [SIGN, FOUR_BITS], ids=["1 bit", "4 bits"])
@pytest.mark.parametrize(("x", "medians"), [(SHIFTED, [0.0, 2.0, -4.0]), (SYMMETRIC, [0.0] * 3)])
def test_channel_is_the_median_and_the_standard_deviation(inputs: nn.Module, x: Distribution, medians: list[float]):
    start = input_start("channel", inputs, signal(x))
    assert start.threshold.tolist() == pytest.approx(medians, abs=1e-5)
    assert start.spread.tolist() == pytest.approx([1.0, 2.0, 3.0])


def test_channel_splits_what_a_relu_returns_above_its_zeros():
    values = torch.relu(torch.tensor([-1.0, 0.0, 1.0])[:, None] + torch.randn(3, 50_000))
    rectified = Distribution.normal(torch.tensor([-1.0, 0.0, 1.0])).map(torch.relu, nonnegative=True)
    start = input_start("channel", SIGN, signal(rectified))
    assert (start.threshold > 0).all()
    assert_close(start.spread, values.std(1), rtol=0.06, atol=0)
    above = (values >= start.threshold[:, None]).float().mean(1)
    positive = (values > 0).float().mean(1)
    assert (above >= torch.minimum(0.8 * positive, torch.tensor(0.45))).all()
    assert (above <= 0.55).all()


def test_auto_is_channel_for_a_value_that_is_not_symmetric():
    start = input_start("auto", SIGN, signal(SHIFTED))
    assert start.threshold.tolist() == pytest.approx([0.0, 2.0, -4.0], abs=1e-5)
    assert start.spread.tolist() == pytest.approx([1.0, 2.0, 3.0])


def test_auto_has_no_threshold_for_a_value_that_is_known_to_be_symmetric():
    start = input_start("auto", SIGN, signal(SYMMETRIC))
    assert start.threshold is None
    assert start.spread.tolist() == pytest.approx([1.0, 2.0, 3.0])
    assert input_start("auto", SIGN, signal(UNKNOWN)).threshold is not None


def test_another_default_dtype_changes_nothing():
    model = nn.Sequential(nn.Conv3d(2, 16, 3), nn.BatchNorm3d(16), nn.ReLU(), nn.Conv3d(16, 16, 3))
    expected = qconvert.binarize(model, "default", report=False).state_dict()
    torch.set_default_dtype(torch.float64)
    try:
        state = qconvert.binarize(model, "default", report=False).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {name: value.dtype for name, value in state.items()} == {name: value.dtype for name, value in expected.items()}
    for name, value in expected.items():
        assert_close(state[name], value)


def test_auto_is_nothing_for_more_bits():
    assert input_start("auto", FOUR_BITS, signal(SHIFTED)) == InputStart(None, None)
    assert input_start("auto", FOUR_BITS, None) == InputStart(None, None)


@pytest.mark.parametrize("setting", ["channel", "auto"])
def test_where_nothing_is_known_it_is_0_and_1(setting: str):
    assert input_start(setting, SIGN, None) == InputStart(0.0, 1.0)


def test_a_threshold_is_of_what_is_read_at_any_time():
    far = Distribution.normal(torch.full((3,), 50.0))
    start = input_start("auto", SIGN, signal(SYMMETRIC, otherwise=far))
    # 4 of 7 parts of the nearer values are below it
    expected = torch.special.ndtri(torch.tensor(4 / 7)) * torch.tensor([1.0, 2.0, 3.0])
    assert_close(start.threshold, expected, rtol=0.1, atol=0)
    assert (start.spread > 10).all()


# --- output_start ---


def rules(weight: str = "sign", inputs: Any = "approxsign", threshold: Any = "channel", **settings: Any) -> dict:
    side = {"quantizer": inputs} if isinstance(inputs, str) else inputs
    sides = {"weight": {"quantizer": weight, "scale": "channel"}, "input": side | {"threshold": threshold}}
    return {"rule": [{"layers": "3", "quantize": True} | sides | settings]}


def network(**settings: Any) -> nn.Sequential:
    """Return convolution, BatchNorm, ReLU, convolution; the BatchNorm has random parameters and the right statistics."""
    model = nn.Sequential(nn.Conv3d(8, 32, 3, padding=1), nn.BatchNorm3d(32), nn.ReLU(), nn.Conv3d(32, 12, **settings))
    nn.init.uniform_(model[1].weight, 0.3, 2)
    nn.init.uniform_(model[1].bias, -1, 1)
    model[1].momentum = None
    with torch.no_grad():
        model.train()(clips())
    return model.eval()


def clips() -> Tensor:
    return torch.randn(4, 8, 8, 14, 14)


def outputs(model: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(clips()).transpose(0, 1).flatten(1).double().numpy()


MEAN, STD = 0.25, 0.25
"""Tolerances: of a mean in standard deviations, and relative. The pass takes the values in a window to be independent, and
a clip to have 16 x 112 x 112 values, of which fewer are border."""


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3},
        {"kernel_size": 1, "bias": False},
        {"kernel_size": 3, "groups": 4},
        {"kernel_size": 3, "stride": 2, "bias": False},
        {"kernel_size": (1, 3, 3), "padding": (0, 1, 1)},
        {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "rule",
    [
        rules(), rules("ternary", "sign"), rules(threshold="auto"),
        rules(inputs={"quantizer": "lsq", "bits": 4, "signed": False}),
        rules(threshold=0.5), rules(pad_value=0.0),
    ],
    ids=["sign", "ternary", "auto", "4 bits", "number", "pad 0"],
)  # fmt: skip
def test_the_converted_layers_output_has_the_float_layers_moments(settings: dict, rule: dict):
    model = network(**settings)
    expected, actual = outputs(model), outputs(convert(model, rule))
    scale = expected.std(1)
    assert (np.abs(actual.mean(1) - expected.mean(1)) < MEAN * scale).all()
    assert (np.abs(actual.std(1) / scale - 1) < STD).all()


def test_the_fit_to_the_weights_would_not_have_them():
    """The tolerances tell the two starts apart."""
    model = network(kernel_size=3)
    expected, converted = outputs(model), convert(model, rules())
    with torch.no_grad():
        converted[3].scale.copy_(model[3].weight.abs().mean((1, 2, 3, 4)))
        converted[3].offset.zero_()
    actual = outputs(converted)
    assert (np.abs(actual.mean(1) - expected.mean(1)) > MEAN * expected.std(1)).any()


@pytest.mark.parametrize("pad_value", [-1.0, 0.0, 1.0])
def test_the_border_is_counted(pad_value: float):
    """Of a volume of 2 x 2 x 2 with a border of 1, 7 in 8 values are border."""
    conv, x = nn.Conv3d(64, 16, 1, padding=1), torch.randn(512, 64, 2, 2, 2)
    output = conv(x).detach().transpose(0, 1).flatten(1)
    read = replace(Distribution.normal(torch.zeros(64)), size=(2, 2, 2))
    known = Signal(read, Distribution.normal(output.mean(1), output.std(1)))
    start = output_start(conv, SIGN, quantizer("sign"), pad_value, InputStart(None, None), known)
    padded = nn.functional.pad(torch.where(x < 0, -1.0, 1.0), (1,) * 6, value=pad_value)
    raw = nn.functional.conv3d(padded, torch.where(conv.weight < 0, -1.0, 1.0)).detach().transpose(0, 1).flatten(1)
    corrected = start.scale[:, None] * raw + start.offset[:, None] + conv.bias.detach()[:, None]
    assert_close(corrected.mean(1), output.mean(1), rtol=0, atol=0.05 * output.std().item())
    if pad_value == 0:  # a border of ones is the same in all channels: its part in the spread depends on their weights
        assert_close(corrected.std(1), output.std(1), rtol=0.05, atol=0)


def test_a_border_that_repeats_values_is_none():
    read = replace(Distribution.normal(torch.ones(4)), size=(2, 2, 2))
    known = Signal(read, Distribution.normal(torch.zeros(3)))
    repeated = nn.Conv3d(4, 3, 3, padding=1, padding_mode="replicate")
    without, zeros = (nn.Conv3d(4, 3, 3, padding=padding) for padding in (0, 1))
    for conv in (without, zeros):
        conv.load_state_dict(repeated.state_dict())
    starts = [
        output_start(conv, SIGN, quantizer("sign"), -1.0, InputStart(1.0, 1.0), known) for conv in (repeated, without, zeros)
    ]
    assert_close(starts[0].scale, starts[1].scale)
    assert_close(starts[0].offset, starts[1].offset)
    assert not torch.allclose(starts[0].offset, starts[2].offset)


def test_without_a_signal_or_a_weight_it_is_the_fit_to_the_weights():
    conv, quantizers = nn.Conv3d(3, 2, 1), (SIGN, quantizer("sign"))
    start = output_start(conv, *quantizers, -1.0, InputStart(0.0, 1.0), None)
    assert (start.scale, start.offset) == ("channel", 0.0)
    start = output_start(conv.to("meta"), *quantizers, -1.0, InputStart(0.0, 1.0), signal(SHIFTED))
    assert (start.scale, start.offset) == ("channel", 0.0)


def test_a_channel_that_would_be_constant_keeps_the_fit_to_its_weights():
    """Its input is never below the threshold: no scale gives the output a spread."""
    conv = nn.Conv3d(3, 2, 1, bias=False)
    rectified = SHIFTED.map(torch.relu, nonnegative=True)
    known = Signal(rectified, Distribution.normal(torch.zeros(2), torch.ones(2)))
    start = output_start(conv, SIGN, quantizer("sign"), -1.0, InputStart(None, None), known)
    assert_close(start.scale, conv.weight.detach().abs().mean((1, 2, 3, 4)))
    assert start.offset.tolist() == [0.0, 0.0]


def test_a_weight_of_zeros_is_no_obstacle():
    model = network(kernel_size=1)
    nn.init.zeros_(model[3].weight[:1])
    layer = convert(model, rules())[3]
    assert layer.scale.isfinite().all()
    assert layer.offset.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_start_is_of_the_layers_precision(dtype: torch.dtype):
    model = network(kernel_size=3)
    expected, layer = convert(model, rules())[3], convert(model.to(dtype), rules())[3]
    for name in ("scale", "offset"):
        assert getattr(layer, name).dtype == dtype
        assert_close(getattr(layer, name).float(), getattr(expected, name), rtol=0.05, atol=0.05)


# --- constants ---


def constants(model: nn.Module, x: Any) -> set[str]:
    """Return the layers whose quantized input is one value in more than half of the channels, by a run with hooks."""
    found = set()
    for name in binary_layers(model):

        def hook(module, args, codes, name=name):
            channels = codes.transpose(0, 1).flatten(1)
            if (channels == channels[:, :1]).all(1).float().mean() > 0.5:
                found.add(name)

        model.get_submodule(name).activation.register_forward_hook(hook)
    with torch.no_grad():
        model(x)
    return found


def warned(model: nn.Module, rule: Any, data: Any = None) -> tuple[nn.Module, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        converted = qconvert.binarize(model, rule, calibration_data=data, report=False)
    return converted, [str(each.message) for each in caught if each.category is ConstantInputWarning]


def named(message: str) -> set[str]:
    return set(message.partition("learn nothing: ")[2].partition(". ")[0].split(", "))


def test_r3d_18_with_plain_signs_sees_constants_wherever_hooks_do():
    model = r3d_18().eval()
    converted, (message,) = warned(model, "bitorch")
    seen = constants(converted, torch.randn(1, 3, 8, 32, 32))
    assert len(binary_layers(converted)) == 20
    assert len(seen) == 19
    assert named(message) == seen
    assert message.startswith("19 of 20 converted layers see a constant")
    assert 'threshold = "auto"' in message


def test_r3d_18_with_thresholds_sees_none():
    rule = {"extends": "bitorch", "rule": [{"input": {"quantizer": "sign", "threshold": "auto"}}]}
    converted, messages = warned(r3d_18().eval(), rule)
    assert messages == []
    assert constants(converted, torch.randn(8, 3, 8, 32, 32)) == set()


@pytest.mark.parametrize(
    ("build", "rule", "expected"),
    [
        (TwoConvs, "bitorch", {"second"}),
        (TwoConvs, rules(layers="*"), set()),
        (TwoConvs, rules(layers="*", threshold=0.25), set()),
        (TwoConvs, rules(layers="*", threshold=-0.25), {"second"}),
        (lambda: nn.Sequential(nn.Conv3d(1, 2, 1), nn.Sigmoid(), nn.Conv3d(2, 2, 1)), "bitorch", {"2"}),
        (lambda: nn.Sequential(nn.Conv3d(1, 2, 1), nn.Tanh(), nn.Conv3d(2, 2, 1)), "bitorch", set()),
        (lambda: nn.Sequential(nn.Conv3d(1, 2, 1), nn.ReLU(), nn.Conv3d(2, 2, 1)), "weights-only", set()),
    ],
)  # fmt: skip
def test_the_warning_names_the_layers_that_see_a_constant(build: Callable[[], nn.Module], rule: Any, expected: set[str]):
    model, x = build().eval(), torch.randn(2, 2 if build is TwoConvs else 1, 4, 6, 6)
    converted, messages = warned(model, rule)
    assert constants(converted, x) == expected
    assert set().union(*map(named, messages)) == expected
    assert len(messages) == (1 if expected else 0)


@pytest.mark.parametrize(("rectified", "expected"), [(4, set()), (5, {"2"})])
def test_a_layer_is_named_where_more_than_half_of_its_channels_are_constant(rectified: int, expected: set[str]):
    class Partly(nn.Module):
        def forward(self, x):
            return torch.cat([x[:, :rectified].relu(), x[:, rectified:]], 1)

    _, messages = warned(nn.Sequential(nn.Conv3d(1, 8, 1, bias=False), Partly(), nn.Conv3d(8, 2, 1)).eval(), "bitorch")
    assert set().union(*map(named, messages)) == expected


def test_the_warning_advises_what_the_rule_or_the_data_lack():
    model = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2), nn.Conv3d(2, 2, 1), nn.Conv3d(2, 2, 1)).eval()
    nn.init.zeros_(model[1].weight)
    nn.init.ones_(model[1].bias)
    add_threshold, measure, other_data = 'threshold = "auto"', "by calibration_data", "constant in calibration_data"
    both = {"extends": "bitorch", "rule": [{"layers": "3", "input": {"quantizer": "sign", "threshold": "auto"}}]}
    clips = [torch.randn(2, 1, 2, 2, 2)]
    for rule, data, dead, expected in (
        ("bitorch", None, "2, 3", [add_threshold]),
        (rules(layers="*"), None, "2, 3", [measure]),
        (rules(layers="*"), clips, "2, 3", [other_data]),
        (both, clips, "2, 3", [add_threshold, other_data]),
    ):
        _, (message,) = warned(model, rule, data)
        assert f"learn nothing: {dead}. " in message
        assert [each for each in (add_threshold, measure, other_data) if each in message] == expected


def test_the_warning_is_an_error_where_that_is_asked_for():
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConstantInputWarning)
        with pytest.raises(
            ConstantInputWarning, match=r"^1 of 2 converted layers see a constant and learn nothing: second\. "
        ):
            qconvert.binarize(TwoConvs(), "bitorch", report=False)


RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "max of two": lambda x: torch.max(x, torch.zeros_like(x)),
    "max with itself negated": lambda x: torch.max(x, -x),
    "threshold": lambda x: F.threshold(x, 0.0, 0.0),
    "product with a mask": lambda x: x * (x > 0),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.0),
    "flip": lambda x: x.relu().flip(1),
    "roll": lambda x: x.relu().roll(1, dims=2),
    "addcmul": lambda x: torch.addcmul(torch.zeros_like(x), x.relu(), torch.ones_like(x)),
    "einsum": lambda x: torch.einsum("ncdhw->ncdwh", x.relu()),
    "stack": lambda x: torch.stack([x.relu(), x.relu()]).sum(0),
    "adaptive max pooling": lambda x: F.adaptive_max_pool3d(x.relu(), (7, 55, 55)),
    "logaddexp": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "softmax over channels": lambda x: x.softmax(1),
}


class Rectified(nn.Module):
    """A value that a function makes non-negative, between two convolutions; behind a step that no graph shows if opaque."""

    def __init__(self, function: Callable[[Tensor], Tensor], opaque: bool):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv3d(1, 16, 3), nn.BatchNorm3d(16, momentum=1.0), nn.Conv3d(16, 2, 1)
        self.function, self.opaque = function, opaque

    def forward(self, x):
        x = self.function(self.norm(self.first(x)))
        if self.opaque and x.sum() < 0:
            raise ValueError("of values that are not negative")
        return self.second(x)


@pytest.mark.parametrize("opaque", [False, True], ids=["traced", "opaque"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("function", RELUS.values(), ids=RELUS)
def test_a_relu_by_any_name_leaves_no_constant(function: Callable[[Tensor], Tensor], training: bool, opaque: bool):
    # what an opaque module does between its children nothing tells, but for a ReLU it is prepared
    if opaque and function in (RELUS["logaddexp"], RELUS["softmax over channels"], RELUS["adaptive max pooling"]):
        pytest.skip("never 0, and of no known size")
    model, x = Rectified(function, opaque), torch.randn(1, 1, *USUAL_SIZE)
    model(x)
    converted, messages = warned(model.train(training), rules(layers="second"))
    assert messages == []
    assert constants(converted, x) == set()


def test_a_model_without_values_is_not_judged():
    with torch.device("meta"):
        model = TwoConvs()
    converted, messages = warned(model, "bitorch")
    assert messages == []
    assert isinstance(converted.second, QConv3d)
