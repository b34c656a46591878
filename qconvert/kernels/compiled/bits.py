"""The packing's compiled worker: floats to the bit planes of their codes, 64 channels in a word."""

from enum import IntEnum, auto, unique
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from ..codes import PIECE, WORD
from .compiling import compiled_worker
from .fingerprint import fingerprint
from .memory import copy_float, next_number, read_word, write_word
from .vectors import FLOATS, INTS, float_splat, floats, splat


@intrinsic
def signs(typing_context: Any, values: Any, thresholds: Any) -> Any:
    """Return where 16 float32 values are not below their thresholds, as 16 bits of an int64. Both are addresses."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        values, thresholds = (floats(b, address) for address in arguments)
        return b.zext(b.bitcast(b.fcmp_unordered(">=", values, thresholds), ir.IntType(PIECE)), ir.IntType(64))

    return types.int64(types.intp, types.intp), codegen


@intrinsic
def codes(typing_context: Any, values: Any, thresholds: Any, spreads: Any, settings: Any, out: Any) -> Any:
    """Write the codes of 16 float32 values, from 0 on, as int32. All arguments are addresses.

    Code: ``round(clamp((value - threshold) / spread / divisor * factor, lowest, highest)) - lowest``, in the order of
    operations of the quantizers, so that not one code is another. NaN has code 0.

    Args:
        typing_context: numba's.
        values: the values.
        thresholds: float32, one for each value.
        spreads: float32, one for each value.
        settings: divisor, factor, lowest, highest: float32.
        out: where the codes go.
    """

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        *vectors, settings, out = arguments
        values, thresholds, spreads = (floats(b, address) for address in vectors)
        divisor, factor, lowest, highest = (
            float_splat(b, b.add(settings, ir.Constant(ir.IntType(64), 4 * n))) for n in range(4)
        )
        x = b.fmul(b.fdiv(b.fdiv(b.fsub(values, thresholds), spreads), divisor), factor)
        x = b.select(b.fcmp_ordered(">", x, lowest), x, lowest)
        x = b.select(b.fcmp_ordered("<", x, highest), x, highest)
        rint = cgutils.get_or_insert_function(b.module, ir.FunctionType(FLOATS, [FLOATS]), f"llvm.rint.v{PIECE}f32")
        codes = b.fptosi(b.fsub(b.call(rint, [x]), lowest), INTS)
        b.store(codes, b.inttoptr(out, INTS.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), codegen


@intrinsic
def plane(typing_context: Any, codes: Any, bit: Any) -> Any:
    """Return bit ``bit`` of each of 16 int32 at an address, as 16 bits of an int64."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        address, bit = arguments
        value = b.load(b.inttoptr(address, INTS.as_pointer()))
        value.align = 4
        shifts = splat(b, b.trunc(bit, INTS.element), INTS)
        flags = b.trunc(b.lshr(value, shifts), ir.VectorType(ir.IntType(1), PIECE))
        return b.zext(b.bitcast(flags, ir.IntType(PIECE)), ir.IntType(64))

    return types.int64(types.intp, types.int64), codegen


@unique
class Argument(IntEnum):
    """Places in the worker's array of int64: addresses (0 for none) and numbers."""

    NEXT = 0
    """The next row."""
    X = auto()
    """float32 [sample, depth, height][width][group][channel]."""
    ROWS = auto()
    WIDTH = auto()
    GROUPS = auto()
    GROUP_CHANNELS = auto()
    """Channels of a group."""
    THRESHOLDS = auto()
    """float32 for each channel."""
    SPREADS = auto()
    """float32 for each channel."""
    SETTINGS = auto()
    """float32, see `codes`; 0 where a code is a sign."""
    PLANES = auto()
    PLANE_BYTES = auto()
    OUTPUT = auto()
    """Words [plane][row with its border][width with its border][group][word]."""
    ROW_OFFSETS = auto()
    """For each row, in bytes from OUTPUT: where its first position goes."""


ARGUMENTS = len(Argument)


@njit(inline="always")
def _piece(values, first, present, spare):
    """Return the address of 16 values from the first on.

    Where there are fewer it is that of a copy, in which the rest is so low that its bits are 0.
    """
    at = values + 4 * first
    if present - first >= PIECE:
        return at
    for c in range(present - first):
        copy_float(at + 4 * c, spare + 4 * c)
    return spare


@njit(inline="always")
def _sign_word(values, thresholds, present, spare):
    """Return the signs of at most 64 values of a position as a word."""
    word = 0
    for first in range(0, present, PIECE):
        word |= signs(_piece(values, first, present, spare), thresholds + 4 * first) << first
    return word


@njit(inline="always")
def _code_words(values, thresholds, spreads, settings, present, spare, found, bits):
    """Set the bits of the codes of at most 64 values of a position, a word for each plane."""
    bits[:] = 0
    for first in range(0, present, PIECE):
        at = _piece(values, first, present, spare)
        codes(at, thresholds + 4 * first, spreads + 4 * first, settings, found.ctypes.data)
        for p in range(bits.size):
            bits[p] |= plane(found.ctypes.data, p) << first


@cache
def compiled() -> Any:
    """Return the worker, a function of numba's, compiled or read from its cache."""
    of_all_sources = fingerprint()

    @compiled_worker
    def worker(pointer):
        a = carray(pointer, ARGUMENTS + 0 * of_all_sources)  # part of the key in numba's cache
        channels, groups, settings = a[Argument.GROUP_CHANNELS], a[Argument.GROUPS], a[Argument.SETTINGS]
        of_group = 4 * PIECE * ((channels + PIECE - 1) // PIECE)
        spare, found = np.full(PIECE, -np.inf, np.float32), np.zeros(PIECE, np.int32)
        bits = np.zeros(a[Argument.PLANES], np.int64)
        row = next_number(a.ctypes.data)
        while row < a[Argument.ROWS]:
            x = a[Argument.X] + 4 * row * a[Argument.WIDTH] * groups * channels
            out = a[Argument.OUTPUT] + read_word(a[Argument.ROW_OFFSETS] + 8 * row)
            for place in range(a[Argument.WIDTH] * groups):
                for first in range(0, channels, WORD):
                    values, present = x + 4 * first, min(WORD, channels - first)
                    table = of_group * (place % groups) + 4 * first
                    thresholds = a[Argument.THRESHOLDS] + table
                    if settings == 0:
                        write_word(out, _sign_word(values, thresholds, present, spare.ctypes.data))
                    else:
                        spreads = a[Argument.SPREADS] + table
                        _code_words(values, thresholds, spreads, settings, present, spare.ctypes.data, found, bits)
                        for p in range(bits.size):
                            write_word(out + p * a[Argument.PLANE_BYTES], bits[p])
                    out += 8
                x += 4 * channels
            row = next_number(a.ctypes.data)

    return worker
