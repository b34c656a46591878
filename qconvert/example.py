"""Example inputs: the one that a rule file describes, how a model is called on one, and what is said where that fails."""

import copy
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import first_line
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


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested containers and dataclasses, in order."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in([getattr(leaf, field.name) for field in fields(leaf)])
    return found


def copied_inputs(inputs: Any) -> Any:
    """Return a copy that the model may write to, whose tensors have no history."""
    fresh = {id(t): t.detach().clone().requires_grad_(t.requires_grad) for t in tensors_in(inputs)}
    return copy.deepcopy(inputs, fresh)


def does_not_run(model: nn.Module, inputs: Any, error: Exception) -> str:
    """Return the message for a model that raises on an input: what was seen, and what to do."""
    shapes = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors_in(inputs))
    return (
        f"{type(model).__name__} does not run on the example input {shapes or repr(inputs)}: {first_line(error)}. "
        "Pass example_inputs that fit: a tensor, a tuple of arguments or a dict of keyword arguments"
    )
