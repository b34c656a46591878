"""Functional 3D convolutions: which a model has, and the layer that takes the place of one."""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import pairwise
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import fx, nn

from .alone import OwnForward, own_forward
from .code import is_torchs, operations, reachable
from .layers.shortcut import no_shortcut
from .layers.tied import TiedConv3d
from .sites import FUNCTIONAL, Site

_CONV3D = {F.conv3d, torch.conv3d, torch.ops.aten.conv3d.default, torch.ops.aten.conv3d}
_OF_ANY_RANK = {torch.convolution, torch.ops.aten.convolution.default, torch.ops.aten.convolution}
_RANK = 5
"""Dimensions of a weight: (O, C / groups, kD, kH, kW)."""


def functional_sites(model: nn.Module, graphs: Mapping[str, fx.Graph]) -> Iterator[Site]:
    """Yield every functional 3D convolution in the graphs, and in modules whose code names one.

    Its name is that of the module whose forward calls it, and its node's in the graph of that forward alone.
    """
    calls: dict[str, list[str]] = {name: [] for name, module in model.named_modules() if names_conv3d(module)}
    for region, graph in graphs.items():
        for node in graph.nodes:
            if _is_listed(node, model.get_submodule(region)):
                calls.setdefault(owner_name(region, node), []).append(node.name)
    for owner, names in calls.items():
        module = model.get_submodule(owner)
        own = own_forward(module)
        found = {node.name: node for graph in own.graphs for node in graph.nodes if _is_listed(node, module)}
        unseen = [] if own.failure is None else ["conv3d"]  # the code names one, and no graph shows where it is called
        for name in found or names or unseen:
            yield _site(f"{owner}.{layer_name(module, name)}".removeprefix("."), module, found.get(name), own)


def is_conv3d(node: fx.Node) -> bool:
    """Whether the node calls a functional 3D convolution that may become a layer."""
    return node.op == "call_function" and node.target in _CONV3D


def _is_listed(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node is a 3D convolution, also by a function for any rank, which the weight or a setting tells."""
    if node.op != "call_function" or node.target not in _OF_ANY_RANK:
        return is_conv3d(node)
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    sizes = [value for value in given.values() if isinstance(value, (list, tuple))]
    is_3d = any(len(size) == _RANK - 2 for size in sizes) or _rank(given["weight"], root) == _RANK
    return is_3d and given["transposed"] is False


def _rank(value: Any, root: nn.Module) -> int | None:
    """Return the number of dimensions of a Parameter or buffer; None where it cannot be told."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    found: Any = root
    for name in str(value.target).split("."):
        found = getattr(found, name, None)
    return found.dim() if isinstance(found, torch.Tensor) else None


def owner_name(region: str, node: fx.Node) -> str:
    """Return the name of the innermost module in whose forward a node of a region was made."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return ".".join(part for part in (region, stack[-1][0] if stack else "") if part)


def names_conv3d(module: nn.Module) -> bool:
    """Whether code of the module's class, or of a function that it leads to, names a 3D convolution of torch's.

    A Conv3d's own is its own affair. A function for any rank counts where the module has a weight for it.
    """
    named = _convolutions_named(type(module))  # type: ignore[arg-type]  # a class can be hashed
    return "conv3d" in named or ("convolution" in named and any(map(_is_weight, module.parameters(recurse=False))))


def _is_weight(parameter: nn.Parameter) -> bool:
    return not isinstance(parameter, nn.UninitializedParameter) and parameter.dim() == _RANK


@lru_cache(maxsize=1024)
def _convolutions_named(cls: type[nn.Module]) -> frozenset[str]:
    if issubclass(cls, nn.Conv3d):
        return frozenset()
    own = [base for base in cls.__mro__ if issubclass(base, nn.Module) and not is_torchs(base.__module__)]
    codes = reachable(value for base in own for value in vars(base).values())
    return frozenset(name for code in codes for name in _named_by(code))


def _named_by(code: CodeType) -> Iterator[str]:
    if "conv3d" in code.co_names:
        yield "conv3d"
    steps = operations(code) if "convolution" in code.co_names else ()
    if any(before in ("torch", "aten") and name == "convolution" for (_, before), (_, name) in pairwise(steps)):
        yield "convolution"


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
        no_shortcut=no_shortcut(layer),
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
    if not is_conv3d(node):
        raise _NotConvertibleError("it is a convolution of any rank: call F.conv3d, which can be converted")
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
