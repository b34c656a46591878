"""`PackedConv3d`: a quantized convolution that computes with bits."""

import math
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor, nn

from ..layers import QActivation, QConv3d, QConv3d_NoAct
from ..layers.padding import padding_amounts
from ..layers.standardization import latent
from ..quantizations import LSQ, InputDoReFa, Quantization
from ..quantizations.levels import Levels
from ..quantizations.operators import FORMULAS
from ..quantizations.stored import bare
from .codes import WORD
from .epilogue import Epilogue
from .geometry import Window, geometry
from .layout import Row, arranged, by_block
from .operators import BLOCK, pack_bits, packed_conv3d

PIECE = 16
"""Channels that are packed at once."""

_SINGLE = 4
"""Dimensions of an input without a batch."""

MOST_BITS = 8
"""Of a code: beyond, pairs of planes cost more than products of floats."""

LEAST_PRODUCTS = 8
"""Products of a layer for each word of 64 that it would compare: with fewer, in small groups, a convolution of floats is faster."""


def no_packing(layer: QConv3d_NoAct) -> str | None:
    """Return why the layer cannot compute with bits, or would be slower for it; None if it can."""
    if not isinstance(layer, QConv3d):
        return "its input is in float: there is nothing to count"
    inputs, weights = bare(layer.activation.activation_function), bare(layer._weight_quantize)
    quantized = quantized_weight(layer)
    if type(layer.activation) is not QActivation or _hooked(layer.activation, *layer.activation.children()):
        return "its activation is of another class, or has hooks"
    if not isinstance(inputs, (LSQ, InputDoReFa)) and _comparison(inputs) is None:
        return f"its input is in float, or its quantizer {inputs.name!r} has no codes"
    levels = weights.levels(quantized)
    if levels is None:
        return f"its weight's quantizer {weights.name!r} has no levels"
    if max(levels.bits, inputs.bit_width) > MOST_BITS:
        return f"{levels.bits}-bit weights and {inputs.bit_width}-bit inputs: more than {MOST_BITS} bits are slower than floats"
    if quantized.dtype != torch.float32 or quantized.device.type != "cpu":
        return f"its weight is {quantized.dtype} on {quantized.device}: bits are counted on a CPU, beside float32"
    if not _twice_border(layer, inputs).is_integer():
        return f"its border of {layer.pad_value:g} lies between the codes"
    group_inputs, group_outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    compared = -(-group_outputs // BLOCK) * BLOCK * -(-group_inputs // WORD)
    if group_inputs * group_outputs < LEAST_PRODUCTS * compared:
        return f"groups of {group_inputs} -> {group_outputs} channels: too few for words of {WORD}"
    return None


def _centre(levels: Levels) -> int:
    """Return z for which ``step / 2 * (2 u - n + z)`` is what the code u stands for, see layout.py."""
    return 2**levels.bits - 1 + 2 * levels.lowest // levels.step


def quantized_weight(layer: QConv3d_NoAct) -> Tensor:
    """Return what the layer convolves with."""
    quantized: Tensor = layer._weight_quantize(latent(layer.weight.detach(), standardize=layer.standardize))
    return quantized


def _hooked(*modules: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _comparison(quantizer: Quantization) -> Any:
    operator = quantizer.operator
    return None if operator is None else FORMULAS[operator].comparison


def _levels_of_inputs(quantizer: Quantization) -> Levels:
    """Return the levels of an input quantizer, which do not depend on the input."""
    levels = quantizer.levels(torch.empty(0))
    assert levels is not None
    return levels


def _twice_border(layer: QConv3d, inputs: Quantization) -> float:
    """Return twice the code that the border's value has; it is between two codes where sums of its products are no integers."""
    if layer.padding_mode != "zeros" or not any(padding_amounts(layer.padding, layer.kernel_size, layer.dilation)):
        return 0.0
    levels = _levels_of_inputs(inputs)
    return 2 * (layer.pad_value * levels.divisor / levels.unit - levels.lowest) / levels.step


class PackedConv3d(nn.Module):
    """A quantized convolution that computes with bits, and what comes after it in the same pass over the output.

    Forward: ``y = prelu(factor * conv3d(pad(codes(x)), codes of the weight) + summand + residual) + last``.

    Shapes: x (N, C, D, H, W) float32, or its packed codes (int64, see operators.py); residual and output (N, O, D', H', W'),
    in channels_last_3d. The sums are whole numbers, the same as those of the layer that was packed; what comes after is
    rounded to float32 after each operation.

    Args:
        layer: the layer that is packed, for which `no_packing` is None.

    Attributes:
        epilogue: what comes after the sums; it takes effect with `finish`.
        following: border of the layer that reads packed outputs, None where none does.
        has_values: whether floats are put out too.
    """

    weight: Tensor
    table: Tensor
    tap_sums: Tensor
    thresholds: Tensor
    spreads: Tensor
    settings: Tensor | None

    def __init__(self, layer: QConv3d) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = layer.in_channels, layer.out_channels, layer.groups
        self.kernel_size, self.stride, self.dilation = tuple(layer.kernel_size), tuple(layer.stride), tuple(layer.dilation)
        self.padding_mode, self._fill = layer.padding_mode, layer._reversed_padding_repeated_twice
        is_filled = layer.padding_mode == "zeros"
        self.border = padding_amounts(layer.padding, layer.kernel_size, layer.dilation) if is_filled else [0] * 6
        self._window = Window.of(self.kernel_size, self.stride, self.border, self.dilation)
        self.following: list[int] | None = None
        self.has_values = True
        inputs, weights = bare(layer.activation.activation_function), bare(layer._weight_quantize)
        self.input_levels = _levels_of_inputs(inputs)
        self.twice_border = round(_twice_border(layer, inputs))
        quantized = quantized_weight(layer)
        levels = weights.levels(quantized)
        self._take_inputs(layer.activation, inputs)
        self._take_weight(quantized, levels)
        self._take_epilogue(layer)
        self.finish()

    def _take_inputs(self, activation: QActivation, inputs: Quantization) -> None:
        levels, comparison = self.input_levels, _comparison(inputs)
        channels = self.in_channels // self.groups

        def by_group(values: Tensor | None, fill: float) -> Tensor:
            """Return values per channel as (groups, channels of a group, rounded up to whole pieces)."""
            given = torch.full((self.in_channels,), fill) if values is None else values.detach().float()
            return F.pad(given.view(self.groups, channels), (0, -channels % PIECE), value=fill)

        thresholds = by_group(activation.threshold, 0.0)
        if comparison is not None and comparison.becomes == 1:  # above the threshold, not at it
            thresholds = torch.nextafter(thresholds, torch.tensor(math.inf))
        self.register_buffer("thresholds", thresholds)
        self.register_buffer("spreads", by_group(activation.spread, 1.0))
        highest = levels.lowest + levels.count - 1
        settings = [levels.unit, float(levels.divisor), float(levels.lowest), float(highest)]
        self.register_buffer("settings", None if comparison is not None else torch.tensor(settings))

    def _take_weight(self, quantized: Tensor, levels: Levels) -> None:
        self.planes = (self.input_levels.bits, levels.bits)
        codes = levels.codes(quantized).view(quantized.shape).long().numpy()
        words = arranged(codes, self.groups, *self.planes, BLOCK)
        self.register_buffer("weight", torch.from_numpy(words))
        self._centre = tuple(_centre(each) for each in (self.input_levels, levels))
        sums = (2 * codes - (2**levels.bits - 1) + self._centre[1]).sum(1)
        self.register_buffer("tap_sums", torch.from_numpy(sums))
        self._bases: dict[tuple[int, ...], Tensor] = {}
        ours, theirs = (each.step / 2 * each.unit / each.divisor for each in (self.input_levels, levels))
        self._unit = ours * theirs

    def _take_epilogue(self, layer: QConv3d) -> None:
        ones, zeros = torch.ones(self.out_channels).double(), torch.zeros(self.out_channels).double()
        scale = ones if layer.scale is None else layer.scale.detach().double()
        summands = [each.detach().double() for each in (layer.offset, layer.bias) if each is not None]
        self.epilogue = Epilogue(self._unit * scale, sum(summands, zeros))
        self._adds_input = layer.shortcut
        if layer.shortcut:
            self.epilogue.add()
        if layer.rprelu is not None:
            shift, slope, summand = (each.detach().double() for each in layer.rprelu.parameters())
            self.epilogue.bend(slope, before=-shift, after=summand)

    def finish(self) -> None:
        """Let the epilogue take effect."""
        self._set_table(self.epilogue.rows())

    @property
    def reads_signs(self) -> bool:
        """Whether the layer before it can do its packing: one threshold a channel, and no use for the floats."""
        return self.settings is None and self.groups == 1 and self.padding_mode == "zeros" and not self._adds_input

    def hand_on(self, reader: "PackedConv3d", *, has_values: bool) -> None:
        """Put out the bits that another layer reads, beside the floats or in their place."""
        self.following, self.has_values = reader.border, has_values
        rows = self.epilogue.rows()
        rows[Row.THRESHOLD] = reader.thresholds[0, : self.out_channels]
        self._set_table(rows)

    def _set_table(self, rows: Tensor) -> None:
        blocked = by_block(rows.numpy(), self.groups, BLOCK, fill=math.inf).swapaxes(0, 1)
        self.register_buffer("table", torch.from_numpy(np.ascontiguousarray(blocked)))

    def bases(self, size: tuple[int, ...]) -> Tensor:
        """Return what twice the counts are taken from for inputs of D, H, W, int64 [class][group, block][channel]."""
        key = size if self.twice_border else ()
        if key not in self._bases:
            self._bases[key] = self._new_bases(size)
        return self._bases[key]

    def _new_bases(self, size: tuple[int, ...]) -> Tensor:
        input_centre, weight_centre = self._centre
        largest = [2**planes - 1 for planes in self.planes]
        products = self.in_channels // self.groups * math.prod(self.kernel_size)
        sums = self.tap_sums.numpy()
        base = products * largest[0] * (largest[1] - weight_centre) + input_centre * sums.sum((1, 2, 3))[None]
        if self.twice_border:
            base = base + self.twice_border * geometry(self._window, 1, size, 1, 1).outside(sums)
        return torch.from_numpy(by_block(base, self.groups, BLOCK))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """Return the output: floats, packed codes for the layer that follows, or both."""
        single = x.dim() == _SINGLE
        x = x[None] if single else x
        words = x if x.dtype == torch.int64 else self.pack(x)
        size = self._window.inner(words.shape[2:5])
        found = packed_conv3d(
            words,
            self.weight,
            self.bases(size),
            self.table,
            x if self._adds_input else residual,
            self.kernel_size,
            self.stride,
            self.border,
            self.dilation,
            self.out_channels,
            self.in_channels // self.groups,
            self.planes[1],
            2 * self._centre[1],
            self.has_values,
            self.following,
        )
        return found[0][0] if single else found[0] if len(found) == 1 else found

    def pack(self, x: Tensor) -> Tensor:
        """Return the packed codes of a float input, shape (N, C, D, H, W)."""
        if self.padding_mode != "zeros":
            x = F.pad(x, self._fill, mode=self.padding_mode)
        return pack_bits(x.float(), self.thresholds, self.spreads, self.settings, self.planes[0], self.border, self.groups)
