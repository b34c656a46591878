"""What follows a packed layer in the model's graph, taken into its epilogue; bits handed on from one to the next."""

import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import fx, nn

from ..alone import own_forward
from ..generated import source_of, with_forward
from ..inplace import in_place
from ..tracer import IN_PLACE
from .layer import PackedConv3d

_RELU = {F.relu, torch.relu, torch.relu_, F.relu_, "relu", "relu_"}
_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
"""What passes its input on, in eval mode."""


def fuse(model: nn.Module) -> dict[str, str]:
    """Rewrite the forward of every part of the model that can be followed, and return those that cannot, with the reason.

    Args:
        model: in eval mode, with packed layers. Its modules keep their places; those whose work a packed layer does now are
            not called any more.
    """
    obstacles: dict[str, str] = {}
    for name, graph in _regions("", model, obstacles):
        region = model.get_submodule(name)
        _fuse_region(region, graph)
        for node in graph.nodes:
            if IN_PLACE in node.meta:
                node.target, node.args = in_place, (node.meta[IN_PLACE], *node.args)
        region.__class__ = with_forward(region, source_of(graph))
    return obstacles


def _regions(name: str, module: nn.Module, obstacles: dict[str, str]) -> Iterator[tuple[str, fx.Graph]]:
    """Yield the largest parts of the model whose forward a graph can replace, each with that graph."""
    if isinstance(module, PackedConv3d) or not _holds_packed(module):
        return
    own = own_forward(module)
    if own.obstacle is None:
        yield name, _inlined(module, own.graph)
        return
    if type(module).forward is not nn.Module.forward:
        obstacles[name] = own.obstacle
    for child_name, child in module.named_children():
        yield from _regions(f"{name}.{child_name}".removeprefix("."), child, obstacles)


def _holds_packed(module: nn.Module) -> bool:
    return any(isinstance(inner, PackedConv3d) for inner in module.modules())


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _inlined(module: nn.Module, graph: fx.Graph) -> fx.Graph:
    """Put the forwards of the module's children into its graph, where these hold packed layers."""
    for node in list(graph.nodes):
        if node.op != "call_module":
            continue
        child = module.get_submodule(node.target)
        if isinstance(child, PackedConv3d) or not _holds_packed(child) or _has_hooks(child):
            continue
        own = own_forward(child)
        if own.obstacle is None and _is_plain(own.graph):
            _inline(node, _inlined(child, own.graph))
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


def _fuse_region(region: nn.Module, graph: fx.Graph) -> None:
    modules = dict(region.named_modules(remove_duplicate=False))
    calls = Counter(modules[node.target] for node in graph.nodes if node.op == "call_module")
    layers = {
        node: modules[node.target]
        for node in graph.nodes
        if node.op == "call_module" and isinstance(modules[node.target], PackedConv3d)
        # what comes after one of its calls does not come after the others
        if calls[modules[node.target]] == 1 and not _has_hooks(modules[node.target])
    }
    ends = [_take_in(node, layer, modules) for node, layer in layers.items()]
    by_node = dict(zip(ends, layers.values(), strict=True))
    for node, layer in by_node.items():
        _hand_on(node, layer, by_node)
    graph.lint()


def _take_in(node: fx.Node, layer: PackedConv3d, modules: dict[str, nn.Module]) -> fx.Node:
    """Let the layer do what follows it, as far as it can, and return its node in the place of the last operation."""
    while len(node.users) == 1:
        (after,) = node.users
        others = [each for each in after.args if each is not node]
        if _is_addition(after, node):
            (other,) = others
            if not layer.epilogue.add():
                break
            with node.graph.inserting_before(after):
                taken = node.graph.call_module(node.target, (node.args[0], other))
        elif _takes(layer, after, modules):
            with node.graph.inserting_before(after):
                taken = node.graph.call_module(node.target, node.args)
        else:
            break
        after.replace_all_uses_with(taken)
        node.graph.erase_node(after)
        node.graph.erase_node(node)
        node = taken
    layer.finish()
    return node


def _is_addition(node: fx.Node, value: fx.Node) -> bool:
    """Whether the node adds one other tensor to the value, which no other name can see."""
    if node.target not in _ADD or node.op not in ("call_function", "call_method") or node.kwargs or len(node.args) != 2:
        return False
    is_overwritten = IN_PLACE in node.meta or node.target in ("add_", operator.iadd)
    other = node.args[1] if node.args[0] is value else node.args[0]
    return isinstance(other, fx.Node) and other is not value and (node.args[0] is value or not is_overwritten)


def _takes(layer: PackedConv3d, node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Take the operation of a node in, and return whether that can be."""
    if node.op != "call_module":
        is_relu = node.target in _RELU and len(node.args) == 1 and not set(node.kwargs) - {"inplace"}
        return is_relu and layer.epilogue.bend(torch.zeros(1).double())
    module = modules[node.target]
    if _has_hooks(module) or module.training:
        return False
    if type(module) in _NOTHING:
        return True
    if type(module) is nn.BatchNorm3d and module.track_running_stats:
        return layer.epilogue.scale(*_of_norm(module))
    if type(module) is nn.ReLU:
        return layer.epilogue.bend(torch.zeros(1).double())
    if type(module) is nn.LeakyReLU:
        return layer.epilogue.bend(torch.full((1,), module.negative_slope).double())
    return type(module) is nn.PReLU and layer.epilogue.bend(module.weight.detach().double())


def _of_norm(norm: nn.BatchNorm3d) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factor and summand of a BatchNorm in eval mode, float64 (C,)."""
    deviation = (norm.running_var.double() + norm.eps).sqrt()
    factor = 1 / deviation if norm.weight is None else norm.weight.detach().double() / deviation
    shift = 0.0 if norm.bias is None else norm.bias.detach().double()
    return factor, shift - norm.running_mean.double() * factor


def _hand_on(node: fx.Node, layer: PackedConv3d, by_node: dict[fx.Node, PackedConv3d]) -> None:
    """Let the layer put out the bits that a layer behind it reads, beside floats where others read these."""
    readers = [user for user in node.users if user in by_node and user.args[0] is node and by_node[user].reads_signs]
    if len(readers) != 1 or layer.groups != 1:
        return
    (reader,) = readers
    is_read_by_others = len(node.users) > 1 or node in reader.args[1:]
    layer.hand_on(by_node[reader], has_values=is_read_by_others)
    if is_read_by_others:
        with node.graph.inserting_after(node):
            values, bits = (node.graph.call_function(operator.getitem, (node, index)) for index in range(2))
        node.replace_all_uses_with(values, delete_user_cb=lambda user: user not in (values, bits))
        reader.update_arg(0, bits)
