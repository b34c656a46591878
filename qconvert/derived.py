"""Classes that exist only in memory, each derived from one of the user's: how they are made, how instances are pickled."""

import types
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from .errors import ModelError


class _Silent(nn.Module):  # a Module, so that a Module can become an instance: Python compares the layouts
    """Comes before the user's classes, whose ``__init_subclass__`` is about classes of theirs: one may refuse this one."""

    def __init_subclass__(cls) -> None:
        pass


def derived(name: str, bases: tuple[type, ...], members: dict[str, Any], recipe: tuple[Any, ...]) -> Any:
    """Return a new class.

    Args:
        name: its name.
        bases: what it derives from, the user's class first.
        members: what is in it.
        recipe: a function that can be imported, and its arguments: how to get the class when an instance is unpickled.

    Raises:
        ModelError: if the user's class cannot be derived from.
    """

    def reduced(self: nn.Module, protocol: object) -> tuple[Any, ...]:
        return _empty, recipe, self.__getstate__()  # type: ignore[no-untyped-call]

    silent = () if any(issubclass(base, _Silent) for base in bases) else (_Silent,)
    try:
        return _new(name, (*silent, *bases), members | {"__reduce_ex__": reduced})
    except Exception as error:  # a user's metaclass may raise anything; it is named as the cause
        refusal = f"no class can derive from {bases[0].__name__}, whose metaclass is {type(bases[0]).__name__}"
        advice = f"Let the metaclass take a class {name!r} without arguments, or leave this layer out"
        raise ModelError(f"{refusal}: {type(error).__name__}: {error}. {advice}") from error


def _new(name: str, bases: tuple[type, ...], members: dict[str, Any]) -> Any:
    return types.new_class(name, bases, exec_body=lambda namespace: namespace.update(members))


def _empty(make: Callable[..., Any], *arguments: Any) -> Any:
    cls = make(*arguments)
    return cls.__new__(cls)


def below_parametrizations(module: nn.Module, change: Callable[[Any], Any]) -> Any:
    """Return what the function makes of the module's class; of a parametrized module, with its parametrizations on top.

    torch.nn.utils.parametrize gives such a module a class of its own, adds properties there, deletes them there, and goes
    back to that class's first base in the end.
    """
    top = type(module)
    if not (parametrize.is_parametrized(module) and top.__module__ == parametrize.__name__):
        return change(top)
    below = change(top.__bases__[0])
    return _new(f"Parametrized{below.__name__}", (below,), dict(vars(top)))


def is_the_users(cls: type) -> bool:
    """Whether a class is none of those that exist only in memory, here or in torch's parametrizations."""
    return cls is not _Silent and _Silent not in cls.__bases__ and cls.__module__ != parametrize.__name__
