"""Rules of the graph pass for what moves, joins, cuts or pools values. Their formulas are in transfer.py."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .distribution import UNKNOWN, Distribution, mixture
from .geometry import Size, window
from .operation import RANK, Operation


def _window(operation: Operation) -> int:
    """Return how many values a pooling takes together, 1 where it does not say."""
    size = operation.setting("kernel_size", 1)
    if isinstance(size, int):
        rank = next((n for n in (1, 2, 3) if operation.name.endswith(f"{n}d")), 1)
        return math.prod([size] * rank)
    sizes = size if isinstance(size, (tuple, list)) and all(isinstance(n, int) for n in size) else ()
    return math.prod(sizes)


def average_pooling(operation: Operation) -> Distribution:
    """The mean of a window."""
    x = _strided(operation)
    spread = _window(operation) ** -0.25
    mean = x.mean[:, None]
    return replace(x, points=mean + (x.points - mean) * spread)


def max_pooling(operation: Operation) -> Distribution:
    """The largest of a window."""
    return _strided(operation).largest_of(_window(operation) ** 0.75)


def adaptive_average_pooling(operation: Operation) -> Distribution:
    """The mean of the windows that there are of an input of the usual size."""
    x, number = _adapted(operation)
    mean = x.mean[:, None]
    return replace(x, points=mean + (x.points - mean) * number**-0.25)


def adaptive_max_pooling(operation: Operation) -> Distribution:
    """The largest of such a window."""
    x, number = _adapted(operation)
    return x.largest_of(number**0.75)


def _adapted(operation: Operation) -> tuple[Distribution, float]:
    """Return the input with the size that an adaptive pooling leaves, and how many values it takes together."""
    x, size = operation.x, operation.setting("output_size", 1)
    sizes = (size,) * 3 if isinstance(size, int) or size is None else size
    if x.size is None or not isinstance(sizes, (tuple, list)) or len(sizes) != len(x.size):
        return replace(x, size=None), 1.0
    depth, height, width = (before if after is None else after for before, after in zip(x.size, sizes, strict=True))
    if not all(isinstance(n, int) for n in (depth, height, width)):
        return replace(x, size=None), 1.0
    return replace(x, size=(depth, height, width)), max(1.0, math.prod(x.size) / (depth * height * width))


def _strided(operation: Operation) -> Distribution:
    """Return the input with the size that a pooling leaves."""
    x = operation.x
    settings = (operation.setting(name, place) for name, place in (("kernel_size", 1), ("stride", 2), ("padding", 3)))
    kernel, stride, padding = settings
    moved = window(kernel, stride, 0 if padding is None else padding)
    return x if x.size is None or moved is None else replace(x, size=moved.output(x.size))


def interpolate(operation: Operation) -> Distribution:
    """The same values, another size."""
    x, factor, size = operation.x, operation.setting("scale_factor", 2), operation.setting("size", 1)
    if isinstance(factor, (int, float)) and x.size is not None:
        depth, height, width = (max(1, int(n * factor)) for n in x.size)
        return replace(x, size=(depth, height, width))
    return x if factor is None and size is None else replace(x, size=None)


def cat(operation: Operation) -> Distribution:
    """Channels joined, or a mixture."""
    parts = operation.args[0] if operation.args else operation.kwargs.get("tensors")
    dim = operation.setting("dim", 1, 0)
    if not isinstance(parts, (tuple, list)) or not parts or not all(isinstance(part, Distribution) for part in parts):
        return UNKNOWN
    first: Distribution = parts[0]
    is_along_channels = first.holds_channels(dim)
    if not is_along_channels or any(part.channels == 1 for part in parts):
        joined = mixture(parts)
        if is_along_channels:
            return joined.pooled()
        return replace(joined, size=None) if len(parts) > 1 else joined
    nonnegative, known = (all(getattr(part, flag) for part in parts) for flag in ("nonnegative", "known"))
    return replace(first, points=torch.cat([part.points for part in parts]), nonnegative=nonnegative, known=known)


def split(operation: Operation, *, by_size: bool) -> Any:
    """Channels taken apart."""
    x, amount, dim = operation.x, operation.args[1] if len(operation.args) > 1 else None, operation.setting("dim", 2, 0)
    if by_size:
        sizes = {"split_size", "split_size_or_sections"} & operation.kwargs.keys()
        amount = operation.kwargs[sizes.pop()] if sizes else amount
    else:
        amount = operation.kwargs.get("chunks", amount)
    if not x.holds_channels(dim):
        return replace(x, size=None)
    if not isinstance(amount, (int, list, tuple)) or x.channels == 1:
        return x.pooled()
    try:
        parts: Sequence[Tensor] = (torch.split if by_size else torch.chunk)(x.points, amount)  # type: ignore[arg-type]
    except (RuntimeError, TypeError):  # sizes that are not of this many channels
        return x.pooled()
    return tuple(replace(x, points=part) for part in parts)


def item(operation: Operation) -> Any:
    """A part of a container or of a tensor."""
    container, index = operation.args
    if isinstance(container, Distribution):
        # a bare number may be that of a part; a new object: it is not the whole
        return _indexed(container, index) if isinstance(index, (tuple, slice)) else replace(container)
    if isinstance(container, (tuple, list)) and isinstance(index, int) and -len(container) <= index < len(container):
        return container[index]
    return UNKNOWN


def _indexed(x: Distribution, index: Any) -> Distribution:
    index = index if isinstance(index, tuple) else (index,)
    if any(part is Ellipsis for part in index):
        place = next(place for place, part in enumerate(index) if part is Ellipsis)
        index = (*index[:place], *[slice(None)] * (RANK - len(index) + 1), *index[place + 1 :])
    others = [*index, *[slice(None)] * (RANK - len(index))]
    channels = others.pop(x.axis)
    is_moved = x.axis == 1 and isinstance(others[0], int)
    plain = isinstance(channels, (int, slice, list)) and all(isinstance(part, (int, slice)) for part in others)
    if not plain or is_moved or len(others) != RANK - 1:
        return _pooled_value(x)
    try:
        points = x.points[[channels] if isinstance(channels, int) else channels] if x.channels > 1 else x.points
    except (TypeError, IndexError):  # computed from a size, which is not known
        return _pooled_value(x)
    return replace(x, points=points, size=_cut(x.size, others[1:])) if len(points) else _pooled_value(x)


def _cut(size: Size | None, slices: Sequence[Any]) -> Size | None:
    """Return the size of a part of a volume; None if it has fewer dimensions, or a bound is computed."""
    if size is None or not all(isinstance(part, slice) for part in slices):
        return None
    try:
        depth, height, width = (len(range(n)[part]) for n, part in zip(size, slices, strict=True))
    except TypeError:
        return None
    return depth, height, width


def permute(operation: Operation) -> Distribution:
    """The channels, moved."""
    x = operation.x
    dims = operation.setting("dims", 1)
    order = list(dims) if isinstance(dims, (tuple, list)) else list(operation.args[1:])
    if not order or not all(isinstance(dim, int) for dim in order):
        return _pooled_value(x)
    return _reordered(x, [dim % len(order) for dim in order])


def _reordered(x: Distribution, order: list[int]) -> Distribution:
    """Return x with its dimensions in another order."""
    channels = x.axis % len(order)
    place = order.index(channels)
    if place not in (1, len(order) - 1):
        return _pooled_value(x)
    volume = [dim for dim in range(1, len(order)) if dim != channels]
    moved = [dim for dim in order[1:] if dim != channels]
    size = None
    if x.size is not None and len(order) == RANK and order[0] == 0:
        depth, height, width = (x.size[volume.index(dim)] for dim in moved)
        size = depth, height, width
    return replace(x, axis=1 if place == 1 else -1, size=size)


def transpose(operation: Operation) -> Distribution:
    """The channels, moved."""
    x = operation.x
    words = ("dim0", "dim1") if operation.name == "transpose" else ("axis0", "axis1")
    dims = [operation.setting(word, place) for place, word in enumerate(words, start=1)]
    if not all(isinstance(dim, int) for dim in dims):
        return _pooled_value(x)
    if x.size is not None:
        order = list(range(RANK))
        first, second = (dim % RANK for dim in dims)
        order[first], order[second] = second, first
        return _reordered(x, order)
    # of how many dimensions it is, is not known: these may be the channels'
    suspects = [dim == 1 or dim < -1 if x.axis == 1 else dim == -1 or dim > 1 for dim in dims]
    return _pooled_value(x) if any(suspects) else replace(x)


def rearranged(operation: Operation) -> Distribution:
    """The same values in other places: flip, roll."""
    x = operation.x
    dims = operation.setting("dims", 2 if operation.name == "roll" else 1)
    keeps_channels = dims is not None and not any(
        map(x.holds_channels, dims if isinstance(dims, (tuple, list)) else (dims,))
    )
    return replace(x) if keeps_channels else replace(x.pooled())


def pad(operation: Operation) -> Distribution:
    """The same values, but for a border that is below 0."""
    x, mode, value = operation.x, operation.setting("mode", 2, "constant"), operation.setting("value", 3, 0)
    negative = mode == "constant" and isinstance(value, (int, float)) and value < 0
    amounts = operation.setting("padding" if operation.module else "pad", 1)
    size = None
    if isinstance(amounts, (tuple, list)) and all(isinstance(n, int) for n in amounts):
        if x.size is not None and x.axis == 1:
            # (left W, right W, left H, ...)
            width, height, depth = (n + sum(amounts[2 * dim : 2 * dim + 2]) for dim, n in enumerate(reversed(x.size)))
            size = depth, height, width
        if any(amounts[6:]):
            x = x.pooled()  # channels of zeros
    return replace(x, nonnegative=x.nonnegative and not negative, size=size)


def as_it_was(operation: Operation) -> Distribution:
    """The input."""
    return operation.x


def pooled(operation: Operation) -> Distribution:
    """The same values, channels no longer told apart."""
    return _pooled_value(operation.x)


def _pooled_value(x: Distribution) -> Distribution:
    return replace(x.pooled(), axis=1, size=None)
