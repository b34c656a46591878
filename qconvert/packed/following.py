"""What follows a layer in a graph, as far as an epilogue takes it in."""

import copy
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor, fx, nn

from ..tracer import IN_PLACE
from .epilogue import Epilogue
from .obstacles import has_hooks

Modules = Mapping[Any, nn.Module]
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


def added_to(value: fx.Node, node: fx.Node) -> fx.Node | None:
    """Return the tensor that the node adds to the value, which no other name can see; None where it does something else."""
    if node.target not in _ADD or node.op not in ("call_function", "call_method") or node.kwargs:
        return None
    first, second = node.args
    is_overwritten = IN_PLACE in node.meta or node.target in ("add_", operator.iadd)
    other = second if first is value else first
    is_sum = isinstance(other, fx.Node) and other is not value and (first is value or not is_overwritten)
    return other if is_sum else None  # type: ignore[return-value]  # a Node


def side_by_side(node: fx.Node) -> list[fx.Node]:
    """Return the tensors whose channels a node puts side by side, where no other node reads any of them, else []."""
    if node.op != "call_function" or node.target not in _CONCATENATE or len(node.args) + len(node.kwargs) != _CONCATENATED:
        return []
    parts, dim = node.args[0] if node.args else None, node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if not isinstance(parts, list | tuple) or dim not in _CHANNELS or len(set(parts)) < len(parts):
        return []
    return [] if any(not isinstance(part, fx.Node) or len(part.users) > 1 for part in parts) else list(parts)


def module_of(node: fx.Node, modules: Modules) -> nn.Module | None:
    """Return a module that does what the node does, if it is of those that a layer may take in."""
    if node.op != "call_module":
        is_relu = node.target in _RELU and len(node.args) == 1 and not set(node.kwargs) - {"inplace"}
        return nn.ReLU() if is_relu else None
    module = modules[node.target]
    is_plain = not has_hooks(module) and len(node.args) == 1 and not node.kwargs
    return module if is_plain and isinstance(module, _TAKEN) else None


def takes(epilogue: Epilogue, module: nn.Module) -> bool:
    """Take in what a module does, and return whether that can be."""
    if isinstance(module, nn.BatchNorm3d):
        return is_constant(module) and epilogue.normalize(*of_norm(module), module)
    slope = _slope(module)
    return type(module) in _NOTHING or (slope is not None and epilogue.bend(slope, module))


def of_channels(module: nn.Module, channels: slice) -> nn.Module:
    """Return what a module, which treats channels one by one, does to some of them."""
    part = copy.deepcopy(module)
    for tensors in (part._parameters, part._buffers):
        for name, values in tensors.items():
            if values is not None and values.numel() > 1:  # one number is for all channels
                tensors[name] = values.detach()[channels]  # type: ignore[assignment]  # no Parameter: nobody trains it
    return part


def _slope(module: nn.Module) -> Tensor | None:
    """Return the slope below 0 of an activation, float64 (1,) or (C,); None of anything else."""
    if type(module) is nn.ReLU:
        return torch.zeros(1).double()
    if type(module) is nn.LeakyReLU:
        return torch.full((1,), module.negative_slope).double()
    return module.weight.detach().double() if type(module) is nn.PReLU else None


def of_norm(norm: nn.BatchNorm3d) -> tuple[Tensor, Tensor]:
    """Return factor and summand of a BatchNorm in eval mode, (C,), as torch itself computes them."""
    zeros: Tensor = torch.zeros_like(norm.running_mean)  # type: ignore[arg-type]  # it has statistics
    ones = (zeros + 1).view(1, -1, 1, 1, 1)
    factor = F.batch_norm(ones, zeros, norm.running_var, norm.weight, eps=norm.eps)
    summand = norm(zeros.view(1, -1, 1, 1, 1))
    return factor.detach().flatten().double(), summand.detach().flatten().double()


def is_constant(norm: nn.BatchNorm3d) -> bool:
    """Whether a BatchNorm multiplies and adds what no input changes, and nothing else happens there."""
    is_plain = type(norm).forward is nn.BatchNorm3d.forward and not has_hooks(norm)
    return is_plain and norm.running_mean is not None and norm.running_var is not None


@torch.no_grad()
def make_identity(norm: nn.BatchNorm3d) -> None:
    """Let a BatchNorm in eval mode return its input, but for rounding."""
    norm.running_mean.zero_()  # type: ignore[union-attr]  # it has statistics
    norm.running_var.fill_(1 - norm.eps)  # type: ignore[union-attr]
    if norm.affine:
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)


def title(node: fx.Node, modules: Modules) -> str:
    """Return what the summary calls the operation of a node."""
    if node.op == "call_module":
        return type(modules[node.target]).__name__
    return getattr(node.target, "__name__", str(node.target))
