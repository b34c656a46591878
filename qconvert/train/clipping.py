"""`clip_latent_weights`: latent weights kept where a step can still turn their sign."""

import torch
from torch import nn

from ..errors import ModelError
from .layers import quantized_layers


@torch.no_grad()
def clip_latent_weights(model: nn.Module) -> None:
    """Clamp the latent weight of each layer that has a ``latent_clip`` to ``[-latent_clip, latent_clip]``, in place.

    Call it after ``optimizer.step()``. A weight far from 0 has the sign that it has, whatever the gradient says for a while;
    the bound keeps it in reach. Layers whose ``latent_clip`` is None are left alone. Works on sharded weights (DTensor).

    Courbariaux et al. 2015, BinaryConnect, section 2.4, https://arxiv.org/abs/1511.00363.

    Raises:
        ModelError: if such a layer's weight is computed (weight_norm, prune), where none can be clipped. Nothing is changed.
    """
    clipped = [(name, layer, layer.latent_clip) for name, layer in quantized_layers(model) if layer.latent_clip is not None]
    for name, layer, _ in clipped:
        if "weight" not in layer._parameters:
            advice = "Remove what computes it, or leave latent_clip out of the layer's rule"
            raise ModelError(f"layer {name!r} has latent_clip, but its weight is computed from other Parameters. {advice}")
    for _, layer, bound in clipped:
        layer.weight.clamp_(-bound, bound)
