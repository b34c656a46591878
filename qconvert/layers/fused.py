"""A layer's training step as one operator, which keeps for its backward pass what a float convolution keeps: its input.

That is memory which lives anyhow: the ReLU or BatchNorm before keeps the same tensor. Codes, gradient window and quantized
weight are computed again in the backward pass, which is a few passes over memory beside a convolution's arithmetic. The
formula written out is `QConv3d`'s own forward, which runs wherever this does not.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from ..quantizations.operators import FORMULAS
from .step import Geometry, Step, output_dtype
from .step_backward import convolution_backward, gradient_of_input, gradients_of_weight, per_channel_sum
from .step_forward import output_of

_INPUTS = 5
"""Place of the input quantizer's name behind input and weight."""


def computes_in(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype in which a convolution runs now: under autocast not that of the weight.

    The operator is told. It may run later, where autocast is off again: in a backward pass, or in what torch.compile made.
    """
    device = x.device.type
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_cast else weight.dtype


def _step(tensors: Sequence[Any], settings: Sequence[Any]) -> Step:
    """Return the step of the operator's arguments: those that a backward pass needs, and those that are no tensors."""
    inputs, input_settings, weights, weight_settings, window, *geometry, dtype = settings
    x, weight, threshold, spread, scale = tensors
    quantizers = (FORMULAS[inputs], input_settings, FORMULAS[weights], weight_settings)
    return Step(x, weight, threshold, spread, scale, *quantizers, window, Geometry(*geometry), dtype)


def _forward(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor | None,
    spread: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    inputs: str,
    input_settings: Sequence[float],
    weights: str,
    weight_settings: Sequence[float],
    window: float,
    stride: Sequence[int],
    border: Sequence[int],
    pad_value: float,
    dilation: Sequence[int],
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    quantizers = (inputs, input_settings, weights, weight_settings, window)
    settings = (*quantizers, stride, border, pad_value, dilation, groups, dtype)
    return output_of(_step((x, weight, threshold, spread, scale), settings), offset, bias)


fused = torch.library.custom_op("qconvert::quantized_conv3d", _forward, mutates_args=())


@fused.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    *_, dtype = rest
    geometry = Geometry(*rest[-len(Geometry._fields) - 1 : -1])
    x, padding = (x, geometry.left) if geometry.is_even else (F.pad(x, geometry.border), (0, 0, 0))
    output = F.conv3d(x.to(dtype), weight.to(dtype), None, geometry.stride, padding, geometry.dilation, geometry.groups)
    return output.to(output_dtype(dtype, *rest[2:_INPUTS]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, threshold, spread, scale, _, _, *ctx.settings = inputs
    ctx.save_for_backward(x, weight, threshold, spread, scale)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    of_x, of_weight, of_threshold, _, of_scale, of_offset, of_bias, *others = ctx.needs_input_grad
    step = _step(ctx.saved_tensors, ctx.settings)
    is_single = step.x.dim() < step.weight.dim()  # without a batch
    if is_single:
        step, grad_output = replace(step, x=step.x[None]), grad_output[None]
    through = convolution_backward(step, grad_output, of_codes=of_x or of_threshold, of_weight=of_weight or of_scale)
    output_sum = per_channel_sum(grad_output)
    grad_x = grad_weight = grad_threshold = grad_scale = None
    if through.of_codes is not None:
        grad_x = gradient_of_input(step, through.of_codes, through.input)
        grad_threshold = -per_channel_sum(grad_x) if of_threshold else None
        grad_x = (grad_x[0] if is_single else grad_x).to(step.x.dtype)
    if through.of_weight is not None:
        grad_weight, grad_scale = gradients_of_weight(step, through.of_weight, output_sum, through.weight)
    grads = (grad_x, grad_weight, grad_threshold, None, grad_scale, output_sum, output_sum)
    wanted = (of_x, of_weight, of_threshold, False, of_scale, of_offset, of_bias)
    return *(grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True)), *[None] * len(others)


fused.register_autograd(_backward, setup_context=_keep)


@fused.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, int]:
    inputs = FORMULAS[rest[_INPUTS]]
    if in_dims[0] is not None and not any(isinstance(dim, int) for dim in in_dims[1:]) and inputs.elementwise:
        x = x.movedim(in_dims[0], 0)
        if x.dim() == weight.dim():
            return fused(x, weight, *rest), 0
        return fused(x.flatten(0, 1), weight, *rest).unflatten(0, x.shape[:2]), 0
    args = (x, weight, *rest)
    samples = (
        [arg.select(dim, n) if isinstance(dim, int) else arg for arg, dim in zip(args, in_dims, strict=True)]
        for n in range(info.batch_size)
    )
    return torch.stack([fused(*sample) for sample in samples]), 0


@register_flop_formula(torch.ops.qconvert.quantized_conv3d)
def _flops(x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """Return those of the convolution."""
    return conv_flop_count(x_shape, weight_shape, out_shape)
