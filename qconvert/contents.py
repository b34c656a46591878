"""What a module holds beside its tensors, to tell what a forward that was traced has changed."""

import io
import pickle
from collections.abc import Mapping
from contextlib import suppress
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, fx, nn

_BY_IDENTITY = (Tensor, nn.Module, fx.Proxy, type, FunctionType, BuiltinFunctionType, ModuleType)
_ATOMS = (type(None), bool, int, float, str)

Contents = Mapping[str, Mapping[str, object]]
"""Attributes by the name of the module and their own."""


def contents(module: nn.Module) -> Contents:
    """Return what the attributes of the module hold, and which objects those of the modules inside it are."""
    inner = {name: dict(zip(vars(each), map(id, vars(each).values()), strict=True)) for name, each in module.named_modules()}
    return inner | {"": {key: _Pickled(value) for key, value in vars(module).items()}}


def different(before: Contents, after: Contents) -> list[str]:
    """Return the names of the attributes that were set, deleted or changed in between."""
    pairs = [(name, before.get(name, {}), after.get(name, {})) for name in sorted(before.keys() | after.keys())]
    return [
        f"{name}.{key}".removeprefix(".")
        for name, old, new in pairs
        if old != new
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


class _Pickled(pickle.Pickler):
    """An object, and its pickle when this was made: in it tensors are versions, modules and functions identities."""

    def __init__(self, value: object) -> None:
        self.value = value
        self.held: list[object] = []  # so that no other object gets their identities
        self.written = b""
        if type(value) in _ATOMS:
            return
        written = io.BytesIO()
        super().__init__(written)
        with suppress(Exception):  # a user's __reduce__ may raise anything: what cannot be pickled is its identity
            self.dump(value)
            self.written = written.getvalue()

    def persistent_id(self, value: Any) -> tuple[int, int] | None:
        """Return what stands for an object that is not looked into."""
        if not isinstance(value, _BY_IDENTITY):
            return None
        self.held.append(value)
        return id(value), _version(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Pickled) and self.value is other.value and self.written == other.written

    __hash__ = None  # type: ignore[assignment]


def _version(value: object) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0
