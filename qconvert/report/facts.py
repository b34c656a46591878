"""The facts of a report, all of them integers: what each layer holds, and what it computes in one forward pass.

The pass runs on a copy of the module tree under FakeTensorMode, which computes shapes only. Multiply-accumulates come
from the formulas of torch.utils.flop_counter (1 MAC = 2 FLOPs), and belong to the innermost layer that is running.
"""

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..errors import InputError
from ..layers import QConv3d, QConv3d_NoAct
from ..trace import copied, structural_copy, unwrapped

LOW_BIT = 8
"""Widest operands whose products count as bit operations rather than float operations."""

Shape = tuple[int, ...]


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
    """The layers of a model and what could not be counted."""

    layers: tuple[Layer, ...]
    uncounted: tuple[Uncounted, ...]


def collect(model: nn.Module, example_inputs: Any = None) -> Facts:
    """Return the facts of the model. Without example inputs it is not run, and counts of operations are None.

    Raises:
        InputError: if the model does not run on the inputs.
    """
    model = unwrapped(model)
    layers = _static_facts(model)
    if example_inputs is None:
        return Facts(tuple(layers.values()), ())
    runs = _run(model, example_inputs)
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
    return Facts(tuple(sorted(layers.values(), key=lambda layer: order[layer.name])), tuple(uncounted))


def _static_facts(model: nn.Module) -> dict[str, Layer]:
    stored = {id(t) for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    bits = _bits_per_value(model)
    seen: set[int] = set()
    layers: dict[str, Layer] = {}
    for name, module in _rows(model):
        # a convolution's quantizers are part of its row
        own = list(module.modules()) if isinstance(module, nn.Conv3d) else [module]
        parameters = [p for inner in own for p in inner._parameters.values() if p is not None and not _seen(p, seen)]
        buffers = [b for inner in own for b in inner._buffers.values() if b is not None and id(b) in stored]
        buffers = [b for b in buffers if not _seen(b, seen)]
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
                buffer_bits=sum(_numel(b) * b.element_size() * 8 for b in buffers),
            )
    return layers


def _rows(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not (inside and name.startswith(inside)):
            yield name, module
            if isinstance(module, nn.Conv3d):
                inside = (*inside, f"{name}.") if name else ("",)


def _seen(tensor: Tensor, seen: set[int]) -> bool:
    known = id(tensor) in seen
    seen.add(id(tensor))
    return known


def _numel(tensor: Tensor) -> int:
    return 0 if isinstance(tensor, nn.UninitializedParameter) else tensor.numel()


def _bits_per_value(model: nn.Module) -> dict[int, int]:
    """Return the storage bits of every Parameter: those of its quantizer, if every layer that uses it quantizes it."""
    bits: dict[int, int] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                quantized = isinstance(module, QConv3d_NoAct) and key == "weight"
                own = (_precision(module)[0] if quantized else None) or parameter.element_size() * 8
                bits[id(parameter)] = max(own, bits.get(id(parameter), 0))
    return bits


def _precision(module: nn.Module) -> tuple[int | None, int | None]:
    """Return (bits per weight, bits per input value) of a layer, (None, None) if it has no weight."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None, None
    full = weight.element_size() * 8
    if not isinstance(module, QConv3d_NoAct):
        return full, full
    # identity says 32 bits: what it passes on has the width of the dtype
    activation = module.activation.activation_function.bit_width if isinstance(module, QConv3d) else full
    return min(module._weight_quantize.bit_width, full), min(activation, full)


class _Runs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What ran: calls, shapes and MACs per module, and the operators without a formula."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack = [""]
        self.calls: Counter[str] = Counter()
        self.macs: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()
        self.types: dict[str, str] = {}
        self.shapes: dict[str, tuple[Shape | None, Shape | None]] = {}

    def watch(self, model: nn.Module) -> None:
        """Follow which module is running, by hooks."""
        for name, module in _rows(model):
            self.types[name] = type(module).__name__
            module.register_forward_pre_hook(partial(self._enter, name))
            module.register_forward_hook(partial(self._leave, name), with_kwargs=True, always_call=True)

    def _enter(self, name: str, _module: nn.Module, _args: object) -> None:
        self.stack.append(name)

    def _leave(self, name: str, _module: nn.Module, args: object, kwargs: object, output: object) -> None:
        self.stack.pop()
        self.calls[name] += 1
        self.shapes.setdefault(name, (_shape((args, kwargs)), _shape(output)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = func._overloadpacket
        formula: Any = flop_registry.get(operator)
        if formula is None:
            with self:  # under inference_mode, composite operators arrive whole
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        if formula is not None:
            self.macs[self.stack[-1]] += formula(*args, **kwargs, out_val=output) // 2
        elif not func.is_view and any(isinstance(value, Tensor) for value in pytree.tree_leaves((args, kwargs))):
            self.operators[str(operator)] += 1
        return output


def _shape(value: object) -> Shape | None:
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return tuple(tensors[0].shape) if tensors else None


def _run(model: nn.Module, example_inputs: Any) -> _Runs:
    """Run the model once on fake tensors; where that cannot be done, for real on a copy."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with fake:
            inputs = pytree.tree_map_only(Tensor, fake.from_tensor, example_inputs)
            return _watched(structural_copy(model), inputs)
    except Exception:  # noqa: BLE001 (value-dependent code fails in any way; the real run below tells a true failure)
        with torch.random.fork_rng(), _python_rng():
            inputs = pytree.tree_map_only(Tensor, torch.clone, example_inputs)
            try:
                return _watched(copied(model), inputs)
            except Exception as error:
                raise InputError(_failure(model, example_inputs, error)) from error


def _watched(model: nn.Module, inputs: Any) -> _Runs:
    """Run the model, a copy that nobody else uses, in evaluation mode."""
    args, kwargs = _arguments(inputs)
    runs = _Runs()
    runs.watch(model.eval())
    with torch.no_grad(), runs:
        model(*args, **kwargs)
    return runs


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tuple holds the arguments, a dict the keyword arguments; anything else is the one argument."""
    if isinstance(inputs, tuple):
        return inputs, {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs,), {}


@contextmanager
def _python_rng() -> Iterator[None]:
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def _failure(model: nn.Module, example_inputs: Any, error: Exception) -> str:
    shapes = [f"{tuple(t.shape)} {t.dtype}" for t in pytree.tree_leaves(example_inputs) if isinstance(t, Tensor)]
    first_line = next(iter(str(error).splitlines()), "")
    return (
        f"{type(model).__name__} does not run on the example input {', '.join(shapes) or repr(example_inputs)}: "
        f"{type(error).__name__}: {first_line}. Pass example_inputs that fit: a tensor, a tuple of arguments "
        "or a dict of keyword arguments"
    )
