"""The example input that a rule file describes."""

from typing import Any

import torch
from torch import nn

from .rules import Model


def example_input(description: Model, model: nn.Module) -> Any:
    """Return zeros of the described shape, on the model's device; a list of tensors for a list of shapes; None for none."""
    if description.input_shape is None:
        return None
    parameter = next(model.parameters(), torch.empty(0))
    named = {"float": parameter.dtype, "uint8": torch.uint8, "int64": torch.int64}
    placed = {"dtype": named[description.input_dtype], "device": parameter.device}
    shapes = description.input_shape
    if all(isinstance(size, int) for size in shapes):
        return torch.zeros(shapes, **placed)
    return [torch.zeros(shape, **placed) for shape in shapes]
