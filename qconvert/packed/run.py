"""The compiled workers, called with tensors."""

import numpy as np
import torch
from torch import Tensor

from . import bits as packing
from . import convolve as convolving
from .convolve import CHANNELS, POSITIONS
from .geometry import Geometry
from .openmp import run
from .tile import SHAPE

WORD = packing.WORD


def pack(x: Tensor, thresholds: Tensor, spreads: Tensor, settings: Tensor | None, planes: int, geometry: Geometry, groups: int) -> Tensor:
    n, c, d, h, w = x.shape
    x = x.permute(0, 2, 3, 4, 1).contiguous()
    out = torch.zeros((planes, n, *geometry.padded, groups, geometry.words), dtype=torch.int64)
    A = packing.Argument
    a = np.zeros(len(A), np.int64)
    rows = geometry.rows
    a[A.X], a[A.ROWS], a[A.WIDTH], a[A.GROUPS], a[A.GROUP_CHANNELS] = x.data_ptr(), n * d * h, w, groups, c // groups
    a[A.THRESHOLDS], a[A.SPREADS] = thresholds.data_ptr(), spreads.data_ptr()
    a[A.SETTINGS] = 0 if settings is None else settings.data_ptr()
    a[A.PLANES], a[A.PLANE_BYTES] = planes, geometry.plane_bytes
    a[A.OUTPUT], a[A.ROW_OFFSETS] = out.data_ptr(), rows.ctypes.data
    run(packing.compiled().address, a)
    return out


def word_offsets(geometry: Geometry, input_planes: int, weight_planes: int) -> np.ndarray:
    from .layout import pairs
    planes = [i for _, of_level in pairs(input_planes, weight_planes) for i, _ in of_level]
    return np.concatenate([i * geometry.plane_bytes + geometry.taps for i in planes])


def convolve(x, words, runs, offsets, bases, classes, addends, table, geometry, groups, group_channels, residual=None, out=True, next=None):
    """x bits [plane][N][D][H][W][G][word]"""
    A = convolving.Argument
    a = np.zeros(len(A), np.int64)
    count = len(geometry.positions)
    a[A.X], a[A.WORD_OFFSETS], a[A.RUNS], a[A.RUN_COUNT] = x.data_ptr(), offsets.ctypes.data, runs.ctypes.data, len(runs)
    a[A.WEIGHTS], a[A.WEIGHT_BYTES] = words.data_ptr(), words.stride(0) * 8
    a[A.POSITION_OFFSETS], a[A.POSITION_COUNT] = geometry.positions.ctypes.data, count
    a[A.BASES] = bases.data_ptr()
    a[A.CLASSES] = 0 if classes is None else classes.ctypes.data
    a[A.ADDENDS] = 0 if addends is None else addends.data_ptr()
    a[A.TABLE] = table.data_ptr()
    a[A.GROUPS], a[A.BLOCKS], a[A.GROUP_CHANNELS] = groups, len(words) // groups, group_channels
    a[A.GROUP_BYTES] = 8 * geometry.words
    a[A.RESIDUAL] = 0 if residual is None else residual.data_ptr()
    y = torch.empty((geometry.batch, *geometry.outputs, groups * group_channels)) if out else None
    a[A.OUTPUT] = 0 if y is None else y.data_ptr()
    bits = None
    if next is not None:
        bits = torch.zeros((1, next.batch, *next.padded, 1, next.words), dtype=torch.int64)
        a[A.BITS], a[A.BIT_OFFSETS] = bits.data_ptr(), next.inner.ctypes.data
    tiles = -(-count // POSITIONS)
    a[A.TILES] = max(1, min(64, tiles * len(words) // (4 * torch.get_num_threads())))
    run(convolving.compiled().address, a)
    return y, bits
