"""The facts of a report, all of them integers: what each layer holds, and what it computes in one forward pass."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..layers import QConv3d, QConv3d_NoAct
from ..layers.computed import weights_at_rest
from ..layers.tied import handed_over
from ..trace import unwrapped
from .options import Option, options_of
from .run import Shape, rows, run

LOW_BIT = 8
"""Widest operands whose products count as bit operations rather than float operations."""


@dataclass(frozen=True)
class Layer:
    """One layer of one model. Counts of operations are for one forward pass, None if the model was not run.

    Attributes:
        name, type: dotted name and class name.
        is_conv3d: whether it is a Conv3d, converted or not.
        weight_bits, input_bits: bits per weight and per input value, None for a layer without weights.
        calls: how often it ran.
        input_shape, output_shape: of its first call; None where it has not run or has no tensor there.
        parameters, parameter_bits: its Parameters and the bits that they need in storage; a Parameter that several
            layers share is counted at the first.
        buffer_bits: bits of the buffers that a checkpoint holds.
        macs: multiply-accumulates.
    """

    name: str
    type: str
    is_conv3d: bool = False
    weight_bits: int | None = None
    input_bits: int | None = None
    calls: int | None = None
    input_shape: Shape | None = None
    output_shape: Shape | None = None
    parameters: int = 0
    parameter_bits: int = 0
    buffer_bits: int = 0
    macs: int | None = None

    @property
    def precision(self) -> str:
        """``"W1A1"`` for 1-bit weights and inputs; "" for a layer without weights."""
        return "" if self.weight_bits is None else f"W{self.weight_bits}A{self.input_bits}"

    @property
    def is_low_bit(self) -> bool:
        """Whether its products are bit operations. A MAC has the precision of the larger of its operands."""
        widths = (self.weight_bits, self.input_bits)
        return all(width is not None and width <= LOW_BIT for width in widths)

    @property
    def flops(self) -> int | None:
        """FLOPs = 2 x MACs, of a layer that computes in float."""
        return None if self.macs is None else 0 if self.is_low_bit else 2 * self.macs

    @property
    def bops(self) -> int | None:
        """BOPs = 2 x weight bits x input bits x MACs, of a layer whose weights and inputs both have at most 8 bits."""
        if self.macs is None:
            return None
        if self.weight_bits is None or self.input_bits is None or not self.is_low_bit:
            return 0
        return 2 * self.weight_bits * self.input_bits * self.macs


@dataclass(frozen=True)
class Uncounted:
    """Something that ran without a MAC formula, or was never called.

    Attributes:
        name: the operator, or the layer that was never called.
        calls: how often it ran.
        reason: why it is not in the counts.
    """

    name: str
    calls: int
    reason: str


@dataclass(frozen=True)
class Facts:
    """The layers of a model, what could not be counted, whether the model was run, and what optional settings add."""

    layers: tuple[Layer, ...]
    uncounted: tuple[Uncounted, ...]
    was_run: bool
    options: tuple[Option, ...] = ()


def collect(model: nn.Module, example_inputs: Any = None) -> Facts:
    """Return the facts of the model. Without example inputs it is not run, and counts of operations are None.

    Raises:
        InputError: if the model does not run on the inputs.
    """
    model = unwrapped(model)
    options = options_of(model)
    with weights_at_rest(model):
        layers = _static_facts(model)
    if example_inputs is None:
        return Facts(tuple(layers.values()), (), was_run=False, options=options)
    runs = run(model, example_inputs)
    for name, calls in runs.calls.items():
        layer = layers.get(name, Layer(name, runs.types[name]))
        if name in layers or runs.macs[name]:
            seen, returned = runs.shapes[name]
            layers[name] = replace(layer, calls=calls, macs=runs.macs[name], input_shape=seen, output_shape=returned)
    never_run = {name: replace(layer, calls=0, macs=0) for name, layer in layers.items() if layer.calls is None}
    layers |= never_run
    # a layer's own MACs are listed where it is registered
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    uncounted = [Uncounted(name, calls, "no MAC formula") for name, calls in runs.operators.most_common()]
    uncounted += [Uncounted(name, 0, "never called") for name, layer in never_run.items() if layer.weight_bits is not None]
    ordered = sorted(layers.values(), key=lambda layer: order[layer.name])
    return Facts(tuple(ordered), tuple(uncounted), was_run=True, options=options)


def _static_facts(model: nn.Module) -> dict[str, Layer]:
    bits = _bits_per_value(model)
    seen: set[int] = set()
    layers: dict[str, Layer] = {}
    for name, module in rows(model):
        # a convolution's quantizers are part of its row
        own = list(module.modules()) if isinstance(module, nn.Conv3d) else [module]
        parameters = _unseen([p for inner in own for p in inner._parameters.values() if p is not None], seen)
        buffers = _unseen([b for inner in own for b in _saved_buffers(inner)], seen)
        weight_bits, input_bits = _precision(module)
        if parameters or buffers or weight_bits is not None:
            layers[name] = Layer(
                name,
                type(module).__name__,
                isinstance(module, nn.Conv3d),
                weight_bits,
                input_bits,
                parameters=sum(_numel(p) for p in parameters),
                parameter_bits=sum(_numel(p) * bits[id(p)] for p in parameters),
                buffer_bits=sum(_numel(b) * b.dtype.itemsize * 8 for b in buffers),
            )
    return layers


def _saved_buffers(module: nn.Module) -> list[Tensor]:
    """Return the module's own buffers that a checkpoint holds."""
    left_out = module._non_persistent_buffers_set
    return [buffer for name, buffer in module._buffers.items() if buffer is not None and name not in left_out]


def _unseen(tensors: list[Any], seen: set[int]) -> list[Tensor]:
    """Return the tensors that no layer before had, each once."""
    new = {id(tensor): tensor for tensor in tensors if id(tensor) not in seen}
    seen.update(new)
    return list(new.values())


def _numel(tensor: Tensor) -> int:
    return 0 if isinstance(tensor, nn.UninitializedParameter) else tensor.numel()


def _bits_per_value(model: nn.Module) -> dict[int, int]:
    """Return the storage bits of every Parameter: those of its quantizer, if every layer that uses it quantizes it."""
    bits: dict[int, int] = {}
    for module in model.modules():
        not_its_own = handed_over(module)
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in not_its_own:
                quantized = isinstance(module, QConv3d_NoAct) and key == "weight"
                own = (_precision(module)[0] if quantized else None) or parameter.dtype.itemsize * 8
                bits[id(parameter)] = max(own, bits.get(id(parameter), 0))
    return bits


def _precision(module: nn.Module) -> tuple[int | None, int | None]:
    """Return (bits per weight, bits per input value) of a layer, (None, None) if it has no weight."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None, None
    full = weight.dtype.itemsize * 8
    if not isinstance(module, QConv3d_NoAct):
        return full, full
    # identity says 32 bits: what it passes on has the width of the dtype
    activation = module.activation.activation_function.bit_width if isinstance(module, QConv3d) else full
    return min(module._weight_quantize.bit_width, full), min(activation, full)
