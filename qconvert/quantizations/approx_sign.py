"""`ApproxSign`: sign with the triangular gradient of Bi-Real Net."""

from torch import Tensor

from .base import BinaryQuantization
from .operators import quantizer_operator
from .sign import binary, not_below


def _triangle(x: Tensor) -> Tensor:
    return x.abs_().mul_(-2.0).add_(2.0).clamp_(min=0.0)


approx_sign = quantizer_operator("approx_sign", binary, _triangle, reach=1.0, bit=not_below)


class ApproxSign(BinaryQuantization):
    """Sign whose gradient is that of a piecewise quadratic curve.

    Forward: ``y = -1 if x < 0 else +1``. Gradient: ``dy/dx = 2 - 2|x|`` where ``|x| <= 1``, else 0.

    Liu et al. 2018, Bi-Real Net, https://arxiv.org/abs/1808.00278.
    """

    name = "approxsign"
    operator = "approx_sign"
    elementwise = True
