"""Calibration: one pass over the user's data sets what the graph alone can only estimate.

Batch by batch the float model runs, and then the converted one. Layer after layer, in the order of the data, each converted
layer's threshold moves to where it splits what the layer really reads (an LSQ step to where it changes that least), and its
scale and offset to where its output has the mean and spread of the float layer's. The BatchNorms behind it see the output so
corrected, and their running statistics move as far as the conversion has moved what they read; those of a network that was
never trained are taken anew. What is kept is a few numbers per channel, however many batches there are.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .batches import numbered, run
from .errors import InputError
from .example import FORMS
from .layers import QConv3d
from .layers.qconv3d import per_channel
from .moments import Moments
from .observer import make_float
from .rules import Plan
from .running_statistics import averaging, carried_over, is_untrained, live_norms
from .signals import POINTS, Distribution, mixture
from .trace import copied

_SAMPLE = 2**13
"""Values of a channel, evenly spread over a batch, that stand for all of them."""

_LEARNED = ("activation.", "scale", "offset")
"""How the keys of what is set in a layer begin."""


@dataclass
class _Layer:
    """What has been seen of one layer, and where that puts its settings."""

    name: str
    float_output: Moments = field(default_factory=Moments)
    raw_output: Moments = field(default_factory=Moments)
    parts: list[tuple[int, Distribution]] = field(default_factory=list)
    """What it reads, with the number of values: each part of at least twice as many as the next, so there are few."""
    reads: Distribution | None = None

    def watch_float(self, conv: QConv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Stand in for the float layer's ``_quantized_conv``."""
        output: Tensor = type(conv)._quantized_conv(conv, x, weight, bias)
        self.float_output.add(_channels(output, self.name))
        return output

    def watch_quantized(self, layer: QConv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Stand in for the quantized layer's ``_quantized_conv``: correct the layer, then run it."""
        self._read(layer, _channels(x, self.name))
        if layer.scale is None or layer.offset is None or not self.float_output.count:
            return type(layer)._quantized_conv(layer, x, weight, bias)
        layer.scale.copy_(torch.ones_like(layer.scale).copysign(layer.scale))  # below 0 where a standardized weight needs it
        layer.offset.fill_(0)
        output = type(layer)._quantized_conv(layer, x, weight, None)
        self.raw_output.add(_channels(output, self.name))
        std = self.raw_output.std
        layer.scale.mul_(torch.where(std > 0, self.float_output.std / std, 1.0))
        factor, constant = layer.scale.abs(), 0.0 if bias is None else bias
        layer.offset.copy_(self.float_output.mean - constant - factor * self.raw_output.mean)
        # bit for bit what the layer will put out: the next threshold is one of these values
        return per_channel(output, factor, layer.offset, bias)

    def _read(self, layer: QConv3d, values: Tensor) -> None:
        self.parts.append((values.shape[1], _measured(values)))
        while len(self.parts) > 1 and self.parts[-2][0] < 2 * self.parts[-1][0]:
            self.parts[-2:] = [(sum(count for count, _ in self.parts[-2:]), _together(self.parts[-2:]))]
        self.reads, activation = _together(self.parts), layer.activation
        if activation.spread is not None:  # else no threshold, or one that the rules gave as a number
            activation.spread.copy_(self.reads.spread)
            if activation.threshold is not None:
                activation.threshold.copy_(self.reads.split)
        points = self.reads.points.T[:, :, None, None, None].to(layer.weight.device)
        activation.activation_function.start_from_inputs(activation.normalized(points))


def _channels(tensor: Tensor, layer: str) -> Tensor:
    """Return the values of each channel, shape (C, n), of (N, C, D, H, W) or (C, D, H, W).

    Raises:
        InputError: if there is none, or one of them is not finite.
    """
    values = tensor.movedim(-4, 0).flatten(1).float()
    if not values.numel():
        raise InputError(f"layer {layer!r} meets no values: a batch of size 0 in the calibration data? Leave it out")
    if not values.isfinite().all():
        raise InputError(f"layer {layer!r} meets values that are not finite: NaN or infinity in the calibration data?")
    return values


def _together(parts: list[tuple[int, Distribution]]) -> Distribution:
    counts, distributions = zip(*parts, strict=True)
    return mixture(distributions, counts)


def _measured(values: Tensor) -> Distribution:
    step = max(1, values.shape[1] // _SAMPLE) | 1  # odd, so as not to fall in step with the width of a frame
    ordered = values[:, ::step].sort(1).values.cpu()
    place = (torch.arange(POINTS, device="cpu") + 0.5) / POINTS * ordered.shape[1]
    return Distribution(ordered[:, place.long()])


@dataclass(frozen=True)
class Calibration:
    """What the data say about a converted model.

    Attributes:
        state: thresholds, spreads, steps of inputs, scales, offsets and running statistics, by state-dict key.
        inputs: what each converted layer reads, by its name. A layer that was not reached is not there.
    """

    state: dict[str, Tensor]
    inputs: dict[str, Distribution]


@torch.no_grad()
def calibrate(converted: nn.Module, plan: Plan, batches: Iterable[Any]) -> Calibration:
    """Run a converted model and its float counterpart over the data, and return what they say.

    Args:
        converted: a copy that nobody else uses. A BatchNorm that is frozen (in eval mode in a model that trains) stays so.
        plan: what was converted.
        batches: example inputs, of the form that `binarize` takes: a tensor (or a list, for a model that takes one), a tuple
            of arguments, or a dict of keyword arguments.

    Raises:
        InputError: if these are no batches or there is none, or the model does not run on one.
    """
    live = live_norms(converted)
    original = copied(converted.eval())
    layers = {decision.site.name: _Layer(decision.site.name) for decision in plan.converted}
    for name, layer in layers.items():
        counterpart: QConv3d = original.get_submodule(name)  # type: ignore[assignment]  # what was converted is one
        quantized: QConv3d = converted.get_submodule(name)  # type: ignore[assignment]
        make_float(counterpart)
        # under the forward of a subclass, under the hooks of the user, and before shortcut and RPReLU
        vars(counterpart)["_quantized_conv"] = partial(layer.watch_float, counterpart)
        vars(quantized)["_quantized_conv"] = partial(layer.watch_quantized, quantized)
    trained = {name: norm for name, norm in live.items() if not is_untrained(norm)}
    untrained = [norm for name, norm in live.items() if name not in trained]
    with averaging(untrained), carried_over(trained, original):
        for number, batch in numbered(batches, "calibration_data", "Calibrating"):
            for model in (original, converted):
                run(model, batch, f"calibration batch {number}", _advice(batch))
    inputs = {name: layer.reads for name, layer in layers.items() if layer.reads is not None}
    return Calibration(_state(converted, layers, list(live.values())), inputs)


def _advice(batch: Any) -> str:
    """Return what to do about a batch that does not fit: loaders give lists and tuples that hold labels, too."""
    alone = "pass the inputs alone: (batch[0] for batch in loader)"
    if isinstance(batch, tuple):
        return f"A tuple holds the arguments. If the first are the inputs and the others labels, {alone}"
    if isinstance(batch, list):
        several = "if its items are the arguments, pass (tuple(batch) for batch in loader)"
        return f"A list is one argument. If its first item is the input, {alone}; {several}"
    return f"Batches have the form of example_inputs: {FORMS}"


def _state(model: nn.Module, layers: Iterable[str], norms: list[_BatchNorm]) -> dict[str, Tensor]:
    """Return what the calibration has set."""
    changed: dict[str, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name in layers:
            learned = {key: value for key, value in module.state_dict().items() if key.startswith(_LEARNED)}
            changed |= {f"{name}.{key}": value for key, value in learned.items()}
        elif any(module is norm for norm in norms):
            changed |= {f"{name}.{key}": value for key, value in module.named_buffers(recurse=False)}
    return {key: value.detach().clone() for key, value in changed.items()}
