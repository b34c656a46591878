"""A layer's weight as the compiled worker reads it, and the whole numbers that its counts are taken from.

Codes are u = 0 .. 2^k - 1 and mean ``lowest + step * u`` (`Levels`). With s = -1, +1 for each bit of u and n = 2^k - 1,
``2 u - n = sum over planes of 2^j s_j``; so with z = n + 2 lowest / step, a value is step / 2 times ``v + z`` where v is
that sum, and a product of a window of inputs with a weight is step step' / 4 times

    sum (v + z) (v' + z') = sum v v' + z sum v' + z' sum v + K z z'

over its K values. The first sum is one of signs, which XOR and population count give: K - 2 popcount for each pair of
planes.
"""

from collections.abc import Iterator
from enum import IntEnum, unique
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .codes import WORD


@unique
class Row(IntEnum):
    """What comes after the sum, float32 for each channel, one row after another."""

    SCALE = 0
    OFFSET = 1
    BIAS = 2
    NORM_FACTOR = 3
    """Factor of a BatchNorm, after that."""
    NORM_SUMMAND = 4
    SLOPE = 5
    """Factor of values that are not above 0, after the residual."""
    LAST = 6
    """Summand after that."""
    THRESHOLD = 7
    """An output's bit is whether it is not below it."""


def pairs(input_planes: int, weight_planes: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Yield the sums of plane numbers, the highest first, each with its pairs (plane of the input, of the weight)."""
    for level in reversed(range(input_planes + weight_planes - 1)):
        yield level, [(i, level - i) for i in range(input_planes) if 0 <= level - i < weight_planes]


def runs(input_planes: int, weight_planes: int, words: int, longest: int) -> NDArray[np.int64]:
    """Return (end, shift) of each run of words that is counted in one go, as the tile takes them.

    Args:
        input_planes: bits of an input's code.
        weight_planes: bits of a weight's code.
        words: words of a window of one plane.
        longest: words that a run may have, 0 for any number.
    """
    found, start = [], 0
    for _, of_level in pairs(input_planes, weight_planes):
        end = start + words * len(of_level)
        ends = [*range(start + longest, end, longest), end] if longest else [end]
        found += [(each, int(index == 0)) for index, each in enumerate(ends)]
        start = end
    return np.array(found, np.int64)


def arranged(codes: NDArray[np.int32], groups: int, input_planes: int, weight_planes: int, block: int) -> NDArray[np.int64]:
    """Return the words of a weight in the order in which a tile reads them, [group, block][word][channel].

    Args:
        codes: from 0 on, shape (O, C / groups, kD, kH, kW).
        groups: channel groups.
        input_planes: bits of an input's code.
        weight_planes: bits of a weight's code.
        block: output channels of a tile. What a group has too few of is words of 0.
    """
    outputs, channels = codes.shape[:2]
    values = codes.reshape(groups, outputs // groups, channels, -1)
    values = np.pad(values, ((0, 0), (0, -(outputs // groups) % block), (0, -channels % WORD), (0, 0)))
    planes = []
    for plane in range(weight_planes):
        bits = np.packbits((values >> plane & 1).astype(np.uint8).swapaxes(2, 3), axis=-1, bitorder="little")
        words = np.ascontiguousarray(bits).view(np.int64)  # [group][channel][tap][word]
        planes.append(words.reshape(groups, -1, block, words.shape[2] * words.shape[3]).swapaxes(2, 3))
    order = [plane for _, of_level in pairs(input_planes, weight_planes) for _, plane in of_level]
    words = np.concatenate([planes[plane] for plane in order], axis=2)
    return np.ascontiguousarray(words.reshape(-1, *words.shape[2:]))


def by_block(values: NDArray[Any], groups: int, block: int, fill: float = 0) -> NDArray[Any]:
    """Return values per output channel, in the last dimension, as [...][group, block][channel]."""
    *rest, outputs = values.shape
    values = values.reshape(*rest, groups, outputs // groups)
    padding = [(0, 0)] * (len(rest) + 1) + [(0, -(outputs // groups) % block)]
    return np.ascontiguousarray(np.pad(values, padding, constant_values=fill).reshape(*rest, -1, block))


def epilogue_table(rows: NDArray[np.float32], groups: int, block: int) -> NDArray[np.float32]:
    """Return what comes after the sum, rows (8, O) in the order of `Row`, as [group, block][row][channel]."""
    blocked = by_block(rows, groups, block)
    # no channel of a block that is none of the layer's has a bit
    blocked[Row.THRESHOLD] = by_block(rows[Row.THRESHOLD], groups, block, fill=np.inf)
    return np.ascontiguousarray(blocked.swapaxes(0, 1))
