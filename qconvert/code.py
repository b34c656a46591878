"""Code, read instead of run: which functions a function leads to by their names, and what each names."""

import dis
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, lru_cache, partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

_INNER = {
    property: "fget",
    cached_property: "func",
    partial: "func",
    classmethod: "__func__",
    staticmethod: "__func__",
    MethodType: "__func__",
    type(lru_cache(print)): "__wrapped__",
}
"""Where the function stands in what may take its place."""


def reachable(functions: Iterable[Any], classes: Iterable[type] = ()) -> list[CodeType]:
    """Return the code of the functions and of all that they lead to by a name, without torch's own.

    Args:
        functions: where to start; what is no function is passed over.
        classes: whose methods count as named by ``.name``, whatever stands before the dot.
    """
    methods = [vars(base) for cls in classes for base in cls.__mro__ if not is_torchs(base.__module__)]
    found: list[CodeType] = []
    seen: set[FunctionType] = set()
    pending = list(functions)
    while pending:
        function = _bare(pending.pop())
        if not isinstance(function, FunctionType) or function in seen:
            continue
        seen.add(function)
        pending.append(getattr(function, "__wrapped__", None))
        if not is_torchs(function.__globals__.get("__name__", "")):
            codes = list(_with_inner(function.__code__))
            found += codes
            pending += _loaded(function, codes, methods)
    return found


def is_torchs(module_name: str) -> bool:
    """Whether a module of that name is torch's own."""
    return module_name.partition(".")[0] == "torch"


@lru_cache(maxsize=4096)
def operations(code: CodeType) -> tuple[tuple[str, Any], ...]:
    """Return name and argument of every instruction, without those that only prepare a call."""
    silent = ("CACHE", "PUSH_NULL", "PRECALL", "RESUME")
    return tuple((each.opname, each.argval) for each in dis.get_instructions(code) if each.opname not in silent)


def questions(code: CodeType) -> Iterator[str]:
    """Yield what the code asks for, or leaves behind, that a graph of it does not show."""
    steps = (*operations(code), ("", None), ("", None))
    for (operation, name), (_, operand), (after, _) in zip(steps, steps[1:], steps[2:], strict=False):
        is_of_self = operand == "self" and after.startswith("CALL")
        if operation.startswith("MATCH_") or (
            operation == "LOAD_GLOBAL" and name in ("type", "callable") and not is_of_self
        ):
            yield "it asks for the type of a value"
        elif name in ("is_fx_tracing", "is_fx_symbolic_tracing", "Proxy"):
            yield "it asks whether it is traced"
        elif operation == "CHECK_EXC_MATCH" or name == "suppress":
            yield "it catches exceptions"
        elif operation == "STORE_GLOBAL":
            yield f"it sets a global, {name}"


def _bare(value: Any) -> Any:
    """Return the function inside a property, a method, a partial or the like."""
    attribute = _INNER.get(type(value))
    return value if attribute is None else _bare(getattr(value, attribute))


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    """Yield the code, and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)


def _loaded(function: FunctionType, codes: list[CodeType], methods: Iterable[Mapping[str, Any]]) -> list[Any]:
    """Return what the code may load: globals, what a closure holds, and attributes of modules and of classes."""
    globals_ = {name for code in codes for operation, name in operations(code) if operation in ("LOAD_GLOBAL", "LOAD_NAME")}
    names = {name for code in codes for name in code.co_names}
    values = [*_at(globals_, function.__globals__), *_closure(function)]
    for space in methods:
        values += _at(names, space)
    modules: list[ModuleType] = []
    for value in values:  # they become more
        if isinstance(value, ModuleType) and value not in modules and not is_torchs(value.__name__):
            modules.append(value)
            values += _at(names, vars(value))
    return values


def _at(names: set[str], space: Mapping[str, Any]) -> list[Any]:
    return [space[name] for name in sorted(names & space.keys())]


def _closure(function: FunctionType) -> list[Any]:
    return [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
