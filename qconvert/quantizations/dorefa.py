"""`WeightDoReFa` and `InputDoReFa`: k-bit uniform quantizers."""

import torch
from torch import Tensor

from .base import Quantization, check_bits
from .levels import Levels
from .operators import quantizer_operator


def _weight_dorefa(x: Tensor, levels: int) -> Tensor:
    if x.numel() == 0:
        return x.clone()
    squashed = torch.tanh(x)
    largest = torch.max(torch.abs(squashed))
    # weights that are all 0 have no largest one to divide by; they round to the middle levels instead of NaN
    unit = squashed / (2.0 * torch.where(largest == 0, 1.0, largest)) + 0.5
    return 2.0 * (torch.round(unit * levels) / levels) - 1.0


def _input_dorefa(x: Tensor, levels: int) -> Tensor:
    return torch.round(torch.clamp(x, 0, 1) * levels) / levels


weight_dorefa = quantizer_operator("weight_dorefa", _weight_dorefa, elementwise=False)
input_dorefa = quantizer_operator("input_dorefa", _input_dorefa)


class WeightDoReFa(Quantization):
    """DoReFa for weights: squash by tanh, scale to [-1, 1], round to 2**k levels.

    Forward, n = 2**bits - 1: ``t = tanh(x); y = 2 * round(n * (t / (2 max|t|) + 1/2)) / n - 1``. Gradient: ``dy/dx = 1``.

    Zhou et al. 2016, DoReFa-Net, https://arxiv.org/abs/1606.06160.

    Args:
        bits: k, 1 to 16.

    Raises:
        QuantizerError: if ``bits`` is out of range.
    """

    name = "weightdorefa"
    operator = "weight_dorefa"
    bit_width = 1

    def __init__(self, bits: int = 1) -> None:
        super().__init__()
        self.bit_width = check_bits(bits, self.name)

    @property
    def operator_settings(self) -> tuple[float, ...]:
        """The highest level."""
        return (2**self.bit_width - 1,)

    def levels(self, quantized: Tensor) -> Levels:
        """Return -1 .. +1 in steps of 2 / n."""
        n = 2**self.bit_width - 1
        return Levels(self.bit_width, count=n + 1, lowest=-n, step=2, divisor=n, unit=1.0, dtype=quantized.dtype)


class InputDoReFa(Quantization):
    """DoReFa for inputs: clip to [0, 1], round to 2**k levels.

    Forward, n = 2**bits - 1: ``y = round(n * clamp(x, 0, 1)) / n``. Gradient: ``dy/dx = 1``.

    Zhou et al. 2016, DoReFa-Net, https://arxiv.org/abs/1606.06160.

    Args:
        bits: k, 1 to 16.

    Raises:
        QuantizerError: if ``bits`` is out of range.
    """

    name = "inputdorefa"
    operator = "input_dorefa"
    elementwise = True
    bit_width = 1

    def __init__(self, bits: int = 1) -> None:
        super().__init__()
        self.bit_width = check_bits(bits, self.name)

    @property
    def operator_settings(self) -> tuple[float, ...]:
        """The highest level."""
        return (2**self.bit_width - 1,)

    def levels(self, quantized: Tensor) -> Levels:
        """Return 0 .. 1 in steps of 1 / n."""
        n = 2**self.bit_width - 1
        return Levels(self.bit_width, count=n + 1, lowest=0, step=1, divisor=n, unit=1.0, dtype=quantized.dtype)
