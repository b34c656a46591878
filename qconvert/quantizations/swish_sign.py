"""`SwishSign`: sign with the gradient of a swish-shaped curve."""

import torch
from torch import Tensor

from ..errors import QuantizerError
from .base import BinaryQuantization
from .operators import quantizer_operator
from .sign import NOT_BELOW, binary


def _swish_sign(x: Tensor, beta: float) -> Tensor:
    return binary(x)


def _swish(x: Tensor, beta: float) -> Tensor:
    scaled = beta * x
    return (beta * (2 - scaled * torch.tanh(scaled / 2))) / (1 + torch.cosh(scaled))


swish_sign = quantizer_operator("swish_sign", _swish_sign, _swish, comparison=NOT_BELOW)


class SwishSign(BinaryQuantization):
    """Sign whose gradient is the derivative of the SignSwish function.

    Forward: ``y = -1 if x < 0 else +1``.
    Gradient: ``dy/dx = beta * (2 - beta*x * tanh(beta*x / 2)) / (1 + cosh(beta*x))``.

    Darabi et al. 2018, BNN+ (SignSwish), https://arxiv.org/abs/1812.11800.

    Args:
        beta: steepness, > 0.

    Raises:
        QuantizerError: if ``beta`` is not above 0.
    """

    name = "swishsign"
    operator = "swish_sign"
    elementwise = True

    def __init__(self, beta: float = 5.0) -> None:
        super().__init__()
        if not beta > 0:
            raise QuantizerError(f"swishsign: beta must be above 0, got {beta!r}")
        self.beta = beta

    @property
    def operator_settings(self) -> tuple[float, ...]:
        """The steepness."""
        return (float(self.beta),)
