"""A step backward: a float convolution's two gradients, and what quantizers, threshold, scale and window make of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..quantizations.operators import FORMULAS
from .step import Step, column


class Through(NamedTuple):
    """The gradients of a convolution's codes (or bits) and of its quantized weight; None for one that was not asked for.

    Beside them what it was computed from, as memory to be written over: fresh memory costs more time than arithmetic on it.
    """

    of_codes: Tensor | None
    of_weight: Tensor | None
    input: Tensor
    weight: Tensor


def convolution_backward(step: Step, grad_output: Tensor, *, of_codes: bool, of_weight: bool) -> Through:
    """Return the gradients of the convolution itself."""
    geometry = step.geometry
    values, padding = (step.bits(torch.empty_like(step.x)), geometry.left) if step.convolves_bits else step.padded_codes()
    weight = step.quantized_weight()
    of_output, given, scaled = (each.to(step.dtype) for each in (grad_output, values, step.scaled(weight)))

    def gradients(given: Tensor, padding: Sequence[int], *wanted: bool) -> tuple[Tensor | None, Tensor | None]:
        moved = (geometry.stride, padding, geometry.dilation, False, (0, 0, 0), geometry.groups)
        found = torch.ops.aten.convolution_backward(of_output, given, scaled, None, *moved, (*wanted, False))
        return found[0], found[1]

    if values.shape == step.x.shape or not geometry.is_even:
        codes, quantized = gradients(given, padding, of_codes, of_weight)
    else:  # that of the codes depends on no value of theirs: it is had without the border's
        quantized = gradients(given, padding, False, True)[1] if of_weight else None
        codes = gradients(given.new_empty(step.x.shape), geometry.left, True, False)[0] if of_codes else None
    if codes is not None and codes.shape != step.x.shape:
        inner = [slice(left, left + size) for left, size in zip(geometry.left, step.x.shape[-3:], strict=True)]
        codes = codes[..., inner[0], inner[1], inner[2]]
    return Through(codes, quantized, values, weight)


def gradient_of_input(step: Step, gradient: Tensor, scratch: Tensor) -> Tensor:
    """Return the gradient of the layer's input, in the dtype of its units, from that of its codes, which is written over."""
    gradient = gradient.to(
        step.x.dtype if step.threshold is None else torch.promote_types(step.x.dtype, step.threshold.dtype)
    )
    has_window = 0 < step.window < step.source.reach
    for slope, settings in (
        (step.source.slope, step.input_settings),
        (FORMULAS["gradient_window"].slope if has_window else None, (step.window,)),
    ):
        if slope is not None:
            gradient.mul_(slope(step.units(_reused(scratch, gradient)), *settings))
    if step.spread is None or step.spread_in_weight is not None:
        return gradient
    return gradient.div_(column(step.spread))


def gradients_of_weight(step: Step, gradient: Tensor, output_sum: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the latent weight and the scale from that of the quantized weight, which is written over."""
    gradient = gradient.to(step.weight.dtype)
    if step.convolves_bits:
        # c = 2 b - 1, in the border too, so that every weight meets all of grad_output
        torch.add(-column(output_sum)[..., None], gradient, alpha=2, out=gradient)
    of_scale = None
    if step.scale is not None:
        of_scale = quantized.mul_(gradient).flatten(1).sum(1)
        gradient.mul_(column(step.scale)[..., None])
    if step.target.slope is not None:
        gradient.mul_(step.target.slope(step.weight.clone(), *step.weight_settings))
    return gradient, of_scale


def _reused(scratch: Tensor, like: Tensor) -> Tensor | None:
    """Return the memory if a tensor like the other fits it."""
    return scratch if scratch.shape == like.shape and scratch.dtype == like.dtype else None


def per_channel_sum(values: Tensor) -> Tensor:
    """Return the sums of (N, C, D, H, W) over all but the channels."""
    return values.sum((0, 2, 3, 4))
