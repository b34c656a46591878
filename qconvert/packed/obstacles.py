"""Whether a layer can compute with bits: what its inputs' codes are, and the reason where it cannot."""

from collections.abc import Iterator

import torch
from torch import nn

from ..kernels.codes import WORD
from ..kernels.operators import BLOCK
from ..layers import QActivation, QConv3d, QConv3d_NoAct
from ..layers.padding import padding_amounts
from ..quantizations import LSQ, InputDoReFa, Quantization
from ..quantizations.levels import Levels
from ..quantizations.operators import FORMULAS, Comparison
from ..quantizations.stored import bare
from .weights import own_weight, quantized_weight

MOST_BITS = 8
"""Of a code: beyond, pairs of planes cost more than products of floats."""

SUMS = 1 << 31
"""What no sum reaches: they are int32."""

LEAST_PRODUCTS = 8
"""Products of a layer for each word that it would compare: with fewer, in small groups, floats are faster."""


def no_packing(layer: QConv3d_NoAct) -> str | None:
    """Return why the layer cannot compute with bits, or would be slower for it; None if it can."""
    return next(_reasons(layer), None) if isinstance(layer, QConv3d) else "its input is in float: there is nothing to count"


def _reasons(layer: QConv3d) -> Iterator[str]:
    other_weight = own_weight(layer)
    if other_weight is not None:
        yield other_weight
    if type(layer.activation) is not QActivation or has_hooks(layer.activation, *layer.activation.children()):
        yield "its activation is of another class, or has hooks"
    yield from _of_quantizers(layer)
    yield from _of_geometry(layer)


def _of_quantizers(layer: QConv3d) -> Iterator[str]:
    inputs, weights, quantized = input_quantizer(layer), bare(layer._weight_quantize), quantized_weight(layer)
    levels = layer._weight_quantize.levels(quantized)
    if not _has_codes(inputs):
        yield f"its input is in float, or its quantizer {inputs.name!r} has no codes that can be compared"
    elif input_levels(inputs).unit <= 0:
        yield "the step of its input's quantizer is not above 0"
    if levels is None:
        yield f"its weight's quantizer {weights.name!r} does not say its levels"
    elif max(levels.bits, inputs.bit_width) > MOST_BITS:
        widths = f"{levels.bits}-bit weights and {inputs.bit_width}-bit inputs"
        yield f"{widths}: with more than {MOST_BITS} bits floats are faster"
    elif _has_codes(inputs) and quantized[0].numel() * _twice_largest_input(layer) * _twice_largest(levels) >= SUMS:
        yield "its sums may take more than 31 bits"
    if quantized.dtype != torch.float32 or quantized.device.type != "cpu":
        yield f"its weight is {quantized.dtype} on {quantized.device}: bits are counted on a CPU, beside float32"


def _of_geometry(layer: QConv3d) -> Iterator[str]:
    if min(padding_amounts(layer.padding, layer.kernel_size, layer.dilation)) < 0:
        yield "its padding is below 0"
    if not twice_border_code(layer).is_integer():
        yield f"its border of {layer.pad_value:g} lies between the codes"
    group_inputs, group_outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    compared = -(-group_outputs // BLOCK) * BLOCK * -(-group_inputs // WORD)
    if group_inputs * group_outputs < LEAST_PRODUCTS * compared:
        yield f"groups of {group_inputs} -> {group_outputs} channels are too few for words of {WORD}: floats are faster"


def _twice_largest_input(layer: QConv3d) -> float:
    """Return twice the largest magnitude of an input in steps, of the border too."""
    levels = input_levels(input_quantizer(layer))
    return max(_twice_largest(levels), abs(twice_border_code(layer) + 2 * levels.lowest / levels.step))


def _twice_largest(levels: Levels) -> float:
    """Return twice the largest magnitude of a value in steps: what the sums are made of."""
    return 2 * max(abs(levels.lowest), abs(levels.lowest + levels.step * (levels.count - 1))) / levels.step


def input_quantizer(layer: QConv3d) -> Quantization:
    """Return the quantizer of the layer's inputs that is at work."""
    return bare(layer.activation.activation_function)


def comparison_of(quantizer: Quantization) -> Comparison | None:
    """Return the comparison that a quantizer to -1 and +1 is, None for any other."""
    is_operator = type(quantizer).quantize is Quantization.quantize and quantizer.operator is not None
    return FORMULAS[quantizer.operator].comparison if is_operator else None  # type: ignore[index]  # there is an operator


def input_levels(quantizer: Quantization) -> Levels:
    """Return the levels of an input quantizer, which are the same for all inputs."""
    levels: Levels = quantizer.levels(torch.empty(0, dtype=torch.float32, device="cpu"))  # type: ignore[assignment]  # it has codes
    return levels


def twice_border_code(layer: QConv3d) -> float:
    """Return twice the code of the border's value. If that is whole, so is what the border adds to a sum."""
    is_filled = layer.padding_mode == "zeros" and any(padding_amounts(layer.padding, layer.kernel_size, layer.dilation))
    if not is_filled or not _has_codes(input_quantizer(layer)):
        return 0.0
    levels = input_levels(input_quantizer(layer))
    return 2 * (layer.pad_value * levels.divisor / levels.unit - levels.lowest) / levels.step


def _has_codes(quantizer: Quantization) -> bool:
    own = {LSQ: LSQ.quantize, InputDoReFa: Quantization.quantize}
    is_uniform = any(isinstance(quantizer, cls) and type(quantizer).quantize is code for cls, code in own.items())
    return is_uniform or comparison_of(quantizer) is not None


def has_hooks(*modules: nn.Module) -> bool:
    """Return whether one of the modules has forward hooks, which see what lies between operations."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)
