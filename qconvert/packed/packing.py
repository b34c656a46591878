"""`pack`: a converted model becomes one that computes with bits."""

from dataclasses import dataclass

from tabulate import tabulate
from torch import nn

from ..errors import ModelError
from ..layers import QConv3d_NoAct
from ..rewrite import become
from ..trace import copied, unwrapped
from .fusing import fuse
from .layer import PackedConv3d, no_packing


def pack(model: nn.Module) -> nn.Module:
    model = unwrapped(model)
    packed = copied(model).eval()
    for layer in list(packed.modules()):
        if isinstance(layer, QConv3d_NoAct):
            why = no_packing(layer)
            if why is None:
                become(layer, PackedConv3d(layer).eval())
    fuse(packed)
    return packed
