"""`ApproxSign`: sign with the triangular gradient of Bi-Real Net."""

import torch
from torch import Tensor

from .base import BinaryQuantization
from .operators import quantizer_operator
from .sign import binary


def _triangle(grad_output: Tensor, x: Tensor) -> Tensor:
    magnitude = torch.abs(x)
    return (2.0 - 2.0 * magnitude) * (magnitude <= 1) * grad_output


approx_sign = quantizer_operator("approx_sign", binary, _triangle)


class ApproxSign(BinaryQuantization):
    """Sign whose gradient is that of a piecewise quadratic curve.

    Forward: ``y = -1 if x < 0 else +1``. Gradient: ``dy/dx = 2 - 2|x|`` where ``|x| <= 1``, else 0.

    Liu et al. 2018, Bi-Real Net, https://arxiv.org/abs/1808.00278.
    """

    name = "approxsign"
    operator = "approx_sign"
    elementwise = True
