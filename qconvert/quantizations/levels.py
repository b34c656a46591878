"""`Levels`: the values that a quantizer can put out, each with an integer code."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import QuantizerError

_SLICE = 2**16
"""Values that are looked up at a time, in memory that stays in the cache: 512 KiB of float64."""


@dataclass(frozen=True)
class Levels:
    """The values of a quantizer: code u = 0 .. count - 1 stands for ``unit * (lowest + step * u) / divisor``.

    Attributes:
        bits: width of a code.
        count: number of codes, at most ``2 ** bits``.
        lowest, step, divisor: integers: what the code 0 stands for, the distance to the next one, and what they are over.
        unit: the factor that is no integer, such as a learned step.
        dtype: that of the values.
    """

    bits: int
    count: int
    lowest: int
    step: int
    divisor: int
    unit: float
    dtype: torch.dtype

    def values(self, device: torch.device | None = None) -> Tensor:
        """Return the values by code, shape (count,), bit for bit what the quantizer puts out but for the sign of a zero."""
        codes = torch.arange(self.count, device=device)
        if self.divisor == 1:
            multiples = (self.lowest + self.step * codes).to(self.dtype)
        else:  # DoReFa's order of operations, which rounds otherwise than that of the formula above
            multiples = self.step * (codes.to(self.dtype) / self.divisor) + self.lowest / self.divisor
        return multiples * torch.tensor(self.unit, dtype=self.dtype, device=device)

    def codes(self, quantized: Tensor) -> Tensor:
        """Return the codes of quantized values, int32, flat, in C order.

        Raises:
            QuantizerError: if a value is none of the levels.
        """
        values, order = self.values(quantized.device).to(quantized.dtype).double().sort()  # a learned step may be negative
        flat = quantized.contiguous().flatten()
        codes = torch.empty(flat.shape, dtype=torch.int32, device=flat.device)
        for start in range(0, len(flat), _SLICE):
            part = flat[start : start + _SLICE].double()
            places = torch.searchsorted(values, part, out_int32=True).clamp_(max=self.count - 1)
            strange = part[values[places] != part]
            if strange.numel():
                raise QuantizerError(f"{strange[0].item()!r} is none of the {self.count} levels of its quantizer")
            codes[start : start + _SLICE] = order[places]
        return codes
