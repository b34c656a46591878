"""A convolution of signs with weights that change from step to step: what training runs forward."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .codes import WORD, in_pieces
from .geometry import Geometry, Window, geometry
from .layout import Row, epilogue_table
from .operators import BLOCK, is_compiled, kernel

_LEAST_SHARE = 0.25
"""Of a word's bits and a block's channels that must be the layer's own. Below it a convolution of floats was as quick."""


def is_worth_it(
    x: Tensor, weight: Tensor, stride: Sequence[int], border: Sequence[int], dilation: Sequence[int], groups: int
) -> bool:
    """Return whether `signs_conv3d` takes these tensors, the input as float32, and beats a convolution of floats."""
    if {x.device.type, weight.device.type} != {"cpu"} or weight.dtype != torch.float32:
        return False
    outputs, channels, *size = weight.shape
    if x.shape[1] != channels * groups or x.numel() == 0:
        return False  # a convolution of floats says what is wrong, or has nothing to do
    if min(border) < 0 or min(Window.of(size, stride, border, dilation).outputs(x.shape[2:])) < 1:
        return False
    used = [size / (each * -(-size // each)) for size, each in ((channels, WORD), (outputs // groups, BLOCK))]
    return math.prod(used) >= _LEAST_SHARE and is_compiled()


def signs_conv3d(
    x: Tensor,
    weight: Tensor,
    thresholds: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    border: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    above: tuple[bool, bool],
    memory_format: torch.memory_format,
) -> Tensor:
    """Return ``conv3d(sign(x - threshold), sign(weight)) * scale + offset + bias``, with a border of -1.

    Shapes: x float32 (N, C, D, H, W), weight float32 (O, C / groups, kD, kH, kW), output float32 (N, O, D', H', W').

    Args:
        x: the input.
        weight: the latent weight.
        thresholds: float32 (C,); None is 0.
        scale: float32 (O,); None is 1.
        offset: float32 (O,); None is 0.
        bias: float32 (O,); None is 0.
        stride: of the convolution.
        border: its padding, in the order of F.pad.
        dilation: of the convolution.
        groups: of the convolution.
        above: for the input and for the weight, whether a sign is +1 above the threshold only, or at it too.
        memory_format: of the output.
    """
    outputs, products = len(weight), weight[0].numel()
    window = Window.of(weight.shape[2:], stride, border, dilation)
    where = geometry(window, len(x), tuple(x.shape[2:]), groups, -(-x.shape[1] // groups // WORD))
    words = _words(x, thresholds, where, groups, above=above[0])
    of_weight = kernel.pack_weight(weight.contiguous(), groups, above=above[1])
    bases = words.new_full((1, len(of_weight), BLOCK), products, dtype=torch.int32)
    table = _table(outputs, groups, scale, offset, bias)
    (values,) = kernel.convolve(
        words, of_weight, bases, None, table, where, groups, outputs, (1, 1), None,
        has_values=True, following=None, memory_format=memory_format,
    )  # fmt: skip
    return values


def _words(x: Tensor, thresholds: Tensor | None, where: Geometry, groups: int, *, above: bool) -> Tensor:
    limits = x.new_zeros(x.shape[1]) if thresholds is None else thresholds.detach().expand(x.shape[1]).contiguous()
    if above:
        return kernel.pack_planes(x.contiguous(), limits, where, groups, above=True)
    limits = in_pieces(limits, groups)
    return kernel.pack(x, limits, limits, None, 1, where, groups)  # a sign has no spread


def _table(channels: int, groups: int, scale: Tensor | None, offset: Tensor | None, bias: Tensor | None) -> Tensor:
    rows = torch.zeros(len(Row), channels, dtype=torch.float32, device="cpu")
    rows[Row.NORM_FACTOR] = rows[Row.SLOPE] = 1.0
    for row, values, default in ((Row.SCALE, scale, 1.0), (Row.OFFSET, offset, 0.0), (Row.BIAS, bias, 0.0)):
        rows[row] = default if values is None else values  # values.numpy() would fix their memory, which FSDP frees
    return torch.from_numpy(epilogue_table(rows.numpy(), groups, BLOCK))
