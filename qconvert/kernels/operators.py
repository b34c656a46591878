"""The packed layers' arithmetic as registered operators (`torch.ops.qconvert.*`): compiled, or in torch's own operations.

Packed inputs are int64 tensors [plane][sample][D][H][W][group][word], D, H and W with their border: bit c of a word is a
plane's bit of channel c, and the bits of the border are 0. Floats are tensors (N, C, D, H, W).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakIdKeyDictionary

from . import in_torch
from .codes import WORD
from .formats import memory_format
from .geometry import Geometry, Window, geometry
from .layout import by_block

try:
    from .compiled import kernel
except ImportError:  # numba is an extra: the same results in torch's operations, as `packed.summary()` says
    kernel = None  # type: ignore[assignment]

__all__ = ["BLOCK", "is_compiled", "kernel", "pack_bits", "packed_conv3d"]

BLOCK = 32 if kernel is None else kernel.BLOCK
"""Output channels that are computed together."""


def is_compiled() -> bool:
    """Whether the operators run compiled: whether numba is installed. If so, their kernel is ready from here on."""
    if kernel is None:
        return False
    kernel.prepare()
    return True


def _pack_bits(
    x: Tensor,
    thresholds: Tensor,
    spreads: Tensor,
    settings: Tensor | None,
    planes: int,
    border: Sequence[int],
    groups: int,
) -> Tensor:
    """Return the bits of the codes of a float input.

    Args:
        x: float32 (N, C, D, H, W).
        thresholds: float32 (groups, channels of a group, rounded up to 16).
        spreads: as thresholds.
        settings: divisor, factor, lowest and highest, float32 (4,); None where the code is the sign.
        planes: bits of a code.
        border: of the convolution that reads the bits, in the order of F.pad.
        groups: its channel groups.
    """
    samples, channels, *size = x.shape
    where = _geometry_of_input(samples, channels, size, border, groups)
    if kernel is not None and x.device.type == "cpu":
        return kernel.pack(x, thresholds, spreads, settings, planes, where, groups)
    return in_torch.packed(x, thresholds, spreads, settings, planes, border, groups)


def _geometry_of_input(samples: int, channels: int, size: Sequence[int], border: Sequence[int], groups: int) -> Geometry:
    """Return the geometry of a packed input, whatever kernel reads it."""
    return geometry(_reading(border), samples, tuple(size), groups, -(-channels // groups // WORD))


_NO_BORDER = (0,) * 6
"""Of words: theirs is in their sizes."""


def _reading(border: Sequence[int]) -> Window:
    """Return a window that reads one position at a time of an input with this border."""
    return Window.of((1, 1, 1), (1, 1, 1), border, (1, 1, 1))


def _with_border(base: Tensor, tap_sums: Tensor, factor: int, where: Geometry, groups: int) -> Tensor:
    """Return the base for each class of positions, int32 [class][group, block][channel]."""
    if tap_sums not in _bases:
        _bases[tap_sums] = {}
    of_size: dict[tuple[int, ...], Tensor] = _bases[tap_sums]
    found = of_size.get(where.size)
    if found is None:
        if len(of_size) >= _SIZES:
            of_size.clear()
        outside = torch.from_numpy(by_block(factor * where.outside(tap_sums.numpy()), groups, base.shape[-1]))
        found = of_size[where.size] = base + outside.int()
    return found  # not what is there now: another thread may have cleared it


_bases: Any = WeakIdKeyDictionary()
"""Of each layer's tap_sums the bases by D, H, W of the input."""

_SIZES = 16
"""Sizes of input for which a layer's bases are kept: a model sees few."""


def _geometry_of_words(words: Tensor, window: Window) -> Geometry:
    _, samples, *padded, groups, per_group = words.shape
    return geometry(window, samples, window.inner(padded), groups, per_group)


def _packed_conv3d(
    words: Tensor,
    weight: Tensor,
    base: Tensor,
    tap_sums: Tensor | None,
    table: Tensor,
    residual: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    border: Sequence[int],
    dilation: Sequence[int],
    channels: int,
    group_inputs: int,
    weight_planes: int,
    sum_factor: int,
    border_factor: int,
    channels_last: bool,
    has_values: bool,
    following: Sequence[int] | None,
) -> list[Tensor]:
    """Return the convolution of packed codes, and what comes after it: as floats, as bits, or both in this order.

    ``y = prelu(norm(scale * (base - 2 count + sum_factor * sum of the window's codes) + offset + bias) + residual) + last``

    Args:
        words: the packed input.
        weight: words [group, block][word][channel], see `layout.arranged`.
        base: int32 [group, block][channel].
        tap_sums: int64 (O, kD, kH, kW): what is added to the base for each tap in the border, times border_factor. None is
            nothing.
        table: float32 [group, block][row][channel], see `layout.Row`.
        residual: float32, of the output's shape.
        kernel_size: of the convolution.
        stride: of the convolution.
        dilation: of the convolution.
        border: its padding, in the order of F.pad, which the packed input has.
        channels: O.
        group_inputs: C / groups.
        weight_planes: bits of the weight's codes.
        sum_factor: see above; 0 where the weight's levels lie around 0.
        border_factor: see tap_sums.
        channels_last: whether floats are put out in channels_last_3d.
        has_values: whether the floats are wanted.
        following: the border of the convolution that reads the bits: where y is not below the table's threshold. None is no
            bits.
    """
    where = _geometry_of_words(words, Window.of(kernel_size, stride, border, dilation))
    groups, planes = words.shape[-2], (len(words), weight_planes)
    form = memory_format(channels_last=channels_last)
    bases = base[None] if tap_sums is None else _with_border(base, tap_sums, border_factor, where, groups)
    if kernel is None or words.device.type != "cpu":
        totals = in_torch.totals(words, weight, bases, where, channels, group_inputs, planes, sum_factor)
        found = in_torch.finished(totals, table, residual, groups, has_values=has_values, following=following)
        return [found[0].contiguous(memory_format=form), *found[1:]] if has_values else found
    sums = kernel.window_sums(words, where) * sum_factor if sum_factor else None
    after = None if following is None else _geometry_of_input(where.batch, channels, where.outputs, following, 1)
    return kernel.convolve(
        words, weight, bases, sums, table, where, groups, channels, planes, residual,
        has_values=has_values, following=after, memory_format=form,
    )  # fmt: skip


pack_bits = torch.library.custom_op("qconvert::pack_bits", _pack_bits, mutates_args=())
packed_conv3d = torch.library.custom_op("qconvert::packed_conv3d", _packed_conv3d, mutates_args=())


@pack_bits.register_fake
def _(
    x: Tensor,
    thresholds: Tensor,
    spreads: Tensor,
    settings: Tensor | None,
    planes: int,
    border: Sequence[int],
    groups: int,
) -> Tensor:
    return _empty_words(x, planes, x.shape[0], x.shape[1], x.shape[2:], border, groups)


@packed_conv3d.register_fake
def _(words: Tensor, weight: Tensor, base: Tensor, tap_sums: Tensor | None, table: Tensor, *rest: Any) -> list[Tensor]:
    _, kernel_size, stride, _, dilation, channels, *_, channels_last, has_values, following = rest
    samples, size = words.shape[1], Window.of(kernel_size, stride, _NO_BORDER, dilation).outputs_of(words.shape[2:5])
    found = []
    if has_values:
        form = memory_format(channels_last=channels_last)
        found.append(torch.empty_like(table.new_empty((samples, channels, *size)), memory_format=form))
    if following is not None:
        found.append(_empty_words(words, 1, samples, channels, size, following, 1))
    return found


def _empty_words(
    like: Tensor, planes: int, samples: int, channels: int, size: Sequence[int], border: Sequence[int], groups: int
) -> Tensor:
    padded = _reading(border).padded(size)
    return like.new_empty((planes, samples, *padded, groups, -(-channels // groups // WORD)), dtype=torch.int64)


@register_flop_formula(torch.ops.qconvert.packed_conv3d)
def _flops(
    words: Any, weight: Any, base: Any, tap_sums: Any, table: Any, residual: Any, kernel_size: Any, stride: Any, border: Any,
    dilation: Any, channels: int, group_inputs: int, *_: Any, **__: Any,
) -> Any:  # fmt: skip
    """Return 2 for each product of an input with a weight, as for a convolution in float."""
    size = Window.of(kernel_size, stride, _NO_BORDER, dilation).outputs_of(words[2:5])
    return 2 * words[1] * math.prod(size) * channels * group_inputs * math.prod(kernel_size)
