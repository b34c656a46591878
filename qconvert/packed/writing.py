"""Operations of a graph that write to tensors which are there already: nothing that reads these may move past them."""

import operator
from collections.abc import Iterator
from itertools import takewhile

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import fx, nn

from ..tracer import IN_PLACE
from .following import Modules
from .layer import PackedConv3d

_WRITING = {
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow),
    *(operator.iand, operator.ior, operator.ixor, operator.setitem),
}
_FRESH = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul, torch.div),
    *(torch.cat, torch.concat, torch.concatenate, torch.stack, torch.relu, torch.sigmoid, torch.mean, F.relu, F.conv3d),
}
"""Functions whose result is memory of its own."""


def is_overwritten(read: list[fx.Node], first: fx.Node, last: fx.Node, modules: Modules) -> bool:
    """Return whether an operation between two nodes of a graph may write to the memory of one of the tensors."""
    memory = set().union(*(_memory(node, modules) for node in read))
    between = list(takewhile(lambda node: node is not last, _after(first)))
    return any(memory & _memory(target, modules) for node in between for target in _targets(node, modules))


def _after(node: fx.Node) -> Iterator[fx.Node]:
    while node.next.op != "root":
        node = node.next
        yield node


def _targets(node: fx.Node, modules: Modules) -> list[fx.Node]:
    """Return the tensors to which a node writes."""
    if node.op == "call_module":
        module = modules[node.target]
        is_known = type(module).__module__.startswith("torch.nn") or isinstance(module, PackedConv3d)
        return [] if is_known and not getattr(module, "inplace", False) else node.all_input_nodes
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    is_in_place = name.endswith("_") and not name.endswith("__")
    is_writing = node.op in ("call_function", "call_method") and (is_in_place or node.target in _WRITING)
    is_told = node.kwargs.get("inplace") is True or node.kwargs.get("out") is not None
    return node.all_input_nodes if IN_PLACE in node.meta or is_writing or is_told else []


def _memory(node: fx.Node, modules: Modules) -> set[fx.Node]:
    """Return the nodes in whose memory a node's tensor may lie: its own, or those of what it is a view of."""
    found: set[fx.Node] = set()
    left = [node]
    while left:
        each = left.pop()
        if each not in found:
            found.add(each)
            left += [] if _is_fresh(each, modules) else each.all_input_nodes
    return found


def _is_fresh(node: fx.Node, modules: Modules) -> bool:
    """Return whether a node's tensor has memory of its own."""
    if _targets(node, modules):
        return False
    if node.op == "call_module":
        return isinstance(modules[node.target], (nn.Conv3d, nn.BatchNorm3d, nn.ReLU, nn.LeakyReLU, nn.PReLU, PackedConv3d))
    return node.op == "placeholder" or node.target in _FRESH
