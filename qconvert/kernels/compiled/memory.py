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
