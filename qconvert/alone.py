"""One module's own forward as a graph that may replace it, or the reason why none may.

Its children stay whole, with their hooks. fx runs a forward once, on stand-ins, and what it decides then is decided for
good. So it is traced under several conditions: where two graphs differ, or the forward does more than a graph can tell,
there is none.
"""

import copy
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

from .code import questions, reachable
from .contents import contents, different
from .errors import first_line
from .generated import source_of
from .rng import preserved_rng
from .standin import OwnTracer
from .tracer import IN_PLACE, attributes_kept


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
    autocast: bool = False
    given: Mapping[str, Any] = field(default_factory=dict)  # arguments that have a value of their own


_REASONS = {
    "it draws random numbers in Python": _Condition(seed=1),
    "it asks whether gradients are on": _Condition(gradients=False),
    "it asks whether autocast is on": _Condition(autocast=True),
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
    return f"its forward cannot be traced on its own ({first_line(error)})"


def own_graph(module: nn.Module) -> fx.Graph:
    """Return the graph of a forward without an obstacle. It raises whatever the forward does where there is one."""
    return _traced(module, _Condition())


def _differences(module: nn.Module, graph: fx.Graph, in_training: fx.Graph) -> Iterator[str]:
    yield from _unseen(module)
    written = _written(graph, {})
    if _written(in_training, {}) != written:
        yield "it runs other code in train() than in eval()"
    if _written(_traced(module, _Condition(seed=1, gradients=False, autocast=True)), {}) != written:
        yield from (why for why, alone in _REASONS.items() if _written(_traced(module, alone), {}) != written)
        yield "it draws random numbers and asks whether gradients or autocast are on"
    for node in graph.nodes:
        if node.op == "placeholder" and not node.target.startswith("*"):
            yield from _depends_on(module, graph, node)


def _unseen(module: nn.Module) -> Iterator[str]:
    """Yield what the code says that no graph shows: also code that is not run when it is traced."""
    held = (*module.modules(), *vars(module).values())
    for code in reachable([type(module).forward], dict.fromkeys(map(type, held))):
        yield from questions(code)


def _depends_on(module: nn.Module, graph: fx.Graph, argument: fx.Node) -> Iterator[str]:
    """Try the argument as None, for `if mask is None`, and as its default, which a caller who leaves it out gets."""
    for value in {id(value): value for value in (None, *argument.args) if _is_plain(value)}.values():
        given = {str(argument.target): value}
        try:
            is_same = _written(_traced(module, _Condition(given=given)), {}) == _written(graph, given)
        except TraceError:
            is_same = False
        except Exception:  # noqa: BLE001, S112 (the forward does not take this value)
            continue
        if not is_same:
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
    if _is_a_sequence(module):
        return _sequence(module, condition.given)
    trial = _trial(module)
    children = [child for child in module.modules() if child is not module]
    with (
        preserved_rng(condition.seed),
        attributes_kept(children),
        torch.set_grad_enabled(condition.gradients),
        _autocast(condition.autocast),
    ):
        for each in trial.modules():
            vars(each)["training"] = condition.training
        before = contents(trial)
        graph = OwnTracer(condition.given).trace(trial)
        changed = different(before, contents(trial))
    if any(key.startswith("_tensor_constant") for key in changed):
        raise TraceError("it makes a tensor, whose value the graph would fix")
    if changed:
        raise TraceError(f"it sets {', '.join(changed)} of the module, which a graph would not")
    return graph


def _is_a_sequence(module: nn.Module) -> bool:
    """Whether a forward is torch's own of a Sequential."""
    if not isinstance(module, nn.Sequential) or None in module._modules.values():
        return False
    cls = type(module)
    return cls.forward is nn.Sequential.forward and cls.__iter__ is nn.Sequential.__iter__


def _sequence(module: nn.Module, given: Mapping[str, Any]) -> fx.Graph:
    """Return what tracing would give: models have hundreds of them, and fx takes its time to be set up for each."""
    graph = fx.Graph()
    value = given["input"] if "input" in given else graph.placeholder("input")
    for name in module._modules:
        value = graph.call_module(name, (value,))
    graph.output(value)
    return graph


@contextmanager
def _autocast(enabled: bool) -> Iterator[None]:
    """Switch autocast as a forward sees it: torch.autocast would leave a device that is not there alone."""
    before = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    try:
        for device in before:
            torch.set_autocast_enabled(device, enabled)
        yield
    finally:
        for device, was_enabled in before.items():
            torch.set_autocast_enabled(device, was_enabled)


def _trial(module: nn.Module) -> nn.Module:
    """Return a copy that shares children and Parameters, and has no hooks: they are not called by a forward.

    Buffers are its own: a forward may write to one by a name that fx does not know.
    """
    memo: dict[int, Any] = {id(each): each for each in (*module.children(), *module.parameters())}
    for key, value in vars(module).items():
        if key.endswith("_hooks"):
            memo[id(value)] = type(value)()
    for leaf in pytree.tree_leaves(vars(module)):
        if isinstance(leaf, Tensor) and id(leaf) not in memo:
            memo[id(leaf)] = leaf.detach().clone()  # deepcopy refuses tensors with a history
    return copy.deepcopy(module, memo)
