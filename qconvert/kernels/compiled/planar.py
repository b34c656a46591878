"""The compiled worker that packs the signs of floats in (N, C, D, H, W) order, where each channel is a plane."""

from enum import IntEnum, auto, unique
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from ..codes import PIECE, WORD
from .compiling import compiled_worker
from .fingerprint import fingerprint
from .memory import I64, copy_float, next_number, read_word, write_word
from .vectors import INTS, float_splat, floats, prefetch, splat

_HALF = 32
"""Channels whose bits a vector of int32 holds for 16 positions."""

_AHEAD = 512
"""Bytes: no processor foresees what 64 planes are read in turns. Packing took 2.5 times as long without."""


@intrinsic
def _below(typing_context: Any, values: Any, plane: Any, thresholds: Any, channels: Any, mirror: Any, out: Any) -> Any:
    """Write for each of 16 positions which channels are below their thresholds, bits of an int32.

    Args:
        typing_context: numba's.
        values: address of the first channel's float32 at the first position; the positions lie side by side.
        plane: bytes from a channel to the next.
        thresholds: address of a float32 for each channel.
        channels: how many, 1 to 32.
        mirror: 0, or the sign bit of a float32: then it is those that are above their thresholds.
        out: address of 16 int32.
    """

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        values, plane, thresholds, channels, mirror, out = arguments
        flips = splat(b, b.trunc(mirror, INTS.element), INTS)
        before, loop, done = b.block, b.append_basic_block("channel"), b.append_basic_block("done")
        b.branch(loop)
        b.position_at_end(loop)
        channel, found = b.phi(I64), b.phi(INTS)
        at = b.add(values, b.mul(channel, plane))
        prefetch(b, b.add(at, ir.Constant(I64, _AHEAD)))
        numbers = floats(b, at)
        limits = float_splat(b, b.add(thresholds, b.shl(channel, ir.Constant(I64, 2))))
        numbers, limits = (b.bitcast(b.xor(b.bitcast(each, INTS), flips), each.type) for each in (numbers, limits))
        bit = splat(b, b.shl(ir.Constant(INTS.element, 1), b.trunc(channel, INTS.element)), INTS)
        of_channel = b.and_(b.sext(b.fcmp_ordered("<", numbers, limits), INTS), bit)
        found_next, following = b.or_(found, of_channel), b.add(channel, ir.Constant(I64, 1))
        b.cbranch(b.icmp_signed("<", following, channels), loop, done)
        for phi, start, then in (
            (channel, ir.Constant(I64, 0), following),
            (found, ir.Constant(INTS, [0] * PIECE), found_next),
        ):
            phi.add_incoming(start, before)
            phi.add_incoming(then, loop)
        b.position_at_end(done)
        b.store(found_next, b.inttoptr(out, INTS.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), codegen


@unique
class Argument(IntEnum):
    """Places in the worker's array of int64: addresses and numbers."""

    NEXT = 0
    """The next piece of work."""
    X = auto()
    """float32 [sample][group][channel][position]."""
    SAMPLES = auto()
    GROUPS = auto()
    CHANNELS = auto()
    """Of a group."""
    POSITIONS = auto()
    THRESHOLDS = auto()
    """float32 [group][channel]."""
    MIRROR = auto()
    """0 where a bit is whether a value is not below its threshold, the sign bit of a float32 where it is above it."""
    OUTPUT = auto()
    SAMPLE_OFFSETS = auto()
    """For each sample, in bytes from OUTPUT: where its words go."""
    POSITION_OFFSETS = auto()
    """For each position, in bytes from its sample's."""
    GROUP_BYTES = auto()
    """From a group's words of a position to the next group's."""
    WORD_BYTES = auto()
    """From a word of a position to the next."""
    PIECES = auto()
    """Pieces of 16 positions that are packed in one go."""


ARGUMENTS = len(Argument)


@njit(inline="always")
def _few(values, plane, channels, positions, spare):
    """Copy planes of fewer than 16 positions to where each has 16."""
    for c in range(channels):
        for p in range(positions):
            copy_float(values + c * plane + 4 * p, spare + 4 * (PIECE * c + p))


@njit(inline="always")
def _words(values, plane, thresholds, channels, mirror, words, halves):
    """Set a word of at most 64 channels for each of 16 positions."""
    _below(values, plane, thresholds, min(_HALF, channels), mirror, halves.ctypes.data)
    if channels > _HALF:
        above = values + _HALF * plane
        _below(above, plane, thresholds + 4 * _HALF, channels - _HALF, mirror, halves[1:].ctypes.data)
    present = -1 if channels == WORD else (1 << channels) - 1
    for p in range(PIECE):
        word = np.int64(halves[0, p]) & 0xFFFFFFFF
        if channels > _HALF:
            word |= np.int64(halves[1, p]) << _HALF
        words[p] = word if mirror != 0 else ~word & present


@njit(inline="always")
def _pack(a, plane_of, start, thresholds, out, spare, halves, words):
    """Pack all channels of a group at 16 positions, or at all of them where they are fewer."""
    channels, positions, mirror = a[Argument.CHANNELS], a[Argument.POSITIONS], a[Argument.MIRROR]
    plane = 4 * positions
    for first in range(0, channels, WORD):
        present = min(WORD, channels - first)
        values = plane_of + plane * first + 4 * start
        if positions < PIECE:
            _few(values, plane, present, positions, spare.ctypes.data)
            _words(spare.ctypes.data, 4 * PIECE, thresholds + 4 * first, present, mirror, words, halves)
        else:
            _words(values, plane, thresholds + 4 * first, present, mirror, words, halves)
        at = out + first // WORD * a[Argument.WORD_BYTES]
        for p in range(min(PIECE, positions)):
            write_word(at + read_word(a[Argument.POSITION_OFFSETS] + 8 * (start + p)), words[p])


@cache
def compiled() -> Any:
    """Return the worker, a function of numba's, compiled or read from its cache."""
    of_all_sources = fingerprint()

    @compiled_worker
    def worker(pointer):
        a = carray(pointer, ARGUMENTS + 0 * of_all_sources)  # part of the key in numba's cache
        channels, positions, groups = a[Argument.CHANNELS], a[Argument.POSITIONS], a[Argument.GROUPS]
        spare, halves, words = np.zeros((WORD, PIECE), np.float32), np.zeros((2, PIECE), np.int32), np.zeros(PIECE, np.int64)
        step = PIECE * a[Argument.PIECES]
        runs = (positions + step - 1) // step
        number = next_number(a.ctypes.data)
        while number < a[Argument.SAMPLES] * groups * runs:
            plane, run = number // runs, number % runs  # of a sample's group
            group = plane % groups
            out = a[Argument.OUTPUT] + read_word(a[Argument.SAMPLE_OFFSETS] + 8 * (plane // groups))
            out += group * a[Argument.GROUP_BYTES]
            x = a[Argument.X] + 4 * plane * channels * positions
            thresholds = a[Argument.THRESHOLDS] + 4 * group * channels
            for first in range(run * step, min((run + 1) * step, positions), PIECE):
                # the last piece may have been packed in part: packing it again does no harm
                _pack(a, x, max(0, min(first, positions - PIECE)), thresholds, out, spare, halves, words)
            number = next_number(a.ctypes.data)

    return worker
