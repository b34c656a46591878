"""`LastCall`: what a model was called with and what came out of it and of some of its layers, noted by hooks."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..trace import unwrapped


class LastCall:
    """The last call of a model. All tensors are copies: what comes next may be an operation in place.

    Args:
        model: the model, with its wrapper, if it has one: as it is called.
        names: names of modules in it, whose outputs are noted too.
        pick: what of the model's output is noted.
        hooks: where the hooks are entered, and ended.

    Attributes:
        arguments: what it was called with; None if it was not.
        output: what was picked of its output.
        layers: what each layer put out, call by call.
        is_complete: whether the call has come to its end.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], pick: Callable[[Any], Any], hooks: ExitStack) -> None:
        self._names = tuple(names)
        self._pick = pick
        self.clear()
        modules = dict(unwrapped(model).named_modules(remove_duplicate=False))
        for name in self._names:
            hooks.enter_context(modules[name].register_forward_hook(partial(self._see, name)))
        hooks.enter_context(model.register_forward_pre_hook(self._begin, with_kwargs=True))
        hooks.enter_context(model.register_forward_hook(self._end))

    def clear(self) -> None:
        """Forget the call, and with it the graph that hangs on its tensors."""
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.output: Any = None
        self.layers: dict[str, list[Any]] = {name: [] for name in self._names}
        self.is_complete = False

    def _begin(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.clear()
        self.arguments = _copied((args, kwargs))

    def _see(self, name: str, _layer: nn.Module, _args: object, output: Any) -> None:
        # and not once more, for checkpointing in the backward pass
        if self.arguments is not None and not self.is_complete:
            self.layers[name].append(_copied(output))

    def _end(self, _model: nn.Module, _args: object, output: Any) -> None:
        self.output = _copied(self._pick(output))
        self.is_complete = True


def _copied(value: Any) -> Any:
    """Return the containers anew, with copies of their tensors, through which gradients flow."""
    return pytree.tree_map_only(Tensor, torch.clone, value)
