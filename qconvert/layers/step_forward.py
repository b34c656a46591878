"""A step forward: in words of 64 bits where that is quicker, else as a convolution of floats.

Where inputs and weights have 1 bit the convolution reads the input's bits b in place of the codes c = 2 b - 1:
``conv(c, w) = 2 conv(b, w) - sum(w)``, whole numbers, so exactly the same. A border of -1 then is one of 0, which is the
convolution's own padding. On a CPU with numba it is not even a convolution of floats: it is that of packed models, which
compares 64 bits at a time (see kernels/signs.py).
"""

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor

from ..kernels.formats import is_channels_last, memory_format
from ..kernels.signs import is_worth_it, signs_conv3d
from .step import Step, column, output_dtype


def output_of(step: Step, offset: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return a layer's output."""
    dtype = output_dtype(step.dtype, step.scale, offset, bias)
    output = _in_words(step, offset, bias) if step.is_binary else None
    if output is not None:
        return output.to(dtype)
    output = (_of_bits(step) if step.convolves_bits else _of_codes(step)).to(dtype)
    if step.scale is not None:
        output.mul_(column(step.scale))
    for summand in (offset, bias):
        if summand is not None:
            output.add_(column(summand))
    return output


def _in_words(step: Step, offset: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Return the layer's output, computed from words of 64 bits; None where that cannot be, or is no quicker."""
    stride, border, _, dilation, groups = step.geometry
    moved = (stride, border, dilation, groups)
    given = (step.threshold, step.scale, offset, bias)
    is_float32 = all(each.dtype == torch.float32 for each in given if each is not None)
    if not is_float32 or step.x.dtype not in {torch.float32, step.dtype}:  # under autocast an input of either is fine
        return None
    x = step.x if step.x.dim() == step.weight.dim() else step.x[None]
    if not is_worth_it(x, step.weight, *moved):
        return None
    form = memory_format(channels_last=is_channels_last(step.x, step.weight))
    above = (step.source.comparison.becomes == 1, step.target.comparison.becomes == 1)  # type: ignore[union-attr]  # binary
    output = signs_conv3d(x.float(), step.weight, *given, *moved, above=above, memory_format=form)
    return output if x is step.x else output[0]


def _of_bits(step: Step) -> Tensor:
    """Return the convolution of the codes, computed from their bits."""
    weight = step.quantized_weight()
    half_sum = weight.flatten(1).sum(1).mul_(-0.5)
    bits = step.bits(torch.empty_like(step.x))
    geometry = step.geometry
    return F.conv3d(bits, weight, half_sum, geometry.stride, geometry.left, geometry.dilation, geometry.groups).mul_(2)


def _of_codes(step: Step) -> Tensor:
    codes, padding = step.padded_codes()
    geometry = step.geometry
    return F.conv3d(codes, step.quantized_weight(), None, geometry.stride, padding, geometry.dilation, geometry.groups)
