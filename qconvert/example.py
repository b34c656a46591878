"""Example inputs: the one that a rule file describes, and how a model is called on one."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from .tables import Model


def example_input(description: Model, model: nn.Module) -> Any:
    """Return zeros of the described shape, on the model's device; a list of tensors for a list of shapes; None for none."""
    if description.input_shape is None:
        return None
    parameter = next(model.parameters(), torch.empty(0))
    named = {"float": parameter.dtype, "uint8": torch.uint8, "int64": torch.int64}
    blank = partial(torch.zeros, dtype=named[description.input_dtype], device=parameter.device)
    shape = description.input_shape
    return [blank(inner) for inner in shape] if isinstance(shape[0], list) else blank(shape)


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return how a model is called: a tuple holds the arguments, a dict the keyword arguments, anything else is the one."""
    if isinstance(inputs, tuple):
        return inputs, {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs,), {}
