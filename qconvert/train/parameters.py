"""`parameter_groups`: what a quantized network learns, sorted by how it is to be learned."""

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import InputError, ModelError
from ..layers import QActivation
from ..layers.computed import weight_parameters
from ..layers.rprelu import RPReLU
from ..quantizations import Identity, Quantization
from .layers import quantized_layers


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, *, latent_lr: float = 1.0, added_lr: float = 1.0
) -> list[dict[str, Any]]:
    """Return the trainable parameters of a converted model in groups, for any torch optimizer that takes groups.

    - ``latent``, at ``lr * latent_lr``, not decayed: the weights behind quantized ones, or what those are computed from.
    - ``added``, at ``lr * added_lr``, not decayed: thresholds, scales, offsets, LSQ's steps, what PReLU and RPReLU learn.
    - ``rest``, at ``lr``, decayed: everything else, the weights of converted layers that keep them float among it.

    The size of a latent weight is its inertia (Helwegen et al. 2019, https://arxiv.org/abs/1906.02107): decay makes the sign
    flip more easily, and makes no quantized weight smaller.

    Each parameter is in one group, the first that it belongs to, in the model's order. Frozen parameters and empty groups
    are left out. Make the groups after `fully_shard`, which replaces the parameters.

    Args:
        model: a converted model, or one with float convolutions only.
        lr: learning rate, above 0.
        weight_decay: of the rest, 0 or above.
        latent_lr: factor of the latent weights' learning rate, 0 or above.
        added_lr: factor of the learning rate of what was added, 0 or above.

    Raises:
        InputError: if a number is out of range.
        ModelError: if the model has no trainable parameter.
    """
    if not _is_number(lr) or not 0 < lr < math.inf:
        raise InputError(f"lr must be a number above 0, got {lr!r}")
    for name, factor in (("weight_decay", weight_decay), ("latent_lr", latent_lr), ("added_lr", added_lr)):
        if not _is_number(factor) or not 0 <= factor < math.inf:
            raise InputError(f"{name} must be a number from 0 on, got {factor!r}")
    names = {id(parameter): "added" for parameter in _added(model)}
    names |= {id(parameter): "latent" for parameter in _latent(model)}
    settings = {"latent": (lr * latent_lr, 0.0), "added": (lr * added_lr, 0.0), "rest": (lr, weight_decay)}
    members: dict[str, list[nn.Parameter]] = {name: [] for name in settings}
    for parameter in model.parameters():
        if parameter.requires_grad:
            members[names.get(id(parameter), "rest")].append(parameter)
    if not any(members.values()):
        raise ModelError(f"{type(model).__name__} has no trainable parameter: model.requires_grad_() makes them trainable")
    return [
        {"params": members[name], "lr": rate, "weight_decay": decay, "name": name}
        for name, (rate, decay) in settings.items()
        if members[name]
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, Tensor))  # some optimizers take a learning rate that is a tensor


def _latent(model: nn.Module) -> Iterator[nn.Parameter]:
    for _, layer in quantized_layers(model):
        if not isinstance(layer._weight_quantize, Identity):
            yield from weight_parameters(layer)


def _added(model: nn.Module) -> Iterator[nn.Parameter]:
    for _, layer in quantized_layers(model):
        yield from (learned for learned in (layer.scale, layer.offset) if learned is not None)
    for module in model.modules():
        if isinstance(module, (QActivation, Quantization, RPReLU, nn.PReLU)):
            yield from module.parameters()
