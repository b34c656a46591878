"""A layer's training step as one operator, which keeps for its backward pass what a float convolution keeps: its input.

That is memory which lives anyhow: the ReLU or BatchNorm before keeps the same tensor. Codes, gradient window and quantized
weight are computed again in the backward pass, which is a few passes over memory beside a convolution's arithmetic. The
formula written out is `QConv3d`'s own forward, which runs wherever this does not.

Where inputs and weights have 1 bit the convolution reads the input's bits b in place of the codes c = 2 b - 1:
``conv(c, w) = 2 conv(b, w) - sum(w)``, whole numbers, so exactly the same. A border of -1 then is one of 0, which is the
convolution's own padding, and bits are bytes to the processor (see `byte_conv3d`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from ..quantizations.operators import FORMULAS, Formula
from .byte_conv import byte_conv3d, runs_in_bytes

_INPUTS = 5
"""Place of the input quantizer's name behind input and weight."""


class _Geometry(NamedTuple):
    """How the convolution moves over its input; ``border`` in the order of F.pad."""

    stride: Sequence[int]
    border: Sequence[int]
    pad_value: float
    dilation: Sequence[int]
    groups: int

    @property
    def own_padding(self) -> Sequence[int] | None:
        """The border as a convolution takes it, None where it is not the same on both sides."""
        left, right = self.border[::2], self.border[1::2]
        return left[::-1] if left == right else None


class _Step(NamedTuple):
    """What a backward pass needs: tensors, quantizers with their settings, and the dtype of the convolution."""

    x: Tensor
    weight: Tensor
    threshold: Tensor | None
    spread: Tensor | None
    scale: Tensor | None
    source: Formula
    input_settings: Sequence[float]
    target: Formula
    weight_settings: Sequence[float]
    window: float
    geometry: _Geometry
    dtype: torch.dtype

    @property
    def convolves_bits(self) -> bool:
        """Whether the convolution reads the input's bits."""
        return _convolves_bits(self.source, self.target, self.geometry, self.dtype)


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
    geometry = _Geometry(stride, border, pad_value, dilation, groups)
    source, target = FORMULAS[inputs], FORMULAS[weights]
    if _convolves_bits(source, target, geometry, _computes_in(x, weight)):
        output = _of_bits(source, x, threshold, target, weight, geometry)
    else:
        codes = source.forward(_in_units(x, threshold, spread), *input_settings)
        padded, padding = _padded(codes, geometry)
        output = F.conv3d(padded, target.forward(weight, *weight_settings), None, stride, padding, dilation, groups)
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


@fused.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    _, _, *factors = rest[:_INPUTS]
    geometry = _Geometry(*rest[-len(_Geometry._fields) :])
    padding = geometry.own_padding
    x, padding = (F.pad(x, geometry.border), (0, 0, 0)) if padding is None else (x, padding)
    output = F.conv3d(x, weight, None, geometry.stride, padding, geometry.dilation, geometry.groups)
    dtypes = [factor.dtype for factor in factors if factor is not None]
    return output.to(torch.promote_types(output.dtype, dtypes[0])) if dtypes else output


def _computes_in(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype in which a convolution runs."""
    device = x.device.type
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_cast else weight.dtype


def _convolves_bits(source: Formula, target: Formula, geometry: _Geometry, dtype: torch.dtype) -> bool:
    """Return whether the convolution may read the input's bits: in half precision their sums would not be exact."""
    has_bits = source.bit is not None and target.bit is not None and dtype in (torch.float32, torch.float64)
    return has_bits and geometry.own_padding is not None and (geometry.pad_value == -1.0 or not any(geometry.border))


def _of_bits(
    source: Formula, x: Tensor, threshold: Tensor | None, target: Formula, weight: Tensor, geometry: _Geometry
) -> Tensor:
    """Return the convolution of the codes, computed from their bits."""
    padding = geometry.own_padding
    if runs_in_bytes(x, weight, geometry.stride, padding, geometry.dilation):
        bits, weights = _bit(source, x, threshold), _bit(target, weight, None).view(torch.int8).mul_(2).sub_(1)
        moved = (geometry.stride, padding, geometry.dilation, geometry.groups)
        return byte_conv3d(bits, weights, *moved, _memory_format(x, weight))
    quantized = _signs(target, weight)
    half_sum = quantized.flatten(1).sum(1).mul_(-0.5)
    bits = _bit(source, x, threshold, torch.empty_like(x))
    return F.conv3d(bits, quantized, half_sum, geometry.stride, padding, geometry.dilation, geometry.groups).mul_(2)


def _memory_format(*tensors: Tensor) -> torch.memory_format:
    """Return that of what a convolution of the tensors puts out."""
    wide = torch.channels_last_3d
    are_wide = (each.dim() == 5 and each.is_contiguous(memory_format=wide) and not each.is_contiguous() for each in tensors)  # noqa: PLR2004
    return wide if any(are_wide) else torch.contiguous_format


def _bit(formula: Formula, x: Tensor, threshold: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Return where the quantizer gives +1, as bool, or as 0 and 1 in ``out``. A positive spread makes no difference."""
    bits: Tensor = formula.bit(x, 0.0 if threshold is None else _column(threshold), out=out)  # type: ignore[misc]
    return bits


def _signs(formula: Formula, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the weight as -1 and +1."""
    return _bit(formula, weight, None, torch.empty_like(weight) if out is None else out).mul_(2).sub_(1)


def _reused(scratch: Tensor, like: Tensor) -> Tensor | None:
    """Return the memory if a tensor like the other fits it."""
    return scratch if scratch.shape == like.shape and scratch.dtype == like.dtype else None


def _quantized_weight(step: _Step, out: Tensor | None = None) -> Tensor:
    if step.convolves_bits:
        return _signs(step.target, step.weight, out)
    return step.target.forward(step.weight, *step.weight_settings)


def _in_units(x: Tensor, threshold: Tensor | None, spread: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Return the input in the units of its quantizer, as a tensor of its own."""
    units = torch.sub(x, 0 if threshold is None else _column(threshold), out=out)
    return units if spread is None else units.div_(_column(spread))


def _padded(codes: Tensor, geometry: _Geometry) -> tuple[Tensor, Sequence[int]]:
    """Return the codes with their border, and the padding that is left to the convolution."""
    padding = geometry.own_padding
    if padding is not None and (geometry.pad_value == 0.0 or not any(padding)):
        return codes, padding
    return F.pad(codes, geometry.border, value=geometry.pad_value), (0, 0, 0)


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, threshold, spread, scale, _, _, *ctx.settings = inputs
    ctx.save_for_backward(x, weight, threshold, spread, scale)
    ctx.dtype = _computes_in(x, weight)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    of_x, of_weight, of_threshold, _, of_scale, of_offset, of_bias, *others = ctx.needs_input_grad
    inputs, input_settings, weights, weight_settings, window, *geometry = ctx.settings
    quantizers = (FORMULAS[inputs], input_settings, FORMULAS[weights], weight_settings)
    step = _Step(*ctx.saved_tensors, *quantizers, window, _Geometry(*geometry), ctx.dtype)
    is_single = step.x.dim() < step.weight.dim()  # without a batch
    if is_single:
        step, grad_output = step._replace(x=step.x[None]), grad_output[None]
    grad_codes, grad_quantized, *scratch = _convolution_backward(
        step, grad_output, of_codes=of_x or of_threshold, of_weight=of_weight or of_scale
    )
    output_sum = _per_channel_sum(grad_output)
    grad_x = grad_weight = grad_threshold = grad_scale = None
    if grad_codes is not None:
        grad_x = _of_input(step, grad_codes, scratch[0])
        grad_threshold = -_per_channel_sum(grad_x) if of_threshold else None
        grad_x = (grad_x[0] if is_single else grad_x).to(step.x.dtype)
    if grad_quantized is not None:
        grad_weight, grad_scale = _of_weight(step, grad_quantized, output_sum, scratch[1])
    grads = (grad_x, grad_weight, grad_threshold, None, grad_scale, output_sum, output_sum)
    wanted = (of_x, of_weight, of_threshold, False, of_scale, of_offset, of_bias)
    return *(grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True)), *[None] * len(others)


def _convolution_backward(
    step: _Step, grad_output: Tensor, *, of_codes: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Return the gradients of the codes, and of the quantized weight at scale 1 from the codes or their bits, if asked for.

    The convolution's input and weight come with them, as memory to be written over: fresh memory costs more time than the
    arithmetic on it.
    """
    geometry = step.geometry
    if step.convolves_bits:
        values, padding = _bit(step.source, step.x, step.threshold, torch.empty_like(step.x)), geometry.own_padding
    else:
        units = _in_units(step.x, step.threshold, step.spread)
        values, padding = _padded(step.source.forward(units, *step.input_settings), geometry)
    # the scale as a factor of the weight: as one of grad_output it would take a tensor of that size
    factors = _quantized_weight(step)
    factors = factors if step.scale is None else factors.mul_(_column(step.scale)[..., None])
    tensors = (grad_output.to(step.dtype), values.to(step.dtype), factors.to(step.dtype))
    moved = (geometry.stride, padding, geometry.dilation, False, (0, 0, 0), geometry.groups)
    grad_values, grad_quantized, _ = torch.ops.aten.convolution_backward(*tensors, None, *moved, (of_codes, of_weight, False))
    if grad_values is None or values.shape == step.x.shape:
        return grad_values, grad_quantized, values, factors
    starts = zip(geometry.border[-2::-2], step.x.shape[-3:], strict=True)
    inner = [slice(before, before + size) for before, size in starts]
    return grad_values[..., inner[0], inner[1], inner[2]], grad_quantized, values, factors


def _of_input(step: _Step, gradient: Tensor, scratch: Tensor) -> Tensor:
    """Return the gradient of the layer's input, in the dtype of its units, from that of the codes, which is written over."""
    is_shifted = step.threshold is not None
    gradient = gradient.to(torch.promote_types(step.x.dtype, step.threshold.dtype) if is_shifted else step.x.dtype)
    slopes = [(step.source.slope, step.input_settings)] if step.source.slope is not None else []
    if 0 < step.window < step.source.reach:
        slopes.append((FORMULAS["gradient_window"].slope, (step.window,)))
    for slope, settings in slopes:
        gradient.mul_(slope(_in_units(step.x, step.threshold, step.spread, _reused(scratch, gradient)), *settings))
    return gradient if step.spread is None else gradient.div_(_column(step.spread))


def _of_weight(
    step: _Step, gradient: Tensor, output_sum: Tensor, scratch: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the latent weight and the scale from that of the quantized weight, which is written over."""
    gradient = gradient.to(step.weight.dtype)
    if step.convolves_bits:
        # c = 2 b - 1, in the border too, so that every weight meets all of grad_output
        gradient.mul_(2).sub_(_column(output_sum)[..., None])
    of_scale = None
    if step.scale is not None:
        of_scale = _quantized_weight(step, _reused(scratch, gradient)).mul_(gradient).flatten(1).sum(1)
        gradient.mul_(_column(step.scale)[..., None])
    if step.target.slope is not None:
        gradient.mul_(step.target.slope(step.weight.clone(), *step.weight_settings))
    return gradient, of_scale


def _per_channel_sum(values: Tensor) -> Tensor:
    return values.sum((0, 2, 3, 4))


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
