"""The roles that convolutions have in a network, read off the traced graphs: which are first, last, on a shortcut.

A set of convolutions is an int used as a bit set, so that a pass over a graph is one `|` per edge.
"""

import operator
from collections.abc import Iterator, Mapping

import torch
from torch import fx, nn

from .factorised import halves

_ADD_FUNCTIONS = {operator.add, operator.iadd, torch.add}
_ADD_METHODS = {"add", "add_", "__add__", "__iadd__", "__radd__"}


class RegionGraph:
    """A region's graph with its nodes' module names as the whole model knows them.

    Args:
        graph: the graph.
        region: dotted name of the region.
        first_name: for every name of a module, the one under which it is listed.
    """

    def __init__(self, graph: fx.Graph, region: str, first_name: Mapping[str, str]) -> None:
        self.graph = graph
        self.region = region
        self._first_name = first_name

    def module_of(self, node: fx.Node) -> str | None:
        """Return the name of the module that the node calls, or None if it calls none."""
        if node.op != "call_module":
            return None
        local = str(node.target)
        name = f"{self.region}.{local}" if self.region else local
        # a region that is a single convolution calls it by a name of its own
        return self._first_name.get(name, self.region)

    def calls(self) -> Iterator[tuple[fx.Node, str | None]]:
        """Yield every node with the name of the module that it calls."""
        return ((node, self.module_of(node)) for node in self.graph.nodes)


def roles_of(model: nn.Module, graphs: Mapping[str, RegionGraph]) -> dict[str, frozenset[str]]:
    """Return the roles of the convolutions that have one, by name.

    first, last: no other Conv3d lies before (behind) it on the data path. Where a module cannot be traced, its children
    are taken in the order in which they are registered, each reading what the one before it returns; but one that reads
    as many channels as the first child, and not as many as the one before it returns, starts a path beside it.
    shortcut: of the two branches from one value to an addition, it lies on the one that has the fewer convolutions.
    spatial, temporal: a 1 x k x k and a k x 1 x 1 convolution, one of which reads the result of the other.
    depthwise, pointwise: a depthwise convolution and a 1 x 1 x 1 one that reads its result.
    """
    walk = _Walk(model, graphs)
    found = [("first", name) for name in walk.ends("", 0)] + [("last", name) for name in walk.ends("", -1)]
    found += [("shortcut", name) for flow in walk.flows.values() for name in flow.shortcuts()]
    found += [role for region in graphs.values() for role in halves(region.calls(), walk.modules)]
    roles: dict[str, set[str]] = {}
    for role, name in found:
        roles.setdefault(name, set()).add(role)
    return {name: frozenset(names) for name, names in roles.items()}


class _Walk:
    def __init__(self, model: nn.Module, graphs: Mapping[str, RegionGraph]) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.convs = {name: module for name, module in self.modules.items() if isinstance(module, nn.Conv3d)}
        self.holders = {prefix for name in self.convs for prefix in _prefixes(name)}
        self.flows = {name: _Flow(graph, self.holders) for name, graph in graphs.items()}
        self._ends: dict[tuple[str, int], list[str]] = {}

    def ends(self, name: str, side: int) -> list[str]:
        """Return the first (side 0) or last (side -1) convolutions of the module of that name."""
        if name in self.convs:
            return [name]
        if (name, side) not in self._ends:
            self._ends[name, side] = [conv for part in self._parts(name, side) for conv in self.ends(part, side)]
        return self._ends[name, side]

    def _parts(self, name: str, side: int) -> list[str]:
        """Return the parts of a module that are first or last in it."""
        if name in self.flows:
            return self.flows[name].sources if side == 0 else self.flows[name].sinks
        children = [f"{name}.{child}" if name else child for child, _ in self.modules[name].named_children()]
        return [path[side] for path in self._paths([child for child in children if child in self.holders])]

    def _paths(self, children: list[str]) -> list[list[str]]:
        """Divide the children of a module that cannot be traced into the paths that they are on."""
        paths = [children[:1]] if children else []
        for child in children[1:]:
            reads = {self.convs[conv].in_channels for conv in self.ends(child, 0)} - {0}  # 0: a lazy one, not known yet
            entry = {self.convs[conv].in_channels for conv in self.ends(children[0], 0)}
            returned = {self.convs[conv].out_channels for conv in self.ends(paths[-1][-1], -1)}
            if reads & entry and not reads & returned:
                paths.append([])
            paths[-1].append(child)
        return paths


class _Flow:
    """The convolutions of one graph and which of them each value depends on."""

    def __init__(self, region: RegionGraph, holders: set[str]) -> None:
        self.names: list[str] = []
        self.before: dict[fx.Node, int] = {}  # the convolutions that a node's value depends on
        self._sources: dict[fx.Node, int] = {}  # all nodes that it depends on
        self._adds: list[fx.Node] = []
        has_source: list[bool] = []
        has_sink = 0
        for node, name in region.calls():
            inputs, sources = 0, 0 if node.op == "get_attr" else 1 << len(self._sources)
            for source in node.all_input_nodes:
                inputs |= self.before[source]
                sources |= self._sources[source]
            self._sources[node] = sources
            if name is not None and name in holders:
                has_sink |= inputs
                has_source.append(inputs == 0)
                inputs |= 1 << len(self.names)
                self.names.append(name)
            elif _is_add(node):
                self._adds.append(node)
            self.before[node] = inputs
        self.sources = [name for name, is_source in zip(self.names, has_source, strict=True) if is_source]
        self.sinks = [name for index, name in enumerate(self.names) if not has_sink >> index & 1]

    def shortcuts(self) -> Iterator[str]:
        for add in self._adds:
            left, right = (self._sources[operand] for operand in add.all_input_nodes)
            if not left & right:
                continue  # two streams that meet: no branch of one goes around the other
            left, right = (self.before[operand] for operand in add.all_input_nodes)
            branches = sorted((left & ~right, right & ~left), key=int.bit_count)
            if 0 < branches[0].bit_count() < branches[1].bit_count():
                yield from (name for index, name in enumerate(self.names) if branches[0] >> index & 1)


def _is_add(node: fx.Node) -> bool:
    adds = node.op == "call_function" and node.target in _ADD_FUNCTIONS
    adds = adds or (node.op == "call_method" and node.target in _ADD_METHODS)
    return adds and len(node.all_input_nodes) == 2  # noqa: PLR2004 (left and right)


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[:end]) for end in range(len(parts) + 1))
