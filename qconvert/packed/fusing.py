"""What follows a packed layer in the model's graph, taken into its epilogue; bits handed on from one to the next."""

import copy
import operator
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from itertools import accumulate

from torch import fx, nn

from ..generated import source_of, with_forward
from ..inplace import in_place
from ..layers import QConv3d_NoAct
from ..tracer import IN_PLACE
from .bit_conv import BitConv3d
from .following import (
    Modules,
    added_to,
    is_constant,
    make_identity,
    module_of,
    of_channels,
    of_norm,
    side_by_side,
    takes,
    title,
)
from .layer import PackedConv3d
from .obstacles import has_hooks
from .regions import regions
from .writing import is_overwritten


def fuse(model: nn.Module, *, folds_floats: bool) -> dict[str, str]:
    """Rewrite the forward of every part of the model that can be followed, and return those that cannot, with the reason.

    Args:
        model: in eval mode, with packed layers. Its modules keep their places, and do what they did when they are called by
            themselves: a layer that does the work of those behind it is another one, of the same weight.
        folds_floats: whether float convolutions take in the BatchNorm behind them: they round otherwise then.
    """
    obstacles: dict[str, str] = {}
    names = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    for name, graph in list(regions("", model, obstacles)):
        region = model.get_submodule(name)
        _fuse_region(region, graph, names, folds_floats=folds_floats)
        for node in graph.nodes:
            if IN_PLACE in node.meta:
                node.target, node.args = in_place, (node.meta[IN_PLACE], *node.args)
        region.__class__ = with_forward(region, source_of(graph))
    return obstacles


def _fuse_region(region: nn.Module, graph: fx.Graph, names: Counter[nn.Module], *, folds_floats: bool) -> None:
    """Rewrite the graph of a region.

    What comes after one call of a layer does not come after others, so that only layers with one call take it in: with one
    node in the graph, and one name in the whole model (``names`` tells of how many there are).
    """
    modules = dict(region.named_modules(remove_duplicate=False))
    calls = Counter(modules[node.target] for node in graph.nodes if node.op == "call_module")
    alone = {module for module, count in calls.items() if count == names[module] == 1}
    layers = {
        node: _twin(node, region, modules)
        for node in graph.nodes
        if node.op == "call_module" and isinstance(modules[node.target], PackedConv3d) and modules[node.target] in alone
    }
    for node in list(graph.nodes) if folds_floats else ():
        _fold_norm(node, modules, alone)
    ends = {_take_in(node, layer, modules): layer for node, layer in layers.items()}
    for node in graph.nodes:
        parts = side_by_side(node)
        if parts and all(part in ends for part in parts):
            _take_in_before(node, [ends[part] for part in parts], modules)
    for node, layer in ends.items():
        _hand_on(node, layer, ends, modules)
    for node, layer in ends.items():
        layer.channels_last = _is_only_added(_values(node, layer), ends)
    graph.lint()


def _twin(node: fx.Node, region: nn.Module, modules: dict[str, nn.Module]) -> PackedConv3d:
    """Let the node call a layer that nothing else calls, of the same weight, and return it."""
    name = str(node.target).removesuffix(".packed")
    owner: BitConv3d = region.get_submodule(name)  # type: ignore[assignment]  # as `regions` has put it there
    owner.fused = owner.packed.twin()
    node.target = f"{name}.fused"
    modules[node.target] = owner.fused
    return owner.fused


def _take_in(node: fx.Node, layer: PackedConv3d, modules: Modules) -> fx.Node:
    """Let the layer do what follows it, as far as it can, and return its node in the place of the last operation."""
    while len(node.users) == 1:
        (after,) = node.users
        other = added_to(node, after)
        read = [*node.all_input_nodes, *([] if other is None else [other])]
        if is_overwritten(read, node, after, modules):
            break
        module = module_of(after, modules)
        is_taken = module is not None and takes(layer.epilogue, module)
        if not (is_taken if other is None else layer.epilogue.add()):
            break
        with node.graph.inserting_before(after):
            taken = node.graph.call_module(str(node.target), node.args if other is None else (node.args[0], other))
        layer.takes_in.append(title(after, modules))
        after.replace_all_uses_with(taken)
        node.graph.erase_node(after)
        node.graph.erase_node(node)
        node = taken
    layer.finish()
    return node


def _take_in_before(node: fx.Node, layers: Sequence[PackedConv3d], modules: Modules) -> None:
    """Let layers whose outputs the node puts side by side do what follows it, each for its own channels."""
    ends = accumulate(layer.out_channels for layer in layers)
    channels = [slice(end - layer.out_channels, end) for end, layer in zip(ends, layers, strict=True)]
    while len(node.users) == 1:
        (after,) = node.users
        epilogues = [copy.copy(layer.epilogue) for layer in layers]
        module = module_of(after, modules)
        parts = [] if module is None else [of_channels(module, some) for some in channels]
        if not parts or not all(map(takes, epilogues, parts)):
            return
        for layer, epilogue in zip(layers, epilogues, strict=True):
            layer.epilogue = epilogue
            layer.takes_in.append(title(after, modules))
            layer.finish()
        after.replace_all_uses_with(node)
        node.graph.erase_node(after)


def _fold_norm(node: fx.Node, modules: Modules, alone: Set[nn.Module]) -> None:
    """Fold the BatchNorm behind a float convolution into its weight."""
    after = next(iter(node.users), node)
    conv, norm = (modules[each.target] if each.op == "call_module" else None for each in (node, after))
    if not isinstance(conv, nn.Conv3d) or isinstance(conv, QConv3d_NoAct) or type(conv).forward is not nn.Conv3d.forward:
        return
    is_alone = len(node.users) == 1 and conv in alone and "weight" in conv._parameters
    if isinstance(norm, nn.BatchNorm3d) and norm in alone and is_constant(norm) and is_alone and not has_hooks(conv):
        factor, summand = of_norm(norm)
        bias = 0.0 if conv.bias is None else conv.bias.detach().double()
        dtype = conv.weight.dtype
        conv.weight = nn.Parameter((conv.weight.detach().double() * factor.view(-1, 1, 1, 1, 1)).to(dtype))
        conv.bias = nn.Parameter((bias * factor + summand).to(dtype))
        make_identity(norm)  # for those that call it by itself
        after.replace_all_uses_with(node)
        node.graph.erase_node(after)


def _hand_on(node: fx.Node, layer: PackedConv3d, by_node: dict[fx.Node, PackedConv3d], modules: Modules) -> None:
    """Let the layer put out the bits that a layer behind it reads, beside floats where others read these."""
    readers = [user for user in node.users if user in by_node and user.args[0] is node and by_node[user].reads_signs]
    if len(readers) != 1 or layer.groups != 1:
        return
    (reader,) = readers
    if is_overwritten([node], node, reader, modules):
        return
    is_read_by_others = len(node.users) > 1 or node in reader.args[1:]
    layer.hand_on(by_node[reader], has_values=is_read_by_others)
    if is_read_by_others:
        with node.graph.inserting_after(node):
            values, bits = (node.graph.call_function(operator.getitem, (node, index)) for index in range(2))
        node.replace_all_uses_with(values, delete_user_cb=lambda user: user not in (values, bits))
        reader.update_arg(0, bits)


def _values(node: fx.Node, layer: PackedConv3d) -> fx.Node:
    """Return the node of a layer's floats, or of its bits where it puts out none."""
    is_list = layer.has_values and layer.following is not None
    return next(user for user in node.users if user.args == (node, 0)) if is_list else node


def _is_only_added(values: fx.Node, by_node: Mapping[fx.Node, PackedConv3d]) -> bool:
    """Whether packed layers add the floats, and nothing else reads them: quicker where channels lie side by side."""
    readers = [user for user in values.users if user in by_node and user.args[0] is not values]
    return len(readers) == len(values.users) > 0
