"""One module's own forward as a graph that may replace it, or the reason why none may.

Its children stay whole, with their hooks. fx runs a forward once, on stand-ins, and what it decides then is decided for
good. So it is traced under several conditions: where two graphs differ, or the forward does more than a graph can tell,
there is none.
"""

import builtins
import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.fx.proxy import TraceError
from torch.utils import _pytree as pytree

from .generated import source_of
from .rng import preserved_rng
from .tracer import IN_PLACE, NamingTracer, attributes_kept


@dataclass(frozen=True)
class OwnForward:
    """What a trace of a module alone has found.

    Attributes:
        module: the module.
        graphs: the forward in eval and in train mode, as far as it could be traced.
        failure: why they are not both there, or no graph could be the forward of a module.
    """

    module: nn.Module
    graphs: tuple[fx.Graph, ...]
    failure: str | None

    @property
    def graph(self) -> fx.Graph:
        """The graph that may replace the forward, if there is no obstacle."""
        return self.graphs[0]

    @cached_property
    def obstacle(self) -> str | None:
        """Why no graph may replace the forward, or None."""
        if self.failure is not None:
            return self.failure
        try:
            return next(_differences(self.module, *self.graphs), None)
        except Exception as error:  # noqa: BLE001 (a user's forward may raise anything; the reason is reported)
            return _failure(error)


@dataclass(frozen=True)
class _Condition:
    training: bool = False
    seed: int = 0
    gradients: bool = True
    given: Mapping[str, Any] = field(default_factory=dict)  # arguments that have a value of their own


_REASONS = {
    "it draws random numbers in Python": _Condition(seed=1),
    "it asks whether gradients are on": _Condition(gradients=False),
}


def own_forward(module: nn.Module) -> OwnForward:
    """Trace the module's forward without its children's. The module is not changed and not run."""
    if "forward" in vars(module):
        return OwnForward(module, (), "its forward was replaced on the instance")
    if isinstance(module, fx.GraphModule):
        return OwnForward(module, (), "it is a GraphModule")
    graphs: list[fx.Graph] = []
    try:
        graphs.append(own_graph(module))
        graphs.append(_traced(module, _Condition(training=True)))
        source_of(graphs[0])
        return OwnForward(module, tuple(graphs), None)
    except Exception as error:  # noqa: BLE001 (a user's forward may raise anything; the reason is reported)
        return OwnForward(module, tuple(graphs), _failure(error))


def _failure(error: Exception) -> str:
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"its forward cannot be traced on its own ({type(error).__name__}: {first_line})"


def own_graph(module: nn.Module) -> fx.Graph:
    """Return the graph of a forward without an obstacle. It raises whatever the forward does where there is one."""
    return _traced(module, _Condition())


def _differences(module: nn.Module, graph: fx.Graph, in_training: fx.Graph) -> Iterator[str]:
    written = _written(graph, {})
    if _written(in_training, {}) != written:
        yield "it runs other code in train() than in eval()"
    if _written(_traced(module, _Condition(seed=1, gradients=False)), {}) != written:
        yield from (why for why, alone in _REASONS.items() if _written(_traced(module, alone), {}) != written)
        yield "it draws random numbers and asks whether gradients are on"
    for node in graph.nodes:
        if node.op == "placeholder" and not node.target.startswith("*"):
            yield from _depends_on(module, graph, node)


def _depends_on(module: nn.Module, graph: fx.Graph, argument: fx.Node) -> Iterator[str]:
    """Try the argument as None, for `if mask is None`, and as its default, which a caller who leaves it out gets."""
    for value in {id(value): value for value in (None, *argument.args) if _is_plain(value)}.values():
        given = {str(argument.target): value}
        try:
            other = _traced(module, _Condition(given=given))
        except Exception:  # noqa: BLE001, S112 (the forward does not take this value)
            continue
        if _written(other, {}) != _written(graph, given):
            yield f"what it does depends on the argument {argument.target!r}"


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _written(graph: fx.Graph, given: Mapping[str, Any]) -> list[Any]:
    """Return what the graph does, to compare with another's: its nodes by number, arguments that are given by value."""
    values: dict[fx.Node, Any] = {}
    lines: list[Any] = []
    for node in graph.nodes:
        if node.op == "placeholder" and node.target in given:
            values[node] = given[node.target]
            continue
        values[node] = f"%{len(lines)}"
        lines.append((node.op, node.target, repr(map_arg((node.args, node.kwargs), values.get)), node.meta.get(IN_PLACE)))
    return lines


def _traced(module: nn.Module, condition: _Condition) -> fx.Graph:
    trial = _trial(module)
    trial.training = condition.training
    before = _state(trial)
    children = [child for child in module.modules() if child is not module]
    with (
        preserved_rng(condition.seed),
        attributes_kept(children),
        torch.set_grad_enabled(condition.gradients),
        _types_not_asked(),
    ):
        graph = _OwnTracer(condition).trace(trial)
    after = _state(trial)
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    if any(key.startswith("_tensor_constant") for key in changed):
        raise TraceError("it makes a tensor, whose value the graph would fix")
    if changed:
        raise TraceError(f"it sets {', '.join(changed)} of the module, which a graph would not")
    return graph


@contextmanager
def _types_not_asked() -> Iterator[None]:
    """Refuse a forward that asks a stand-in for its type: it is no Tensor, and what is called with a list is no list."""
    real = builtins.isinstance

    def asked(value: Any, kinds: Any) -> bool:
        asker = sys._getframe(1).f_globals.get("__name__", "")
        if issubclass(type(value), fx.Proxy) and not asker.startswith("torch."):  # torch.is_tensor asks for the user
            raise TraceError("it asks for the type of a value")
        return real(value, kinds)

    builtins.isinstance = asked
    try:
        yield
    finally:
        builtins.isinstance = real


def _trial(module: nn.Module) -> nn.Module:
    """Return a copy that shares children, Parameters and buffers, and has no hooks: they are not called by a forward."""
    memo: dict[int, Any] = {id(each): each for each in (*module.children(), *module.parameters(), *module.buffers())}
    for key, value in vars(module).items():
        if key.endswith("_hooks"):
            memo[id(value)] = type(value)()
    for leaf in pytree.tree_leaves(vars(module)):
        if isinstance(leaf, Tensor) and id(leaf) not in memo:
            memo[id(leaf)] = leaf.detach().clone()  # deepcopy refuses tensors with a history
    return copy.deepcopy(module, memo)


def _state(module: nn.Module) -> dict[str, Any]:
    """Return the attributes to compare: containers item by item, tensors by their version, all else by identity."""
    state = {}
    for key, value in vars(module).items():
        leaves, spec = pytree.tree_flatten(value)
        state[key] = [_Same(leaf, _version(leaf)) for leaf in leaves], str(spec)
    return state


@dataclass(frozen=True, eq=False)
class _Same:
    value: Any  # held, so that no other object gets its identity
    version: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value and self.version == other.version

    __hash__ = None  # type: ignore[assignment]


def _version(leaf: object) -> int:
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0


class _OwnTracer(NamingTracer):
    """Keeps every submodule whole, and refuses code under a context that a graph does not know."""

    def __init__(self, condition: _Condition) -> None:
        super().__init__()
        self.condition = condition
        self.context = _context()

    def is_leaf_module(self, *_: Any) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _context() != self.context:
            raise TraceError("part of it runs under no_grad, autocast, checkpointing or the like")
        return super().create_node(*args, **kwargs)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        if kind == "placeholder" and target in self.condition.given:
            return self.condition.given[target]
        return super().create_proxy(kind, target, args, kwargs, *rest, **named)


def _context() -> tuple[Any, ...]:
    autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast, hooks)
