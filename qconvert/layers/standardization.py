"""Weight standardization: what a layer quantizes in place of its latent weight."""

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor

from ..quantizations import Quantization
from ..quantizations.base import least_squares

_EPSILON = 1e-8
"""Added to the variance: a channel whose weights are (nearly) equal becomes 0, and its gradient stays finite."""


def standardized(weight: Tensor) -> Tensor:
    """Return the weight less its mean and over its standard deviation, per output channel; it has a gradient.

    Shapes: (O, C / groups, kD, kH, kW), as the weight's. The variance is that of all the channel's values (divided by their
    number). A channel of one weight, or of equal ones, becomes 0.

    IR-Net (Qin et al. 2020, https://arxiv.org/abs/1909.10788), without its scales of powers of two; BNext (Guo et al. 2022,
    https://arxiv.org/abs/2211.12933).
    """
    return F.layer_norm(weight, weight.shape[1:], eps=_EPSILON)


def latent(weight: Tensor, *, standardize: bool) -> Tensor:
    """Return what a layer quantizes: the weight as it is, or standardized."""
    return standardized(weight) if standardize else weight


@torch.no_grad()
def fitted_scale(quantizer: Quantization, weight: Tensor, *, standardize: bool) -> Tensor:
    """Return the factor per output channel, shape (O,), that brings what the quantizer makes nearest to the weight."""
    return least_squares(weight, quantizer(standardized(weight))) if standardize else quantizer.fitted_scale(weight)
