"""`Quantization`: bit widths, the deprecated name, subclasses."""

import pytest
import torch
from torch import nn

from qconvert.quantizations import Identity, Quantization, quantizer

BIT_WIDTHS = {
    "identity": 32,
    "sign": 1,
    "approxsign": 1,
    "swishsign": 1,
    "steheaviside": 1,
    "progressive_sign": 1,
    "weightdorefa": 1,
    "inputdorefa": 1,
    "ternary": 2,
    "lsq": 4,
}


@pytest.mark.parametrize("name", BIT_WIDTHS)
def test_bit_width(name):
    assert quantizer(name).bit_width == BIT_WIDTHS[name]
    assert type(quantizer(name)).bit_width == BIT_WIDTHS[name]


def test_old_name_of_bit_width_warns_at_the_caller():
    with pytest.warns(DeprecationWarning, match=r"^'bitwidth' is deprecated, use 'bit_width'$") as caught:
        assert quantizer("inputdorefa", bits=3).bitwidth == 3
    assert caught[0].filename == __file__


def test_identity_is_no_copy():
    x = torch.randn(2, 3)
    assert Identity()(x) is x


def test_forward_is_quantize():
    class Doubled(Quantization):
        def quantize(self, x):
            return 2 * x

    assert isinstance(Doubled(), nn.Module)
    assert Doubled()(torch.ones(1)).item() == 2


def test_subclass_without_quantize_says_so():
    class Unfinished(Quantization):
        pass

    with pytest.raises(NotImplementedError, match=r"^Unfinished defines no quantize\(\)$"):
        Unfinished()(torch.ones(1))
