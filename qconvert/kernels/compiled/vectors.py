"""LLVM's vector code in parts that several workers need."""

from llvmlite import ir
from numba.core import cgutils

from ..codes import PIECE

FLOATS, INTS = ir.VectorType(ir.FloatType(), PIECE), ir.VectorType(ir.IntType(32), PIECE)
"""A piece of channels or positions."""


def splat(b: ir.IRBuilder, value: ir.Value, kind: ir.VectorType) -> ir.Value:
    """Return a vector of that kind whose elements all are the value."""
    undefined = ir.Constant(kind, ir.Undefined)
    first = b.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    return b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count))


def floats(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Return 16 float32 at an address."""
    value = b.load(b.inttoptr(address, FLOATS.as_pointer()))
    value.align = 4
    return value


def float_splat(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Return the float32 at an address 16 times."""
    return splat(b, b.load(b.inttoptr(address, FLOATS.element.as_pointer())), FLOATS)


def prefetch(b: ir.IRBuilder, address: ir.Value, *, to_write: bool = False) -> None:
    """Bring what lies at an address, if anything does, into the cache, to be read soon, or written."""
    number, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
    function = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
    kind, into_all_levels, data = (ir.Constant(number, each) for each in (int(to_write), 3, 1))
    b.call(
        cgutils.get_or_insert_function(b.module, function, "llvm.prefetch.p0i8"),
        [b.inttoptr(address, pointer), kind, into_all_levels, data],
    )
