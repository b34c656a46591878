"""A layer's training step as one operator, which keeps for its backward pass what a float convolution keeps: its input.

That is memory which lives anyhow: the ReLU or BatchNorm before keeps the same tensor. Codes, gradient window and quantized
weight are computed again in the backward pass, which is a few passes over memory beside a convolution's arithmetic. The
formula written out is `QConv3d`'s own forward, which runs wherever this does not.

Where inputs and weights have 1 bit the convolution reads the input's bits b in place of the codes c = 2 b - 1:
``conv(c, w) = 2 conv(b, w) - sum(w)``, whole numbers, so exactly the same. A border of -1 then is one of 0, which is the
convolution's own padding. On a CPU with numba the forward pass is not even a convolution of floats: it is that of packed
models, which compares 64 bits at a time (see kernels/signs.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from ..kernels.signs import is_worth_it, signs_conv3d
from ..quantizations.operators import FORMULAS, Formula

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
    def left(self) -> Sequence[int]:
        """The border before D, H, W."""
        return self.border[-2::-2]

    @property
    def is_even(self) -> bool:
        """Whether the border is the same on both sides, as a convolution's own padding is."""
        return self.left == self.border[::-2]

    @property
    def is_filled(self) -> bool:
        """Whether the border has values other than 0."""
        return self.pad_value != 0.0 and any(self.border)


@dataclass(frozen=True)
class _Step:
    """What a step computes with. ``dtype`` is that of the convolution: under autocast not that of the weight."""

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
    def is_binary(self) -> bool:
        """Whether it is a convolution of signs with signs, whose border is -1."""
        quantizers = (self.source.comparison, self.target.comparison)
        return None not in quantizers and (self.geometry.pad_value == -1.0 or not any(self.geometry.border))

    @property
    def convolves_bits(self) -> bool:
        """Whether the convolution reads the input's bits. In half precision their sums would not be exact.

        Not where the weight is the larger tensor: what that takes of it costs more than a copy of the input with a border.
        """
        is_worth_it = self.x.numel() > self.weight.numel() and self.dtype in {torch.float32, torch.float64}
        return self.is_binary and self.geometry.is_even and is_worth_it

    @property
    def spread_in_weight(self) -> Tensor | None:
        """The spread where the gradient of the codes is divided by it as it is made, by way of the weight."""
        return self.spread if self.geometry.groups == 1 and self.dtype == self.weight.dtype else None

    def bits(self, out: Tensor | None = None) -> Tensor:
        """Return where the input's codes are +1. A spread, which is positive, makes no difference."""
        threshold = 0.0 if self.threshold is None else _column(self.threshold)
        return self.source.comparison.bits(self.x, threshold, out)  # type: ignore[union-attr]  # asked where there is one

    def units(self, out: Tensor | None = None) -> Tensor:
        """Return the input in the units of its quantizer, as a tensor of its own."""
        units = torch.sub(self.x, 0 if self.threshold is None else _column(self.threshold), out=out)
        return units if self.spread is None else units.div_(_column(self.spread))

    def quantized_weight(self) -> Tensor:
        """Return the quantized weight, as a tensor of its own."""
        if self.target.comparison is not None:
            return self.target.comparison.codes(self.weight, 0.0, torch.empty_like(self.weight))
        return self.target.forward(self.weight, *self.weight_settings)

    def scaled(self, weight: Tensor) -> Tensor:
        """Return a quantized weight with scale and spread as factors: as those of gradients they would take more passes."""
        factor = None if self.scale is None else _column(self.scale)[..., None]
        if self.spread_in_weight is not None:
            factor = (1.0 if factor is None else factor) / _column(self.spread_in_weight)
        return weight if factor is None else weight * factor

    def padded_codes(self) -> tuple[Tensor, Sequence[int]]:
        """Return the input's codes with their border, and the padding that is left to the convolution."""
        codes, geometry = self.source.forward(self.units(), *self.input_settings), self.geometry
        if geometry.is_even and not geometry.is_filled:
            return codes, geometry.left
        return F.pad(codes, geometry.border, value=geometry.pad_value), (0, 0, 0)


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _step(tensors: Sequence[Any], settings: Sequence[Any], dtype: torch.dtype) -> _Step:
    """Return the step of the operator's arguments: those that a backward pass needs, and those that are no tensors."""
    inputs, input_settings, weights, weight_settings, window, *geometry = settings
    x, weight, threshold, spread, scale = tensors
    quantizers = (FORMULAS[inputs], input_settings, FORMULAS[weights], weight_settings)
    return _Step(x, weight, threshold, spread, scale, *quantizers, window, _Geometry(*geometry), dtype)


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
    quantizers = (inputs, input_settings, weights, weight_settings, window)
    settings = (*quantizers, stride, border, pad_value, dilation, groups)
    step = _step((x, weight, threshold, spread, scale), settings, _computes_in(x, weight))
    output = _in_words(step, offset, bias) if step.is_binary else None
    if output is not None:
        return output
    if step.convolves_bits:
        output = _of_bits(step)
    else:
        codes, padding = step.padded_codes()
        output = F.conv3d(codes, step.quantized_weight(), None, stride, padding, dilation, groups)
    # under autocast what the convolution puts out is of fewer bits than its factor
    factors = [each for each in (scale, offset, bias) if each is not None]
    output = output.to(torch.promote_types(output.dtype, factors[0].dtype)) if factors else output
    if scale is not None:
        output.mul_(_column(scale))
    for summand in (offset, bias):
        if summand is not None:
            output.add_(_column(summand))
    return output


def _computes_in(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype in which a convolution runs."""
    device = x.device.type
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_cast else weight.dtype


def _in_words(step: _Step, offset: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Return the layer's output, computed from words of 64 bits; None where that cannot be, or is no quicker."""
    stride, border, _, dilation, groups = step.geometry
    x = step.x if step.x.dim() == step.weight.dim() else step.x[None]
    moved = (stride, border, dilation, groups)
    given = (step.threshold, step.scale, offset, bias)
    if any(each.dtype != torch.float32 for each in given if each is not None) or step.dtype != torch.float32:
        return None
    if not is_worth_it(x, step.weight, *moved):
        return None
    above = (step.source.comparison.becomes == 1, step.target.comparison.becomes == 1)  # type: ignore[union-attr]  # binary
    output = signs_conv3d(x, step.weight, *given, *moved, above=above, memory_format=_memory_format(step))
    return output if x is step.x else output[0]


def _of_bits(step: _Step) -> Tensor:
    """Return the convolution of the codes, computed from their bits."""
    weight = step.quantized_weight()
    half_sum = weight.flatten(1).sum(1).mul_(-0.5)
    bits = step.bits(torch.empty_like(step.x))
    geometry = step.geometry
    return F.conv3d(bits, weight, half_sum, geometry.stride, geometry.left, geometry.dilation, geometry.groups).mul_(2)


def _memory_format(step: _Step) -> torch.memory_format:
    """Return that of what a float convolution puts out."""
    wide = torch.channels_last_3d
    tensors = [each for each in (step.x, step.weight) if each.dim() == step.weight.dim() and not each.is_contiguous()]
    return wide if any(each.is_contiguous(memory_format=wide) for each in tensors) else torch.contiguous_format


fused = torch.library.custom_op("qconvert::quantized_conv3d", _forward, mutates_args=())


@fused.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    geometry = _Geometry(*rest[-len(_Geometry._fields) :])
    x, padding = (x, geometry.left) if geometry.is_even else (F.pad(x, geometry.border), (0, 0, 0))
    output = F.conv3d(x, weight, None, geometry.stride, padding, geometry.dilation, geometry.groups)
    factors = [each for each in rest[2:_INPUTS] if each is not None]
    return output.to(torch.promote_types(output.dtype, factors[0].dtype)) if factors else output


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, threshold, spread, scale, _, _, *ctx.settings = inputs
    ctx.save_for_backward(x, weight, threshold, spread, scale)
    ctx.dtype = _computes_in(x, weight)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    of_x, of_weight, of_threshold, _, of_scale, of_offset, of_bias, *others = ctx.needs_input_grad
    step = _step(ctx.saved_tensors, ctx.settings, ctx.dtype)
    is_single = step.x.dim() < step.weight.dim()  # without a batch
    if is_single:
        step, grad_output = replace(step, x=step.x[None]), grad_output[None]
    through = _convolution_backward(step, grad_output, of_codes=of_x or of_threshold, of_weight=of_weight or of_scale)
    output_sum = _per_channel_sum(grad_output)
    grad_x = grad_weight = grad_threshold = grad_scale = None
    if through.codes is not None:
        grad_x = _of_input(step, through.codes, through.input)
        grad_threshold = -_per_channel_sum(grad_x) if of_threshold else None
        grad_x = (grad_x[0] if is_single else grad_x).to(step.x.dtype)
    if through.quantized is not None:
        grad_weight, grad_scale = _of_weight(step, through.quantized, output_sum, through.quantized_weight)
    grads = (grad_x, grad_weight, grad_threshold, None, grad_scale, output_sum, output_sum)
    wanted = (of_x, of_weight, of_threshold, False, of_scale, of_offset, of_bias)
    return *(grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True)), *[None] * len(others)


class _Through(NamedTuple):
    """The gradients of a convolution's codes (or bits) and of its quantized weight; None for one that was not asked for.

    Beside them what it was computed from, as memory to be written over: fresh memory costs more time than arithmetic on it.
    """

    codes: Tensor | None
    quantized: Tensor | None
    input: Tensor
    quantized_weight: Tensor


def _convolution_backward(step: _Step, grad_output: Tensor, *, of_codes: bool, of_weight: bool) -> _Through:
    geometry = step.geometry
    values, padding = (step.bits(torch.empty_like(step.x)), geometry.left) if step.convolves_bits else step.padded_codes()
    weight = step.quantized_weight()
    tensors = (grad_output.to(step.dtype), values.to(step.dtype), step.scaled(weight).to(step.dtype), None)
    moved = (geometry.stride, padding, geometry.dilation, False, (0, 0, 0), geometry.groups)
    codes, quantized, _ = torch.ops.aten.convolution_backward(*tensors, *moved, (of_codes, of_weight, False))
    if codes is not None and values.shape != step.x.shape:
        inner = [slice(left, left + size) for left, size in zip(geometry.left, step.x.shape[-3:], strict=True)]
        codes = codes[..., inner[0], inner[1], inner[2]]
    return _Through(codes, quantized, values, weight)


def _of_input(step: _Step, gradient: Tensor, scratch: Tensor) -> Tensor:
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
    return gradient.div_(_column(step.spread))


def _of_weight(step: _Step, gradient: Tensor, output_sum: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the latent weight and the scale from that of the quantized weight, which is written over."""
    gradient = gradient.to(step.weight.dtype)
    if step.convolves_bits:
        # c = 2 b - 1, in the border too, so that every weight meets all of grad_output
        torch.add(-_column(output_sum)[..., None], gradient, alpha=2, out=gradient)
    of_scale = None
    if step.scale is not None:
        of_scale = quantized.mul_(gradient).flatten(1).sum(1)
        gradient.mul_(_column(step.scale)[..., None])
    if step.target.slope is not None:
        gradient.mul_(step.target.slope(step.weight.clone(), *step.weight_settings))
    return gradient, of_scale


def _reused(scratch: Tensor, like: Tensor) -> Tensor | None:
    """Return the memory if a tensor like the other fits it."""
    return scratch if scratch.shape == like.shape and scratch.dtype == like.dtype else None


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
