"""Example inputs: the one that a rule file describes, how a model is called on one, and what is said where that fails."""

import copy
import reprlib
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


FORMS = "a tensor, a tuple of arguments or a dict of keyword arguments"
"""What a model can be called with; `arguments` says how."""


def does_not_run(model: nn.Module, inputs: Any, error: Exception) -> str:
    """Return the message for a model that raises on an example input: what was seen, and what to do."""
    return f"{refused(model, 'the example input', inputs, error)}. Pass example_inputs that fit: {FORMS}"


def refused(model: nn.Module, name: str, inputs: Any, error: Exception) -> str:
    """Return what was seen where a model raises on an input of that name."""
    shown = inputs[0] if isinstance(inputs, tuple) and len(inputs) == 1 else inputs  # which is the same call
    return f"{type(model).__name__} does not run on {name} {described(shown)}: {first_line(error)}"


def described(value: Any) -> str:
    """Return tensors and arrays by shape and dtype in the containers that they are in, and all else cut short."""
    return _BRIEF.repr(value)


def is_array(value: Any) -> bool:
    """Return whether the value is a tensor, or an array of another library."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


class _Brief(reprlib.Repr):
    def repr_instance(self, x: Any, level: int) -> str:
        if is_array(x):
            kind = "" if isinstance(x, Tensor) else f"{type(x).__name__} "
            return f"{kind}{tuple(x.shape)} {x.dtype}"
        if isinstance(x, Mapping):
            return self.repr_dict(x, level)  # type: ignore[arg-type]  # it reads keys and items only
        inner = tensors_in(x)  # of a dataclass, a named tuple
        return f"{type(x).__name__}({', '.join(map(described, inner))})" if inner else super().repr_instance(x, level)


_BRIEF = _Brief()
_BRIEF.maxtuple = _BRIEF.maxdict = 12  # arguments of a model: all of them
