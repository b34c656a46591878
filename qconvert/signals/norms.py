"""Rules of the graph pass for normalisations. Their formulas are in transfer.py."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..running_statistics import is_untrained
from .distribution import UNKNOWN, Distribution
from .operation import Operation, as_column


def channel_norm(operation: Operation) -> Distribution:
    """Each channel by itself: batch and instance norm."""
    norm = operation.module
    weight, bias = operation.setting("weight", 3), operation.setting("bias", 4)
    x = operation.x
    if norm is not None and is_untrained(norm) and not operation.training:
        return _affine(x, weight, bias)
    channels = getattr(norm, "num_features", weight.numel() if isinstance(weight, Tensor) else x.channels)
    x = x.wide(channels)
    return replace(_affine(x.standardized(channels), weight, bias), known=True)


def group_norm(operation: Operation) -> Distribution:
    """Groups of channels."""
    groups, weight, bias = (operation.setting(*key) for key in (("num_groups", 1), ("weight", 2), ("bias", 3)))
    x = operation.x
    if isinstance(weight, Tensor):
        x = x.wide(weight.numel())
    if not isinstance(groups, int) or x.channels % groups:
        return UNKNOWN
    return replace(_affine(x.standardized(groups), weight, bias), known=True)


def layer_norm(operation: Operation) -> Distribution:
    """All channels together."""
    weight, bias = operation.setting("weight", 2), operation.setting("bias", 3)
    last = isinstance(weight, Tensor) and weight.dim() == 1
    x = replace(_affine(operation.x.standardized(1), weight, bias), known=True)
    return replace(x, axis=-1, size=x.size if x.axis == -1 else None) if last else x


def _affine(x: Distribution, weight: Tensor | None, bias: Tensor | None) -> Distribution:
    for parameter, function in ((weight, torch.mul), (bias, torch.add)):
        column = None if parameter is None else as_column(parameter)
        if column is not None:
            x = (x.wide(len(column)) if len(column) > 1 else x).map(partial(function, column), nonnegative=False)
    return x
