"""A layer's training step as one operator, which keeps for its backward pass what a float convolution keeps: its input.

That is memory which lives anyhow: the ReLU or BatchNorm before keeps the same tensor. Codes, gradient window and quantized
weight are computed again in the backward pass, which is a few passes over memory beside a convolution's arithmetic. The
formula written out is `QConv3d`'s own forward, which runs wherever this does not.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from ..quantizations.operators import FORMULAS, Formula

_INPUTS = 5
"""Place of the input quantizer's name behind input and weight."""


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
) -> Tensor:
    codes = FORMULAS[inputs].forward(_in_units(x, threshold, spread), *input_settings)
    quantized = FORMULAS[weights].forward(weight, *weight_settings)
    padded, padding = _padded(codes, border, pad_value)
    output = F.conv3d(padded, quantized, None, stride, padding, dilation, groups)
    # under autocast what the convolution puts out is of fewer bits than its factor
    factors = [each for each in (scale, offset, bias) if each is not None]
    output = output.to(torch.promote_types(output.dtype, factors[0].dtype)) if factors else output
    if scale is not None:
        output.mul_(_column(scale))
    for summand in (offset, bias):
        if summand is not None:
            output.add_(_column(summand))
    return output


fused = torch.library.custom_op("qconvert::quantized_conv3d", _forward, mutates_args=())
fused.register_fake(_forward)


def _in_units(x: Tensor, threshold: Tensor | None, spread: Tensor | None) -> Tensor:
    """Return the input in the units of its quantizer."""
    if threshold is None:
        return x if spread is None else x / _column(spread)
    units = x - _column(threshold)
    return units if spread is None else units.div_(_column(spread))


def _padded(codes: Tensor, border: Sequence[int], pad_value: float) -> tuple[Tensor, Sequence[int]]:
    """Return the codes with their border, and the padding that is left to the convolution."""
    left, right = border[::2], border[1::2]
    if left == right and (pad_value == 0.0 or not any(left)):
        return codes, left[::-1]
    return F.pad(codes, border, value=pad_value), (0, 0, 0)


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, threshold, spread, scale, _, _, *ctx.settings = inputs
    ctx.save_for_backward(x, weight, threshold, spread, scale)
    device = output.device.type
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    ctx.dtype = torch.get_autocast_dtype(device) if is_cast else weight.dtype  # in which the convolution has run


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, threshold, spread, scale = ctx.saved_tensors
    inputs, input_settings, weights, weight_settings, window, *geometry = ctx.settings
    of_x, of_weight, of_threshold, _, of_scale, of_offset, of_bias, *_ = ctx.needs_input_grad
    units = _in_units(x, threshold, spread)
    quantized = FORMULAS[weights].forward(weight, *weight_settings)
    grad_codes, grad_quantized = _convolution_backward(
        grad_output.to(ctx.dtype),
        FORMULAS[inputs].forward(units, *input_settings).to(ctx.dtype),
        # the scale as a factor of the weight: as one of grad_output it would take a tensor of that size
        (quantized if scale is None else quantized * scale.view(-1, 1, 1, 1, 1)).to(ctx.dtype),
        *geometry,
        of_codes=of_x or of_threshold,
        of_weight=of_weight or of_scale,
    )
    grad_x = grad_weight = grad_threshold = grad_scale = None
    if grad_codes is not None:
        grad_x = _through(FORMULAS[inputs], grad_codes.to(units.dtype), units, input_settings)
        if 0 < window < FORMULAS[inputs].reach:
            grad_x = _through(FORMULAS["gradient_window"], grad_x, units, (window,))
        grad_x = grad_x if spread is None else grad_x / _column(spread)
        grad_threshold = -_per_channel_sum(grad_x) if of_threshold else None
        grad_x = grad_x.to(x.dtype)
    if grad_quantized is not None:
        grad_quantized = grad_quantized.to(weight.dtype)
        if scale is not None:
            grad_scale = (grad_quantized * quantized).flatten(1).sum(1)
            grad_quantized = grad_quantized * scale.view(-1, 1, 1, 1, 1)
        grad_weight = _through(FORMULAS[weights], grad_quantized, weight, weight_settings)
    grad_summand = _per_channel_sum(grad_output) if of_offset or of_bias else None
    grads = (grad_x, grad_weight, grad_threshold, None, grad_scale, grad_summand, grad_summand)
    needed = zip(grads, ctx.needs_input_grad, strict=False)
    return *(grad if is_needed else None for grad, is_needed in needed), *[None] * len(ctx.settings)


def _convolution_backward(
    grad_output: Tensor,
    codes: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    border: Sequence[int],
    pad_value: float,
    dilation: Sequence[int],
    groups: int,
    *,
    of_codes: bool,
    of_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the codes and of the weight, as far as they are asked for."""
    padded, padding = _padded(codes, border, pad_value)
    is_single = codes.dim() == weight.dim() - 1  # without a batch
    if is_single:
        grad_output, padded = grad_output[None], padded[None]
    grad_padded, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_output,
        padded,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        (0, 0, 0),
        groups,
        (of_codes, of_weight, False),
    )
    if grad_padded is None:
        return None, grad_weight
    grad_codes = grad_padded[0] if is_single else grad_padded
    if padded.shape[2:] == codes.shape[-3:]:
        return grad_codes, grad_weight
    inner = [slice(left, left + size) for left, size in zip(border[-2::-2], codes.shape[-3:], strict=True)]
    return grad_codes[..., inner[0], inner[1], inner[2]], grad_weight


def _through(formula: Formula, grad_output: Tensor, x: Tensor, settings: Sequence[float]) -> Tensor:
    return grad_output if formula.gradient is None else formula.gradient(grad_output, x, *settings)


def _per_channel_sum(values: Tensor) -> Tensor:
    return values.movedim(-4, 0).flatten(1).sum(1)


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
