"""`PackedConv3d`: a quantized convolution that computes with bits."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import InputError, ModelError
from ..kernels.codes import in_pieces
from ..kernels.formats import is_channels_last
from ..kernels.geometry import Window
from ..kernels.in_torch import by_channel
from ..kernels.layout import Row, arranged, by_block, epilogue_table
from ..kernels.operators import BLOCK, pack_bits, packed_conv3d
from ..layers import QActivation, QConv3d
from ..layers.padding import padding_amounts
from ..layers.qconv3d import per_channel
from ..quantizations.levels import Levels
from ..quantizations.operators import Comparison
from .epilogue import Epilogue
from .obstacles import comparison_of, input_levels, input_quantizer, twice_border_code
from .weights import quantized_weight

_SINGLE = 4
"""Dimensions of an input without a batch."""

_PACKED = 7
"""Dimensions of packed codes."""

_WHOLE = 1 << 24
"""Whole numbers up to here are exact in float32."""


class PackedConv3d(nn.Module):
    """A quantized convolution that computes with bits, and what comes after it in the same pass over the output.

    Forward: ``y = prelu(norm(scale * conv3d(pad(codes(x)), codes of the weight) + offset + bias) + residual) + last``,
    where ``norm(v) = norm_factor * v + norm_summand``, all of them per output channel.

    Shapes: x (N, C, D, H, W) float32, or its packed codes (int64, see operators.py); residual and output (N, O, D', H', W').
    The sums are whole numbers, the same as those of the layer that was packed; what comes after is rounded to float32 after
    each operation.

    Args:
        layer: the layer that is packed, for which `no_packing` is None.

    Attributes:
        epilogue: what comes after the sums; it takes effect with `finish`.
        takes_in: the operations of the model in it, by name.
        following: border of the layer that reads packed outputs, None where none does.
        has_values: whether floats are put out too.
        channels_last: whether they are always put out in channels_last_3d, or else in the memory format of the input.
    """

    weight: Tensor
    table: Tensor
    float_table: Tensor
    base: Tensor
    tap_sums: Tensor | None
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
        self._products = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        self.register_buffer("table", None)
        self.register_buffer("float_table", None)
        self.following: list[int] | None = None
        self.has_values = True
        self.channels_last = False
        self.takes_in: list[str] = []
        inputs, quantized = input_quantizer(layer), quantized_weight(layer)
        self.input_levels = input_levels(inputs)
        self.twice_border = round(twice_border_code(layer))
        self._take_inputs(layer.activation, comparison_of(inputs))
        self._take_weight(quantized, layer._weight_quantize.levels(quantized))  # type: ignore[arg-type]  # it has levels
        self._take_epilogue(layer)
        self.finish()

    def _take_inputs(self, activation: QActivation, comparison: Comparison | None) -> None:
        levels = self.input_levels
        kinds = ((activation.threshold, 0.0), (activation.spread, 1.0))
        given = (_per_channel(values, default, self.in_channels).float() for values, default in kinds)
        thresholds, spreads = (in_pieces(each, self.groups) for each in given)
        if comparison is not None and comparison.becomes == 1:  # above the threshold, not at it
            thresholds = torch.nextafter(thresholds, thresholds.new_tensor(math.inf))
        self.register_buffer("thresholds", thresholds)
        self.register_buffer("spreads", spreads)
        highest = levels.lowest + levels.count - 1
        settings = [levels.unit, float(levels.divisor), float(levels.lowest), float(highest)]
        self.register_buffer("settings", None if comparison is not None else spreads.new_tensor(settings))

    def _take_weight(self, quantized: Tensor, levels: Levels) -> None:
        self.planes = (self.input_levels.bits, levels.bits)
        codes = levels.codes(quantized).view(quantized.shape).numpy()
        words = arranged(codes, self.groups, *self.planes, BLOCK)
        self.register_buffer("weight", torch.from_numpy(words))
        self._centre = tuple(_centre(each) for each in (self.input_levels, levels))
        sums = (2 * codes - (2**levels.bits - 1) + self._centre[1]).sum(1, dtype=np.int64)
        self.register_buffer("base", self._blocked(torch.from_numpy(self._base(sums.sum((1, 2, 3)))).int()))
        self.register_buffer("tap_sums", torch.from_numpy(sums) if self.twice_border else None)
        ours, theirs = (each.step / 2 * each.unit / each.divisor for each in (self.input_levels, levels))
        self._unit = ours * theirs

    def _take_epilogue(self, layer: QConv3d) -> None:
        kinds = ((layer.scale, 1.0), (layer.offset, 0.0), (layer.bias, 0.0))
        scale, offset, bias = (_per_channel(values, default, self.out_channels) for values, default in kinds)
        self.epilogue = Epilogue(self._unit * scale, offset, bias, partial(_own, layer.scale, layer.offset, layer.bias))
        self._adds_input = layer.shortcut
        if layer.shortcut:
            self.epilogue.add()
        if layer.rprelu is not None:
            shift, slope, summand = (each.detach().double() for each in layer.rprelu.parameters())
            self.epilogue.bend(slope, layer.rprelu, before=-shift, after=summand)

    def twin(self) -> Self:
        """Return a layer of the same weight, to which other operations can be added."""
        twin = copy.copy(self)
        twin._buffers, twin.epilogue, twin.takes_in = dict(self._buffers), copy.copy(self.epilogue), []
        return twin

    def finish(self) -> None:
        """Let the epilogue take effect."""
        self.float_table = self.table = self._table(self.epilogue.rows())

    @property
    def reads_signs(self) -> bool:
        """Whether the layer before it can do its packing: one threshold a channel, and no use for the floats."""
        return self.settings is None and self.groups == 1 and self.padding_mode == "zeros" and not self._adds_input

    def hand_on(self, reader: "PackedConv3d", *, has_values: bool) -> None:
        """Put out the bits that another layer reads, beside the floats or in their place."""
        self.following, self.has_values = reader.border, has_values
        rows, thresholds = self.epilogue.rows(), reader.thresholds[0, : self.out_channels]
        rows[Row.THRESHOLD] = thresholds
        if self._sums_signs and not has_values and self.epilogue.is_monotone:
            rows[Row.SCALE], rows[Row.THRESHOLD] = self.epilogue.whole_thresholds(thresholds, self._largest_sum)
            rows[Row.OFFSET] = rows[Row.BIAS] = rows[Row.NORM_SUMMAND] = rows[Row.LAST] = 0.0
            rows[Row.NORM_FACTOR] = rows[Row.SLOPE] = 1.0
        self.table = self._table(rows)

    @property
    def _sums_signs(self) -> bool:
        """Whether the counts are the sums of the model, whole numbers that a float32 has."""
        is_of_signs = self.planes == (1, 1) and self._centre == (0, 0) and self._unit == 1.0
        return is_of_signs and self._largest_sum <= _WHOLE

    @property
    def _largest_sum(self) -> int:
        """The largest magnitude of a sum of signs, with the border's values."""
        return self._products * max(1, abs(self.twice_border - 1))

    def _table(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(epilogue_table(rows.numpy(), self.groups, BLOCK))

    def _base(self, sums: NDArray[Any]) -> Any:
        """Return what twice a count is taken from, see layout.py: twice, because ``s s' = 1 - 2 (bits differ)``."""
        input_centre, weight_centre = self._centre
        of_input, of_weight = (2**planes - 1 for planes in self.planes)
        return self._products * of_input * (of_weight - weight_centre) + input_centre * sums

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """Return the output: floats, packed codes for the layer that follows, or both.

        Without a batch, and where adding the residual changes shapes, floats come in the place of the codes, too.

        Raises:
            InputError: for another number of channels, or an input that is smaller than the kernel.
        """
        is_single = x.dim() == _SINGLE
        batch = x[None] if is_single else x
        words = batch if x.dtype == torch.int64 and x.dim() == _PACKED else self.pack(batch)
        residual = x if self._adds_input else residual
        size = (words.shape[1], self.out_channels, *self._window.outputs_of(words.shape[2:5]))
        if min(size[2:]) < 1:
            sizes = " x ".join(map(str, words.shape[2:5]))
            raise InputError(f"an input of {sizes} positions, with its border, is too small: {self}")
        convolve = partial(self._convolve, words, channels_last=self.channels_last or is_channels_last(x))
        if not is_single and (residual is None or (isinstance(residual, Tensor) and residual.shape == size)):
            found = convolve(self.table, residual, has_values=self.has_values, following=self.following)
            return found[0] if len(found) == 1 else found
        values = self._in_floats(convolve, residual, is_single=is_single)
        return [values, values] if self.has_values and self.following is not None else values

    def _in_floats(self, convolve: Callable[..., list[Tensor]], residual: Tensor | None, *, is_single: bool) -> Tensor:
        if residual is None:
            (values,) = convolve(self.float_table, None, has_values=True, following=None)
            return values[0] if is_single else values
        table = self.float_table.clone()
        table[:, Row.SLOPE], table[:, Row.LAST] = 1.0, 0.0
        (values,) = convolve(table, None, has_values=True, following=None)
        rows = by_channel(self.float_table.movedim(1, 0), self.groups, self.out_channels)
        slope, last = (rows[row].view(-1, 1, 1, 1) for row in (Row.SLOPE, Row.LAST))
        values = (values[0] if is_single else values) + residual
        return torch.where(values > 0, values, values * slope) + last

    def _convolve(
        self,
        words: Tensor,
        table: Tensor,
        residual: Tensor | None,
        *,
        channels_last: bool,
        has_values: bool,
        following: list[int] | None,
    ) -> list[Tensor]:
        found: list[Tensor] = packed_conv3d(
            words,
            self.weight,
            self.base,
            self.tap_sums,
            table,
            residual,
            self.kernel_size,
            self.stride,
            self.border,
            self.dilation,
            self.out_channels,
            self.in_channels // self.groups,
            self.planes[1],
            2 * self._centre[1],
            self.twice_border,
            channels_last,
            has_values,
            following,
        )
        return found

    def pack(self, x: Tensor) -> Tensor:
        """Return the packed codes of a float input, shape (N, C, D, H, W).

        Raises:
            InputError: for another number of channels.
        """
        if x.dim() != _SINGLE + 1 or x.shape[1] != self.in_channels:
            expected = f"(N, {self.in_channels}, D, H, W) or ({self.in_channels}, D, H, W)"
            raise InputError(f"a packed convolution expects an input of shape {expected}, got {tuple(x.shape)}")
        if self.padding_mode != "zeros":
            x = F.pad(x, self._fill, mode=self.padding_mode)
        words: Tensor = pack_bits(
            x.float(), self.thresholds, self.spreads, self.settings, self.planes[0], self.border, self.groups
        )
        return words

    def _load_from_state_dict(self, *args: Any) -> None:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._load_from_state_dict(*args)
        for name, buffer in before.items():
            loaded: Tensor = self._buffers[name]  # type: ignore[assignment]  # it was a tensor
            self._buffers[name] = loaded.to(buffer.dtype).contiguous()  # workers read raw memory
        if self.tap_sums is not None:
            self.tap_sums = self.tap_sums.clone()  # what is remembered of it goes by the object

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Bring the words into this machine's order: that of a pickle may be another's."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.weight.shape[-1] == BLOCK:
            return
        self.weight = (
            self._blocked(by_channel(self.weight.movedim(1, 0), self.groups, self.out_channels)).movedim(0, 1).contiguous()
        )
        self.base = self._blocked(by_channel(self.base, self.groups, self.out_channels))
        self.table, self.float_table = (
            self._table(by_channel(each.movedim(1, 0), self.groups, self.out_channels))
            for each in (self.table, self.float_table)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device.

        Raises:
            ModelError: for another dtype than float32.
        """
        dtype = fn(self.table[:0]).dtype
        if dtype != torch.float32:
            raise ModelError(
                f"a packed layer computes in float32, not in {dtype}: pack the converted model again, with "
                "qconvert.pack(model, dtype=...) for float convolutions in another dtype"
            )
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved

    def extra_repr(self) -> str:
        """Show the geometry."""
        sizes = f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}"
        return f"{self.in_channels}, {self.out_channels}, {sizes}, groups={self.groups}"

    def _blocked(self, values: Tensor) -> Tensor:
        return torch.from_numpy(by_block(values.numpy(), self.groups, BLOCK))

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode.

        Raises:
            ModelError: for any other.
        """
        if mode:
            raise ModelError("a packed model has no latent weights to train: train the converted model, and pack it again")
        return super().train(mode)


def _per_channel(values: Tensor | None, default: float, channels: int) -> Tensor:
    """Return values per channel, float64 (channels,)."""
    if values is None:
        return torch.full((channels,), default, dtype=torch.float64, device="cpu")
    return values.detach().double().expand(channels)


def _own(scale: Tensor | None, offset: Tensor | None, bias: Tensor | None, sums: Tensor) -> Tensor:
    return per_channel(sums, scale, offset, bias)


def _centre(levels: Levels) -> int:
    """Return z for which ``step / 2 * (2 u - n + z)`` is what the code u stands for, see layout.py."""
    highest: int = 2**levels.bits - 1
    return highest + 2 * levels.lowest // levels.step
