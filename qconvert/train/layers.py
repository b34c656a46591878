"""The layers of a model that have quantized weights."""

from collections.abc import Iterator

from torch import nn

from ..errors import ModelError
from ..layers import QConv3d_NoAct
from ..trace import unwrapped


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QConv3d_NoAct]]:
    """Yield every QConv3d and QConv3d_NoAct with its name in the model inside DDP's or torch.compile's wrapper."""
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, QConv3d_NoAct):
            yield name, module


def no_layer(model: nn.Module, wanted: str) -> ModelError:
    """Return the error for a model that has no layer of the kind that is wanted."""
    return ModelError(f"{type(unwrapped(model)).__name__} has no {wanted}: convert it with qconvert.binarize first")
