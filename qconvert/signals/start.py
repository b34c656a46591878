"""What a new layer's threshold, spread, scale and offset start from, given what is known about the convolution's data."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers import QConv3d
from ..layers.standardization import fitted_scale, latent
from ..quantizations import Quantization
from ..rules import Plan
from .distribution import Distribution
from .geometry import window
from .products import bordered, convolved
from .propagation import Signal

_MOST_CHANNELS = 0.5
"""A layer is reported as constant where more than this share of its channels is."""


@dataclass(frozen=True)
class InputStart:
    """The start of a layer's threshold and spread, shape (C,) or one number for all channels; None is none."""

    threshold: Tensor | float | None
    spread: Tensor | float | None


@dataclass(frozen=True)
class OutputStart:
    """The start of a layer's scale and offset, shape (O,) or one number; scale "channel" is the fit to the weight alone."""

    scale: Tensor | str | None
    offset: Tensor | float | None


def input_start(setting: str | float | None, inputs: Quantization, signal: Signal | None) -> InputStart:
    """Return threshold and spread for a rule's setting.

    "channel": the value that splits the channel's values evenly, and their standard deviation; 0 and 1 for a convolution
    that no graph reaches. "auto": for a quantizer of 1 bit the same, but without a threshold where the input is known to be
    symmetric about 0; for one of more bits neither. A number or None is the threshold as it stands.
    """
    if not isinstance(setting, str) or (setting == "auto" and inputs.bit_width > 1):
        return InputStart(None if isinstance(setting, str) else setting, None)
    if signal is None:
        return InputStart(0.0, 1.0)
    read = signal.anytime
    if setting == "auto" and read.is_symmetric:
        return InputStart(None, read.spread)
    return InputStart(read.split, read.spread)


@torch.no_grad()
def output_start(
    conv: nn.Conv3d,
    inputs: Quantization,
    weights: Quantization,
    pad_value: float,
    start: InputStart,
    signal: Signal | None,
    *,
    standardize: bool = False,
) -> OutputStart:
    """Return the scale and offset that give the quantized layer's output the float layer's mean and spread per channel.

    ``scale = s / s_q`` and ``offset = m - bias - scale m_q``: m and s are the float output's mean and standard deviation,
    m_q and s_q those of ``conv3d(pad(Q_in(u)), Q_w(weight))`` for independent inputs. A channel of which that says nothing
    keeps the fit to its weights.
    """
    if signal is None or conv.weight.is_meta:
        return OutputStart("channel", 0.0)
    read = _quantized(signal.input, inputs, start)
    moments = bordered(read.mean(1), read.var(1, correction=0), _inside(conv, signal), pad_value)
    source = latent(conv.weight, standardize=standardize)
    weight, in_parts = (source, weights) if weights.elementwise else (weights(source), nn.Identity())
    mean, variance = convolved(weight, conv.groups, *moments, in_parts)
    scale = signal.output.std / variance.sqrt()
    usable = scale.isfinite() & (scale > 0)
    if standardize or not usable.all():
        fitted = fitted_scale(weights, conv.weight, standardize=standardize).float().cpu()
        # a standardized channel may point away from its weights, as where all of them are equal and negative
        usable = usable & (fitted > 0) if standardize else usable
        scale = torch.where(usable, scale, fitted)
    bias = 0.0 if conv.bias is None else conv.bias.float().cpu()
    return OutputStart(scale, torch.where(usable, signal.output.mean - bias - scale * mean, 0.0))


def _inside(conv: nn.Conv3d, signal: Signal) -> float:
    """Return the share of what the convolution reads that is not its border."""
    moved = window(conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    size = signal.input.size
    if moved is None or size is None or conv.padding_mode != "zeros":
        return 1.0
    return moved.inside(size)


def _quantized(read: Distribution, inputs: Quantization, start: InputStart) -> Tensor:
    """Return what the points of each channel become, shape (C, points)."""
    points = read.points
    if start.threshold is not None:
        points = points - torch.as_tensor(start.threshold, dtype=torch.float32, device="cpu").reshape(-1, 1)
    if start.spread is not None:
        points = points / torch.as_tensor(start.spread, dtype=torch.float32, device="cpu").reshape(-1, 1)
    codes: Tensor = inputs(points.T[:, :, None, None, None])
    return codes.flatten(1).T


@torch.no_grad()
def constant_layers(model: nn.Module, plan: Plan, inputs: Mapping[str, Distribution]) -> list[str]:
    """Return the converted layers that see one value, as far as is known, in more than half of their channels."""
    dead = []
    for name in (decision.site.name for decision in plan.converted):
        layer = model.get_submodule(name)
        if name in inputs and isinstance(layer, QConv3d) and not layer.weight.is_meta:
            points = inputs[name].wide(layer.in_channels).points.to(layer.weight.device, layer.weight.dtype)
            codes = layer.activation(points.T[:, :, None, None, None]).flatten(1)
            if (codes == codes[0]).all(0).float().mean() > _MOST_CHANNELS:
                dead.append(name)
    return dead
