"""What follows a packed layer in the model's graph, taken into its epilogue; bits handed on from one to the next."""

import copy
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor, fx, nn

from ..alone import own_forward
from ..generated import source_of, with_forward
from ..inplace import in_place
from ..layers import QConv3d_NoAct
from ..tracer import IN_PLACE
from .bit_conv import BitConv3d
from .epilogue import Epilogue
from .layer import PackedConv3d
from .obstacles import has_hooks

_Modules = Mapping[Any, nn.Module]
"""The modules of a region by what the nodes of its graph say."""

_RELU = {F.relu, torch.relu, torch.relu_, F.relu_, "relu", "relu_"}
_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_CONCATENATE = {torch.cat, torch.concat, torch.concatenate}
_CONCATENATED = 2
"""Arguments of a concatenation: the tensors and the dimension."""
_CHANNELS = {1, -4}
"""The dimension of channels in (N, C, D, H, W)."""
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
"""What passes its input on, in eval mode."""
_TAKEN = (nn.BatchNorm3d, nn.ReLU, nn.LeakyReLU, nn.PReLU, *_NOTHING)


def fuse(model: nn.Module, *, folds_floats: bool) -> dict[str, str]:
    """Rewrite the forward of every part of the model that can be followed, and return those that cannot, with the reason.

    Args:
        model: in eval mode, with packed layers. Its modules keep their places; those whose work a packed layer does now are
            not called any more.
        folds_floats: whether float convolutions take in the BatchNorm behind them: they round otherwise then.
    """
    obstacles: dict[str, str] = {}
    names = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    for name, graph in list(_regions("", model, obstacles)):
        region = model.get_submodule(name)
        _fuse_region(region, graph, names, folds_floats=folds_floats)
        for node in graph.nodes:
            if IN_PLACE in node.meta:
                node.target, node.args = in_place, (node.meta[IN_PLACE], *node.args)
        region.__class__ = with_forward(region, source_of(graph))
    return obstacles


def _regions(name: str, module: nn.Module, obstacles: dict[str, str]) -> Iterator[tuple[str, fx.Graph]]:
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
        yield from _regions(f"{name}.{inner}".removeprefix("."), module.get_submodule(inner), obstacles)


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


def _fuse_region(region: nn.Module, graph: fx.Graph, names: Counter[nn.Module], *, folds_floats: bool) -> None:
    """Rewrite the graph of a region.

    What comes after one call of a layer does not come after others, so that only layers with one call take it in: with one
    node in the graph, and one name in the whole model (``names`` tells of how many there are).
    """
    modules = dict(region.named_modules(remove_duplicate=False))
    calls = Counter(modules[node.target] for node in graph.nodes if node.op == "call_module")
    alone = {module for module, count in calls.items() if count == names[module] == 1}
    layers = {
        node: modules[node.target]
        for node in graph.nodes
        if node.op == "call_module" and isinstance(modules[node.target], PackedConv3d) and modules[node.target] in alone
    }
    for node in list(graph.nodes) if folds_floats else ():
        _fold_norm(node, modules, alone)
    ends = {_take_in(node, layer, modules): layer for node, layer in layers.items()}
    for node in graph.nodes:
        parts = _parts(node)
        if parts and all(part in ends for part in parts):
            _take_in_before(node, [ends[part] for part in parts], modules)
    for node, layer in ends.items():
        _hand_on(node, layer, ends)
    graph.lint()


def _take_in(node: fx.Node, layer: PackedConv3d, modules: _Modules) -> fx.Node:
    """Let the layer do what follows it, as far as it can, and return its node in the place of the last operation."""
    while len(node.users) == 1:
        (after,) = node.users
        other = _added_to(node, after)
        module = _module_of(after, modules)
        is_taken = module is not None and _takes(layer.epilogue, module)
        if not (is_taken if other is None else layer.epilogue.add()):
            break
        with node.graph.inserting_before(after):
            taken = node.graph.call_module(str(node.target), node.args if other is None else (node.args[0], other))
        layer.takes_in.append(_title(after, modules))
        after.replace_all_uses_with(taken)
        node.graph.erase_node(after)
        node.graph.erase_node(node)
        node = taken
    layer.finish()
    return node


def _parts(node: fx.Node) -> list[fx.Node]:
    """Return the tensors whose channels a node puts side by side, where no other node reads any of them, else []."""
    if node.op != "call_function" or node.target not in _CONCATENATE or len(node.args) + len(node.kwargs) != _CONCATENATED:
        return []
    parts, dim = node.args[0] if node.args else None, node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if not isinstance(parts, list | tuple) or dim not in _CHANNELS or len(set(parts)) < len(parts):
        return []
    return [] if any(not isinstance(part, fx.Node) or len(part.users) > 1 for part in parts) else list(parts)


def _take_in_before(node: fx.Node, layers: Sequence[PackedConv3d], modules: _Modules) -> None:
    """Let layers whose outputs the node puts side by side do what follows it, each for its own channels."""
    ends = accumulate(layer.out_channels for layer in layers)
    channels = [slice(end - layer.out_channels, end) for end, layer in zip(ends, layers, strict=True)]
    while len(node.users) == 1:
        (after,) = node.users
        epilogues = [copy.copy(layer.epilogue) for layer in layers]
        module = _module_of(after, modules)
        parts = [] if module is None else [_of_channels(module, some) for some in channels]
        if not parts or not all(map(_takes, epilogues, parts)):
            return
        for layer, epilogue in zip(layers, epilogues, strict=True):
            layer.epilogue = epilogue
            layer.takes_in.append(_title(after, modules))
            layer.finish()
        after.replace_all_uses_with(node)
        node.graph.erase_node(after)


def _of_channels(module: nn.Module, channels: slice) -> nn.Module:
    """Return what a module, which treats channels one by one, does to some of them."""
    part = copy.deepcopy(module)
    for tensors in (part._parameters, part._buffers):
        for name, values in tensors.items():
            if values is not None and values.numel() > 1:  # one number is for all channels
                tensors[name] = values.detach()[channels]  # type: ignore[assignment]  # no Parameter: nobody trains it
    return part


def _fold_norm(node: fx.Node, modules: _Modules, alone: Set[nn.Module]) -> None:
    """Fold the BatchNorm behind a float convolution into its weight."""
    after = next(iter(node.users), node)
    conv, norm = (modules[each.target] if each.op == "call_module" else None for each in (node, after))
    if not isinstance(conv, nn.Conv3d) or isinstance(conv, QConv3d_NoAct) or type(conv).forward is not nn.Conv3d.forward:
        return
    is_alone = len(node.users) == 1 and conv in alone and "weight" in conv._parameters
    if isinstance(norm, nn.BatchNorm3d) and _is_constant(norm) and is_alone and not has_hooks(conv):
        factor, summand = _of_norm(norm)
        bias = 0.0 if conv.bias is None else conv.bias.detach().double()
        dtype = conv.weight.dtype
        conv.weight = nn.Parameter((conv.weight.detach().double() * factor.view(-1, 1, 1, 1, 1)).to(dtype))
        conv.bias = nn.Parameter((bias * factor + summand).to(dtype))
        after.replace_all_uses_with(node)
        node.graph.erase_node(after)


def _is_constant(norm: nn.BatchNorm3d) -> bool:
    """Whether a BatchNorm multiplies and adds what no input changes, and nothing else happens there."""
    is_plain = type(norm).forward is nn.BatchNorm3d.forward and not has_hooks(norm)
    return is_plain and norm.running_mean is not None and norm.running_var is not None


def _title(node: fx.Node, modules: _Modules) -> str:
    if node.op == "call_module":
        return type(modules[node.target]).__name__
    return getattr(node.target, "__name__", str(node.target))


def _added_to(value: fx.Node, node: fx.Node) -> fx.Node | None:
    """Return the tensor that the node adds to the value, which no other name can see; None where it does something else."""
    if node.target not in _ADD or node.op not in ("call_function", "call_method") or node.kwargs:
        return None
    first, second = node.args
    is_overwritten = IN_PLACE in node.meta or node.target in ("add_", operator.iadd)
    other = second if first is value else first
    is_sum = isinstance(other, fx.Node) and other is not value and (first is value or not is_overwritten)
    return other if is_sum else None  # type: ignore[return-value]  # a Node


def _module_of(node: fx.Node, modules: _Modules) -> nn.Module | None:
    """Return a module that does what the node does, if it is of those that a layer may take in."""
    if node.op != "call_module":
        is_relu = node.target in _RELU and len(node.args) == 1 and not set(node.kwargs) - {"inplace"}
        return nn.ReLU() if is_relu else None
    module = modules[node.target]
    is_plain = not has_hooks(module) and len(node.args) == 1 and not node.kwargs
    return module if is_plain and isinstance(module, _TAKEN) else None


def _takes(epilogue: Epilogue, module: nn.Module) -> bool:
    """Take in what a module does, and return whether that can be."""
    if isinstance(module, nn.BatchNorm3d):
        return _is_constant(module) and epilogue.normalize(*_of_norm(module), module)
    slope = _slope(module)
    return type(module) in _NOTHING or (slope is not None and epilogue.bend(slope, module))


def _slope(module: nn.Module) -> Tensor | None:
    """Return the slope below 0 of an activation, float64 (1,) or (C,); None of anything else."""
    if type(module) is nn.ReLU:
        return torch.zeros(1).double()
    if type(module) is nn.LeakyReLU:
        return torch.full((1,), module.negative_slope).double()
    return module.weight.detach().double() if type(module) is nn.PReLU else None


def _of_norm(norm: nn.BatchNorm3d) -> tuple[Tensor, Tensor]:
    """Return factor and summand of a BatchNorm in eval mode, (C,), as torch itself computes them."""
    zeros: Tensor = torch.zeros_like(norm.running_mean)  # type: ignore[arg-type]  # it has statistics
    ones = (zeros + 1).view(1, -1, 1, 1, 1)
    factor = F.batch_norm(ones, zeros, norm.running_var, norm.weight, eps=norm.eps)
    summand = norm(zeros.view(1, -1, 1, 1, 1))
    return factor.detach().flatten().double(), summand.detach().flatten().double()


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
