"""`diagnose`: what a converted model's layers see, how much gradient reaches them, how near they are to the float model."""

import statistics
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from .errors import CONSTANT_MEASURED_BY, CONSTANT_MENDED_BY, ModelError
from .observer import Observer, converted_layers, observe
from .report.document import Document
from .report.table import Cell, Measure, Table
from .trace import unwrapped

LEGEND = (
    "+1: share of +1 among the signs of the layer's input, and over its channels the lowest, the median and the highest "
    "share. Constant: channels whose quantized input has one value; lost: those of them that vary in the float model. "
    "Window: share of the inputs inside the gradient window. Gradient: norm of the latent weight's gradient / that of the "
    "float layer's. SNR: of the layer's output against the float model's."
)


@dataclass(frozen=True)
class LayerHealth:
    """What one converted layer saw of a batch, over all its calls. None is what cannot be told.

    Attributes:
        name: its dotted name.
        input_bits: bits of one quantized input value, 32 for float.
        calls: how often it ran.
        channels: its input channels.
        positive: share of +1 among the signs of its input; None where the input has more than 1 bit.
        lowest_positive, median_positive, highest_positive: of the shares of the single channels.
        constant_channels: channels whose quantized input has one value over the whole batch.
        lost_channels: those of them whose input is not constant in the float model.
        float_constant_channels: channels whose input is constant in the float model.
        nonzero: share of the inputs that are not 0, before threshold and quantizer: behind a ReLU, those off its zero.
        window: share of the inputs inside the gradient window; 1 where that is off.
        nonfinite: how many inputs are NaN or infinite.
        gradient_norm: norm of the gradient of the latent weight. None for a frozen weight.
        float_gradient_norm: that norm in the float model.
        snr_db: signal-to-noise ratio of the output against that of the same layer in the float model, in dB; infinite where
            the two are equal.
    """

    name: str
    input_bits: int
    calls: int
    channels: int
    positive: float | None = None
    lowest_positive: float | None = None
    median_positive: float | None = None
    highest_positive: float | None = None
    constant_channels: int | None = None
    lost_channels: int | None = None
    float_constant_channels: int | None = None
    nonzero: float | None = None
    window: float | None = None
    nonfinite: int | None = None
    gradient_norm: float | None = None
    float_gradient_norm: float | None = None
    snr_db: float | None = None

    @property
    def gradient_ratio(self) -> float | None:
        """Norm of the latent weight's gradient over that in the float model; None where there is none to compare with."""
        if self.gradient_norm is None or not self.float_gradient_norm:
            return None
        return self.gradient_norm / self.float_gradient_norm

    @property
    def is_dead(self) -> bool:
        """Whether its quantized input is constant in every channel."""
        return self.constant_channels == self.channels

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "gradient_ratio": self.gradient_ratio}


@dataclass(frozen=True)
class Diagnosis(Document):
    """The health of a converted model's layers on one batch.

    Attributes:
        model: the model's class name.
        layers: every QConv3d.
        remarks: what could not be measured, and why.
    """

    model: str
    layers: tuple[LayerHealth, ...]
    remarks: tuple[str, ...] = ()

    @property
    def dead(self) -> tuple[str, ...]:
        """Names of the layers whose quantized input is constant in every channel."""
        return tuple(layer.name for layer in self.layers if layer.is_dead)

    @property
    def title(self) -> str:
        """How many converted layers there are, and how many see a constant."""
        return f"{self.model}: {len(self.layers)} converted Conv3d, {len(self.dead)} dead (a constant input)"

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as plain data: ``model``, ``layers``, ``dead``, ``remarks``."""
        layers = [layer.to_dict() for layer in self.layers]
        return {"model": self.model, "layers": layers, "dead": list(self.dead), "remarks": list(self.remarks)}

    def scalars(self) -> dict[str, float]:
        """Return what was measured by TensorBoard's tags, ``positive/layer1.0.conv1``, and how many layers are ``dead``.

        What is None has no tag. For ``SummaryWriter.add_scalar(tag, value, step)``.
        """
        tags = {"dead": float(len(self.dead))}
        for layer in self.layers:
            measured = {what: value for what, value in layer.to_dict().items() if what not in _FIXED and value is not None}
            tags |= {f"{what}/{layer.name}".rstrip("/"): float(value) for what, value in measured.items()}
        return tags

    def layer_table(self) -> Table:
        """Return the layers as a table."""
        brief = tuple(header for header in _COLUMNS if header not in _WIDE_ONLY)
        return Table(tuple(_COLUMNS), tuple(_cells(layer) for layer in self.layers), brief)

    def notes(self) -> list[str]:
        """Return what the columns mean, which layers are dead, and what could not be measured."""
        notes = [LEGEND]
        if self.dead:
            notes.append(f"Dead: {', '.join(self.dead)}. {CONSTANT_MENDED_BY} {CONSTANT_MEASURED_BY}")
        idle = [layer.name for layer in self.layers if not layer.calls]
        if idle:
            notes.append(f"Not reached: {', '.join(idle)}.")
        broken = [f"{layer.name} ({layer.nonfinite})" for layer in self.layers if layer.nonfinite]
        if broken:
            notes.append(f"NaN or infinite inputs: {', '.join(broken)}.")
        return [*notes, *self.remarks]


_COLUMNS = {
    "layer": "name",
    "input bits": "input_bits",
    "calls": "calls",
    "+1": "positive",
    "+1 min": "lowest_positive",
    "+1 median": "median_positive",
    "+1 max": "highest_positive",
    "channels": "channels",
    "constant": "constant_channels",
    "lost": "lost_channels",
    "constant in float": "float_constant_channels",
    "nonzero": "nonzero",
    "window": "window",
    "nonfinite": "nonfinite",
    "gradient norm": "gradient_norm",
    "float gradient norm": "float_gradient_norm",
    "gradient": "gradient_ratio",
    "SNR (dB)": "snr_db",
}


_FIXED = ("name", "input_bits", "channels")
"""What a layer is, and not what it saw."""
_WIDE_ONLY = ("input bits", "calls", "constant in float", "nonzero", "nonfinite", "gradient norm", "float gradient norm")
_OF_ANY_MAGNITUDE = ("gradient_norm", "float_gradient_norm", "gradient_ratio", "snr_db")


def _cells(layer: LayerHealth) -> tuple[Cell, ...]:
    values = {attribute: getattr(layer, attribute) for attribute in _COLUMNS.values()}
    measured = {name: Measure(values[name]) for name in _OF_ANY_MAGNITUDE if values[name] is not None}
    return tuple((values | measured).values())


def diagnose(model: nn.Module, batch: Any) -> Diagnosis:
    """Measure the health of every QConv3d of a model on a batch.

    The model runs twice, on copies and with the same random draws, every module in the mode that it is in: as it is, and as
    its float counterpart. That has the same latent weights, and in every QConv3d no quantizers, threshold, spread, scale,
    offset or window, and a border of 0: until the model is trained, or its BatchNorm statistics are taken anew, that is the
    float model that was converted. Gradients are those of a fixed random weighting of the outputs. Hooks that you put on the
    model are not called.

    Memory: a copy of the model at a time, its activations as in a training step, and on the CPU the float outputs of the
    converted layers.

    Args:
        model: a converted model; it is not changed.
        batch: a tensor (or a list, for a model that takes one), a tuple of arguments, or a dict of keyword arguments.

    Raises:
        ModelError: if the model has no QConv3d, or cannot be copied.
        InputError: if the model does not run on the batch.
    """
    model = unwrapped(model)
    names = [name for name, _ in converted_layers(model)]
    if not names:
        raise ModelError(f"{type(model).__name__} has no QConv3d to diagnose: convert it with qconvert.binarize first")
    # also where the caller has switched gradients off
    with torch.inference_mode(mode=False), torch.enable_grad():
        expected, float_failure = observe(model, batch)
        seen, failure = observe(model, batch, expected)
    health = tuple(_health(name, seen[name], expected[name]) for name in names)
    failures = {"model": failure, "float model": float_failure}
    remarks = tuple(f"No gradients of the {which}: {why}." for which, why in failures.items() if why)
    return Diagnosis(type(model).__name__, health, remarks)


def _health(name: str, seen: Observer, expected: Observer) -> LayerHealth:
    health = LayerHealth(name, seen.input_bits, seen.calls, seen.channels)
    if not seen.values:
        return health
    health = replace(
        health,
        constant_channels=int(seen.constant.sum()),
        nonzero=seen.nonzero / seen.values,
        window=seen.inside / seen.values,
        nonfinite=seen.nonfinite,
        gradient_norm=seen.gradient_norm,
        float_gradient_norm=expected.gradient_norm,
        snr_db=seen.snr_db,
    )
    if expected.values:
        lost, in_float = seen.constant & ~expected.constant, expected.constant
        health = replace(health, lost_channels=int(lost.sum()), float_constant_channels=int(in_float.sum()))
    if seen.input_bits == 1:
        shares = [count * seen.channels / seen.values for count in seen.positive.tolist()]
        health = replace(
            health,
            positive=int(seen.positive.sum()) / seen.values,
            lowest_positive=min(shares),
            median_positive=statistics.median(shares),
            highest_positive=max(shares),
        )
    return health
