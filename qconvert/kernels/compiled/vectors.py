"""LLVM's vector code in parts that several workers need."""

from llvmlite import ir

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
