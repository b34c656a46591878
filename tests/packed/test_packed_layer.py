"""A packed layer beside naive numpy, and beside the layer that was packed."""

import math
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_layers import both, layer
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from qconvert import ModelError, QConv3d, QConv3d_NoAct
from qconvert.kernels import operators
from qconvert.kernels.geometry import Geometry, Window
from qconvert.packed.layer import PackedConv3d
from qconvert.packed.obstacles import no_packing
from qconvert.quantizations import LSQ, Identity, InputDoReFa, Sign, WeightDoReFa

CHANNELS = [1, 2, 63, 64, 65, 127, 128, 130]
OUTPUTS = [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65]


def whole_sums(made: QConv3d, x: torch.Tensor) -> np.ndarray:
    """Return sums of signs by numpy alone."""
    settings = (made.stride, made.padding, made.dilation, made.groups, made.pad_value, made.padding_mode)
    signs = oracle.sign(x.numpy() - 0), oracle.sign(made.weight.detach().numpy())
    return oracle.conv3d(*signs, None, *settings)


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the compiled workers, and torch's operations in their place."""
    if request.param == "torch":
        monkeypatch.setattr(operators, "kernel", None)
    return request.param


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("inputs", CHANNELS)
def test_sums_of_signs_are_exact_for_any_number_of_channels(
    inputs: int, outputs: int, memory_format: torch.memory_format, way: str
) -> None:
    made, x = QConv3d(inputs, outputs, (2, 1, 2), padding=(1, 0, 0)).eval(), torch.randn(1, inputs, 2, 3, 3)
    x = x.contiguous(memory_format=memory_format)
    assert np.array_equal(PackedConv3d(made)(x).numpy(), whole_sums(made, x))


@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 1},
        {"kernel_size": 3},
        {"kernel_size": (1, 3, 3), "padding": (0, 1, 1)},
        {"kernel_size": (3, 1, 1), "padding": (1, 0, 0)},
        {"kernel_size": (3, 2, 1), "padding": (1, 2, 0), "stride": (1, 2, 3)},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 3, "dilation": 3},
        {"kernel_size": (2, 3, 2), "padding": (4, 1, 2), "dilation": (1, 2, 3), "stride": (3, 1, 2)},
        {"kernel_size": (2, 3, 4), "padding": "same"},
        {"kernel_size": 3, "padding": "valid"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": (1, 2, 1), "padding_mode": "replicate"},
        {"kernel_size": (3, 1, 3), "padding": "same", "padding_mode": "circular"},
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": 3, "padding": 2, "groups": 6, "dilation": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("pad_value", [-1.0, 1.0, 0.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_sums_of_signs_are_exact_for_any_geometry(geometry: dict[str, Any], pad_value: float, batch: int, way: str) -> None:
    made, x = QConv3d(12, 18, **geometry, pad_value=pad_value).eval(), torch.randn(batch, 12, 5, 6, 7)
    assert np.array_equal(PackedConv3d(made)(x).numpy(), whole_sums(made, x))


@st.composite
def cases(draw: Any) -> tuple[dict[str, Any], tuple[int, ...]]:
    def triple(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(3))

    groups = draw(st.integers(1, 3))
    kernel, padding, dilation = triple(1, 3), triple(0, 3), triple(1, 2)
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)]
    size = tuple(draw(st.integers(each, each + 3)) for each in least)
    made = {
        "in_channels": groups * draw(st.integers(1, 70)),
        "out_channels": groups * draw(st.integers(1, 35)),
        "kernel_size": kernel,
        "stride": triple(1, 3),
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "pad_value": draw(st.sampled_from([-1.0, 0.0, 1.0, 3.0, -4.0])),
    }
    return made, (draw(st.integers(1, 2)), made["in_channels"], *size)


@given(cases())
@settings(deadline=None, max_examples=60)
def test_sums_of_signs_are_exact_whatever_the_layer(case: tuple[dict[str, Any], tuple[int, ...]]) -> None:
    made, x = QConv3d(**case[0]).eval(), torch.randn(case[1])
    assert np.array_equal(PackedConv3d(made)(x).numpy(), whole_sums(made, x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (7, 1), (16, 1), (33, 1), (64, 1), (40, 2)])
def test_what_is_added_lies_as_it_lies(channels: int, groups: int, memory_format: torch.memory_format, way: str) -> None:
    made = QConv3d(channels, channels, 3, padding=1, groups=groups, scale=0.5, shortcut=True).eval()
    x = torch.randn(3, channels, 3, 5, 3).contiguous(memory_format=memory_format)
    assert_close(*both(made, x), rtol=0, atol=0)


@pytest.mark.parametrize("x", [torch.tensor([0.0, -0.0, 1e-45, -1e-45, math.inf, -math.inf, math.nan, -1.0])])
def test_every_float_has_the_sign_that_the_quantizer_gives_it(x: torch.Tensor, way: str) -> None:
    made = QConv3d(8, 1, 1).eval()
    made.weight.data = torch.eye(8).view(8, 8, 1, 1, 1)[:1] + 1
    for channel in range(8):
        one = torch.full((1, 8, 1, 1, 1), -1.0)
        one[0, channel] = x[channel]
        assert torch.equal(*both(made, one)), x[channel]


@pytest.mark.parametrize("quantizer", ["sign", "approxsign", "swishsign", "steheaviside", "progressive_sign"])
def test_an_input_at_its_threshold_has_the_sign_that_the_quantizer_gives_it(quantizer: str, way: str) -> None:
    made = layer(70, 16, 1, input_quantization=quantizer, threshold=0.0, spread=2.0)
    at = made.activation.threshold.detach().view(1, -1, 1, 1, 1).clone()
    beside = [torch.nextafter(at, torch.full_like(at, each)) for each in (-math.inf, math.inf)]
    for x in (at, *beside):
        assert torch.equal(*both(made, x))


INPUTS = {
    "sign": lambda: "sign",
    "dorefa1": lambda: InputDoReFa(1),
    "dorefa2": lambda: InputDoReFa(2),
    "dorefa4": lambda: InputDoReFa(4),
    "lsq2": lambda: LSQ(2),
    "lsq2 unsigned": lambda: LSQ(2, signed=False),
    "lsq4": lambda: LSQ(4),
    "lsq8 unsigned": lambda: LSQ(8, signed=False),
}
WEIGHTS = {
    "sign": lambda: "sign",
    "ternary": lambda: "ternary",
    "dorefa2": lambda: WeightDoReFa(2),
    "dorefa3": lambda: WeightDoReFa(3),
    "lsq2": lambda: LSQ(2),
    "lsq4": lambda: LSQ(4),
    "lsq8": lambda: LSQ(8),
}


@given(
    *(st.integers(1, 8), st.integers(2, 8), st.booleans()),
    *(st.integers(1, 70), st.integers(1, 34), st.integers(1, 2), st.integers(-3, 3)),
    st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=40)
def test_sums_of_codes_of_several_bits_are_exact(
    input_bits: int, weight_bits: int, signed: bool, inputs: int, outputs: int, groups: int, border: int, random: Any
) -> None:
    """With steps of 1 the codes are whole numbers, and so is every output, up to its rounding to float32."""
    made = QConv3d(
        *(groups * inputs, groups * outputs, (2, 3, 1)),
        padding=(1, 0, 1),
        groups=groups,
        pad_value=border,
        input_quantization=LSQ(max(input_bits, 1 + signed), signed=signed),
        weight_quantization=LSQ(weight_bits),
    ).eval()
    quantizers = made.activation.activation_function, made._weight_quantize
    numbers = np.random.default_rng(random.randrange(2**32))
    x = numbers.normal(0, 2**input_bits / 3, (2, groups * inputs, 2, 3, 2)).astype(np.float32)
    weight = numbers.normal(0, 2**weight_bits / 3, made.weight.shape).astype(np.float32)
    with torch.no_grad():
        made.weight.copy_(torch.from_numpy(weight))
        for each in quantizers:
            each.step.fill_(1.0)
    codes = [np.rint(values.clip(each.lowest, each.highest)) for values, each in zip((x, weight), quantizers, strict=True)]
    expected = oracle.conv3d(*(each.astype(np.int64) for each in codes), None, 1, (1, 0, 1), 1, groups, border)
    assert np.array_equal(PackedConv3d(made)(torch.from_numpy(x)).detach().numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("groups", [1, 2])
def test_codes_of_several_bits_give_what_floats_give(inputs: str, weights: str, groups: int, way: str) -> None:
    made = layer(
        *(130, 34, (2, 3, 1)),
        padding=(1, 1, 0),
        groups=groups,
        threshold=0.0,
        spread=1.5,
        scale="channel",
        offset=0.0,
        input_quantization=INPUTS[inputs](),
        weight_quantization=WEIGHTS[weights](),
    )
    packed, plain = both(made, torch.randn(2, 130, 3, 4, 5))
    assert_close(packed, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())


@pytest.mark.parametrize("inputs", INPUTS)
def test_the_codes_are_those_of_the_quantizer(inputs: str, way: str) -> None:
    """One input channel and one weight a layer: the output is the code."""
    made = QConv3d(1, 1, 1, input_quantization=INPUTS[inputs](), threshold=0.3, spread=0.7).eval()
    made.weight.data.fill_(1.0)
    values = torch.cat([torch.linspace(-3, 3, 2001), torch.arange(-9, 10) * 0.35 + 0.3])
    packed, plain = both(made, values.view(1, 1, 1, 1, -1))
    assert_close(packed, plain, rtol=1e-6, atol=1e-6)
    assert packed.unique().numel() == plain.unique().numel() > 1


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": "channel"},
        {"scale": "channel", "offset": 0.0},
        {"bias": True},
        {"scale": 2.0, "bias": True},
        {"threshold": 0.0, "spread": 3.0, "scale": "channel"},
        {"standardize": True, "scale": "channel"},
    ],
    ids=str,
)
def test_what_is_per_channel_is_rounded_as_in_the_layer(settings: dict[str, Any], way: str) -> None:
    made = layer(66, 35, 3, padding=1, **settings)
    assert torch.equal(*both(made, torch.randn(2, 66, 3, 4, 5)))


@pytest.mark.parametrize("settings", [{"rprelu": True}, {"shortcut": True}, {"rprelu": True, "shortcut": True}], ids=str)
def test_shortcut_and_rprelu_are_part_of_it(settings: dict[str, Any], way: str) -> None:
    made = layer(40, 40, 3, padding=1, scale="channel", offset=0.0, bias=True, **settings)
    packed, plain = both(made, torch.randn(2, 40, 3, 4, 5))
    assert_close(packed, plain, rtol=1e-6, atol=1e-5)


def test_any_layout_of_the_input_gives_the_same() -> None:
    made, x = layer(20, 20, 3, padding=1), torch.randn(2, 20, 3, 6, 5)
    plain = made(x)
    for same in (x.to(memory_format=torch.channels_last_3d), x.transpose(3, 4).contiguous().transpose(3, 4)):
        assert torch.equal(PackedConv3d(made)(same), plain)
    wide = torch.randn(4, 40, 3, 6, 5)
    assert torch.equal(PackedConv3d(made)(wide[::2, ::2]), made(wide[::2, ::2]))
    assert torch.equal(PackedConv3d(made)(x[0]), plain[0])


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in Linux's /proc")
def test_no_pool_of_threads_is_started_beside_that_of_torch() -> None:
    program = """
import os, torch
from qconvert import QConv3d
from qconvert.packed.layer import PackedConv3d

x = torch.randn(1, 64, 8, 16, 16)
packed = PackedConv3d(QConv3d(64, 64, 3))
torch.set_num_threads(1)
packed(x)  # compiles, for which LLVM may have a thread
torch.set_num_threads(3)
torch.relu(torch.randn(64, 64, 64, 64))
before = len(os.listdir("/proc/self/task"))
packed(x)
print(before, len(os.listdir("/proc/self/task")))
"""
    before, after = map(int, subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout.split())
    assert before == after >= 3


def test_places_are_the_same_arrays_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are given their addresses: one that is replaced is freed while it is read."""
    where = Geometry(Window.of((1, 1, 1), (1, 1, 1), [0] * 6, (1, 1, 1)), 1, (2, 2, 2), 1, 1)
    together, places = threading.Barrier(4, timeout=10), Geometry._places
    monkeypatch.setattr(Geometry, "_places", lambda self, *axes: (together.wait(), places(self, *axes))[1])
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: where.inner, range(4)))
    assert len({id(each) for each in found}) == 1


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same(threads: int) -> None:
    made, x = layer(70, 40, 3, padding=1, scale="channel"), torch.randn(1, 70, 6, 9, 9)
    plain, before = made(x), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(PackedConv3d(made)(x), plain) for _ in range(5))
    finally:
        torch.set_num_threads(before)


def test_the_operators_are_torchs_own_kind() -> None:
    made, x = PackedConv3d(layer(70, 40, 3, padding=1, weight_quantization=LSQ(2))), torch.randn(2, 70, 3, 4, 5)
    packing = (x, made.thresholds, made.spreads, None, 1, made.border, 1)
    torch.library.opcheck(operators.pack_bits, packing)
    words = operators.pack_bits(*packing)
    sizes = (made.kernel_size, made.stride, made.border, made.dilation, 40, 70, 2, -2, 1)
    tensors = (words, made.weight, made.base, torch.randint(-9, 9, (40, 3, 3, 3)), made.table, torch.randn(2, 40, 3, 4, 5))
    for has_values, following in ((True, None), (False, [1, 0, 2, 1, 0, 0]), (True, [1] * 6)):
        for channels_last in (False, True):
            torch.library.opcheck(operators.packed_conv3d, (*tensors, *sizes, channels_last, has_values, following))


def test_its_products_are_counted_as_those_of_a_float_convolution() -> None:
    made, x = layer(64, 40, 3, padding=1, stride=2), torch.randn(2, 64, 3, 4, 5)
    counts = []
    for each in (PackedConv3d(made), torch.nn.Conv3d(64, 40, 3, 2, 1)):
        with FlopCounterMode(display=False) as counter:
            each(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def eight_bits(channels: int, *, signed: bool = True) -> QConv3d:
    """Return a layer whose sums reach 27 * 256 * 256 for each channel, 27 * 510 * 256 with inputs from 0 on."""
    return QConv3d(channels, 16, 3, input_quantization=LSQ(8, signed=signed), weight_quantization=LSQ(8))


def stepping_back() -> QConv3d:
    made = QConv3d(64, 64, 3, input_quantization=LSQ(4))
    torch.nn.init.constant_(made.activation.activation_function.step, -0.3)
    return made


@pytest.mark.parametrize("with_numba", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_floats_come_in_the_memory_format_of_the_input(
    memory_format: torch.memory_format, with_numba: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_numba:
        monkeypatch.setattr(operators, "kernel", None)
    made, x = layer(65, 33, 3), torch.randn(2, 65, 4, 5, 6).contiguous(memory_format=memory_format)
    packed = PackedConv3d(made)
    assert packed(x).is_contiguous(memory_format=memory_format)
    packed.channels_last = True
    assert packed(x).is_contiguous(memory_format=torch.channels_last_3d)


class Custom(Sign):
    name = "custom"

    def levels(self, quantized: torch.Tensor) -> None:
        return None


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: QConv3d_NoAct(64, 64, 3), "its input is in float"),
        (lambda: QConv3d(64, 64, 3, input_quantization=Identity()), "its input is in float"),
        (lambda: QConv3d(64, 64, 3, weight_quantization=Identity()), "'identity' does not say its levels"),
        (lambda: QConv3d(64, 64, 3, weight_quantization=Custom()), "'custom' does not say its levels"),
        (lambda: QConv3d(64, 64, 3, weight_quantization=LSQ(9)), "9-bit weights"),
        (lambda: QConv3d(64, 64, 3, input_quantization=LSQ(16)), "16-bit inputs"),
        (lambda: QConv3d(64, 64, 3, padding=1, pad_value=0.3), r"border of 0\.3 lies between the codes"),
        (lambda: QConv3d(64, 64, 3, groups=64), "groups of 1 -> 1 channels"),
        (lambda: eight_bits(1214), "more than 31 bits"),
        (lambda: eight_bits(610, signed=False), "more than 31 bits"),
        (lambda: QConv3d(64, 64, 3, padding=-1), "its padding is below 0"),
        (stepping_back, "the step of its input's quantizer is not above 0"),
        (lambda: QConv3d(64, 64, 3, padding=1, pad_value=1e7), "more than 31 bits"),
        (lambda: QConv3d(64, 64, 3, dtype=torch.float64), r"torch\.float64"),
        (lambda: QConv3d(64, 64, 3, device="meta"), "on meta"),
    ],
)
def test_what_cannot_be_counted_is_said(made: Any, reason: str) -> None:
    assert re.search(reason, no_packing(made()))


@pytest.mark.parametrize(("channels", "signed"), [(1213, True), (609, False)])
def test_the_largest_sums_are_packed(channels: int, signed: bool) -> None:
    made = eight_bits(channels, signed=signed).eval()
    assert no_packing(made) is None
    inputs, weights = made.activation.activation_function, made._weight_quantize
    for each in (inputs, weights):
        torch.nn.init.ones_(each.step)
    torch.nn.init.constant_(made.weight, -1000.0)
    x = torch.full((1, channels, 3, 3, 3), -1000.0 if signed else 1000.0)
    expected = 27 * channels * -128 * (-128 if signed else 255)
    assert (PackedConv3d(made)(x) == torch.tensor(float(expected))).all()


def test_hooks_on_the_quantizers_are_seen() -> None:
    made = QConv3d(64, 64, 3)
    assert no_packing(made) is None
    made.activation.activation_function.register_forward_hook(lambda *_: None)
    assert "hooks" in no_packing(made)


def test_it_cannot_be_trained() -> None:
    packed = PackedConv3d(layer(64, 64))
    with pytest.raises(ModelError, match="no latent weights to train: train the converted model, and pack it again"):
        packed.train()
    assert not packed.eval().training
