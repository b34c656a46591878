"""Rules of the graph pass for what acts value by value: activations and arithmetic. Formulas: transfer.py."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .distribution import UNKNOWN, Distribution
from .operation import RANK, Operation, as_column, is_plain


def elementwise(operation: Operation, *, nonnegative: bool | None) -> Distribution:
    """``nonnegative``: whether the function is for every input; None: for every input that is."""
    x = operation.x
    if any(isinstance(value, (Distribution, Tensor)) for value in (*operation.args[1:], *operation.kwargs.values())):
        return UNKNOWN
    certain = x.nonnegative if nonnegative is None else nonnegative
    return x.map(lambda points: operation.run(points.clone(), *operation.args[1:], **operation.kwargs), nonnegative=certain)


def prelu(operation: Operation) -> Distribution:
    """The slope of each channel below 0."""
    weight = operation.setting("weight", 1)
    if not is_plain(weight):
        return UNKNOWN
    x = operation.x.wide(weight.numel()) if weight.numel() > 1 else operation.x
    slope = weight.detach().float().cpu().reshape(-1, 1)
    return x.map(lambda points: torch.where(points > 0, points, slope * points), nonnegative=x.nonnegative)


def clamp(operation: Operation) -> Distribution:
    """Each point, clamped."""
    lowest = torch.full_like(operation.x.points[:1, :1], 0.0 if operation.x.nonnegative else torch.finfo(torch.float32).min)
    of_lowest = replace(operation, args=(replace(operation.x, points=lowest), *operation.args[1:]))
    certain = bool((elementwise(of_lowest, nonnegative=False).points >= 0).all())
    return elementwise(operation, nonnegative=certain)


def power(operation: Operation) -> Distribution:
    """Each point to a power."""
    exponent = operation.setting("exponent", 1)
    return elementwise(operation, nonnegative=True if exponent in (2, 4) else None)


def arithmetic(operation: Operation, function: Callable[[Any, Any], Any], *, keeps_sign: bool) -> Distribution:
    """Two values, a value and a number, or a value and one number per channel."""
    if len(operation.args) != 2 or operation.kwargs:  # noqa: PLR2004 (with alpha= or out= it is something else)
        return UNKNOWN
    left, right = operation.args
    if isinstance(left, Distribution) and isinstance(right, Distribution):
        if left is right:
            return left.map(lambda points: function(points, points), nonnegative=keeps_sign and left.nonnegative)
        return left.combine(right, function, nonnegative=keeps_sign and left.nonnegative and right.nonnegative)
    x, constant = (left, right) if isinstance(left, Distribution) else (right, left)
    column = as_column(constant)
    if not isinstance(x, Distribution) or column is None or not _is_along_channels(constant, x):
        return UNKNOWN
    if len(column) > 1:
        x = x.wide(len(column))
    certain = keeps_sign and x.nonnegative and bool((column >= 0).all())
    if isinstance(left, Distribution):
        return x.map(lambda points: function(points, column), nonnegative=certain)
    return x.map(lambda points: function(column, points), nonnegative=certain)


def subtracted_from(left: Any, right: Any) -> Any:
    """Return ``right - left``: what rsub does."""
    return right - left


def _is_along_channels(constant: object, x: Distribution) -> bool:
    """Whether broadcasting gives each channel of x, of (N, C, D, H, W), one value of a vector; a number is fine."""
    if not isinstance(constant, Tensor) or constant.numel() == 1:
        return True
    from_the_end = 1 if x.axis == -1 else RANK - 1
    return constant.dim() >= from_the_end and constant.shape[-from_the_end] == constant.numel()


def softmax(operation: Operation) -> Distribution:
    """Over the channels ``e^x / (e^x + the mean of the others' sum)``; over other values: between 0 and 1, and no more."""
    x = operation.x
    if x.channels == 1 or not x.holds_channels(operation.setting("dim", 1)):
        return replace(UNKNOWN.map(torch.sigmoid, nonnegative=True), known=False)
    powers = (x.points - x.points.max()).exp()
    means = powers.mean(1, keepdim=True)
    return x.to(powers / (powers + means.sum() - means), nonnegative=True)


def extremum(operation: Operation, function: Callable[[Any, Any], Any]) -> Distribution:
    """The larger, or smaller, of two values; the largest along a dimension is another operation of the same name."""
    values = [operand for operand in operation.args if isinstance(operand, (Distribution, Tensor))]
    return arithmetic(operation, function, keeps_sign=True) if len(values) == 2 else UNKNOWN  # noqa: PLR2004
