"""`SteHeaviside`: a step that is -1 at zero, with a windowed straight-through gradient."""

import torch
from torch import Tensor

from .base import BinaryQuantization
from .operators import Comparison, quantizer_operator


def _ste_heaviside(x: Tensor) -> Tensor:
    return torch.sign(torch.sign(x) - 0.5)  # torch.sign of 0 and of NaN is 0


def _window(x: Tensor) -> Tensor:
    return x.abs_().le_(1)


ste_heaviside = quantizer_operator("ste_heaviside", _ste_heaviside, _window, reach=1.0, comparison=Comparison(torch.gt, +1))


class SteHeaviside(BinaryQuantization):
    """Step function with the straight-through estimator inside a window.

    Forward: ``y = +1 if x > 0 else -1`` (so -1 at 0 and for NaN: the useful choice on ReLU outputs).
    Gradient: ``dy/dx = 1`` where ``|x| <= 1``, else 0.

    Hubara et al. 2016, Binarized Neural Networks, https://arxiv.org/abs/1602.02830 (eq. 4, without the threshold at 0).
    """

    name = "steheaviside"
    operator = "ste_heaviside"
    elementwise = True
