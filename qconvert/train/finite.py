"""`finite`: NaN and infinity found at the layer where a sign would hide them."""

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..example import tensors_in
from ..layers import QConv3d_NoAct
from ..layers.computed import weights_at_rest
from .layers import no_layer, quantized_layers

_ADVICE = (
    "A learning rate too high, gradients that are not clipped (torch.nn.utils.clip_grad_norm_), half precision that "
    "overflows, a division by 0, or NaN in the data? A sign would make +1 or -1 of it, and the training would go on"
)


def finite(model: nn.Module) -> ExitStack:
    """Raise at the first NaN or infinite value that a converted layer reads, from now on.

    A sign hides them: they become +1 or -1, and the loss looks as if nothing had happened. Before each call of a layer its
    input, its latent weight and all else that it has learned are looked at; a step of training stays one operator. On a GPU
    each look waits for the device, so this is for a search, or for every hundredth step.

    Returns:
        A context manager with a ``close()``: either ends it.

    Raises:
        ModelError: if the model has no converted layer.
        InputError: in the forward pass of a layer that reads such a value: its name, how many of how many, what to do.
    """
    layers = list(quantized_layers(model))
    if not layers:
        raise no_layer(model, "converted layer")
    hooks = ExitStack()
    for name, layer in layers:
        hooks.enter_context(layer.register_forward_pre_hook(partial(_check, name), with_kwargs=True))
    return hooks


@torch.no_grad()
def _check(name: str, layer: QConv3d_NoAct, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for tensor in tensors_in((args, kwargs)):
        _refuse(name, "input values", tensor)
    with weights_at_rest(layer):
        _refuse(name, "latent weights", layer.weight)
    for key, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if key != "weight":
            _refuse(name, f"values of {key!r}", tensor)


def _refuse(name: str, what: str, tensor: Tensor) -> None:
    if tensor.sum().isfinite():  # one pass over memory, and one such value would make it NaN or infinite
        return
    is_finite = tensor.isfinite()
    if not is_finite.all():  # else the sum was too large
        count, total = tensor.numel() - int(is_finite.sum()), tensor.numel()
        raise InputError(f"layer {name!r}: {count} of {total} {what} are NaN or infinite. {_ADVICE}")
