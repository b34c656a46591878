"""`Step`: what a layer's step of training computes with, forward and backward."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor

from ..quantizations.operators import Formula

_WEIGHTS_PER_INPUT = 16
"""So many times as large a weight may be as the input for the convolution to read bits. From there on it was as quick."""


class Geometry(NamedTuple):
    """How the convolution moves over its input; ``border`` in the order of F.pad."""

    stride: Sequence[int]
    border: Sequence[int]
    pad_value: float
    dilation: Sequence[int]
    groups: int

    @property
    def left(self) -> Sequence[int]:
        """The border before D, H, W."""
        return self.border[-2::-2]

    @property
    def is_even(self) -> bool:
        """Whether the border is the same on both sides, and none is cut off, as a convolution's own padding is."""
        return self.left == self.border[::-2] and min(self.border) >= 0

    @property
    def is_filled(self) -> bool:
        """Whether the border has values other than 0."""
        return self.pad_value != 0.0 and any(self.border)


@dataclass(frozen=True)
class Step:
    """What a step computes with. ``dtype`` is that of the convolution: under autocast not that of the weight."""

    x: Tensor
    weight: Tensor
    threshold: Tensor | None
    spread: Tensor | None
    scale: Tensor | None
    source: Formula
    input_settings: Sequence[float]
    target: Formula
    weight_settings: Sequence[float]
    window: float
    geometry: Geometry
    dtype: torch.dtype

    @property
    def is_binary(self) -> bool:
        """Whether it is a convolution of signs with signs, whose border is -1."""
        quantizers = (self.source.comparison, self.target.comparison)
        return None not in quantizers and (self.geometry.pad_value == -1.0 or not any(self.geometry.border))

    @property
    def convolves_bits(self) -> bool:
        """Whether the convolution reads the input's bits. In half precision their sums would not be exact.

        Not where the weight is much the larger tensor: what that takes of it costs more than an input with a border.
        """
        is_worth_it = _WEIGHTS_PER_INPUT * self.x.numel() > self.weight.numel()
        is_exact = self.dtype in {torch.float32, torch.float64}
        return self.is_binary and self.geometry.is_even and is_worth_it and is_exact

    @property
    def spread_in_weight(self) -> Tensor | None:
        """The spread where the gradient of the codes is divided by it as it is made, by way of the weight."""
        return self.spread if self.geometry.groups == 1 and self.dtype == self.weight.dtype else None

    def bits(self, out: Tensor | None = None) -> Tensor:
        """Return where the input's codes are +1. A spread, which is positive, makes no difference."""
        threshold = 0.0 if self.threshold is None else column(self.threshold)
        return self.source.comparison.bits(self.x, threshold, out)  # type: ignore[union-attr]  # asked where there is one

    def units(self, out: Tensor | None = None) -> Tensor:
        """Return the input in the units of its quantizer, as a tensor of its own."""
        units = torch.sub(self.x, 0 if self.threshold is None else column(self.threshold), out=out)
        return units if self.spread is None else units.div_(column(self.spread))

    def quantized_weight(self) -> Tensor:
        """Return the quantized weight, as a tensor of its own."""
        if self.target.comparison is not None:
            return self.target.comparison.codes(self.weight, 0.0, torch.empty_like(self.weight))
        return self.target.forward(self.weight, *self.weight_settings)

    def scaled(self, weight: Tensor) -> Tensor:
        """Return a quantized weight with scale and spread as factors: as those of gradients they would take more passes."""
        factor = None if self.scale is None else column(self.scale)[..., None]
        if self.spread_in_weight is not None:
            factor = (1.0 if factor is None else factor) / column(self.spread_in_weight)
        return weight if factor is None else weight * factor

    def padded_codes(self) -> tuple[Tensor, Sequence[int]]:
        """Return the input's codes with their border, and the padding that is left to the convolution."""
        codes, geometry = self.source.forward(self.units(), *self.input_settings), self.geometry
        if geometry.is_even and not geometry.is_filled:
            return codes, geometry.left
        return F.pad(codes, geometry.border, value=geometry.pad_value), (0, 0, 0)


def output_dtype(convolved: torch.dtype, *per_channel: Tensor | None) -> torch.dtype:
    """Return the dtype of a layer's output: under autocast its convolution's has fewer bits than scale, offset and bias."""
    factors = [each for each in per_channel if each is not None]
    return torch.promote_types(convolved, factors[0].dtype) if factors else convolved


def column(values: Tensor) -> Tensor:
    """Return values per channel in the shape in which they meet (N, C, D, H, W)."""
    return values.view(-1, 1, 1, 1)
