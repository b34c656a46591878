"""The innermost loop of the binary convolution, as LLVM's vector code: a tile of output positions x output channels.

For each word of 64 channels the codes' bits of each position are compared with those of each output channel's weights: XOR,
population count, add. What a processor does in one instruction of 512 bits another one does in several: LLVM writes
whichever there is. Two ways to count, by processor: words where a vector of 64-bit words is counted at once
(AVX-512's VPOPCNTDQ), bytes elsewhere (AVX2, NEON), which are added up to 64 bits before they overflow.
"""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, config, types
from numba.extending import intrinsic

from ..layout import Row
from .vectors import prefetch, splat

I1, I8, I32, I64, F32 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()


@dataclass(frozen=True)
class Shape:
    """How much of the output a tile computes, and how it counts.

    Attributes:
        positions: output positions.
        vectors: vectors of output channels.
        lanes: 64-bit words in a vector, an output channel each.
        longest_run: words that are counted before the counts must be widened, 0 for as many as there are.
    """

    positions: int
    vectors: int
    lanes: int
    longest_run: int

    @property
    def channels(self) -> int:
        """Output channels of the tile."""
        return self.vectors * self.lanes


def _features() -> set[str]:
    """Return the processor's features that numba compiles for."""
    flat: str = config.CPU_FEATURES if config.CPU_FEATURES is not None else llvm.get_host_cpu_features().flatten()
    return {each[1:] for each in flat.split(",") if each.startswith("+")}


FEATURES = _features()

COUNTS_WORDS = "avx512vpopcntdq" in FEATURES

FUSES_ADDITION = "fma" in FEATURES or platform.machine() not in ("x86_64", "AMD64")
"""Every 64-bit ARM processor does."""

SHAPE = Shape(4, 4, 8, 0) if COUNTS_WORDS else Shape(2, 4, 4, 31)
"""The accumulators of a tile fit into the registers: 32 of 512 bits, or 16 of 256."""


_WORDS = ir.VectorType(I64, SHAPE.lanes)
_NUMBERS = ir.VectorType(I32, 2 * SHAPE.lanes)
_FLOATS = ir.VectorType(F32, 2 * SHAPE.lanes)
"""Sums of two vectors of words: the registers hold twice as many."""
_COUNTS = _WORDS if COUNTS_WORDS else ir.VectorType(I8, 8 * SHAPE.lanes)
_WORD = 8  # bytes
_VECTOR = _WORD * SHAPE.lanes
_LINE = 64  # bytes, of the cache
_PAIRS = range(SHAPE.vectors // 2)


@intrinsic
def tile(
    typing_context: Any,
    inputs: Any,
    word_offsets: Any,
    runs: Any,
    run_count: Any,
    weights: Any,
    bases: Any,
    addends: Any,
    channels: Any,
    residuals: Any,
    outputs: Any,
    bits: Any,
) -> Any:
    """Compute ``SHAPE.positions`` x ``SHAPE.channels`` outputs. All arguments are addresses or numbers, as intp.

    Args:
        typing_context: numba's.
        inputs: for each position, address of its first word.
        word_offsets: for each word, in bytes from a position.
        runs: pairs for each run of words: where it ends, and by how many bits the sum before it is shifted to the left.
        run_count: how many.
        weights: words of the channels, [word][channel].
        bases: for each position, address of what twice the count is taken from, int32 for each channel.
        addends: for each position, an int64 that is added.
        channels: the rows of `Row`.
        residuals: for each position, address of what is added before the slope, float32 for each channel.
        outputs: for each position, address of its outputs, float32.
        bits: for each position, address of its outputs' bits: where an output is not below the threshold.
    """
    signature = types.void(*[types.intp] * 11)
    return signature, _tile


def _tile(context: Any, b: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
    inputs, word_offsets, runs, run_count, weights, bases, addends, *after = arguments
    places = [_load_word(b, inputs, p) for p in range(SHAPE.positions)]
    _prefetch_floats(b, *after[1:3])
    counts = _counts(b, places, word_offsets, runs, run_count, weights)
    sums = []
    for p in range(SHAPE.positions):
        base, addend = _load_word(b, bases, p), splat(b, b.trunc(_load_word(b, addends, p), I32), _NUMBERS)
        one = ir.Constant(_NUMBERS, [1] * _NUMBERS.count)
        twice = [b.shl(_narrowed(b, *counts[p][2 * v : 2 * v + 2]), one) for v in _PAIRS]
        sums.append([b.add(b.sub(_load(b, base, _VECTOR * v, _NUMBERS, 4), twice[v]), addend) for v in _PAIRS])
    _put_out(b, sums, *after)
    return context.get_dummy_value()


def _prefetch_floats(b: ir.IRBuilder, residuals: ir.Value, outputs: ir.Value) -> None:
    """Let what is read and written after the counting come into the cache meanwhile: rows of other channels lie between."""
    for p in range(SHAPE.positions):
        for line in range(0, 4 * SHAPE.channels, _LINE):
            prefetch(b, b.add(_load_word(b, residuals, p), _number(line)))
            prefetch(b, b.add(_load_word(b, outputs, p), _number(line)), to_write=True)


def _counts(
    b: ir.IRBuilder,
    places: list[ir.Value],
    word_offsets: ir.Value,
    runs: ir.Value,
    run_count: ir.Value,
    weights: ir.Value,
) -> list[list[ir.Value]]:
    """Return the counts of differing bits as vectors, [position][vector]."""
    grid = [(p, v) for p in range(SHAPE.positions) for v in range(SHAPE.vectors)]
    before, run_block = b.block, b.append_basic_block("run")
    word_block, widen_block, shift_block, done = (b.append_basic_block(each) for each in ("word", "widen", "shift", "done"))
    b.branch(run_block)

    b.position_at_end(run_block)
    run, run_k, run_weight = b.phi(I64), b.phi(I64), b.phi(I64)
    totals = {each: b.phi(_WORDS) for each in grid}
    end = _load_word(b, b.add(runs, b.shl(run, _number(4))), 0)
    b.branch(word_block)

    b.position_at_end(word_block)
    k, weight = b.phi(I64), b.phi(I64)
    counts = {each: b.phi(_COUNTS) for each in grid}
    offset = _load_word(b, b.add(word_offsets, b.shl(k, _number(3))), 0)
    counted = _with_word(b, counts, [b.add(place, offset) for place in places], weight)
    next_k, next_weight = b.add(k, _number(1)), b.add(weight, _number(_VECTOR * SHAPE.vectors))
    b.cbranch(b.icmp_signed("<", next_k, end), word_block, widen_block)

    b.position_at_end(widen_block)
    widened = counted if COUNTS_WORDS else {each: b.add(totals[each], _widened(b, counted[each])) for each in grid}
    next_run = b.add(run, _number(1))
    b.cbranch(b.icmp_signed("<", next_run, run_count), shift_block, done)

    b.position_at_end(shift_block)
    shift = splat(b, _load_word(b, b.add(runs, b.shl(next_run, _number(4))), 1), _WORDS)
    shifted = {each: b.shl(widened[each], shift) for each in grid}
    b.branch(run_block)

    for phi, start, then in (
        (run, _number(0), next_run),
        (run_k, _number(0), next_k),
        (run_weight, weights, next_weight),
        *((totals[each], _zero(_WORDS), shifted[each]) for each in grid),
    ):
        phi.add_incoming(start, before)
        phi.add_incoming(then, shift_block)
    for phi, start, then in (
        (k, run_k, next_k),
        (weight, run_weight, next_weight),
        *((counts[each], totals[each] if COUNTS_WORDS else _zero(_COUNTS), counted[each]) for each in grid),
    ):
        phi.add_incoming(start, run_block)
        phi.add_incoming(then, word_block)
    b.position_at_end(done)
    return [[widened[p, v] for v in range(SHAPE.vectors)] for p in range(SHAPE.positions)]


def _with_word(
    b: ir.IRBuilder, counts: Mapping[tuple[int, int], ir.Value], places: list[ir.Value], weight: ir.Value
) -> dict[tuple[int, int], ir.Value]:
    """Return the counts and, added to them, those of the bits in which a word of each position differs from the weight's."""
    kind = ir.FunctionType(_COUNTS, [_COUNTS])
    ctpop = cgutils.get_or_insert_function(b.module, kind, f"llvm.ctpop.v{_COUNTS.count}i{_COUNTS.element.width}")
    of_weights = [_load(b, weight, _VECTOR * v, _WORDS) for v in range(SHAPE.vectors)]
    counted = {}
    for p, place in enumerate(places):
        word = splat(b, _load_word(b, place, 0), _WORDS)
        for v in range(SHAPE.vectors):
            differing = b.bitcast(b.xor(word, of_weights[v]), _COUNTS)
            counted[p, v] = b.add(counts[p, v], b.call(ctpop, [differing]))
    return counted


def _widened(b: ir.IRBuilder, counts: ir.Value) -> ir.Value:
    """Return the sums of each 8 bytes as 64-bit words."""
    if COUNTS_WORDS:
        return counts
    if "avx2" in FEATURES:
        sad = cgutils.get_or_insert_function(b.module, ir.FunctionType(_WORDS, [_COUNTS] * 2), "llvm.x86.avx2.psad.bw")
        return b.call(sad, [counts, _zero(_COUNTS)])
    words = b.bitcast(counts, _WORDS)
    for width, mask in ((8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0x00000000FFFFFFFF)):
        masks, widths = (ir.Constant(_WORDS, [each] * SHAPE.lanes) for each in (mask, width))
        words = b.add(b.and_(words, masks), b.and_(b.lshr(words, widths), masks))
    return words


def _narrowed(b: ir.IRBuilder, first: ir.Value, second: ir.Value) -> ir.Value:
    """Return the lower halves of two vectors of words side by side."""
    lower = ir.Constant(ir.VectorType(I32, _NUMBERS.count), list(range(0, 2 * _NUMBERS.count, 2)))
    return b.shuffle_vector(b.bitcast(first, _NUMBERS), b.bitcast(second, _NUMBERS), lower)


def _put_out(
    b: ir.IRBuilder,
    sums: list[list[ir.Value]],
    channels: ir.Value,
    residuals: ir.Value,
    outputs: ir.Value,
    bits: ir.Value,
) -> None:
    """Bring the sums to float, through what comes after the convolution, and store them, their bits, or both."""
    above: list[list[ir.Value]] = [[] for _ in range(SHAPE.positions)]
    for v in _PAIRS:
        place = _VECTOR * v
        scale, offset, bias, norm_factor, norm_summand, slope, last, threshold = (
            _load(b, channels, 4 * SHAPE.channels * row + place, _FLOATS, 4) for row in Row
        )
        for p in range(SHAPE.positions):
            y = b.fadd(b.fmul(b.sitofp(sums[p][v], _FLOATS), scale), offset)
            y = _multiplied_and_added(b, b.fadd(y, bias), norm_factor, norm_summand)
            y = b.fadd(y, _load(b, _load_word(b, residuals, p), place, _FLOATS, 4))
            y = b.fadd(b.select(b.fcmp_ordered(">", y, _zero(_FLOATS)), y, b.fmul(y, slope)), last)
            _store(b, y, b.add(_load_word(b, outputs, p), _number(place)))
            above[p].append(b.fcmp_unordered(">=", y, threshold))
    for p, flags in enumerate(above):
        _store(b, _as_bits(b, flags), _load_word(b, bits, p))


def _multiplied_and_added(b: ir.IRBuilder, y: ir.Value, factor: ir.Value, summand: ir.Value) -> ir.Value:
    """Return ``y * factor + summand`` as torch's BatchNorm does: rounded once where the processor can."""
    if not FUSES_ADDITION:
        return b.fadd(b.fmul(y, factor), summand)
    fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), f"llvm.fma.v{_FLOATS.count}f32")
    return b.call(fma, [y, factor, summand])


def _as_bits(b: ir.IRBuilder, flags: list[ir.Value]) -> ir.Value:
    """Return vectors of flags as one integer, the first flag as its lowest bit."""
    width = sum(each.type.count for each in flags)
    whole = ir.IntType(width)
    value = ir.Constant(whole, 0)
    for index, each in enumerate(flags):
        part = b.zext(b.bitcast(each, ir.IntType(each.type.count)), whole)
        value = b.or_(value, b.shl(part, ir.Constant(whole, index * each.type.count)))
    return value


def _number(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def _zero(kind: ir.VectorType) -> ir.Constant:
    return ir.Constant(kind, [0] * kind.count)


def _pointer(b: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return b.inttoptr(address, kind.as_pointer())


def _load(b: ir.IRBuilder, address: ir.Value, offset: int, kind: ir.Type, align: int = 8) -> ir.Value:
    value = b.load(_pointer(b, b.add(address, _number(offset)), kind))
    value.align = align
    return value


def _load_word(b: ir.IRBuilder, address: ir.Value, index: int) -> ir.Value:
    return _load(b, address, _WORD * index, I64)


def _store(b: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    b.store(value, _pointer(b, address, value.type)).align = 1 if isinstance(value.type, ir.IntType) else 4
