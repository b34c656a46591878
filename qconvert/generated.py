"""A module's class with another forward: one that the graph spells out as Python source.

What is pickled of it is the class that it derives from, the source, and where what the source names is imported from.
"""

import copy
import importlib
import linecache
import math
import types
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any
from zlib import crc32

import torch
from torch import fx, nn

from .derived import below_parametrizations, derived

_ALWAYS = {"torch": torch, "device": torch.device, "inf": math.inf, "nan": math.nan, "NoneType": type(None)}
"""What fx writes without saying where it comes from."""


@dataclass(frozen=True)
class Source:
    """Source code of a forward.

    Attributes:
        text: the code.
        imports: what it names: (name in the code, module, dotted name in that module or "").
    """

    text: str
    imports: tuple[tuple[str, str, str], ...]

    def function(self, filename: str) -> Any:
        """Return the forward. Tracebacks show its lines."""
        names = dict(_ALWAYS) | {name: _found(module, path) for name, module, path in self.imports}
        exec(compile(self.text, filename, "exec"), names)  # noqa: S102 (fx's code, of names that were found by import)
        linecache.cache[filename] = (len(self.text), None, self.text.splitlines(keepends=True), filename)
        return names["forward"]


def source_of(graph: fx.Graph) -> Source:
    """Return the graph as the source of a forward.

    Raises:
        ImportError: if it calls something that cannot be found by its name.
    """
    graph = copy.deepcopy(graph)
    for node in graph.nodes:
        node.type = None  # annotations name types from anywhere
        if node.op == "call_module":
            _read_by_name(node)
    code = graph.python_code("self")
    names = sorted(name for name in code.globals if name not in _ALWAYS)
    source = Source(code.src, tuple((name, *_place(code.globals[name])) for name in names))
    source.function("<trial>")
    return source


def _read_by_name(node: fx.Node) -> None:
    """Let what is parametrized be read as in the user's forward: the parametrization may be removed."""
    owner, parametrized, name = f".{node.target}".rpartition(".parametrizations.")
    if parametrized:
        node.op, node.target = "get_attr", f"{owner}.{name}"[1:]


def _place(value: Any) -> tuple[str, str]:
    if isinstance(value, types.ModuleType):
        return value.__name__, ""
    place = getattr(value, "__module__", None) or "", getattr(value, "__qualname__", "")
    try:
        found = _found(*place)
    except (ImportError, AttributeError, ValueError):
        found = None
    if found is not value:
        raise ImportError(f"it uses {value!r}, which cannot be imported by name")
    return place


def _found(module: str, path: str) -> Any:
    return reduce(getattr, path.split(".") if path else (), importlib.import_module(module))


def with_forward(module: nn.Module, source: Source) -> type[nn.Module]:
    """Return the class that is the module's in everything but the forward, which is the source's.

    Raises:
        ModelError: if the module's class cannot be derived from.
    """
    cls: type[nn.Module] = below_parametrizations(module, lambda below: _counterpart(vars(below).get(_BASE, below), source))
    return cls


_BASE = "_qconvert_base"
"""The attribute in which a class with another forward keeps the user's own: a second rewriting derives from that, too."""


@cache
def _counterpart(base: type[nn.Module], source: Source) -> Any:
    members = {
        "forward": source.function(f"<{base.__qualname__}.forward, rewritten by qconvert, {crc32(source.text.encode()):x}>"),
        _BASE: base,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return derived(base.__name__, (base,), members, (_counterpart, base, source))
