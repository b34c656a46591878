"""A convolution of bits with weights of -1 and +1 in bytes: exact, and on x86 several times as fast as in float.

oneDNN multiplies unsigned with signed bytes and adds up in 32 bits. It comes with torch, which runs its own quantized
models on it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Measured costs, in units of one float multiply-accumulate: bytes must be brought into another order, float outputs back
# out of it, and a weight be packed, once for each step of training.
_PER_BYTE_MOVED = 40
_PER_WEIGHT_PACKED = 120


def runs_in_bytes(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> bool:
    """Return whether `byte_conv3d` runs here, and is quicker than a convolution in float."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or "x86" not in torch.backends.quantized.supported_engines:
        return False
    axes = zip(x.shape[-3:], weight.shape[-3:], stride, padding, dilation, strict=True)
    sizes = [(size + 2 * border - apart * (kernel - 1) - 1) // step + 1 for size, kernel, step, border, apart in axes]
    outputs = math.prod(x.shape[:-4]) * weight.shape[0] * math.prod(sizes)
    macs = outputs * math.prod(weight.shape[1:])
    moved = x.numel() + outputs * x.element_size()
    return macs > _PER_BYTE_MOVED * moved + _PER_WEIGHT_PACKED * weight.numel()


def byte_conv3d(
    bits: Tensor,
    weights: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    memory_format: torch.memory_format,
) -> Tensor:
    """Return the convolution of the codes ``c = 2 b - 1``, whose border is -1, as float32.

    Shapes: bits bool (N, C, D, H, W) or (C, D, H, W), weights int8 (O, C / groups, kD, kH, kW) of -1 and +1.
    """
    x = bits.view(torch.uint8)
    x = x if x.dim() == weights.dim() else x[None]
    ones = torch.ones(len(weights))
    sums = weights.flatten(1).sum(1, dtype=torch.int32)
    moved = ([*stride], [*padding], [*dilation], groups)
    packed = torch.ops.onednn.qconv_prepack(weights, ones, 1.0, 0, *moved, [*x.shape])
    # 2 conv(b, w) - sum(w): input scale 2, bias -sum(w), no zero points, nothing done to the float output
    output: Tensor = torch.ops.onednn.qconv3d_pointwise(
        *(x, 2.0, 0), *(packed, ones, torch.zeros(len(weights), dtype=torch.int64)), -sums.float(), *moved,
        *(1.0, 0, torch.float32), *("none", [], ""),
    )  # fmt: skip
    output = output.contiguous(memory_format=memory_format)
    return output if bits.dim() == weights.dim() else output[0]
