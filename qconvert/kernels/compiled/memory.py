"""What compiled code needs of raw memory: read, write and count at an address."""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

I64, F32 = ir.IntType(64), ir.FloatType()


@intrinsic
def read_word(typing_context: Any, address: Any) -> Any:
    """Return the int64 at an address."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        return b.load(b.inttoptr(arguments[0], I64.as_pointer()))

    return types.int64(types.intp), codegen


@intrinsic
def write_word(typing_context: Any, address: Any, value: Any) -> Any:
    """Store an int64 at an address."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        b.store(arguments[1], b.inttoptr(arguments[0], I64.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), codegen


@intrinsic
def copy_float(typing_context: Any, source: Any, target: Any) -> Any:
    """Copy the float32 at an address to another."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        value = b.load(b.inttoptr(arguments[0], F32.as_pointer()))
        b.store(value, b.inttoptr(arguments[1], F32.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


SQUARE = 8
"""Rows and columns that `transpose` copies at once."""


@intrinsic
def transpose(typing_context: Any, source: Any, source_row: Any, target: Any, target_row: Any) -> Any:
    """Copy 8 x 8 float32 from an address to another, rows to columns. Both have rows that many bytes apart."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        source, source_row, target, target_row = arguments
        kind = ir.VectorType(F32, SQUARE)

        def row_of(start: ir.Value, apart: ir.Value, number: int) -> ir.Value:
            return b.inttoptr(b.add(start, b.mul(apart, ir.Constant(I64, number))), kind.as_pointer())

        rows = [b.load(row_of(source, source_row, number), align=4) for number in range(SQUARE)]
        for apart in (1, 2, 4):  # halves of halves change places across the diagonal
            for first in range(SQUARE):
                if not first & apart:
                    rows[first], rows[first + apart] = _exchanged(b, rows[first], rows[first + apart], apart)
        for number, row in enumerate(rows):
            b.store(row, row_of(target, target_row, number), align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen


def _exchanged(b: ir.IRBuilder, one: ir.Value, other: ir.Value, apart: int) -> tuple[ir.Value, ir.Value]:
    """Return two rows of which the one has got the other's lanes ``l - apart`` in exchange for its lanes l with that bit."""
    lanes = range(SQUARE)
    to_one = [lane if not lane & apart else SQUARE + lane - apart for lane in lanes]
    to_other = [lane + apart if not lane & apart else SQUARE + lane for lane in lanes]
    masks = (ir.Constant(ir.VectorType(ir.IntType(32), SQUARE), each) for each in (to_one, to_other))
    first, second = (b.shuffle_vector(one, other, mask) for mask in masks)
    return first, second


@intrinsic
def next_number(typing_context: Any, address: Any) -> Any:
    """Return the int64 at an address and add 1 to it, as one step for all threads."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        pointer = b.inttoptr(arguments[0], I64.as_pointer())
        return b.atomic_rmw("add", pointer, ir.Constant(I64, 1), "monotonic")

    return types.int64(types.intp), codegen


@intrinsic
def count_bits(typing_context: Any, address: Any) -> Any:
    """Return how many bits of the int64 at an address are 1."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        return b.ctpop(b.load(b.inttoptr(arguments[0], I64.as_pointer())))

    return types.int64(types.intp), codegen
