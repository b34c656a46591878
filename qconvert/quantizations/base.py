"""`Quantization`: the base class of everything that turns a float tensor into a low-bit one."""

import inspect
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import QuantizerError
from .levels import Levels
from .operators import FORMULAS

MAX_BITS = 16
"""Widest quantizer: 2**16 - 1 levels are still exact integers in float32 arithmetic."""

_SLICE = 2**20
"""Values handled at a time where a temporary tensor is needed: 4 MiB of float32."""


class Quantization(nn.Module):
    """A quantizer as a module: ``quantize`` maps a tensor to a tensor of the same shape and dtype.

    Attributes:
        name: the name under which rule files and layers find the quantizer.
        bit_width: bits that one quantized value needs in storage (32 for a quantizer that changes nothing).
        elementwise: whether a quantized value depends on no other value, so that a tensor may be quantized part by part.
        operator: name of the registered operator that `quantize` runs; None for a class that defines `quantize` itself.
    """

    name: ClassVar[str] = "none"
    bit_width: int = -1
    elementwise: ClassVar[bool] = False
    operator: str | None = None

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
        if self.operator is None:
            raise NotImplementedError(f"{type(self).__name__} defines no quantize()")
        return FORMULAS[self.operator].operator(x, *self.operator_settings)

    @property
    def operator_settings(self) -> tuple[float, ...]:
        """The operator's arguments beside the tensor."""
        return ()

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, which a file keeps: the attributes of their names, and ``bit_width`` for ``bits``.

        Raises:
            QuantizerError: if an argument is no attribute.
        """
        names = {name: "bit_width" if name == "bits" else name for name in argument_names(type(self))}
        lost = [name for name, attribute in names.items() if not hasattr(self, attribute)]
        if lost:
            raise QuantizerError(f"{type(self).__name__} does not keep its argument {lost[0]!r}: set self.{lost[0]}")
        return {name: getattr(self, attribute) for name, attribute in names.items()}

    def levels(self, quantized: Tensor) -> Levels | None:  # noqa: ARG002 (for those that override it)
        """Return the levels of which ``quantized``, a tensor that it has put out, consists.

        None, the default, is none that can be told: a file then keeps such weights in float.
        """
        return None

    def start_from(self, weight: Tensor) -> None:
        """Set what the quantizer learns to its starting value for these weights. Nothing by default."""

    def start_from_inputs(self, values: Tensor) -> None:
        """Set what the quantizer learns to its starting value for inputs of which these are some. Nothing by default."""

    @torch.no_grad()
    def fitted_scale(self, weight: Tensor) -> Tensor:
        """Return the factor per output channel, shape (O,), that brings the quantized weight nearest to the weight.

        Least squares: ``<w, q> / <q, q>`` over each output channel, 1 where q is 0.
        """
        return least_squares(weight, self(weight))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``quantize(x)``."""
        return self.quantize(x)


class BinaryQuantization(Quantization):
    """A quantizer to -1 and +1."""

    bit_width = 1

    def levels(self, quantized: Tensor) -> Levels:
        """Return -1 and +1."""
        return Levels(1, count=2, lowest=-1, step=2, divisor=1, unit=1.0, dtype=quantized.dtype)

    @torch.no_grad()
    def fitted_scale(self, weight: Tensor) -> Tensor:
        """Return mean |weight| per output channel: what the least squares come to for a sign (XNOR-Net, eq. 6)."""
        channels = weight.flatten(1)
        # a slice at a time, in memory that is used again: fresh memory for a whole layer's magnitudes costs twice the time
        slices = torch.split(channels, max(1, _SLICE // max(1, channels.shape[1])))
        scratch = torch.empty_like(slices[0])
        return torch.cat([torch.abs(part, out=scratch[: len(part)]).mean(1) for part in slices])


def argument_names(cls: type[Quantization]) -> list[str]:
    """Return the names of the constructor's arguments."""
    parameters = inspect.signature(cls).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def least_squares(weight: Tensor, quantized: Tensor) -> Tensor:
    """Return the factor per output channel, shape (O,), that brings ``quantized`` nearest to the weight."""
    quantized = quantized.flatten(1)
    wide = torch.promote_types(weight.dtype, torch.float32)  # in half, a sum of squares overflows
    dot = (weight.flatten(1) * quantized).sum(1, dtype=wide)
    square = (quantized * quantized).sum(1, dtype=wide)
    return torch.where(square > 0, dot / square, 1.0).to(weight.dtype)


def check_bits(bits: int, quantizer: str, lowest: int = 1) -> int:
    """Return ``bits`` if the quantizer can have that many.

    Raises:
        QuantizerError: if ``bits`` is no whole number in ``lowest .. MAX_BITS``.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not lowest <= bits <= MAX_BITS:
        raise QuantizerError(f"{quantizer}: bits must be a whole number from {lowest} to {MAX_BITS}, got {bits!r}")
    return bits
