"""`Quantization`: the base class of everything that turns a float tensor into a low-bit one."""

import warnings
from typing import ClassVar

from torch import Tensor, nn

from ..errors import QuantizerError

MAX_BITS = 16
"""Widest quantizer: 2**16 - 1 levels are still exact integers in float32 arithmetic."""


class Quantization(nn.Module):
    """A quantizer as a module: ``quantize`` maps a tensor to a tensor of the same shape and dtype.

    Attributes:
        name: the name under which rule files and layers find the quantizer.
        bit_width: bits that one quantized value needs in storage (32 for a quantizer that changes nothing).
    """

    name: ClassVar[str] = "none"
    bit_width: int = -1

    @property
    def bitwidth(self) -> int:
        """Bitorch's old name of `bit_width`; deprecated there and here."""
        warnings.warn("'bitwidth' is deprecated, use 'bit_width'", DeprecationWarning, stacklevel=2)
        return self.bit_width

    def quantize(self, x: Tensor) -> Tensor:
        """Return ``x`` quantized, with a gradient.

        Raises:
            NotImplementedError: if a subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no quantize()")

    def start_from(self, weight: Tensor) -> None:
        """Set what the quantizer learns to its starting value for these weights. Nothing by default."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``quantize(x)``."""
        return self.quantize(x)


def check_bits(bits: int, quantizer: str, lowest: int = 1) -> int:
    """Return ``bits`` if the quantizer can have that many.

    Raises:
        QuantizerError: if ``bits`` is no whole number in ``lowest .. MAX_BITS``.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not lowest <= bits <= MAX_BITS:
        raise QuantizerError(f"{quantizer}: bits must be a whole number from {lowest} to {MAX_BITS}, got {bits!r}")
    return bits
