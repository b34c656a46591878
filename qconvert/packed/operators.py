"""The packed layers' arithmetic as registered operators (`torch.ops.qconvert.*`): compiled, or in torch's own operations.

Packed inputs are int64 tensors [plane][sample][D][H][W][group][word], D, H and W with their border: bit c of a word is a
plane's bit of channel c, and the bits of the border are 0. Floats are tensors (N, C, D, H, W) in channels_last_3d.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakIdKeyDictionary

from .codes import WORD, weighted, words_of
from .geometry import Geometry, Window, geometry
from .layout import by_block, pairs

try:
    from .compiled import kernel
except ImportError:  # numba is an extra: the same results in torch's operations, which `PackedModel.summary` says
    kernel = None  # type: ignore[assignment]

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
    values = torch.unflatten(x.permute(0, 2, 3, 4, 1), -1, (groups, channels // groups))
    thresholds, spreads = thresholds[:, : channels // groups], spreads[:, : channels // groups]
    if settings is None:
        codes = (~(values < thresholds)).long()
    else:
        divisor, factor, lowest, highest = settings
        units = (values - thresholds) / spreads
        codes = (torch.round(torch.clamp(units / divisor * factor, lowest, highest)) - lowest).long()
    words = words_of(codes, planes)
    return F.pad(words, (0, 0, 0, 0, *border))


def _geometry_of_input(samples: int, channels: int, size: Sequence[int], border: Sequence[int], groups: int) -> Geometry:
    """Return the geometry of a packed input, whatever kernel reads it."""
    window = Window.of((1, 1, 1), (1, 1, 1), border, (1, 1, 1))
    return geometry(window, samples, tuple(size), groups, -(-channels // groups // WORD))


def _with_border(base: Tensor, tap_sums: Tensor, factor: int, where: Geometry, groups: int) -> Tensor:
    """Return the base for each class of positions, int64 [class][group, block][channel]."""
    if tap_sums not in _bases:
        _bases[tap_sums] = {}
    of_weight: dict[Geometry, Tensor] = _bases[tap_sums]
    if where not in of_weight:
        outside = torch.from_numpy(by_block(factor * where.outside(tap_sums.numpy()), groups, base.shape[-1]))
        of_weight[where] = base + outside
    return of_weight[where]


_bases: Any = WeakIdKeyDictionary()
"""Of each layer's tap_sums the bases by geometry: a model sees few sizes of input."""


def _geometry_of_words(words: Tensor, window: Window) -> Geometry:
    _, samples, *padded, groups, per_group = words.shape
    return geometry(window, samples, window.inner(padded), groups, per_group)


def _totals(
    words: Tensor,
    weight: Tensor,
    bases: Tensor,
    where: Geometry,
    channels: int,
    group_inputs: int,
    planes: tuple[int, int],
    sum_factor: int,
) -> Tensor:
    """Return the whole numbers that the compiled worker finds, in torch's own operations, shape (N, O, D', H', W')."""
    groups, window = words.shape[-2], where.window
    inputs = weighted(list(words), group_inputs).flatten(-2).movedim(-1, 1)
    of_weight = _weight(weight, planes, where, groups, channels // groups, group_inputs)
    largest = (2 ** planes[0] - 1) * (2 ** planes[1] - 1)
    values = group_inputs * math.prod(window.kernel)
    exact = torch.float32 if values * largest < 2**24 else torch.float64
    moved = (None, window.stride, 0, window.dilation, groups)
    sums = F.conv3d(inputs.to(exact), of_weight.to(exact), *moved)
    base = by_channel(bases, groups, channels)[torch.from_numpy(where.classes) if len(bases) > 1 else 0]
    base = base.T.view(channels, where.batch, *where.outputs).movedim(1, 0) if len(bases) > 1 else base.view(-1, 1, 1, 1)
    totals: Tensor = sums.long() - values * largest + base
    if not sum_factor:
        return totals
    ones = torch.ones_like(of_weight[:groups]).to(exact)
    codes = (F.conv3d(inputs.to(exact), ones, *moved).long() + values * (2 ** planes[0] - 1)) // 2
    of_group: Tensor = sum_factor * codes.repeat_interleave(channels // groups, 1)
    return totals + of_group


def _weight(
    weight: Tensor, planes: tuple[int, int], where: Geometry, groups: int, group_channels: int, group_inputs: int
) -> Tensor:
    """Return ``2 u - n`` for each code u of a weight, float32 (O, C / groups, kD, kH, kW)."""
    order = [plane for _, of_level in pairs(*planes) for _, plane in of_level]
    by_pair = torch.unflatten(weight, 1, (len(order), -1, where.words)).movedim(
        -1, 1
    )  # [group, block][channel][pair][tap][word]
    values = weighted([by_pair[:, :, order.index(plane)] for plane in range(planes[1])], group_inputs)
    outputs = torch.unflatten(values, 0, (groups, -1)).flatten(1, 2)[:, :group_channels].flatten(0, 1)
    return torch.unflatten(outputs.movedim(-1, 1), -1, where.window.kernel)


def _after(totals: Tensor, table: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the values that a table makes of the sums, and their bits."""
    factor, summand, slope, last, threshold = (row.view(-1, 1, 1, 1) for row in table)
    values = totals.float() * factor + summand
    values = values if residual is None else values + residual
    values = torch.where(values > 0, values, values * slope) + last
    return values, ~(values < threshold)


def by_channel(values: Tensor, groups: int, channels: int) -> Tensor:
    """Return values [...][group, block][channel of the block] as (..., O)."""
    return torch.unflatten(values, -2, (groups, -1)).flatten(-2)[..., : channels // groups].flatten(-2)


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
    has_values: bool,
    following: Sequence[int] | None,
) -> list[Tensor]:
    """Return the convolution of packed codes, and what comes after it: as floats, as bits, or both in this order.

    ``y = prelu(factor * (base - 2 count + sum_factor * sum of the window's codes) + summand + residual) + last``

    Args:
        words: the packed input.
        weight: words [group, block][word][channel], see `layout.arranged`.
        base: int64 [group, block][channel].
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
        has_values: whether the floats are wanted.
        following: the border of the convolution that reads the bits: where y is not below the table's threshold. None is no
            bits.
    """
    where = _geometry_of_words(words, Window.of(kernel_size, stride, border, dilation))
    groups, planes = words.shape[-2], (len(words), weight_planes)
    bases = base[None] if tap_sums is None else _with_border(base, tap_sums, border_factor, where, groups)
    if kernel is None or words.device.type != "cpu":
        totals = _totals(words, weight, bases, where, channels, group_inputs, planes, sum_factor)
        values, above = _after(totals, by_channel(table.movedim(1, 0), groups, channels), residual)
        found = [values] if has_values else []
        if following is not None:
            found.append(F.pad(words_of(above.long().movedim(1, -1).unsqueeze(-2), 1), (0, 0, 0, 0, *following)))
        return found
    sums = kernel.window_sums(words, where) * sum_factor if sum_factor else None
    after = None if following is None else _geometry_of_input(where.batch, channels, where.outputs, following, 1)
    return kernel.convolve(
        words, weight, bases, sums, table, where, groups, channels, planes, residual, has_values=has_values, following=after
    )


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
    _, kernel_size, stride, _, dilation, channels, *_, has_values, following = rest
    samples, size = _sizes(words, kernel_size, stride, dilation)
    found = []
    if has_values:
        found.append(table.new_empty((samples, *size, channels)).movedim(-1, 1))
    if following is not None:
        found.append(_empty_words(words, 1, samples, channels, size, following, 1))
    return found


def _sizes(
    words: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, list[int]]:
    """Return samples and D', H', W' of the output."""
    axes = zip(words.shape[2:5], kernel_size, stride, dilation, strict=True)
    return words.shape[1], [(size - apart * (taps - 1) - 1) // step + 1 for size, taps, step, apart in axes]


def _empty_words(
    like: Tensor, planes: int, samples: int, channels: int, size: Sequence[int], border: Sequence[int], groups: int
) -> Tensor:
    padded = [each + left + right for each, left, right in zip(size, border[-2::-2], border[::-2], strict=True)]
    return like.new_empty((planes, samples, *padded, groups, -(-channels // groups // WORD)), dtype=torch.int64)


@register_flop_formula(torch.ops.qconvert.packed_conv3d)
def _flops(
    words: Any, weight: Any, base: Any, tap_sums: Any, table: Any, residual: Any, kernel_size: Any, stride: Any, border: Any,
    dilation: Any, channels: int, group_inputs: int, *_: Any, **__: Any,
) -> Any:  # fmt: skip
    """Return 2 for each product of an input with a weight, as for a convolution in float."""
    axes = zip(words[2:5], kernel_size, stride, dilation, strict=True)
    size = [(each - apart * (taps - 1) - 1) // step + 1 for each, taps, step, apart in axes]
    return 2 * words[1] * math.prod(size) * channels * group_inputs * math.prod(kernel_size)
