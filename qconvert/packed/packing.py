"""`pack`: a converted model becomes one that computes with bits."""

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..code import is_torchs, operations, reachable
from ..errors import InputError, ModelError
from ..example import arguments, copied_inputs, does_not_run, tensors_in
from ..kernels import operators
from ..layers import QConv3d, QConv3d_NoAct
from ..modes import preserved_modes
from ..quantizations import Identity
from ..trace import PACKED, copied, unwrapped
from .bit_conv import BitConv3d, pack_layer
from .fusing import fuse
from .layer import PackedConv3d
from .obstacles import no_packing
from .summary import PackedLayer, Summary


def pack(model: nn.Module, example_inputs: Any = None, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy of a converted model that computes with bits, in eval mode.

    Each QConv3d packs its input and counts (numba's compiled kernel; in torch's own operations, slower than floats, where
    numba is not installed). What follows it in the model - BatchNorm, an addition, ReLU or PReLU - happens in the same pass,
    and the next layer's bits are put out there. Layers and parts for which this cannot be stay as they are:
    ``packed.summary()`` names each with its reason.

    Args:
        model: a model that `binarize` or `load` has returned, trained or not. It stays as it is.
        example_inputs: as in `binarize`. With them both models run once, and the summary tells the largest difference.
        dtype: what float convolutions compute in, such as ``torch.bfloat16``, with the BatchNorm behind them folded in, and
            in channels_last_3d. None leaves them as they are: they round as before, and no sign is another.

    Returns:
        A model of the same class. It is pickled, copied and compiled like any other, and cannot be trained.

    Raises:
        ModelError: if no layer of the model is a QConv3d, or the model cannot be copied.
        InputError: if the model does not run on the example inputs.
    """
    plain = unwrapped(model)
    if not any(isinstance(layer, QConv3d_NoAct) for layer in plain.modules()):
        raise ModelError("no layer of this model is a QConv3d: pack a model that qconvert.binarize has converted")
    latent = {id(layer.weight): layer.weight for layer in plain.modules() if isinstance(layer, QConv3d_NoAct)}
    packed = copied(plain, latent).eval()  # latent weights, which the copy loses, are not copied before
    names = {layer: name for name, layer in packed.named_modules() if isinstance(layer, QConv3d_NoAct)}
    precisions = {layer: _precision(layer) for layer in names}
    reasons = {layer: no_packing(layer) for layer in names}
    is_compiled = operators.is_compiled()
    keeps_weights = _reads_weights(packed)
    for layer, reason in reasons.items():
        if reason is None and isinstance(layer, QConv3d):
            pack_layer(layer, keeps_weight=keeps_weights)
    _own_weights(packed, latent)
    opaque = fuse(packed, folds_floats=dtype is not None)
    if dtype is not None:
        _cast_floats(packed, dtype)
    for module in packed.modules():
        if isinstance(module, PackedConv3d):
            del module.epilogue
    layers = tuple(_described(names[layer], layer, precisions[layer], reason) for layer, reason in reasons.items())
    difference = None if example_inputs is None else _difference(plain, packed, example_inputs)
    summary = Summary(layers, opaque, is_compiled, difference)
    vars(packed).update({PACKED: True, "summary": partial(_this, summary)})
    return packed


def _reads_weights(model: nn.Module) -> bool:
    """Whether code of the model's reads the weight of another module, such as a packed layer, which keeps its own then."""
    classes = dict.fromkeys(type(module) for module in model.modules() if not is_torchs(type(module).__module__))
    steps = [step for code in reachable([cls.forward for cls in classes], classes) for step in pairwise(operations(code))]
    return any(name == "weight" and before != ("LOAD_FAST", "self") for before, (_, name) in steps)


def _own_weights(packed: nn.Module, latent: Mapping[int, Tensor]) -> None:
    """Give the packed model copies of the latent weights that it still has: what it was packed from may be trained on."""
    copies: dict[int, nn.Parameter] = {}
    for module in packed.modules():
        for name, weight in module._parameters.items():
            if weight is not None and id(weight) in latent:
                copy = nn.Parameter(weight.detach().clone(), weight.requires_grad)
                module._parameters[name] = copies.setdefault(id(weight), copy)


def _this(summary: Summary) -> Summary:
    """Return the summary: what ``packed.summary()`` calls, as a function that can be pickled."""
    return summary


def _precision(layer: QConv3d_NoAct) -> str:
    activation = layer.activation.activation_function.bit_width if isinstance(layer, QConv3d) else Identity.bit_width
    return f"W{layer._weight_quantize.bit_width}A{activation}"


def _described(name: str, layer: nn.Module, precision: str, reason: str | None) -> PackedLayer:
    if not isinstance(layer, BitConv3d):
        return PackedLayer(name, precision, reason)
    packed = layer.at_work
    gives = ", ".join(what for what, is_given in (("floats", packed.has_values), ("bits", packed.following)) if is_given)
    return PackedLayer(name, precision, None, tuple(packed.takes_in), gives)


def _cast_floats(model: nn.Module, dtype: torch.dtype) -> None:
    """Let float convolutions compute in the dtype, and all of them in channels_last_3d."""
    for conv in model.modules():
        if isinstance(conv, PackedConv3d):
            conv.channels_last = True
        elif isinstance(conv, nn.Conv3d) and not isinstance(conv, QConv3d_NoAct):
            conv.to(dtype).to(memory_format=torch.channels_last_3d)
            conv.register_forward_pre_hook(partial(_cast_input, dtype))
            conv.register_forward_hook(_cast_output)


def _cast_input(dtype: torch.dtype, conv: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].to(dtype), *inputs[1:])


def _cast_output(conv: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.float()


def _difference(model: nn.Module, packed: nn.Module, inputs: Any) -> float:
    outputs = [_outputs(each, inputs) for each in (model, packed)]
    differences = [
        (ours.double() - theirs.double()).abs().max() for ours, theirs in zip(*outputs, strict=True) if ours.numel()
    ]
    return float(torch.stack(differences).max()) if differences else 0.0


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    args, kwargs = arguments(copied_inputs(inputs))
    with preserved_modes(model):
        try:
            return tensors_in(model.eval()(*args, **kwargs))
        except Exception as error:  # a user's forward may raise anything; it is named as the cause
            raise InputError(does_not_run(model, inputs, error)) from error
