"""What every convolution reads and puts out, told from the graph alone: an abstract interpretation of the traced regions.

A value is a `Distribution`, and `transfer` says what each operation makes of it. What there is no rule for is unknown; where
a module cannot be traced, its children are taken in the order in which they are registered.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..functional import is_conv3d, owner_name
from ..layers.computed import weights_at_rest
from ..running_statistics import is_untrained
from ..sites import FUNCTIONAL, Site
from ..trace import Traced
from .distribution import UNKNOWN, Distribution, mixture
from .geometry import Size
from .operation import Operation
from .transfer import transfer

USUAL_SIZE = (16, 112, 112)
"""Depth, height and width of a clip that action recognition takes."""

_LARGEST_CONSTANT = 2**16
"""Tensors of more values than this are not computed with: they are weights, not settings."""


@dataclass(frozen=True)
class Signal:
    """What is known about one convolution's data, in the mode that the model is in.

    Attributes:
        input: what it reads.
        output: what it puts out.
        otherwise: what it reads in training, of a model in evaluation mode that has never been trained: its BatchNorms do
            next to nothing yet, and will normalise.
    """

    input: Distribution
    output: Distribution
    otherwise: Distribution | None = None

    @cached_property
    def anytime(self) -> Distribution:
        """What it reads, now or in training: seven times as often what it is now."""
        return self.input if self.otherwise is None else mixture([self.input, self.otherwise], (7, 1))


@torch.no_grad()
def signals(traced: Traced, size: Size = USUAL_SIZE) -> dict[str, Signal]:
    """Return the signal of each 3D convolution, by the name of its site. One that no graph reaches has none.

    Args:
        traced: the model.
        size: depth, height and width of the model's input. It says how much of what a convolution reads is border.
    """
    modes = [traced.model.training]
    if not traced.model.training and any(map(is_untrained, traced.model.modules())):
        modes.append(True)
    with weights_at_rest(traced.model):
        now, *other = (_Walk(traced, training, size) for training in modes)
    return {
        name: Signal(mixture(reads), mixture(now.writes[name]), *(mixture(walk.reads[name]) for walk in other))
        for name, reads in now.reads.items()
    }


class _Walk:
    """One walk over the model, in the order of its data."""

    def __init__(self, traced: Traced, training: bool, size: Size) -> None:
        self.graphs = traced.graphs
        self.training = training
        self.modules = dict(traced.model.named_modules(remove_duplicate=False))
        self.site_names = {alias: site.name for site in traced.sites for alias in site.names}
        self.functional: dict[str, list[Site]] = {}
        for site in traced.sites:
            if site.kind == FUNCTIONAL and site.in_channels:
                self.functional.setdefault(site.name.rpartition(".")[0], []).append(site)
        self.reads: dict[str, list[Distribution]] = {}
        self.writes: dict[str, list[Distribution]] = {}
        self.enter("", (replace(UNKNOWN, size=size),))

    def enter(self, name: str, inputs: tuple[Any, ...], kwargs: Mapping[str, Any] = MappingProxyType({})) -> Any:
        """Return what the module of that name makes of the inputs."""
        module = self.modules[name]
        kind = _torch_class(module)
        if name in self.graphs and not isinstance(module, nn.Conv3d):
            return self._interpret(name, inputs)
        if kind is not None:
            output = transfer(Operation(_plain(kind.__name__), module.forward, inputs, kwargs, module, self.training))
            if isinstance(module, nn.Conv3d):
                self._note(self.site_names[name], _first(inputs).wide(module.in_channels), output)
            return output
        # nothing says that a child reads what the one before it returned, nor what the module does beside
        value = replace(_first(inputs), known=False, nonnegative=False)
        for child, _ in module.named_children():
            output = _first(self.enter(_joined(name, child), (value,)))
            value = replace(output, known=False, nonnegative=False)
        return value

    def _note(self, site: str, read: Distribution, written: Distribution) -> None:
        self.reads.setdefault(site, []).append(read)
        self.writes.setdefault(site, []).append(written)

    def _note_functional(self, owner: str, read: Distribution, written: Distribution) -> None:
        """Note what a functional convolution does; those of a module run in the order of its sites."""
        sites = self.functional.get(owner)
        if sites:
            site = sites.pop(0)
            sites.append(site)  # the module may run again
            self._note(site.name, read.wide(site.in_channels), written)

    def _interpret(self, region: str, inputs: tuple[Any, ...]) -> Any:
        values: dict[fx.Node, Any] = {}
        given = iter(inputs)
        result: Any = UNKNOWN
        for node in self.graphs[region].nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            match node.op:
                case "placeholder":
                    values[node] = next(given, None) or replace(UNKNOWN)  # two of them are not one value twice
                case "get_attr":
                    values[node] = _constant(self.modules[region], str(node.target))
                case "call_module":
                    values[node] = self.enter(_joined(region, str(node.target)), args, kwargs)
                case "output":
                    result = args[0]
                case _:
                    values[node] = self._call(node.op, node.target, args, kwargs)
                    if is_conv3d(node):
                        self._note_functional(owner_name(region, node), _first((args, kwargs)), values[node])
        return result

    def _call(self, op: str, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        name, run = (target, _method(target)) if op == "call_method" else (getattr(target, "__name__", ""), target)
        operands = pytree.tree_leaves((args, kwargs))
        if any(isinstance(operand, Distribution) for operand in operands):
            return transfer(Operation(_plain(name), run, args, kwargs, None, self.training))
        return _folded(run, args, kwargs, operands)


def _method(name: str) -> Callable[..., Any]:
    return lambda tensor, *args, **kwargs: getattr(tensor, name)(*args, **kwargs)


def _folded(run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], operands: list[Any]) -> Any:
    """Compute what depends on no input: sizes and small buffers, as in a BatchNorm that is written out."""
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    if any(tensor.numel() > _LARGEST_CONSTANT or tensor.is_meta for tensor in tensors):
        return UNKNOWN
    try:
        return run(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return UNKNOWN  # an operand of it was not known


def _constant(root: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    value = getattr(root.get_submodule(owner), name, UNKNOWN)  # a tensor made while tracing is on the traced copy only
    if isinstance(value, Tensor) and value.numel() <= _LARGEST_CONSTANT:
        return value.detach().clone()  # an operation in place must not reach the model's own
    return value


def _torch_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the class of torch's that the module is; None for a container or a class of the user's own."""
    if isinstance(module, nn.Conv3d):
        return nn.Conv3d
    own = type(module).__module__.startswith("torch.nn.modules")
    return type(module) if own and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) else None


def _first(values: Any) -> Distribution:
    return next((leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Distribution)), UNKNOWN)


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
