"""Which convolutions are the two halves of a factorised one: space and time ((2+1)D), or depthwise and pointwise."""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import NamedTuple

from torch import fx, nn

_HALVES = (("spatial", "temporal"), ("temporal", "spatial"), ("depthwise", "pointwise"))
"""What the first and the second convolution of a pair are."""

_BETWEEN = re.compile(
    r"\w*(batch|instance|group|layer|rms|response)norm|\w*dropout|stochasticdepth"
    r"|\w*[^g]lu|\w*swish|mish|\w*tanh|\w*sigmoid|softplus|softsign|\w*shrink|threshold|clamp"
    r"|(constant|zero|reflection|replication|circular)?pad|identity|contiguous|clone|to|float"
    r"|i?mul|multiply"  # by a scale or a gate: Swish, squeeze and excitation
)
"""What may stand between the two: class, function or method, in one spelling (see `_stands_between`)."""


class _Conv(NamedTuple):
    name: str
    could_be: set[str]


def halves(calls: Iterable[tuple[fx.Node, str | None]], modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Yield (role, name) of the halves of every factorised convolution of a graph.

    Args:
        calls: the graph's nodes, each with the name of the module that it calls.
        modules: the modules by name.
    """
    # the values that depend on a convolution, and whose result each still is: None where more was done than `_BETWEEN`
    results: dict[fx.Node, _Conv | None] = {}
    for node, name in calls:
        values = [value for value in node.all_input_nodes if value in results]
        read = results[min(values)] if values else None  # of a value and a gate made from it, the value comes first
        module = None if name is None else modules[name]
        if name is not None and isinstance(module, nn.Conv3d):
            results[node] = conv = _Conv(name, _could_be(module))
            yield from _pair(read, conv) if read else ()
        elif values:
            results[node] = read if _stands_between(_called(node, module)) else None


def _pair(first: _Conv, second: _Conv) -> Iterator[tuple[str, str]]:
    for one, other in _HALVES:
        if one in first.could_be and other in second.could_be:
            yield one, first.name
            yield other, second.name


def _could_be(conv: nn.Conv3d) -> set[str]:
    """Return which halves the convolution could be, by its shape alone."""
    depth, height, width = conv.kernel_size
    area = height * width
    is_depthwise = 1 < conv.groups == conv.in_channels
    fits = {
        "spatial": depth == 1 < area,
        "temporal": area == 1 < depth,
        "depthwise": is_depthwise and depth * area > 1,
        "pointwise": not is_depthwise and depth * area == 1,
    }
    return {role for role, does_fit in fits.items() if does_fit}


def _called(node: fx.Node, module: nn.Module | None) -> str:
    """Return the name of the module's class, the function or the method that a node calls, "" if it calls none."""
    if module is not None:
        return type(module).__name__
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


@cache
def _stands_between(name: str) -> bool:
    spelling = re.sub(r"_|\d+d?$", "", name.lower().rstrip("_"))  # "batchnorm" for BatchNorm3d and batch_norm
    return _BETWEEN.fullmatch(spelling) is not None
