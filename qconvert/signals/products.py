"""Rules of the graph pass for weighted sums: convolutions and linear layers. Their formulas are in transfer.py."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .distribution import UNKNOWN, Distribution
from .geometry import window
from .operation import Operation, is_plain

_SLICE = 2**18
"""Weights that are squared at a time: what fits a cache."""


def convolved(
    weight: Tensor,
    groups: int,
    mean: Tensor,
    variance: Tensor,
    quantize: Callable[[Tensor], Tensor] = nn.Identity(),  # noqa: B008 (it has no state)
) -> tuple[Tensor, Tensor]:
    """Return mean and variance, shape (O,), of a convolution of independent values: sum w m and sum w^2 v.

    Args:
        weight: shape (O, C / groups, ...).
        groups: number of groups.
        mean: of the values, shape (C,).
        variance: of the values, shape (C,).
        quantize: what is done to the weight first, some output channels at a time: no copy of a whole weight is made.
    """
    rows = weight.detach().flatten(1)
    taps = rows.shape[1] * groups // len(mean)
    mean, variance = (each.to(rows.device).repeat_interleave(taps) for each in (mean, variance))
    if groups > 1:
        rows = quantize(rows).float().view(groups, -1, rows.shape[1])
        sums = [torch.bmm(part, each.view(groups, -1, 1)) for part, each in ((rows, mean), (rows * rows, variance))]
        return sums[0].flatten().cpu(), sums[1].flatten().cpu()
    per_slice = max(1, _SLICE // max(1, rows.shape[1]))
    # all memory at once: small tensors between the slices' would keep their places from being used again
    means, variances = torch.empty(2, len(rows), dtype=torch.float32, device=rows.device)
    scratch = torch.empty(min(per_slice, len(rows)), rows.shape[1], dtype=torch.float32, device=rows.device)
    for start in range(0, len(rows), per_slice):
        part = slice(start, start + per_slice)
        wide = quantize(rows[part]).float()
        torch.mv(wide, mean, out=means[part])
        torch.mv(torch.mul(wide, wide, out=scratch[: len(wide)]), variance, out=variances[part])
    return means.cpu(), variances.cpu()


def bordered(mean: Tensor, variance: Tensor, inside: float, border: float) -> tuple[Tensor, Tensor]:
    """Return mean and variance of what a window reads: values in the share ``inside``, the border's value in the rest."""
    padded = inside * mean + (1 - inside) * border
    return padded, inside * (variance + mean**2) + (1 - inside) * border**2 - padded**2


def convolution(operation: Operation) -> Distribution:
    """Normal: a sum of many values."""
    weight, bias = operation.setting("weight", 1), operation.setting("bias", 2)
    groups = operation.setting("groups", 6, 1)
    if not is_plain(weight) or not isinstance(groups, int):
        return UNKNOWN
    x = _channels_first(operation.x).wide(weight.shape[1] * groups)
    settings = (operation.setting(*each) for each in (("stride", 3, 1), ("padding", 4, 0), ("dilation", 5, 1)))
    moved = window(tuple(weight.shape[2:]), *settings)
    inside = 1.0
    if moved is not None and x.size is not None:
        # a border that repeats the values is none
        inside = moved.inside(x.size) if getattr(operation.module, "padding_mode", "zeros") == "zeros" else 1.0
        x = replace(x, size=moved.output(x.size))
    return _normal(*convolved(weight, groups, *bordered(x.mean, x.std**2, inside, 0.0)), bias, x)


def transposed_convolution(operation: Operation) -> Distribution:
    """As a convolution with the share of the kernel that meets one output."""
    conv = operation.module
    if not isinstance(conv, nn.modules.conv._ConvTransposeNd) or conv.groups > 1 or not is_plain(conv.weight):
        return UNKNOWN
    x = _channels_first(operation.x).wide(conv.in_channels)
    if x.size is not None and len(conv.stride) == len(x.size):
        depth, height, width = (n * step for n, step in zip(x.size, conv.stride, strict=True))
        x = replace(x, size=(depth, height, width))
    share = 1 / math.prod(conv.stride)
    mean, variance = convolved(conv.weight.transpose(0, 1), 1, x.mean, x.std**2)
    return _normal(mean * share, variance * share, conv.bias, x)


def _channels_first(x: Distribution) -> Distribution:
    return x if x.axis == 1 else replace(x.pooled(), axis=1, size=None)


def linear(operation: Operation) -> Distribution:
    """As a convolution, over the last dimension."""
    weight, bias = operation.setting("weight", 1), operation.setting("bias", 2)
    if not is_plain(weight):
        return UNKNOWN
    x = operation.x if operation.x.axis == -1 else replace(operation.x.pooled(), size=None)
    x = x.wide(weight.shape[1])
    return replace(_normal(*convolved(weight, 1, x.mean, x.std**2), bias, x), axis=-1)


def _normal(mean: Tensor, variance: Tensor, bias: Tensor | None, x: Distribution) -> Distribution:
    """Return the normal distribution of a sum of many values of x."""
    if isinstance(bias, Tensor):
        mean = mean + bias.detach().float().cpu()
    return replace(x, points=Distribution.normal(mean, variance.sqrt()).points, nonnegative=False)
