"""`Ternary`: weights that are -a, 0 or +a."""

import torch
from torch import Tensor

from .base import Quantization
from .levels import Levels
from .operators import quantizer_operator

TWN_FACTOR = 0.7
"""Share of the mean magnitude below which a weight becomes 0 (Li et al., eq. 5)."""


def _ternary(x: Tensor) -> Tensor:
    magnitude = torch.abs(x)
    kept = magnitude > TWN_FACTOR * magnitude.mean()
    # clamp: where no weight is kept (all of them zero) the mean is 0 / 1, not 0 / 0
    level = (magnitude * kept).sum() / kept.sum().clamp(min=1)
    return torch.sign(x) * kept * level


ternary = quantizer_operator("ternary", _ternary, elementwise=False)


class Ternary(Quantization):
    """Ternary weights with the best common magnitude.

    Forward: ``d = 0.7 mean|x|; a = mean of |x| where |x| > d; y = a * sign(x)`` where ``|x| > d``, else 0.
    Gradient: ``dy/dx = 1``.

    Li et al. 2016, Ternary Weight Networks, https://arxiv.org/abs/1605.04711.
    """

    name = "ternary"
    operator = "ternary"
    bit_width = 2

    def levels(self, quantized: Tensor) -> Levels:
        """Return -a, 0 and +a."""
        level = quantized.abs().max().item() if quantized.numel() else 0.0
        return Levels(2, count=3, lowest=-1, step=1, divisor=1, unit=level, dtype=quantized.dtype)
