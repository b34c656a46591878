"""Lazy modules: what has no weight yet (`nn.LazyConv3d`) gets it from an example input."""

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .errors import InputError
from .example import arguments, copied_inputs, does_not_run
from .rng import preserved_rng
from .trace import copied, drop_foreign_hooks


def lazy_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that have a Parameter or buffer without a size yet, by name."""
    return {name: module for name, module in model.named_modules() if _is_lazy(module)}


def initialized(model: nn.Module, example_inputs: Any) -> nn.Module:
    """Return a copy of the model in which every lazy module that the example reaches has its weights.

    A trial copy runs once, without gradients and in eval mode; what that changes beside the lazy modules is not kept.

    Raises:
        InputError: if the model does not run on the example input.
        ModelError: if the model cannot be copied.
    """
    lazy = lazy_modules(model)
    trial = copied(model)
    drop_foreign_hooks(trial, spared=set(lazy_modules(trial).values()))
    args, kwargs = arguments(copied_inputs(example_inputs))
    with preserved_rng(), torch.no_grad():
        try:
            trial.eval()(*args, **kwargs)
        except Exception as error:
            raise InputError(does_not_run(model, example_inputs, error)) from error
    ready = {id(module): trial.get_submodule(name).train(module.training) for name, module in lazy.items()}
    return copied(model, ready)


def _is_lazy(module: nn.Module) -> bool:
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(is_lazy(tensor) for tensor in own)
