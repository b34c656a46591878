"""Layers of other libraries, swapped in by hand."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import bitorch.layers
from brevitas.nn import QuantConv3d
from brevitas.quant.binary import SignedBinaryActPerTensorConst, SignedBinaryWeightPerTensorConst
from torch import nn

import qconvert

bitorch_layer = partial(bitorch.layers.QConv3d, weight_quantization="sign")
brevitas_layer = partial(
    QuantConv3d, weight_quant=SignedBinaryWeightPerTensorConst, input_quant=SignedBinaryActPerTensorConst
)


def by_hand(model: nn.Module, rules: str | Mapping[str, Any], layer: Callable[..., nn.Module], **settings: Any) -> nn.Module:
    """Return a copy with another library's layer in the place of those that the rules convert, with their weights."""
    swapped = copy.deepcopy(model)
    for decision in qconvert.plan(model, rules).converted:
        conv = swapped.get_submodule(decision.site.name)
        geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        made = layer(conv.in_channels, conv.out_channels, *geometry, bias=conv.bias is not None, **settings)
        made.weight.data.copy_(conv.weight.data)
        swapped.set_submodule(decision.site.name, made)
    return swapped
