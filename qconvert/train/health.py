"""`flip_rate`: how many binary weights change their sign while a model trains."""

import torch
from torch import Tensor, nn

from ..layers import QConv3d_NoAct
from ..layers.computed import weights_at_rest
from ..layers.standardization import latent
from ..modes import preserved_modes
from .layers import no_layer, quantized_layers
from .sharded import whole

_BYTE = 8


@torch.no_grad()
def flip_rate(model: nn.Module) -> dict[str, float]:
    """Return for each layer with binary weights the share of them, 0 to 1, whose sign changed since the last call.

    The first call gives 0 for each. A healthy training flips many at first and fewer and fewer later on; a rate that stays
    high is a learning rate that is too high, and 0 is a layer that is not trained.

    The signs are those of the quantized weight in evaluation. Each layer keeps them between calls, 1 bit per weight, in an
    attribute that is in no state dict. Where weights are sharded (DTensor), call it on every process. For TensorBoard:
    ``SummaryWriter.add_scalars("flip_rate", flip_rate(model), step)``.

    Larq's FlipRatio (Geiger and Team 2020, https://doi.org/10.21105/joss.01746).

    Raises:
        ModelError: if the model has no layer with weights of 1 bit.
    """
    layers = {name: layer for name, layer in quantized_layers(model) if layer._weight_quantize.bit_width == 1}
    if not layers:
        raise no_layer(model, "layer with weights of 1 bit")
    return {name: _flipped(layer) for name, layer in layers.items()}


def _flipped(layer: QConv3d_NoAct) -> float:
    signs = _signs(layer)
    packed, before = _packed(signs), layer._last_signs
    layer._last_signs = packed
    return 0.0 if before is None else _ones(packed ^ before.to(packed.device)) / signs.numel()


def _signs(layer: QConv3d_NoAct) -> Tensor:
    """Return whether each quantized weight is above 0, flat."""
    with weights_at_rest(layer):
        weight = layer.weight
    with preserved_modes(layer._weight_quantize):
        # not by a call: hooks are about the forward pass
        return (layer._weight_quantize.eval().quantize(latent(whole(weight), standardize=layer.standardize)) > 0).flatten()


def _places(device: torch.device) -> Tensor:
    return torch.arange(_BYTE, dtype=torch.uint8, device=device)


def _packed(bits: Tensor) -> Tensor:
    """Return booleans of shape (n,) as bytes of shape (ceil(n / 8),), zeros behind the last one."""
    whole = nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % _BYTE))
    return (whole.view(-1, _BYTE) << _places(bits.device)).sum(1, dtype=torch.uint8)


def _ones(packed: Tensor) -> int:
    """Return how many bits are 1."""
    return int((packed[:, None] >> _places(packed.device) & 1).sum())
