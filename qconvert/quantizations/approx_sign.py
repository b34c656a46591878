"""`ApproxSign`: sign with the triangular gradient of Bi-Real Net."""

import torch
from torch import Tensor

from .base import BinaryQuantization
from .operators import quantizer_operator
from .sign import NOT_BELOW, binary


def _triangle(x: Tensor) -> Tensor:
    x.abs_()
    return torch.add(x.new_tensor(2.0), x, alpha=-2, out=x).clamp_(min=0.0)


approx_sign = quantizer_operator("approx_sign", binary, _triangle, reach=1.0, comparison=NOT_BELOW)


class ApproxSign(BinaryQuantization):
    """Sign whose gradient is that of a piecewise quadratic curve.

    Forward: ``y = -1 if x < 0 else +1``. Gradient: ``dy/dx = 2 - 2|x|`` where ``|x| <= 1``, else 0.

    Liu et al. 2018, Bi-Real Net, https://arxiv.org/abs/1808.00278.
    """

    name = "approxsign"
    operator = "approx_sign"
    elementwise = True
