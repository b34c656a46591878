"""The compiled workers, called with tensors: numba is needed from here on."""

import math
from functools import cache, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from ..codes import PIECE, WORD
from ..geometry import Geometry
from ..layout import pairs, runs
from . import bits as packing
from . import convolution as convolving
from . import planar
from . import sums as summing
from .convolution import CHANNELS
from .openmp import run
from .tile import SHAPE

BLOCK = CHANNELS
"""Output channels that are computed together."""

_SIGN_BIT = 1 << 31
"""Of a float32."""

_PIECES_PER_THREAD = 4
"""Pieces of work of a block: more than threads, which may not all be as fast, and few, for each costs a little."""


@cache
def prepare() -> None:
    """Compile the workers, or read them from numba's cache, before they are first called; a line says so meanwhile."""
    with Console(stderr=True).status("Compiling the kernel of binary convolutions, once for this machine"):
        for worker in (packing, planar, convolving, summing):
            worker.compiled()


def pack(
    x: Tensor, thresholds: Tensor, spreads: Tensor, settings: Tensor | None, planes: int, geometry: Geometry, groups: int
) -> Tensor:
    """Return the words of a float input, see `qconvert::pack_bits`."""
    samples, channels, depth, height, width = x.shape
    if settings is None and x.is_contiguous():
        limits = thresholds[:, : channels // groups].contiguous()
        return pack_planes(x, limits, geometry, groups, above=False)
    x = x.permute(0, 2, 3, 4, 1).contiguous()
    words = x.new_zeros((planes, samples, *geometry.padded, groups, geometry.words), dtype=torch.int64)
    place = packing.Argument
    a = np.zeros(len(place), np.int64)
    a[place.X], a[place.ROWS], a[place.WIDTH] = x.data_ptr(), samples * depth * height, width
    a[place.GROUPS], a[place.GROUP_CHANNELS] = groups, channels // groups
    a[place.THRESHOLDS], a[place.SPREADS] = thresholds.data_ptr(), spreads.data_ptr()
    a[place.SETTINGS] = 0 if settings is None else settings.data_ptr()
    a[place.PLANES], a[place.PLANE_BYTES] = planes, geometry.plane_bytes
    a[place.OUTPUT], a[place.ROW_OFFSETS] = words.data_ptr(), geometry.rows.ctypes.data
    run(packing.compiled().address, a)
    return words


def pack_planes(x: Tensor, thresholds: Tensor, geometry: Geometry, groups: int, *, above: bool) -> Tensor:
    """Return the words of a contiguous float32 input's signs.

    Args:
        x: float32 (N, C, D, H, W), contiguous.
        thresholds: float32, one for each channel, contiguous.
        geometry: of the words.
        groups: channel groups.
        above: whether a bit is whether a value is above its threshold, or else whether it is not below it.
    """
    samples, channels = x.shape[:2]
    words = x.new_zeros((1, samples, *geometry.padded, groups, geometry.words), dtype=torch.int64)
    if x.numel() == 0:
        return words
    inner = geometry.inner.reshape(samples, -1)
    strides = (8 * geometry.words, 8)
    places = (np.ascontiguousarray(inner[:, 0] - inner[0, 0]), np.ascontiguousarray(inner[0]))
    _pack_planes(x.view(samples, groups, channels // groups, -1), thresholds, words, places, strides, above=above)
    return words


def pack_weight(weight: Tensor, groups: int, *, above: bool) -> Tensor:
    """Return the words of a contiguous float32 weight's signs, [group, block][word][channel], see `layout.arranged`."""
    outputs, channels = weight.shape[:2]
    taps, per_tap, per_group = weight[0, 0].numel(), -(-channels // WORD), outputs // groups
    blocks = -(-per_group // BLOCK)
    words = weight.new_zeros((groups * blocks, taps * per_tap, BLOCK), dtype=torch.int64)
    group, place = np.divmod(np.arange(outputs), per_group)
    block, lane = np.divmod(place, BLOCK)
    places = (8 * ((group * blocks + block) * words[0].numel() + lane), 8 * BLOCK * per_tap * np.arange(taps))
    thresholds = weight.new_zeros(channels)
    _pack_planes(weight.view(outputs, 1, channels, taps), thresholds, words, places, (0, 8 * BLOCK), above=above)
    return words


def _pack_planes(
    x: Tensor,
    thresholds: Tensor,
    words: Tensor,
    places: tuple[NDArray[np.int64], NDArray[np.int64]],
    strides: tuple[int, int],
    *,
    above: bool,
) -> None:
    """Write the words of signs.

    Args:
        x: float32 [sample][group][channel][position].
        thresholds: float32 [group][channel].
        words: where they go.
        places: of each sample, and of each position, in bytes.
        strides: of a group and of a word, in bytes.
        above: as for `pack_planes`.
    """
    place = planar.Argument
    a = np.zeros(len(place), np.int64)
    a[place.X], a[place.THRESHOLDS], a[place.OUTPUT] = x.data_ptr(), thresholds.data_ptr(), words.data_ptr()
    a[place.SAMPLES], a[place.GROUPS], a[place.CHANNELS], a[place.POSITIONS] = x.shape
    a[place.MIRROR] = _SIGN_BIT if above else 0
    a[place.SAMPLE_OFFSETS], a[place.POSITION_OFFSETS] = (each.ctypes.data for each in places)
    a[place.GROUP_BYTES], a[place.WORD_BYTES] = strides
    a[place.PIECES] = _at_once(-(-x.shape[-1] // PIECE))
    run(planar.compiled().address, a)


def convolve(
    words: Tensor,
    weight: Tensor,
    bases: Tensor,
    addends: Tensor | None,
    table: Tensor,
    geometry: Geometry,
    groups: int,
    channels: int,
    planes: tuple[int, int],
    residual: Tensor | None,
    *,
    has_values: bool,
    following: Geometry | None,
    memory_format: torch.memory_format,
) -> list[Tensor]:
    """Return outputs, their bits for the layer that follows, or both, see `qconvert::packed_conv3d`."""
    place = convolving.Argument
    a = np.zeros(len(place), np.int64)
    offsets, ends = _word_order(geometry, planes)
    count = len(geometry.positions)
    a[place.X], a[place.WORD_OFFSETS] = words.data_ptr(), offsets.ctypes.data
    a[place.RUNS], a[place.RUN_COUNT] = ends.ctypes.data, len(ends)
    a[place.WEIGHTS], a[place.WEIGHT_BYTES] = weight.data_ptr(), weight[0].numel() * weight.itemsize
    a[place.POSITION_OFFSETS], a[place.POSITION_COUNT] = geometry.positions.ctypes.data, count
    a[place.BASES], a[place.TABLE] = bases.data_ptr(), table.data_ptr()
    a[place.CLASSES] = geometry.classes.ctypes.data if len(bases) > 1 else 0
    a[place.ADDENDS] = 0 if addends is None else addends.data_ptr()
    a[place.GROUPS], a[place.BLOCKS], a[place.GROUP_CHANNELS] = groups, len(weight) // groups, channels // groups
    a[place.GROUP_BYTES] = geometry.words * words.itemsize
    found: list[Tensor] = []
    plane = math.prod(geometry.outputs)
    if residual is not None:
        residual = residual.float()
        is_planar = residual.is_contiguous()
        residual = residual if is_planar else residual.contiguous(memory_format=torch.channels_last_3d)
        a[place.RESIDUAL], a[place.RESIDUAL_PLANE] = residual.data_ptr(), plane if is_planar else 0
    if has_values:
        shape = (geometry.batch, channels, *geometry.outputs)
        found.append(torch.empty(shape, dtype=torch.float32, device=words.device, memory_format=memory_format))
        a[place.OUTPUT] = found[0].data_ptr()
        a[place.OUTPUT_PLANE] = plane if memory_format == torch.contiguous_format else 0
    if following is not None:
        bits = words.new_zeros((1, following.batch, *following.padded, 1, following.words))
        a[place.BITS], a[place.BIT_OFFSETS] = bits.data_ptr(), following.inner.ctypes.data
        found.append(bits)
    a[place.RUNS_AT_ONCE] = _at_once(-(-count // convolving.RUN))
    run(convolving.compiled().address, a)
    return found


@lru_cache(maxsize=256)
def _word_order(geometry: Geometry, planes: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the offset of each word from a position, in the order of the weight's words, and the runs."""
    of_input = [plane for _, of_level in pairs(*planes) for plane, _ in of_level]
    offsets = np.concatenate([plane * geometry.plane_bytes + geometry.taps for plane in of_input])
    return offsets, runs(*planes, len(geometry.taps), SHAPE.longest_run)


def _at_once(runs: int) -> int:
    """Return how many runs of positions a piece of work has."""
    return max(1, runs // (torch.get_num_threads() * _PIECES_PER_THREAD))


def window_sums(words: Tensor, geometry: Geometry) -> Tensor:
    """Return the sum of the codes under each window, from 0 on, int64, shape (positions, groups)."""
    groups = words.shape[-2]
    count = len(geometry.positions)
    sums = words.new_empty((count, groups))
    place = summing.Argument
    a = np.zeros(len(place), np.int64)
    a[place.X], a[place.PLANES], a[place.PLANE_BYTES] = words.data_ptr(), len(words), geometry.plane_bytes
    a[place.TAPS], a[place.TAP_COUNT] = geometry.taps.ctypes.data, len(geometry.taps)
    a[place.POSITION_OFFSETS], a[place.POSITION_COUNT] = geometry.positions.ctypes.data, count
    a[place.GROUPS], a[place.GROUP_BYTES] = groups, geometry.words * words.itemsize
    a[place.OUTPUT] = sums.data_ptr()
    run(summing.compiled().address, a)
    return sums
