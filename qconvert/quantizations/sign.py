"""`Sign`: one bit, plain straight-through gradient."""

import torch
from torch import Tensor

from .base import BinaryQuantization
from .operators import Comparison, quantizer_operator


def binary(x: Tensor) -> Tensor:
    """Return -1 where x < 0 and +1 elsewhere (0, -0.0 and NaN too), in the dtype of ``x``."""
    # torch.sign of 0 and of NaN is 0; three passes, and on a CPU a fraction of the time of torch.where
    return torch.sign(torch.sign(x) + 0.5)


NOT_BELOW = Comparison(torch.lt, -1)
"""`binary` as a comparison."""

sign = quantizer_operator("sign", binary, comparison=NOT_BELOW)


class Sign(BinaryQuantization):
    """Sign that is never zero, with the straight-through estimator.

    Forward: ``y = -1 if x < 0 else +1`` (so +1 at 0, at -0.0 and for NaN). Gradient: ``dy/dx = 1``.

    Hubara et al. 2016, Binarized Neural Networks, https://arxiv.org/abs/1602.02830 (their window |x| <= 1 is the layer's
    ``gradient_cancellation_threshold``).
    """

    name = "sign"
    operator = "sign"
    elementwise = True
