"""Which weights of a model can be stored as codes, and why the others cannot."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..errors import ModelError, QuantizerError, first_line
from ..layers import QConv3d_NoAct
from ..layers.standardization import latent
from ..layers.tied import TiedConv3d, handed_over
from ..modes import preserved_modes
from ..quantizations import Identity
from ..quantizations.levels import Levels
from ..quantizations.staged import at_work
from ..quantizations.stored import bare
from ..rng import preserved_rng
from ..trace import structural_copy, trace


@dataclass(frozen=True)
class Weight:
    """A weight that can be stored as codes: the name of its quantizer, the levels, and the codes, flat, in C order."""

    quantizer: str
    levels: Levels
    codes: Tensor


def users(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Return the modules that compute with each Parameter, with their names, by its identity."""
    found: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        not_its_own = handed_over(module)
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in not_its_own:
                found.setdefault(id(parameter), []).append((name, module))
    return found


def quantizes(module: nn.Module, parameter: int) -> TypeGuard[QConv3d_NoAct]:
    """Whether the module is a layer whose weight is the Parameter of that identity."""
    return isinstance(module, QConv3d_NoAct) and id(module._parameters.get("weight")) == parameter


def quantized_weights(model: nn.Module) -> tuple[dict[int, Weight], dict[str, str]]:
    """Return the weights that can be stored as codes, by their Parameter's identity; for other layers, why theirs cannot.

    Raises:
        ModelError: naming the layer, if a quantizer puts out what is none of its levels.
    """
    weights: dict[int, Weight] = {}
    reasons: dict[str, str] = {}
    read = _read_by_forwards(model)
    for parameter, modules in users(model).items():
        layers = {name: layer for name, layer in modules if quantizes(layer, parameter)}
        if all(isinstance(bare(layer._weight_quantize), Identity) for layer in layers.values()):
            continue
        others = [name for name, _ in modules if name not in layers]
        if others:
            found: Weight | str = f"{others[0]!r} computes with it in float"
        else:
            found = "a forward reads it, and not for a convolution alone" if parameter in read else _common(layers)
        if isinstance(found, Weight):
            weights[parameter] = found
        else:
            reasons |= dict.fromkeys(layers, found)
    for name, module in model.named_modules():
        if isinstance(module, QConv3d_NoAct) and "weight" not in module._parameters:
            reasons[name] = "it is computed from other Parameters: take its parametrization (weight_norm, prune) off first"
    return weights, reasons


def _common(layers: Mapping[str, QConv3d_NoAct]) -> Weight | str:
    """Return what the layers that share one weight make of it, or why that is not one thing."""
    found = []
    for name, layer in layers.items():
        try:
            weight = _of_layer(layer)
        except QuantizerError as error:
            raise ModelError(f"layer {name!r} cannot be stored: {error}") from error
        if isinstance(weight, str):
            return weight
        found.append(weight)
    first = found[0]
    if all(weight.levels == first.levels and torch.equal(weight.codes, first.codes) for weight in found):
        return first
    return f"{' and '.join(map(repr, layers))} share it and quantize it differently"


def _of_layer(layer: QConv3d_NoAct) -> Weight | str:
    quantizer = at_work(layer._weight_quantize)
    quantized = quantized_weight(layer)
    levels = quantizer.levels(quantized)
    if levels is None:
        return f"its quantizer {bare(quantizer).name!r} does not say its levels"
    if levels.bits != quantizer.bit_width:
        raise QuantizerError(f"its quantizer says a bit_width of {quantizer.bit_width} and levels of {levels.bits} bits")
    codes = levels.codes(quantized)
    return own_weight(layer) or Weight(bare(quantizer).name, levels, codes)


def quantized_weight(layer: QConv3d_NoAct) -> Tensor:
    """Return the weight as it is convolved in evaluation."""
    with preserved_modes(layer._weight_quantize):
        layer._weight_quantize.eval()
        quantized: Tensor = layer._weight_quantize(latent(layer.weight, standardize=layer.standardize))
    return quantized


_PLAIN_FORWARDS = {nn.Conv3d.forward, TiedConv3d.forward}


def own_weight(layer: QConv3d_NoAct) -> str | None:
    """Return how a subclass's own forward convolves with something other than its weight, None if it does not.

    The forward runs, on a copy and an input of the size of the kernel, and what it convolves with is looked at.
    """
    cls = type(layer)
    if cls.forward in _PLAIN_FORWARDS and cls._conv_forward is QConv3d_NoAct._conv_forward:
        return None
    convolved: list[Tensor] = []

    def keep(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolved.append(weight)
        return cls._quantized_conv(copy, x, weight, bias)

    try:
        with preserved_rng(seed=0):
            copy: Any = structural_copy(layer).eval()
            vars(copy)["_quantized_conv"] = keep
            sizes = [step * (size - 1) + 1 for step, size in zip(layer.dilation, layer.kernel_size, strict=True)]
            copy.forward(layer.weight.new_ones(1, layer.in_channels, *sizes))
    except Exception as error:  # noqa: BLE001 (a user's forward may raise anything; the reason is reported)
        return f"the forward of {cls.__name__} does not run by itself: {first_line(error)}"
    if convolved and all(weight is layer.weight for weight in convolved):
        return None
    return f"the forward of {cls.__name__} computes the weight that it convolves with"


def _read_by_forwards(model: nn.Module) -> set[int]:
    """Return the Parameters that a graph reads, but for those that are handed over to a quantized layer."""
    traced, found = trace(model), set()
    for region, graph in traced.graphs.items():
        root = traced.model.get_submodule(region)
        for node in graph.nodes:
            if node.op == "get_attr":
                takers = [root.get_submodule(user.target) if user.op == "call_module" else None for user in node.users]
                if not all(isinstance(taker, TiedConv3d) and isinstance(taker, QConv3d_NoAct) for taker in takers):
                    owner, _, name = str(node.target).rpartition(".")
                    # what is no Parameter of the model is a constant of the trace
                    found.add(id(root.get_submodule(owner)._parameters.get(name)))
    return found
