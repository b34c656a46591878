"""The compiled worker that adds up the codes under each window: what a weight's levels that do not lie around 0 need."""

from enum import IntEnum, auto, unique
from functools import cache
from typing import Any

from numba import carray

from .compiling import compiled_worker
from .fingerprint import fingerprint
from .memory import count_bits, next_number, read_word, write_word


@unique
class Argument(IntEnum):
    """Places in the worker's array of int64: addresses and numbers."""

    NEXT = 0
    """The next output position."""
    X = auto()
    """Bits of the input."""
    PLANES = auto()
    PLANE_BYTES = auto()
    TAPS = auto()
    """For each word of a window, in bytes from a position."""
    TAP_COUNT = auto()
    POSITION_OFFSETS = auto()
    POSITION_COUNT = auto()
    GROUPS = auto()
    GROUP_BYTES = auto()
    """Of a group's words of a position."""
    OUTPUT = auto()
    """int64 [position][group]."""


ARGUMENTS = len(Argument)


@cache
def compiled() -> Any:
    """Return the worker, a function of numba's, compiled or read from its cache."""
    of_all_sources = fingerprint()

    @compiled_worker
    def worker(pointer):
        a = carray(pointer, ARGUMENTS + 0 * of_all_sources)  # part of the key in numba's cache
        position = next_number(a.ctypes.data)
        while position < a[Argument.POSITION_COUNT]:
            for group in range(a[Argument.GROUPS]):
                start = (
                    a[Argument.X] + read_word(a[Argument.POSITION_OFFSETS] + 8 * position) + group * a[Argument.GROUP_BYTES]
                )
                total = 0
                for plane in range(a[Argument.PLANES]):
                    count = 0
                    for tap in range(a[Argument.TAP_COUNT]):
                        count += count_bits(start + plane * a[Argument.PLANE_BYTES] + read_word(a[Argument.TAPS] + 8 * tap))
                    total += count << plane
                write_word(a[Argument.OUTPUT] + 8 * (position * a[Argument.GROUPS] + group), total)
            position = next_number(a.ctypes.data)

    return worker
