"""Where the DoReFa quantizers differ from bitorch's on purpose, and the levels they claim to have."""

import pytest
import torch

from qconvert.errors import QuantizerError
from qconvert.quantizations import InputDoReFa, WeightDoReFa


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_all_zero_weights_are_finite_and_equal(bits):
    levels = 2**bits - 1
    weight = torch.zeros(3, 2, requires_grad=True)
    quantized = WeightDoReFa(bits)(weight)
    quantized.sum().backward()
    middle = 2 * torch.round(torch.tensor(levels / 2)) / levels - 1
    assert torch.equal(quantized, middle.expand(3, 2))
    assert torch.equal(weight.grad, torch.ones(3, 2))


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_weights_take_every_level_from_minus_one_to_one(bits):
    quantized = WeightDoReFa(bits)(torch.linspace(-3, 3, 1001))
    torch.testing.assert_close(quantized.unique(), torch.linspace(-1, 1, 2**bits))


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_inputs_take_every_level_from_zero_to_one(bits):
    quantized = InputDoReFa(bits)(torch.linspace(-3, 3, 1001))
    torch.testing.assert_close(quantized.unique(), torch.linspace(0, 1, 2**bits))


@pytest.mark.parametrize("cls", [WeightDoReFa, InputDoReFa])
def test_bit_width_is_the_number_of_bits(cls):
    assert cls().bit_width == 1
    assert [cls(bits).bit_width for bits in (1, 2, 16)] == [1, 2, 16]


@pytest.mark.parametrize("bits", [0, -1, 17, 2.0, "2", True, None])
@pytest.mark.parametrize("cls", [WeightDoReFa, InputDoReFa])
def test_bits_out_of_range(cls, bits):
    with pytest.raises(QuantizerError, match=f"^{cls.name}: bits must be a whole number from 1 to 16, got {bits!r}$"):
        cls(bits)
