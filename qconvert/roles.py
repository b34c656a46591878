"""Which convolutions are first, last or on a residual shortcut: read off the traced graphs.

A set of convolutions is an int used as a bit set, so that a pass over a graph is one `|` per edge.
"""

import operator
from collections.abc import Iterator, Mapping

import torch
from torch import fx, nn

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


def roles_of(model: nn.Module, graphs: Mapping[str, RegionGraph]) -> dict[str, frozenset[str]]:
    """Return the roles of the convolutions that have one, by name.

    first, last: no other Conv3d lies before (behind) it on the data path. Where a module cannot be traced, its children
    are taken in the order in which they are registered, each reading what the one before it returns.
    shortcut: of the two branches from one value to an addition, it lies on the one that has the fewer convolutions.
    """
    roles: dict[str, set[str]] = {}
    walk = _Walk(model, graphs)
    for role, names in (("first", walk.ends("", 0)), ("last", walk.ends("", -1)), ("shortcut", walk.shortcuts())):
        for name in names:
            roles.setdefault(name, set()).add(role)
    return {name: frozenset(found) for name, found in roles.items()}


class _Walk:
    def __init__(self, model: nn.Module, graphs: Mapping[str, RegionGraph]) -> None:
        self.model = model
        self.graphs = graphs
        self.holders = {
            prefix
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, nn.Conv3d)
            for prefix in _prefixes(name)
        }
        self.flows = {name: _Flow(graph, self.holders) for name, graph in graphs.items()}

    def ends(self, name: str, side: int) -> Iterator[str]:
        """Yield the first (side 0) or last (side -1) convolutions of the module of that name."""
        if isinstance(self.model.get_submodule(name), nn.Conv3d):
            yield name
        elif name in self.flows:
            for inner in self.flows[name].sources if side == 0 else self.flows[name].sinks:
                yield from self.ends(inner, side)
        else:
            children = [child for child, _ in self.model.get_submodule(name).named_children()]
            holders = [full for full in (f"{name}.{child}" if name else child for child in children) if full in self.holders]
            if holders:
                yield from self.ends(holders[side], side)

    def shortcuts(self) -> Iterator[str]:
        for flow in self.flows.values():
            yield from flow.shortcuts()


class _Flow:
    """The convolutions of one graph and which of them each value depends on."""

    def __init__(self, region: RegionGraph, holders: set[str]) -> None:
        self.names: list[str] = []
        self.before: dict[fx.Node, int] = {}  # the convolutions that a node's value depends on
        self._sources: dict[fx.Node, int] = {}  # all nodes that it depends on
        self._adds: list[fx.Node] = []
        has_source: list[bool] = []
        has_sink = 0
        for node in region.graph.nodes:
            inputs, sources = 0, 0 if node.op == "get_attr" else 1 << len(self._sources)
            for source in node.all_input_nodes:
                inputs |= self.before[source]
                sources |= self._sources[source]
            self._sources[node] = sources
            name = region.module_of(node)
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
