"""What the tests of packed layers build: layers of every kind, on weights and inputs that are worth a comparison."""

from typing import Any

import torch
from torch import Tensor

from qconvert import QConv3d
from qconvert.packed.layer import PackedConv3d


def layer(inputs: int, outputs: int, kernel_size: Any = 3, **settings: Any) -> QConv3d:
    """Return a layer in eval mode whose settings per channel differ from channel to channel."""
    made = QConv3d(inputs, outputs, kernel_size, **settings).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name != "weight" and not name.endswith("step"):
                parameter.copy_(torch.randn(parameter.shape))
    return made


@torch.no_grad()
def both(made: QConv3d, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the layer computes packed, and as it is."""
    return PackedConv3d(made)(x), made(x)
