"""The parts of a model whose forward a graph can replace, with the forwards of their children in it."""

from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from ..alone import own_forward
from .bit_conv import BitConv3d
from .obstacles import has_hooks


def regions(name: str, module: nn.Module, obstacles: dict[str, str]) -> Iterator[tuple[str, fx.Graph]]:
    """Yield the largest parts of the model whose forward a graph can replace, each with that graph."""
    if isinstance(module, nn.Conv3d) or not _holds_packed(module):
        return
    own = own_forward(module)
    if own.obstacle is None:
        left: list[str] = []
        yield name, _inlined(module, own.graph, left)
    else:
        left = [child for child, _ in module.named_children()]
        if type(module).forward is not nn.Module.forward:
            obstacles[name] = own.obstacle
    for inner in left:
        yield from regions(f"{name}.{inner}".removeprefix("."), module.get_submodule(inner), obstacles)


def _holds_packed(module: nn.Module) -> bool:
    return any(isinstance(inner, BitConv3d) for inner in module.modules())


def _is_worth_inlining(module: nn.Module) -> bool:
    """Whether there may be convolutions in it, or what follows one."""
    is_sequence = type(module).forward is nn.Sequential.forward
    return is_sequence or any(isinstance(inner, nn.Conv3d) for inner in module.modules())


def _inlined(module: nn.Module, graph: fx.Graph, left: list[str]) -> fx.Graph:
    """Put the forwards of the module's children into its graph, and note the names of those that are left as they are."""
    for node in list(graph.nodes):
        if node.op != "call_module":
            continue
        child = module.get_submodule(node.target)
        if isinstance(child, BitConv3d) and child.is_plain and not has_hooks(child) and not node.kwargs:
            node.target = f"{node.target}.packed"
        elif not isinstance(child, nn.Conv3d) and _is_worth_inlining(child):
            own = own_forward(child)
            if own.obstacle is None and _is_plain(own.graph) and not has_hooks(child):
                inner: list[str] = []
                _inline(node, _inlined(child, own.graph, inner))
                left += [f"{node.target}.{each}" for each in inner]
            else:
                left.append(node.target)
    graph.lint()
    return graph


def _is_plain(graph: fx.Graph) -> bool:
    """Whether a graph takes its arguments one by one and returns one value."""
    *others, output = graph.nodes
    is_starred = any(node.op == "placeholder" and node.target.startswith("*") for node in others)
    return isinstance(output.args[0], fx.Node) and not is_starred


def _inline(node: fx.Node, inner: fx.Graph) -> None:
    """Put the graph of a module in the place of its call."""
    given = iter(node.args)
    values: dict[fx.Node, Any] = {}
    with node.graph.inserting_before(node):
        for each in inner.nodes:
            if each.op == "placeholder":
                values[each] = next(given, node.kwargs.get(each.target, each.args[0] if each.args else None))
            elif each.op == "output":
                result = fx.node.map_arg(each.args[0], values.__getitem__)
            else:
                values[each] = node.graph.node_copy(each, values.__getitem__)
                if each.op in ("call_module", "get_attr"):
                    values[each].target = f"{node.target}.{each.target}"
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
