"""How fast one core compares and counts where nothing else holds it up: what the kernel's speed is a share of."""

import ctypes
import time
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from qconvert.kernels.compiled.tile import COUNTS_WORDS, SHAPE

CHAINS = SHAPE.positions * SHAPE.vectors
"""Sums side by side, as many as the kernel has."""

I64 = ir.IntType(64)
WORDS = ir.VectorType(I64, SHAPE.lanes)
COUNTS = WORDS if COUNTS_WORDS else ir.VectorType(ir.IntType(8), 8 * SHAPE.lanes)


@intrinsic
def _turns(typing_context: Any, count: Any, word: Any) -> Any:
    """XOR, population count and add, so many times for each chain; all of it stays in registers."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        count, word = arguments
        name = f"llvm.ctpop.v{COUNTS.count}i{COUNTS.element.width}"
        ctpop = cgutils.get_or_insert_function(b.module, ir.FunctionType(COUNTS, [COUNTS]), name)
        start = ir.Constant(WORDS, ir.Undefined)
        lanes = b.insert_element(start, word, ir.Constant(ir.IntType(32), 0))
        splat = b.shuffle_vector(lanes, start, ir.Constant(ir.VectorType(ir.IntType(32), SHAPE.lanes), [0] * SHAPE.lanes))
        entry, loop, done = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
        b.branch(loop)
        b.position_at_end(loop)
        turn = b.phi(I64)
        sums = [b.phi(COUNTS) for _ in range(CHAINS)]
        # the word that is compared with changes with the sum, so that no turn can be left out
        after = [b.add(each, b.call(ctpop, [b.xor(each, b.bitcast(splat, COUNTS))])) for each in sums]
        following = b.add(turn, ir.Constant(I64, 1))
        turn.add_incoming(ir.Constant(I64, 0), entry)
        turn.add_incoming(following, loop)
        for number, (phi, value) in enumerate(zip(sums, after, strict=True)):
            phi.add_incoming(ir.Constant(COUNTS, [number] * COUNTS.count), entry)
            phi.add_incoming(value, loop)
        b.cbranch(b.icmp_signed("<", following, count), loop, done)
        b.position_at_end(done)
        total = after[0]
        for value in after[1:]:
            total = b.xor(total, value)
        return b.extract_element(b.bitcast(total, WORDS), ir.Constant(ir.IntType(32), 0))

    return types.int64(types.int64, types.int64), codegen


@cfunc(types.void(types.CPointer(types.int64)), cache=True)
def _worker(pointer):
    a = carray(pointer, 3)
    a[2] = _turns(a[0], a[1])


def words_per_second(rounds: int = 9, turns: int = 2_000_000) -> float:
    """Return how many 64-bit words one core compares and counts a second, the best of the rounds."""
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_worker.address)
    arguments = np.array([turns, 0x5555555555555555, 0], np.int64)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run(arguments.ctypes.data)
        times.append(time.perf_counter() - start)
    return turns * CHAINS * SHAPE.lanes / min(times)
