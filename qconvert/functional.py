"""Functional 3D convolutions: which a model has, and the layer that takes the place of one."""

import inspect
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import fx, nn

from .alone import OwnForward, own_forward
from .layers.tied import TiedConv3d
from .sites import FUNCTIONAL, Site

_CONV3D = {F.conv3d, torch.conv3d, torch.ops.aten.conv3d.default, torch.ops.aten.conv3d}
_RANK = 5
"""Dimensions of a weight: (O, C / groups, kD, kH, kW)."""


def functional_sites(model: nn.Module, graphs: Mapping[str, fx.Graph]) -> Iterator[Site]:
    """Yield every functional 3D convolution in the graphs, and in modules whose code names one.

    Its name is that of the module whose forward calls it, and its node's in the graph of that forward alone.
    """
    calls: dict[str, list[str]] = {name: [] for name, module in model.named_modules() if names_conv3d(module)}
    for region, graph in graphs.items():
        for node in graph.nodes:
            if is_conv3d(node):
                calls.setdefault(owner_name(region, node), []).append(node.name)
    for owner, names in calls.items():
        module = model.get_submodule(owner)
        own = own_forward(module)
        found = {node.name: node for graph in own.graphs for node in graph.nodes if is_conv3d(node)}
        unseen = [] if own.failure is None else ["conv3d"]  # the code names one, and no graph shows where it is called
        for name in found or names or unseen:
            yield _site(f"{owner}.{layer_name(module, name)}".removeprefix("."), module, found.get(name), own)


def is_conv3d(node: fx.Node) -> bool:
    """Whether the node calls a functional 3D convolution."""
    return node.op == "call_function" and node.target in _CONV3D


def owner_name(region: str, node: fx.Node) -> str:
    """Return the name of the innermost module in whose forward a node of a region was made."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return ".".join(part for part in (region, stack[-1][0] if stack else "") if part)


def names_conv3d(module: nn.Module) -> bool:
    """Whether code of the module's class, not of torch's, names conv3d. A Conv3d's own is its own affair."""
    return _class_names_conv3d(type(module))  # type: ignore[arg-type]  # a class can be hashed


@lru_cache(maxsize=1024)
def _class_names_conv3d(cls: type[nn.Module]) -> bool:
    if issubclass(cls, nn.Conv3d):
        return False
    own = [base for base in cls.__mro__ if issubclass(base, nn.Module) and not base.__module__.startswith("torch.")]
    functions = (inspect.unwrap(value) for base in own for value in vars(base).values() if callable(value))
    return any(_code_names_conv3d(function.__code__) for function in functions if hasattr(function, "__code__"))


def _code_names_conv3d(code: CodeType) -> bool:
    """Whether the code, or a function inside it, names conv3d."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return "conv3d" in code.co_names or any(map(_code_names_conv3d, inner))


def _site(name: str, owner: nn.Module, node: fx.Node | None, own: OwnForward) -> Site:
    try:
        layer = None if node is None else layer_for(owner, node)
    except _NotConvertibleError as reason:
        return Site(name, "function", kind=FUNCTIONAL, blocker=str(reason))
    if layer is None:
        return Site(name, "function", kind=FUNCTIONAL, blocker=own.obstacle)
    return Site(
        name,
        "function",
        FUNCTIONAL,
        in_channels=layer.in_channels,
        out_channels=layer.out_channels,
        groups=layer.groups,
        kernel_size=tuple(layer.kernel_size),
        parameters=sum(parameter.numel() for parameter in layer.parameters()),
        blocker=own.obstacle,
    )


class _NotConvertibleError(Exception):
    """A functional convolution that cannot become a layer; says why."""


_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a functional convolution by name, defaults filled in."""
    by_position = zip(("input", "weight", *_DEFAULTS), node.args, strict=False)
    return {**_DEFAULTS, **dict(by_position), **node.kwargs}


def layer_name(owner: nn.Module, name: str) -> str:
    """Return the name under which the owner gets the layer for a node: the node's, unless the owner has something there."""
    return layer_name(owner, f"{name}_") if hasattr(owner, name) else name


def layer_for(owner: nn.Module, node: fx.Node) -> TiedConv3d:
    """Return the layer that computes what the node of the owner's graph does, around the owner's Parameters."""
    given = arguments(node)
    weight, bias = (_parameter(owner, name, given.pop(name)) for name in ("weight", "bias"))
    if weight is None or weight.dim() != _RANK:
        raise _NotConvertibleError("its weight is no Parameter of 5 dimensions")
    del given["input"]
    settings = {name: _constant(name, value) for name, value in given.items()}
    return TiedConv3d.around(weight, bias, **settings).train(owner.training)


def _parameter(owner: nn.Module, name: str, value: Any) -> nn.Parameter | None:
    if value is None:
        return None
    if isinstance(value, fx.Node) and value.op == "get_attr":
        holder, _, attribute = str(value.target).rpartition(".")
        parameter = owner.get_submodule(holder)._parameters.get(attribute)
        if isinstance(parameter, nn.Parameter):
            return parameter
    raise _NotConvertibleError(f"its {name} is computed, or given as an argument: no Parameter of a module")


def _constant(name: str, value: Any) -> Any:
    if isinstance(value, (int, str)):
        return value
    if isinstance(value, (tuple, list)) and all(isinstance(each, int) for each in value):
        return tuple(value) if len(value) > 1 else value[0]
    raise _NotConvertibleError(f"its {name} is computed")
