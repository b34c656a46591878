"""What the compiled workers do, in torch's own operations: the same results, on any device, more slowly."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor

from .codes import weighted, words_of
from .geometry import Geometry
from .layout import Row, pairs


def packed(
    x: Tensor,
    thresholds: Tensor,
    spreads: Tensor,
    settings: Tensor | None,
    planes: int,
    border: Sequence[int],
    groups: int,
) -> Tensor:
    """Return the words of a float input."""
    channels = x.shape[1]
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


def totals(
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
    found: Tensor = sums.long() - values * largest + base
    if not sum_factor:
        return found
    ones = torch.ones_like(of_weight[:groups]).to(exact)
    codes = (F.conv3d(inputs.to(exact), ones, *moved).long() + values * (2 ** planes[0] - 1)) // 2
    of_group: Tensor = sum_factor * codes.repeat_interleave(channels // groups, 1)
    return found + of_group


def _weight(
    weight: Tensor, planes: tuple[int, int], where: Geometry, groups: int, group_channels: int, group_inputs: int
) -> Tensor:
    """Return ``2 u - n`` for each code u of a weight, float32 (O, C / groups, kD, kH, kW)."""
    order = [plane for _, of_level in pairs(*planes) for _, plane in of_level]
    # dimensions: group and block, channel, pair of planes, tap, word
    by_pair = torch.unflatten(weight, 1, (len(order), -1, where.words)).movedim(-1, 1)
    values = weighted([by_pair[:, :, order.index(plane)] for plane in range(planes[1])], group_inputs)
    outputs = torch.unflatten(values, 0, (groups, -1)).flatten(1, 2)[:, :group_channels].flatten(0, 1)
    return torch.unflatten(outputs.movedim(-1, 1), -1, where.window.kernel)


def finished(
    totals: Tensor,
    table: Tensor,
    residual: Tensor | None,
    groups: int,
    *,
    has_values: bool,
    following: Sequence[int] | None,
) -> list[Tensor]:
    """Return what a table makes of the sums: values, their bits for the layer that follows, or both."""
    rows = by_channel(table.movedim(1, 0), groups, totals.shape[1])
    scale, offset, bias, _, _, slope, last, threshold = (row.view(-1, 1, 1, 1) for row in rows)
    values = totals.float() * scale + offset + bias
    # torch's own, for it rounds as that of the model does: once, where the processor has a fused multiply-add
    zeros, ones = torch.zeros_like(rows[0]), torch.ones_like(rows[0])
    values = F.batch_norm(values, zeros, ones, rows[Row.NORM_FACTOR], rows[Row.NORM_SUMMAND], eps=0.0)
    values = values if residual is None else values + residual
    values = torch.where(values > 0, values, values * slope) + last
    found = [values] if has_values else []
    if following is not None:
        codes = (~(values < threshold)).long().movedim(1, -1).unsqueeze(-2)
        found.append(F.pad(words_of(codes, 1), (0, 0, 0, 0, *following)))
    return found


def by_channel(values: Tensor, groups: int, channels: int) -> Tensor:
    """Return values [...][group, block][channel of the block] as (..., O)."""
    return torch.unflatten(values, -2, (groups, -1)).flatten(-2)[..., : channels // groups].flatten(-2)
