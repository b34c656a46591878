"""Model -> `Traced`: its regions as fx graphs, its convolutions as sites. See tracer.py, too.

The graphs are for understanding; the user's own modules go on running (see rewrite.py). So a graph may be partial: where
a forward cannot be traced, that module becomes one opaque node, and its children are traced on their own.
"""

import copy
import inspect
import traceback
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .errors import ModelError, first_line
from .functional import functional_sites, names_conv3d
from .inplace import overwrites
from .layers import QConv3d_NoAct, no_shortcut, obstacle
from .rng import preserved_rng
from .roles import RegionGraph, roles_of
from .sites import Opaque, Overwrite, Site
from .tracer import NamingTracer, attributes_kept

PACKED = "_qconvert_packed"
"""The attribute that marks a model without latent weights."""

_LONE = "conv"
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass(frozen=True)
class Traced:
    """What is known about a model.

    Attributes:
        model: the model, unwrapped from DataParallel, DDP or torch.compile.
        graphs: the forward of each part that torch.fx can follow, by the part's dotted name ("" is the whole model). In
            them every Conv3d, and every module that cannot be followed, is one node.
        opaque: the modules that cannot be followed, and why.
        sites: every convolution and linear layer, in the order in which the modules are registered; functional 3D
            convolutions behind them.
        overwrites: the operations in place that break autograd, where a graph shows them.
    """

    model: nn.Module
    graphs: Mapping[str, fx.Graph]
    opaque: tuple[Opaque, ...]
    sites: tuple[Site, ...]
    overwrites: tuple[Overwrite, ...] = ()

    @cached_property
    def regions(self) -> dict[str, fx.GraphModule]:
        """The graphs as modules that run, by name, for fx passes of the caller's own. They share the model's layers."""
        return {name: self._graph_module(self.model.get_submodule(name), graph) for name, graph in self.graphs.items()}

    def _graph_module(self, part: nn.Module, graph: fx.Graph) -> fx.GraphModule:
        # a graph calls modules by their names in a root; a lone convolution has no root of its own
        root = {_LONE: part} if isinstance(part, nn.Conv3d) else part
        return fx.GraphModule(root, graph)


def trace(model: nn.Module) -> Traced:
    """Find every convolution of the model and the graph around it. The model is not changed and not run.

    Raises:
        ModelError: if ``model`` is no module, or a ScriptModule (which has no Python forward to trace or to keep).
    """
    model = unwrapped(model)
    with preserved_rng(seed=0):  # a forward that draws takes the same branch each time
        graphs, opaque = _Regions(model).trace()
    return Traced(model, graphs, tuple(opaque), tuple(_sites(model, graphs)), overwrites(model, graphs))


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's model inside DataParallel, DistributedDataParallel or torch.compile's wrapper.

    Raises:
        ModelError: if ``model`` is no module that can be converted.
    """
    while isinstance(model, _WRAPPERS) or isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model.module if isinstance(model, _WRAPPERS) else model._orig_mod  # type: ignore[assignment]
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "a ScriptModule has no Python forward: convert the model before torch.jit.script or torch.jit.trace"
        )
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if PACKED in vars(model):
        raise ModelError("a packed model is only run: pass the model that it was packed from; packed.summary() tells of it")
    return model


def structural_copy(model: nn.Module, shared_modules: Iterable[nn.Module] = ()) -> nn.Module:
    """Return a copy of the module tree, its buffers and its Python state that shares the Parameters and the modules named.

    Raises:
        ModelError: if the model holds something that copy.deepcopy cannot copy.
    """
    shared = (*shared_modules, *model.parameters())
    return copied(model, {id(each): each for each in shared})


def copied(model: nn.Module, memo: Mapping[int, Any] = MappingProxyType({})) -> nn.Module:
    """Return a deep copy of the model, in which the objects whose id is in ``memo`` are replaced by what it says.

    Raises:
        ModelError: if the model holds something that copy.deepcopy cannot copy.
    """
    try:
        return _deepcopied(model, dict(memo))
    except ModelError as refused:
        if not isinstance(refused.__cause__, RuntimeError):
            raise
    # deepcopy refuses tensors that are no leaves: weights that a hook computes (weight_norm, prune), outputs that are kept
    held = (leaf for module in model.modules() for leaf in pytree.tree_leaves(vars(module)))
    computed = {id(leaf): leaf.detach().clone() for leaf in held if isinstance(leaf, torch.Tensor) and not leaf.is_leaf}
    return _deepcopied(model, computed | dict(memo))


def _deepcopied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    # deepcopy cannot make a buffer that has no size yet
    lazy = [buffer for buffer in model.buffers() if isinstance(buffer, nn.UninitializedBuffer)]
    fresh = {id(old): nn.UninitializedBuffer(device=old.device, dtype=old.dtype) for old in lazy}  # type: ignore[call-arg]
    try:
        return copy.deepcopy(model, fresh | memo)
    except Exception as error:  # a user's __deepcopy__ may raise anything; it is named as the cause
        message = f"copy.deepcopy({type(model).__name__}) fails: {type(error).__name__}: {error}"
        advice = "Remove what cannot be copied, or convert the model itself: inplace=True, report=False, no calibration_data"
        raise ModelError(f"{message}. {advice}") from error


def drop_foreign_hooks(model: nn.Module, spared: Set[nn.Module] = frozenset()) -> None:
    """Take off the forward hooks of a copy that are not the model's own, from all modules but those spared.

    A closure is shared with the user's model, and what it keeps would be of a trial run. A method of one of the model's
    modules, and a hook of torch's that computes a weight (weight_norm, prune), belong to the copy.
    """
    modules = set(model.modules())
    for module in modules - spared:
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                function = hook.func if isinstance(hook, partial) else hook
                owner = getattr(function, "__self__", None)
                is_own = isinstance(owner, nn.Module) and owner in modules
                if not is_own and type(function).__module__.partition(".")[0] != "torch":
                    del hooks[key]


class _Tracer(NamingTracer):
    """Keeps every Conv3d whole, and turns a submodule whose forward cannot be traced into one node.

    Args:
        uncopyable: modules whose forward is not to be traced, and why.
    """

    def __init__(self, uncopyable: Mapping[nn.Module, str] = MappingProxyType({})) -> None:
        super().__init__()
        self.uncopyable = uncopyable
        self.failures: dict[str, Opaque] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # subclasses too: by default fx walks into Conv3DSimple(nn.Conv3d), and the module is gone
        return isinstance(m, nn.Conv3d) or super().is_leaf_module(m, module_qualified_name)

    def runs_whole(self, module: nn.Module, name: str) -> bool:
        """Whether no code of the user's runs in the module while it is traced: a container's contents do."""
        return self.is_leaf_module(module, name) and not _is_container(module)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        if m in self.uncopyable:
            self.failures[name] = Opaque(name, type(m).__name__, self.uncopyable[m])
        if name in self.failures:
            return self.create_proxy("call_module", name, args, kwargs)
        nodes_before = len(self.graph.nodes)
        stack_before = self.module_stack.copy()
        # new containers: a forward may write into the list it is given before it fails
        args_before, kwargs_before = pytree.tree_map(lambda value: value, (args, kwargs))
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # noqa: BLE001 (a user's forward may raise anything; the reason is reported)
            self.failures = {inner: why for inner, why in self.failures.items() if not inner.startswith(f"{name}.")}
            self.failures[name] = _opaque(name, m, error)
            for node in reversed(list(self.graph.nodes)[nodes_before:]):
                self.graph.erase_node(node)
            self.module_stack = stack_before
            return self.create_proxy("call_module", name, args_before, kwargs_before)


class _Regions:
    """The walk over a module tree that traces what can be traced."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        tracer = _Tracer()
        self.leaves = {module for name, module in root.named_modules() if tracer.runs_whole(module, name)}
        self.uncopyable: dict[nn.Module, str] = {}
        self.graphs: dict[str, fx.Graph] = {}
        self.opaque: list[Opaque] = []

    def trace(self) -> tuple[dict[str, fx.Graph], list[Opaque]]:
        self._trace("", self.root)
        return self.graphs, self.opaque

    def _trace(self, name: str, module: nn.Module) -> None:
        if isinstance(module, nn.Conv3d):
            self.graphs[name] = _graph_of_conv3d()
            return
        if not _holds_conv3d(module):
            return
        if _is_container(module):
            self._trace_children(name, module)
            return
        victim, shared = self._copied(module)
        if victim is None:
            self.opaque.append(Opaque(name, type(module).__name__, self.uncopyable[module]))
            self._trace_children(name, module)
            return
        drop_foreign_hooks(victim, spared=shared)
        tracer = _Tracer(self.uncopyable)
        try:
            with attributes_kept(shared):
                graph = tracer.trace(victim, concrete_args=_defaults(module))
            graph.lint()  # no node reads what a part that failed has left behind
        except Exception as error:  # noqa: BLE001 (a user's forward may raise anything; the reason is reported)
            self.opaque.append(_opaque(name, module, error))
            self._trace_children(name, module)
            return
        self.graphs[name] = graph
        for inner_name, failure in tracer.failures.items():
            inner = module.get_submodule(inner_name)
            if _holds_conv3d(inner):
                full_name = _joined(name, inner_name)
                self.opaque.append(Opaque(full_name, failure.type, failure.reason))
                self._trace_children(full_name, inner)

    def _copied(self, module: nn.Module) -> tuple[nn.Module | None, set[nn.Module]]:
        """Return a copy, if there can be one, and the modules that it shares: torch's leaves, and what cannot be copied.

        What a forward does to Python state while it is traced (caches, counters) happens to a copy, of which a failed trace
        leaves stand-ins behind: each has its own.
        """
        inside = list(module.modules())
        whole = {inner for each in inside if each in self.uncopyable for inner in each.modules()}
        shared = whole | self.leaves.intersection(inside)
        if module in self.uncopyable:
            return None, shared
        try:
            return structural_copy(module, shared), shared
        except ModelError as error:
            self.uncopyable |= _uncopyable(inner for inner in inside if inner not in shared) or {module: _refusal(error)}
            return self._copied(module)

    def _trace_children(self, name: str, module: nn.Module) -> None:
        for child_name, child in module.named_children():
            self._trace(_joined(name, child_name), child)


def _uncopyable(modules: Iterable[nn.Module]) -> dict[nn.Module, str]:
    """Return those modules that cannot be copied whatever their children are, and why."""
    found = {}
    for module in modules:
        try:
            structural_copy(module, module.children())
        except ModelError as error:
            found[module] = _refusal(error)
    return found


def _refusal(error: ModelError) -> str:
    return f"it cannot be copied: {first_line(error.__cause__ or error)}"


def _graph_of_conv3d() -> fx.Graph:
    graph = fx.Graph()
    graph.output(graph.call_module(_LONE, (graph.placeholder("input"),)))
    return graph


def _holds_conv3d(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.Conv3d) or names_conv3d(inner) for inner in module.modules())


def _is_container(module: nn.Module) -> bool:
    """Whether it has no forward of its own: ModuleList, ModuleDict, a plain Module that others are put into."""
    return type(module).forward is nn.Module.forward


def _defaults(module: nn.Module) -> dict[str, Any] | None:
    """Return the default arguments of the forward: what a caller who leaves them out gets, rather than a Proxy.

    Plain values only: fx takes containers apart into arguments of their own.
    """
    parameters = inspect.signature(module.forward).parameters
    plain = (type(None), bool, int, float, str)
    return {name: p.default for name, p in parameters.items() if isinstance(p.default, plain)} or None


def _opaque(name: str, module: nn.Module, error: Exception) -> Opaque:
    """Word the reason: the exception, and the innermost line of code outside torch."""
    frames = [(Path(frame.f_code.co_filename), line) for frame, line in traceback.walk_tb(error.__traceback__)]
    outside = [(file, line) for file, line in frames if "torch" not in file.parts and file != Path(__file__)]
    where = f" ({outside[-1][0].name}:{outside[-1][1]})" if outside else ""
    return Opaque(name, type(module).__name__, f"{first_line(error)}{where}")


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _sites(model: nn.Module, graphs: dict[str, fx.Graph]) -> Iterator[Site]:
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    first_name = {alias: module_names[0] for module_names in names.values() for alias in module_names}
    roles = roles_of(model, {name: RegionGraph(graph, name, first_name) for name, graph in graphs.items()})
    for module, (name, *aliases) in names.items():
        if isinstance(module, _LAYERS):
            yield _site(module, name, tuple(aliases), roles.get(name, frozenset()))
    yield from functional_sites(model, graphs)


def _site(layer: Any, name: str, aliases: tuple[str, ...], roles: frozenset[str]) -> Site:
    converted = isinstance(layer, QConv3d_NoAct)
    is_linear = isinstance(layer, nn.Linear)
    return Site(
        name,
        type(layer).__name__,
        next(base.__name__ for base in _LAYERS if isinstance(layer, base)),
        aliases,
        layer.in_features if is_linear else layer.in_channels,
        layer.out_features if is_linear else layer.out_channels,
        1 if is_linear else layer.groups,
        () if is_linear else tuple(layer.kernel_size),
        _parameters(layer),
        roles,
        None if converted else obstacle(layer) if isinstance(layer, nn.Conv3d) else "not a Conv3d",
        converted,
        no_shortcut(layer) if isinstance(layer, nn.Conv3d) else None,
    )


def _parameters(module: nn.Module) -> int:
    tensors = list(module.parameters())
    return sum(0 if isinstance(p, nn.UninitializedParameter) else p.numel() for p in tensors)
