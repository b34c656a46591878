"""The binary convolution's compiled worker: every tile of the output, shared out among threads."""

from enum import IntEnum, auto, unique
from functools import cache
from typing import Any

import numpy as np
from numba import carray, njit

from ..layout import Row
from .compiling import compiled_worker
from .fingerprint import fingerprint
from .memory import SQUARE, copy_float, next_number, read_word, transpose
from .tile import SHAPE, tile

POSITIONS, CHANNELS = SHAPE.positions, SHAPE.channels


@unique
class Argument(IntEnum):
    """Places in the worker's array of int64: addresses (0 for none) and numbers."""

    NEXT = 0
    """The next piece of work."""
    X = auto()
    """Bits of the input."""
    WORD_OFFSETS = auto()
    RUNS = auto()
    RUN_COUNT = auto()
    WEIGHTS = auto()
    """Words [group][block][word][channel]."""
    WEIGHT_BYTES = auto()
    """Of a block."""
    POSITION_OFFSETS = auto()
    POSITION_COUNT = auto()
    BASES = auto()
    """int32 [class][group][block][channel]: what twice the count is taken from."""
    CLASSES = auto()
    """int64: the class of each position."""
    ADDENDS = auto()
    """int64 for each position [group]."""
    TABLE = auto()
    """float32 [group][block][row][channel], see `tile`."""
    GROUPS = auto()
    BLOCKS = auto()
    """Of a group."""
    GROUP_CHANNELS = auto()
    """Output channels of a group."""
    GROUP_BYTES = auto()
    """Of a group's words of a position of the input."""
    RESIDUAL = auto()
    """float32 [position][channel], or [sample][channel][position of the sample]."""
    RESIDUAL_PLANE = auto()
    """Positions of a sample where the residual's channels are planes, else 0."""
    OUTPUT = auto()
    """float32 [position][channel], or [sample][channel][position of the sample]."""
    OUTPUT_PLANE = auto()
    """Positions of a sample where the output's channels are planes, else 0."""
    BITS = auto()
    """Where the outputs' bits go."""
    BIT_OFFSETS = auto()
    """For each position, in bytes from BITS."""
    RUNS_AT_ONCE = auto()
    """Runs of positions in a piece of work."""


ARGUMENTS = len(Argument)

X_AT, BASE, ADDEND, RESIDUAL, OUTPUT, BITS, NOWHERE = range(7)
"""Rows of what a tile is told for each of its positions; bits that nobody wants go to the last one."""

RUN = 16
"""Positions, whole tiles, whose outputs are brought into planes in one go: a line of the cache each."""

TABLE_BYTES = 4 * len(Row) * CHANNELS
"""Of a block."""


@njit(inline="always")
def _aim(a, told, first, block, group, in_group, residuals, residual_step, outputs, output_step):
    """Tell a tile where its positions read and write: those of a tile that are none are the last one again."""
    last, groups = a[Argument.POSITION_COUNT] - 1, a[Argument.GROUPS]
    x, base = a[Argument.X] + group * a[Argument.GROUP_BYTES], a[Argument.BASES] + 4 * CHANNELS * block
    for p in range(POSITIONS):
        position = min(first + p, last)
        told[X_AT, p] = x + read_word(a[Argument.POSITION_OFFSETS] + 8 * position)
        told[RESIDUAL, p] = residuals + position * residual_step
        told[OUTPUT, p] = outputs + position * output_step
        kind = read_word(a[Argument.CLASSES] + 8 * position) if a[Argument.CLASSES] != 0 else 0
        told[BASE, p] = base + 4 * CHANNELS * groups * a[Argument.BLOCKS] * kind
        if a[Argument.ADDENDS] != 0:
            told[ADDEND, p] = read_word(a[Argument.ADDENDS] + 8 * (position * groups + group))
        if a[Argument.BITS] != 0:
            told[BITS, p] = a[Argument.BITS] + read_word(a[Argument.BIT_OFFSETS] + 8 * position) + in_group // 8


@njit(inline="always")
def _squares(values, planes, plane, reads):
    """Do the same as `_planes` for a whole run and block."""
    for c in range(0, CHANNELS, SQUARE):
        for p in range(0, RUN, SQUARE):
            one, other = values + 4 * (CHANNELS * p + c), planes + 4 * (c * plane + p)
            if reads:
                transpose(other, 4 * plane, one, 4 * CHANNELS)
            else:
                transpose(one, 4 * CHANNELS, other, 4 * plane)


@njit(inline="always")
def _planes(values, planes, plane, channels, first, count, channel, present, reads):
    """Copy a block's values [position][channel] of that many positions to where each channel has a plane, or from there."""
    done = 0
    while done < count:
        sample, place = (first + done) // plane, (first + done) % plane
        run = min(count - done, plane - place)  # of one sample
        here = values + 4 * CHANNELS * done
        there = planes + 4 * ((sample * channels + channel) * plane + place)
        if run == RUN and present == CHANNELS:
            _squares(here, there, plane, reads)
        else:
            for c in range(present):
                for p in range(run):
                    one, other = here + 4 * (CHANNELS * p + c), there + 4 * (c * plane + p)
                    if reads:
                        copy_float(other, one)
                    else:
                        copy_float(one, other)
        done += run


@njit(inline="always")
def _rows(values, rows, row, count, present, reads):
    """Do the same as `_planes` where each position has a row, that many bytes apart."""
    for p in range(count):
        for c in range(present):
            one, other = values + 4 * (CHANNELS * p + c), rows + row * p + 4 * c
            if reads:
                copy_float(other, one)
            else:
                copy_float(one, other)


@njit(inline="always")
def _copy(a, values, floats, plane, first, count, channel, present, reads):
    """Copy a block's values [position][channel] of that many positions to the floats of all channels, or from there."""
    channels = a[Argument.GROUPS] * a[Argument.GROUP_CHANNELS]
    if plane != 0:
        _planes(values, floats, plane, channels, first, count, channel, present, reads)
    else:
        _rows(values, floats + 4 * (first * channels + channel), 4 * channels, count, present, reads)


@njit(inline="always")
def _clear(values, present):
    """Forget what another block has left of channels that this one does not have: NaN is not below any threshold."""
    for p in range(RUN):
        for c in range(present, CHANNELS):
            values[p, c] = 0.0


@njit(inline="always")
def _floats(floats, row, spare, first, in_place):
    """Return where position 0 has its floats of a block, in place or spare, and how many bytes on the next one has."""
    spare_row = 4 * CHANNELS
    return (floats, row) if in_place else (np.int64(spare.ctypes.data) - spare_row * first, spare_row)


@njit(inline="always")
def _run(a, told, spare, first, end, block, group, in_group):
    """Compute a block's outputs of at most `RUN` positions."""
    group_channels, residual, output = a[Argument.GROUP_CHANNELS], a[Argument.RESIDUAL], a[Argument.OUTPUT]
    present, channel = min(CHANNELS, group_channels - in_group), group * group_channels + in_group
    row, is_whole = 4 * a[Argument.GROUPS] * group_channels, present == CHANNELS
    reads_in_place = residual != 0 and is_whole and a[Argument.RESIDUAL_PLANE] == 0
    writes_in_place = output != 0 and is_whole and a[Argument.OUTPUT_PLANE] == 0
    residuals, residual_step = _floats(residual + 4 * channel, row, spare[0], first, reads_in_place)
    outputs, output_step = _floats(output + 4 * channel, row, spare[1], first, writes_in_place)
    if residual != 0 and not reads_in_place:
        _clear(spare[0], present)
        _copy(a, spare[0].ctypes.data, residual, a[Argument.RESIDUAL_PLANE], first, end - first, channel, present, True)
    for position in range(first, end, POSITIONS):
        _aim(a, told, position, block, group, in_group, residuals, residual_step, outputs, output_step)
        tile(
            told[X_AT].ctypes.data,
            a[Argument.WORD_OFFSETS],
            a[Argument.RUNS],
            a[Argument.RUN_COUNT],
            a[Argument.WEIGHTS] + block * a[Argument.WEIGHT_BYTES],
            told[BASE].ctypes.data,
            told[ADDEND].ctypes.data,
            a[Argument.TABLE] + block * TABLE_BYTES,
            told[RESIDUAL].ctypes.data,
            told[OUTPUT].ctypes.data,
            told[BITS].ctypes.data,
        )
    if output != 0 and not writes_in_place:
        _copy(a, spare[1].ctypes.data, output, a[Argument.OUTPUT_PLANE], first, end - first, channel, present, False)


@cache
def compiled() -> Any:
    """Return the worker, a function of numba's, compiled or read from its cache."""
    of_all_sources = fingerprint()

    @compiled_worker
    def worker(pointer):
        a = carray(pointer, ARGUMENTS + 0 * of_all_sources)  # part of the key in numba's cache
        positions, step = a[Argument.POSITION_COUNT], a[Argument.RUNS_AT_ONCE] * RUN
        pieces = (positions + step - 1) // step
        told = np.zeros((7, POSITIONS), np.int64)
        told[BITS, :] = told[NOWHERE].ctypes.data
        # a block of fewer channels, and planes, read and write here; where there is no residual, -0.0 changes no number
        spare = np.full((2, RUN, CHANNELS), -0.0, np.float32)
        piece = next_number(a.ctypes.data)
        while piece < pieces * a[Argument.GROUPS] * a[Argument.BLOCKS]:
            block, start = piece // pieces, piece % pieces * step  # a block's weights stay in the cache
            group, in_group = block // a[Argument.BLOCKS], CHANNELS * (block % a[Argument.BLOCKS])
            for first in range(start, min(start + step, positions), RUN):
                _run(a, told, spare, first, min(first + RUN, positions), block, group, in_group)
            piece = next_number(a.ctypes.data)

    return worker
