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

X_AT, BASE, ADDEND, RESIDUAL, OUTPUT, BITS = range(6)
"""Rows of what a tile is told for each of its positions."""

RUN = 16
"""Positions, whole tiles, whose outputs are brought into planes in one go: a line of the cache each."""

TABLE_BYTES = 4 * len(Row) * CHANNELS
"""Of a block."""


@njit(inline="always")
def _aim(a, told, first_position, block):
    """Tell a tile where its positions read and write."""
    groups, channels = a[Argument.GROUPS], a[Argument.GROUP_CHANNELS]
    group, in_group = block // a[Argument.BLOCKS], CHANNELS * (block % a[Argument.BLOCKS])
    for p in range(POSITIONS):
        position = min(first_position + p, a[Argument.POSITION_COUNT] - 1)
        told[X_AT, p] = read_word(a[Argument.POSITION_OFFSETS] + 8 * position) + group * a[Argument.GROUP_BYTES]
        kind = read_word(a[Argument.CLASSES] + 8 * position) if a[Argument.CLASSES] != 0 else 0
        told[BASE, p] = a[Argument.BASES] + 4 * CHANNELS * (kind * groups * a[Argument.BLOCKS] + block)
        if a[Argument.ADDENDS] != 0:
            told[ADDEND, p] = read_word(a[Argument.ADDENDS] + 8 * (position * groups + group))
        value = 4 * ((position * groups + group) * channels + in_group)
        told[RESIDUAL, p], told[OUTPUT, p] = a[Argument.RESIDUAL] + value, a[Argument.OUTPUT] + value
        if a[Argument.BITS] != 0:
            told[BITS, p] = a[Argument.BITS] + read_word(a[Argument.BIT_OFFSETS] + 8 * position) + in_group // 8


@njit(inline="always")
def _copy(sources, targets, count):
    """Copy that many float32 for each position of a tile."""
    for p in range(POSITIONS):
        for c in range(count):
            copy_float(sources[p] + 4 * c, targets[p] + 4 * c)


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
def _planes(a, values, planes, plane, first, count, block, present, reads):
    """Copy a block's values [position][channel] of that many positions to where each channel has a plane, or from there."""
    channels = a[Argument.GROUPS] * a[Argument.GROUP_CHANNELS]
    channel = block // a[Argument.BLOCKS] * a[Argument.GROUP_CHANNELS] + CHANNELS * (block % a[Argument.BLOCKS])
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
def _clear(values, present):
    """Forget what another block has left of channels that this one does not have: NaN is not below any threshold."""
    for p in range(RUN):
        for c in range(present, CHANNELS):
            values[p, c] = 0.0


@njit(inline="always")
def _run(a, told, spare, spared, first, end, block):
    """Compute a block's outputs of at most `RUN` positions."""
    present = min(CHANNELS, a[Argument.GROUP_CHANNELS] - CHANNELS * (block % a[Argument.BLOCKS]))
    in_planes, out_planes = a[Argument.RESIDUAL_PLANE], a[Argument.OUTPUT_PLANE]
    _clear(spare[0], present)
    if in_planes != 0:
        _planes(a, spare[0].ctypes.data, a[Argument.RESIDUAL], in_planes, first, end - first, block, present, True)
    for position in range(first, end, POSITIONS):
        _aim(a, told, position, block)
        residuals, outputs = told[RESIDUAL], told[OUTPUT]
        if present < CHANNELS:
            residuals, outputs = spared[0], spared[1]
            if a[Argument.RESIDUAL] != 0 and in_planes == 0:
                _copy(told[RESIDUAL], residuals, present)
        if in_planes != 0:
            residuals = told[RESIDUAL]
            for p in range(POSITIONS):  # those of a tile that are none are the last one again
                residuals[p] = spared[0, min(position + p, end - 1) - first]
        if out_planes != 0:
            outputs = spared[1, position - first :]
        tile(
            a[Argument.X],
            told[X_AT].ctypes.data,
            a[Argument.WORD_OFFSETS],
            a[Argument.RUNS],
            a[Argument.RUN_COUNT],
            a[Argument.WEIGHTS] + block * a[Argument.WEIGHT_BYTES],
            told[BASE].ctypes.data,
            told[ADDEND].ctypes.data,
            a[Argument.TABLE] + block * TABLE_BYTES,
            residuals.ctypes.data if a[Argument.RESIDUAL] != 0 else 0,
            outputs.ctypes.data if a[Argument.OUTPUT] != 0 else 0,
            told[BITS].ctypes.data if a[Argument.BITS] != 0 else 0,
        )
        if present < CHANNELS and a[Argument.OUTPUT] != 0 and out_planes == 0:
            _copy(outputs, told[OUTPUT], present)
    if out_planes != 0:
        _planes(a, spare[1].ctypes.data, a[Argument.OUTPUT], out_planes, first, end - first, block, present, False)


@cache
def compiled() -> Any:
    """Return the worker, a function of numba's, compiled or read from its cache."""
    of_all_sources = fingerprint()

    @compiled_worker
    def worker(pointer):
        a = carray(pointer, ARGUMENTS + 0 * of_all_sources)  # part of the key in numba's cache
        positions, step = a[Argument.POSITION_COUNT], a[Argument.RUNS_AT_ONCE] * RUN
        pieces = (positions + step - 1) // step
        told = np.zeros((6, POSITIONS), np.int64)
        spare = np.zeros((2, RUN, CHANNELS), np.float32)  # a block of fewer channels, and planes, read and write here
        spared = np.zeros((2, RUN), np.int64)
        for row in range(2):
            for p in range(RUN):
                spared[row, p] = spare[row, p].ctypes.data
        piece = next_number(a.ctypes.data)
        while piece < pieces * a[Argument.GROUPS] * a[Argument.BLOCKS]:
            block, start = piece // pieces, piece % pieces * step  # a block's weights stay in the cache
            for first in range(start, min(start + step, positions), RUN):
                _run(a, told, spare, spared, first, min(first + RUN, positions), block)
            piece = next_number(a.ctypes.data)

    return worker
