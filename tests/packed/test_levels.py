"""Every quantizer says the values that it puts out, exactly, and their integer codes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconvert.errors import QuantizerError
from qconvert.quantizations import (
    LSQ,
    Identity,
    InputDoReFa,
    ProgressiveSign,
    Quantization,
    Sign,
    SteHeaviside,
    SwishSign,
    Ternary,
    WeightDoReFa,
    quantizer,
)
from qconvert.quantizations.levels import Levels
from qconvert.quantizations.stored import Stored, bare

EVERY = {"sign": Sign, "steheaviside": SteHeaviside, "swishsign": SwishSign, "ternary": Ternary}
EVERY |= {"progressive_sign": lambda: ProgressiveSign().eval()}
EVERY |= {f"weightdorefa{k}": lambda k=k: WeightDoReFa(k) for k in (*range(1, 9), 16)}
EVERY |= {f"inputdorefa{k}": lambda k=k: InputDoReFa(k) for k in (*range(1, 9), 16)}
EVERY |= {f"lsq{k}": lambda k=k: LSQ(k) for k in (*range(2, 9), 16)}
EVERY |= {f"lsq{k}unsigned": lambda k=k: LSQ(k, signed=False) for k in (*range(1, 9), 16)}
every_quantizer = pytest.mark.parametrize("build", EVERY.values(), ids=EVERY)


def quantized(made: Quantization, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return made(x)


@every_quantizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_of_the_codes_are_what_the_quantizer_puts_out(build, dtype):
    made = build().to(dtype)
    x = torch.randn(3, 5, 7, dtype=dtype) * 2
    y = quantized(made, x)
    levels = made.levels(y)
    codes = levels.codes(y)
    assert levels.bits == made.bit_width
    assert levels.count <= 2**levels.bits
    assert torch.equal(levels.values()[codes].view(y.shape), y)


@every_quantizer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(build, dtype):
    made = build().to(dtype)
    if made.bit_width > 8:
        pytest.skip("its codes are no integers of that dtype")
    y = quantized(made, torch.randn(501, dtype=dtype))
    levels = made.levels(y)
    assert torch.equal(levels.values()[levels.codes(y)], y)


@given(st.integers(2, 8), st.floats(2**-6, 3, width=32))
def test_codes_of_lsq_are_the_integers_of_its_paper(bits, step):
    made = LSQ(bits)
    with torch.no_grad():
        made.step.fill_(step)
    x = np.linspace(-5, 5, 97, dtype=np.float32)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    expected = np.clip(np.rint(x / np.float32(step)), lowest, highest) - lowest
    y = quantized(made, torch.from_numpy(x))
    assert made.levels(y).codes(y).tolist() == expected.tolist()


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_dorefa_are_the_rounded_multiples(bits):
    n = 2**bits - 1
    x = np.linspace(-2, 2, 97)
    squashed = np.tanh(x)
    expected = np.rint(n * (squashed / (2 * np.abs(squashed).max()) + 0.5))
    y = quantized(WeightDoReFa(bits), torch.from_numpy(x))
    assert WeightDoReFa(bits).levels(y).codes(y).tolist() == expected.tolist()
    expected = np.rint(n * np.clip(x, 0, 1))
    y = quantized(InputDoReFa(bits), torch.from_numpy(x))
    assert InputDoReFa(bits).levels(y).codes(y).tolist() == expected.tolist()


def test_codes_of_signs_and_ternary():
    x = torch.tensor([-3.0, -0.1, -0.0, 0.0, 0.1, 3.0])
    assert Sign().levels(x).codes(quantized(Sign(), x)).tolist() == [0, 0, 1, 1, 1, 1]
    assert SteHeaviside().levels(x).codes(quantized(SteHeaviside(), x)).tolist() == [0, 0, 0, 0, 1, 1]
    y = quantized(Ternary(), x)
    assert Ternary().levels(y).codes(y).tolist() == [0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("build", [Ternary, Sign, WeightDoReFa, LSQ])
@pytest.mark.parametrize("x", [torch.zeros(0, 3), torch.zeros(4)], ids=["none", "zeros"])
def test_no_values_and_zeros(build, x):
    y = quantized(build(), x)
    levels = build().levels(y)
    assert torch.equal(levels.values()[levels.codes(y)].view(y.shape), y)


@pytest.mark.parametrize("step", [-0.25, 0.0])
def test_a_step_that_training_has_brought_below_zero(step):
    made = LSQ(3)
    with torch.no_grad():
        made.step.fill_(step)
    y = quantized(made, torch.tensor([-3.0, -0.3, 0.3, 3.0]))
    levels = made.levels(y)
    assert torch.equal(levels.values()[levels.codes(y)], y)


@pytest.mark.parametrize("strange", [0.5, math.nan, math.inf])
def test_what_is_no_level(strange):
    levels = Sign().levels(torch.zeros(1))
    with pytest.raises(QuantizerError, match=f"^{strange} is none of the 2 levels of its quantizer$"):
        levels.codes(torch.tensor([1.0, strange, -1.0]))


def test_many_values_are_looked_up_part_by_part():
    y = quantized(Sign(), torch.randn(2**16 * 2 + 3))
    assert torch.equal(Sign().levels(y).codes(y), (y > 0).int())


def test_who_has_no_levels():
    class Halves(Quantization):
        name = "halves"
        bit_width = 2

    assert Identity().levels(torch.zeros(1)) is None
    assert Halves().levels(torch.zeros(1)) is None


def test_stored_passes_on_and_says_what_made_the_values():
    made = Stored(LSQ(3), Levels(3, count=8, lowest=-4, step=1, divisor=1, unit=0.5, dtype=torch.float32))
    x = torch.tensor([0.5, -2.0])
    assert made(x) is x
    assert made.bit_width == 3
    assert made.levels(x).unit == 0.5
    assert bare(made) is made.inner


# --- settings ---


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sign", {}),
        ("lsq", {"bits": 3, "signed": False}),
        ("weightdorefa", {"bits": 5}),
        ("inputdorefa", {"bits": 2}),
        ("swishsign", {"beta": 2.5}),
        ("progressive_sign", {"initial_scale": 0.5, "alpha": 2, "beta": 3}),
        ("identity", {}),
        ("ternary", {}),
    ],
)
def test_settings_are_the_arguments(name, settings):
    assert quantizer(name, **settings).settings == settings


def test_a_quantizer_that_does_not_keep_an_argument():
    class Forgetful(Quantization):
        name = "forgetful"

        def __init__(self, width=3):
            super().__init__()

    with pytest.raises(QuantizerError, match=r"^Forgetful does not keep its argument 'width': set self\.width$"):
        _ = Forgetful().settings
