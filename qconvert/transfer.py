"""The rules of the graph pass: how each operation changes what is known about its input. One table, `RULES`.

x has mean m and variance v per channel; operands are taken to be independent of each other.

| operation | what comes out |
|---|---|
| elementwise f | f of each point; for a ReLU of a normal value, with z = m / s, the mean is m Phi(z) + s phi(z) |
| x + y, x - y | m_x ± m_y, v_x + v_y |
| x y | m_x m_y, v_x v_y + v_x m_y^2 + v_y m_x^2; for a number a or a value per channel: a m, a^2 v |
| x with itself | f of each point: two parts of a value are two values |
| convolution, linear | normal: mean sum w m + b, variance sum w^2 v, over values and border as the window meets them |
| transposed convolution | the same over the 1 / stride of the kernel that meets one output |
| batch, instance, group, layer norm | mean 0 and variance 1 over a channel, group or all channels, times weight, plus bias |
| average pooling over n values | m, v / sqrt(n): neighbours are neither equal (v) nor independent (v / n) |
| max pooling over n values | the largest of n^(3/4) independent ones |
| cat, chunk, split, index, permute | the channels, joined, taken apart, moved; a cat along another dimension is a mixture |
| reshape, view, flatten | the same values, channels no longer told apart; of a mean over dimensions only the mean is right |
| dropout, identity, pad, interpolate, adaptive pooling, casts | as it was |
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .distribution import UNKNOWN, Distribution, mixture
from .geometry import Size, window

_SLICE = 2**18
"""Weights that are squared at a time: what fits a cache."""

_RANK = 5
"""Dimensions of a tensor (N, C, D, H, W)."""


@dataclass(frozen=True)
class Operation:
    """One node of a graph: what it runs, on what.

    Attributes:
        name: what it is in lower case without underscores, the same for a module, a function and a method: "relu".
        run: the operation itself.
        args, kwargs: its operands: `Distribution` for a tensor that depends on the input; settings and weights as they are.
        module: the module that it calls, if it does.
        training: whether normalisations take the statistics of the batch.
    """

    name: str
    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    module: nn.Module | None = None
    training: bool = False

    @property
    def x(self) -> Distribution:
        """The first operand."""
        first = self.args[0] if self.args else self.kwargs.get("input")
        return first if isinstance(first, Distribution) else UNKNOWN

    def setting(self, name: str, position: int, default: Any = None) -> Any:
        """Return an attribute of the module, or an argument of the function by its name or position."""
        if self.module is not None:
            return getattr(self.module, name, default)
        return self.kwargs.get(name, self.args[position] if len(self.args) > position else default)


Rule = Callable[[Operation], Any]


def convolved(
    weight: Tensor,
    groups: int,
    mean: Tensor,
    variance: Tensor,
    quantize: Callable[[Tensor], Tensor] = nn.Identity(),  # noqa: B008 (it has no state)
) -> tuple[Tensor, Tensor]:
    """Return mean and variance, shape (O,), of a convolution of independent values: sum w m and sum w^2 v.

    Args:
        weight: shape (O, C / groups, ...).
        groups: number of groups.
        mean: of the values, shape (C,).
        variance: of the values, shape (C,).
        quantize: what is done to the weight first, some output channels at a time: no copy of a whole weight is made.
    """
    rows = weight.detach().flatten(1)
    taps = rows.shape[1] * groups // len(mean)
    mean, variance = (each.to(rows.device).repeat_interleave(taps) for each in (mean, variance))
    if groups > 1:
        rows = quantize(rows).float().view(groups, -1, rows.shape[1])
        sums = [torch.bmm(part, each.view(groups, -1, 1)) for part, each in ((rows, mean), (rows * rows, variance))]
        return sums[0].flatten().cpu(), sums[1].flatten().cpu()
    means, variances = [], []
    parts = torch.split(rows, max(1, _SLICE // max(1, rows.shape[1])))
    scratch = torch.empty(parts[0].shape, device=rows.device)  # fresh memory for each part's squares costs the most time
    for part in parts:
        wide = quantize(part).float()
        means.append(wide @ mean)
        variances.append(torch.mul(wide, wide, out=scratch[: len(part)]) @ variance)
    return torch.cat(means).cpu(), torch.cat(variances).cpu()


def bordered(mean: Tensor, variance: Tensor, inside: float, border: float) -> tuple[Tensor, Tensor]:
    """Return mean and variance of what a window reads: values in the share ``inside``, the border's value in the rest."""
    padded = inside * mean + (1 - inside) * border
    return padded, inside * (variance + mean**2) + (1 - inside) * border**2 - padded**2


def _convolution(operation: Operation, position: int = 1) -> Distribution:
    weight, bias = operation.setting("weight", position), operation.setting("bias", position + 1)
    groups = operation.setting("groups", position + 5, 1)
    if not _is_plain(weight) or not isinstance(groups, int):
        return UNKNOWN
    x = _channels_first(operation.x).wide(weight.shape[1] * groups)
    settings = (operation.setting(*each) for each in (("stride", 3, 1), ("padding", 4, 0), ("dilation", 5, 1)))
    moved = window(tuple(weight.shape[2:]), *settings)
    inside = 1.0
    if moved is not None and x.size is not None:
        # a border that repeats the values is none
        inside = moved.inside(x.size) if getattr(operation.module, "padding_mode", "zeros") == "zeros" else 1.0
        x = replace(x, size=moved.output(x.size))
    return _normal(*convolved(weight, groups, *bordered(x.mean, x.std**2, inside, 0.0)), bias, x)


def _transposed_convolution(operation: Operation) -> Distribution:
    conv = operation.module
    if not isinstance(conv, nn.modules.conv._ConvTransposeNd) or conv.groups > 1 or not _is_plain(conv.weight):
        return UNKNOWN
    x = _channels_first(operation.x).wide(conv.in_channels)
    if x.size is not None and len(conv.stride) == len(x.size):
        depth, height, width = (n * step for n, step in zip(x.size, conv.stride, strict=True))
        x = replace(x, size=(depth, height, width))
    share = 1 / math.prod(conv.stride)
    mean, variance = convolved(conv.weight.transpose(0, 1), 1, x.mean, x.std**2)
    return _normal(mean * share, variance * share, conv.bias, x)


def _channels_first(x: Distribution) -> Distribution:
    return x if x.axis == 1 else replace(x.pooled(), axis=1, size=None)


def _linear(operation: Operation) -> Distribution:
    weight, bias = operation.setting("weight", 1), operation.setting("bias", 2)
    if not _is_plain(weight):
        return UNKNOWN
    x = operation.x if operation.x.axis == -1 else replace(operation.x.pooled(), size=None)
    x = x.wide(weight.shape[1])
    return replace(_normal(*convolved(weight, 1, x.mean, x.std**2), bias, x), axis=-1)


def _is_plain(weight: object) -> bool:
    """Whether it is a tensor with values."""
    return isinstance(weight, Tensor) and not isinstance(weight, nn.UninitializedParameter) and not weight.is_meta


def _normal(mean: Tensor, variance: Tensor, bias: Tensor | None, x: Distribution) -> Distribution:
    """Return the normal distribution of a sum of many values of x."""
    if isinstance(bias, Tensor):
        mean = mean + bias.detach().float().cpu()
    return replace(x, points=Distribution.normal(mean, variance.sqrt()).points, nonnegative=False)


def _elementwise(operation: Operation, *, nonnegative: bool | None) -> Distribution:
    """``nonnegative``: whether the function is for every input; None: for every input that is."""
    x = operation.x
    if any(isinstance(value, (Distribution, Tensor)) for value in (*operation.args[1:], *operation.kwargs.values())):
        return UNKNOWN
    certain = x.nonnegative if nonnegative is None else nonnegative
    return x.map(lambda points: operation.run(points.clone(), *operation.args[1:], **operation.kwargs), nonnegative=certain)


def _prelu(operation: Operation) -> Distribution:
    weight = operation.setting("weight", 1)
    if not _is_plain(weight):
        return UNKNOWN
    x = operation.x.wide(weight.numel()) if weight.numel() > 1 else operation.x
    slope = weight.detach().float().cpu().reshape(-1, 1)
    return x.map(lambda points: torch.where(points > 0, points, slope * points), nonnegative=x.nonnegative)


def _clamp(operation: Operation) -> Distribution:
    lowest = torch.full((1, 1), 0.0 if operation.x.nonnegative else torch.finfo().min, device="cpu")
    of_lowest = replace(operation, args=(replace(operation.x, points=lowest), *operation.args[1:]))
    certain = bool((_elementwise(of_lowest, nonnegative=False).points >= 0).all())
    return _elementwise(operation, nonnegative=certain)


def _power(operation: Operation) -> Distribution:
    exponent = operation.setting("exponent", 1)
    return _elementwise(operation, nonnegative=True if exponent in (2, 4) else None)


def _arithmetic(operation: Operation, function: Callable[[Any, Any], Any], *, keeps_sign: bool) -> Distribution:
    if len(operation.args) != 2 or operation.kwargs:  # noqa: PLR2004 (with alpha= or out= it is something else)
        return UNKNOWN
    left, right = operation.args
    if isinstance(left, Distribution) and isinstance(right, Distribution):
        if left is right:
            return left.map(lambda points: function(points, points), nonnegative=keeps_sign and left.nonnegative)
        return left.combine(right, function, nonnegative=keeps_sign and left.nonnegative and right.nonnegative)
    x, constant = (left, right) if isinstance(left, Distribution) else (right, left)
    column = _column(constant)
    if not isinstance(x, Distribution) or column is None or not _is_along_channels(constant, x):
        return UNKNOWN
    if len(column) > 1:
        x = x.wide(len(column))
    certain = keeps_sign and x.nonnegative and bool((column >= 0).all())
    if isinstance(left, Distribution):
        return x.map(lambda points: function(points, column), nonnegative=certain)
    return x.map(lambda points: function(column, points), nonnegative=certain)


def _column(constant: object) -> Tensor | None:
    """Return a number, or a tensor of one value per channel, as a column beside the points."""
    if isinstance(constant, (int, float)):
        return torch.tensor([[float(constant)]], device="cpu")
    if isinstance(constant, Tensor) and not constant.is_meta and constant.numel() == max(constant.shape, default=1):
        return constant.detach().float().cpu().reshape(-1, 1)
    return None


def _is_along_channels(constant: object, x: Distribution) -> bool:
    """Whether broadcasting gives each channel of x, of (N, C, D, H, W), one value of a vector; a number is fine."""
    if not isinstance(constant, Tensor) or constant.numel() == 1:
        return True
    from_the_end = 1 if x.axis == -1 else _RANK - 1
    return constant.dim() >= from_the_end and constant.shape[-from_the_end] == constant.numel()


def is_untrained(norm: nn.Module) -> bool:
    """Whether the running statistics are what they start from, mean 0 and variance 1."""
    if not isinstance(norm, _NormBase) or norm.running_mean is None or norm.running_var is None or norm.running_mean.is_meta:
        return False
    if isinstance(norm.running_mean, nn.UninitializedBuffer):
        return False
    return not bool(norm.running_mean.any()) and bool((norm.running_var == 1).all())


def _channel_norm(operation: Operation) -> Distribution:
    norm = operation.module
    weight, bias = operation.setting("weight", 3), operation.setting("bias", 4)
    x = operation.x
    if norm is not None and is_untrained(norm) and not operation.training:
        return _affine(x, weight, bias)
    channels = getattr(norm, "num_features", weight.numel() if isinstance(weight, Tensor) else x.channels)
    x = x.wide(channels)
    return replace(_affine(x.standardized(channels), weight, bias), known=True)


def _group_norm(operation: Operation) -> Distribution:
    groups, weight, bias = (operation.setting(*key) for key in (("num_groups", 1), ("weight", 2), ("bias", 3)))
    x = operation.x
    if isinstance(weight, Tensor):
        x = x.wide(weight.numel())
    if not isinstance(groups, int) or x.channels % groups:
        return UNKNOWN
    return replace(_affine(x.standardized(groups), weight, bias), known=True)


def _layer_norm(operation: Operation) -> Distribution:
    weight, bias = operation.setting("weight", 2), operation.setting("bias", 3)
    last = isinstance(weight, Tensor) and weight.dim() == 1
    x = replace(_affine(operation.x.standardized(1), weight, bias), known=True)
    return replace(x, axis=-1, size=x.size if x.axis == -1 else None) if last else x


def _affine(x: Distribution, weight: Tensor | None, bias: Tensor | None) -> Distribution:
    for parameter, function in ((weight, torch.mul), (bias, torch.add)):
        column = None if parameter is None else _column(parameter)
        if column is not None:
            x = (x.wide(len(column)) if len(column) > 1 else x).map(partial(function, column), nonnegative=False)
    return x


def _window(operation: Operation) -> int:
    """Return how many values a pooling takes together, 1 where it does not say."""
    size = operation.setting("kernel_size", 1)
    if isinstance(size, int):
        rank = next((n for n in (1, 2, 3) if operation.name.endswith(f"{n}d")), 1)
        return math.prod([size] * rank)
    sizes = size if isinstance(size, (tuple, list)) and all(isinstance(n, int) for n in size) else ()
    return math.prod(sizes)


def _average_pooling(operation: Operation) -> Distribution:
    x = _strided(operation)
    spread = _window(operation) ** -0.25
    mean = x.mean[:, None]
    return replace(x, points=mean + (x.points - mean) * spread)


def _max_pooling(operation: Operation) -> Distribution:
    return _strided(operation).largest_of(_window(operation) ** 0.75)


def _strided(operation: Operation) -> Distribution:
    """Return the input with the size that a pooling leaves."""
    x = operation.x
    settings = (operation.setting(name, place) for name, place in (("kernel_size", 1), ("stride", 2), ("padding", 3)))
    kernel, stride, padding = settings
    moved = window(kernel, stride, 0 if padding is None else padding)
    return x if x.size is None or moved is None else replace(x, size=moved.output(x.size))


def _interpolate(operation: Operation) -> Distribution:
    x, factor, size = operation.x, operation.setting("scale_factor", 2), operation.setting("size", 1)
    if isinstance(factor, (int, float)) and x.size is not None:
        depth, height, width = (max(1, int(n * factor)) for n in x.size)
        return replace(x, size=(depth, height, width))
    return x if factor is None and size is None else replace(x, size=None)


def _cat(operation: Operation) -> Distribution:
    parts = operation.args[0] if operation.args else operation.kwargs.get("tensors")
    dim = operation.setting("dim", 1, 0)
    if not isinstance(parts, (tuple, list)) or not parts or not all(isinstance(part, Distribution) for part in parts):
        return UNKNOWN
    joined = mixture(parts)
    if not _is_channel(dim, joined):
        return replace(joined, size=None) if len(parts) > 1 else joined
    if any(part.channels == 1 for part in parts):
        return joined.pooled()
    return replace(joined, points=torch.cat([part.points for part in parts]))


def _is_channel(dim: object, x: Distribution) -> bool:
    """Whether the dimension is the channels', of a tensor (N, C, D, H, W)."""
    return dim in {1: (1, -4), -1: (4, -1)}.get(x.axis, ())


def _split(operation: Operation, *, by_size: bool) -> Any:
    x, amount, dim = operation.x, operation.args[1] if len(operation.args) > 1 else None, operation.setting("dim", 2, 0)
    if by_size:
        sizes = {"split_size", "split_size_or_sections"} & operation.kwargs.keys()
        amount = operation.kwargs[sizes.pop()] if sizes else amount
    else:
        amount = operation.kwargs.get("chunks", amount)
    if not _is_channel(dim, x):
        return replace(x, size=None)
    if not isinstance(amount, (int, list, tuple)) or x.channels == 1:
        return x.pooled()
    try:
        parts: Sequence[Tensor] = (torch.split if by_size else torch.chunk)(x.points, amount)  # type: ignore[arg-type]
    except (RuntimeError, TypeError):  # sizes that are not of this many channels
        return x.pooled()
    return tuple(replace(x, points=part) for part in parts)


def _item(operation: Operation) -> Any:
    container, index = operation.args
    if isinstance(container, Distribution):
        # a bare number may be that of a part; a new object: it is not the whole
        return _indexed(container, index) if isinstance(index, (tuple, slice)) else replace(container)
    if isinstance(container, (tuple, list)) and isinstance(index, int) and -len(container) <= index < len(container):
        return container[index]
    return UNKNOWN


def _indexed(x: Distribution, index: Any) -> Distribution:
    index = index if isinstance(index, tuple) else (index,)
    if any(part is Ellipsis for part in index):
        place = next(place for place, part in enumerate(index) if part is Ellipsis)
        index = (*index[:place], *[slice(None)] * (_RANK - len(index) + 1), *index[place + 1 :])
    others = [*index, *[slice(None)] * (_RANK - len(index))]
    channels = others.pop(x.axis)
    is_moved = x.axis == 1 and isinstance(others[0], int)
    plain = isinstance(channels, (int, slice, list)) and all(isinstance(part, (int, slice)) for part in others)
    if not plain or is_moved or len(others) != _RANK - 1:
        return _pooled_value(x)
    try:
        points = x.points[[channels] if isinstance(channels, int) else channels] if x.channels > 1 else x.points
    except (TypeError, IndexError):  # computed from a size, which is not known
        return _pooled_value(x)
    return replace(x, points=points, size=_cut(x.size, others[1:])) if len(points) else _pooled_value(x)


def _cut(size: Size | None, slices: Sequence[Any]) -> Size | None:
    """Return the size of a part of a volume; None if it has fewer dimensions, or a bound is computed."""
    if size is None or not all(isinstance(part, slice) for part in slices):
        return None
    try:
        depth, height, width = (len(range(n)[part]) for n, part in zip(size, slices, strict=True))
    except TypeError:
        return None
    return depth, height, width


def _permute(operation: Operation) -> Distribution:
    x = operation.x
    dims = operation.setting("dims", 1)
    order = list(dims) if isinstance(dims, (tuple, list)) else list(operation.args[1:])
    if not order or not all(isinstance(dim, int) for dim in order):
        return _pooled_value(x)
    return _reordered(x, [dim % len(order) for dim in order])


def _reordered(x: Distribution, order: list[int]) -> Distribution:
    """Return x with its dimensions in another order."""
    channels = x.axis % len(order)
    place = order.index(channels)
    if place not in (1, len(order) - 1):
        return _pooled_value(x)
    volume = [dim for dim in range(1, len(order)) if dim != channels]
    moved = [dim for dim in order[1:] if dim != channels]
    size = None
    if x.size is not None and len(order) == _RANK and order[0] == 0:
        depth, height, width = (x.size[volume.index(dim)] for dim in moved)
        size = depth, height, width
    return replace(x, axis=1 if place == 1 else -1, size=size)


def _transpose(operation: Operation) -> Distribution:
    x = operation.x
    words = ("dim0", "dim1") if operation.name == "transpose" else ("axis0", "axis1")
    dims = [operation.setting(word, place) for place, word in enumerate(words, start=1)]
    if not all(isinstance(dim, int) for dim in dims):
        return _pooled_value(x)
    if x.size is not None:
        order = list(range(_RANK))
        first, second = (dim % _RANK for dim in dims)
        order[first], order[second] = second, first
        return _reordered(x, order)
    # of how many dimensions it is, is not known: these may be the channels'
    suspects = [dim == 1 or dim < -1 if x.axis == 1 else dim == -1 or dim > 1 for dim in dims]
    return _pooled_value(x) if any(suspects) else replace(x)


def _pad(operation: Operation) -> Distribution:
    x, mode, value = operation.x, operation.setting("mode", 2, "constant"), operation.setting("value", 3, 0)
    negative = mode == "constant" and isinstance(value, (int, float)) and value < 0
    amounts = operation.setting("padding" if operation.module else "pad", 1)
    size = None
    if isinstance(amounts, (tuple, list)) and all(isinstance(n, int) for n in amounts):
        if x.size is not None and x.axis == 1:
            # (left W, right W, left H, ...)
            width, height, depth = (n + sum(amounts[2 * dim : 2 * dim + 2]) for dim, n in enumerate(reversed(x.size)))
            size = depth, height, width
        if any(amounts[6:]):
            x = x.pooled()  # channels of zeros
    return replace(x, nonnegative=x.nonnegative and not negative, size=size)


def _as_it_was(operation: Operation) -> Distribution:
    return operation.x


def _pooled_away(operation: Operation) -> Distribution:
    return replace(operation.x, size=None)


def _pooled(operation: Operation) -> Distribution:
    return _pooled_value(operation.x)


def _pooled_value(x: Distribution) -> Distribution:
    return replace(x.pooled(), axis=1, size=None)


def _softmax(_: Operation) -> Distribution:
    return replace(UNKNOWN.map(torch.sigmoid, nonnegative=True), known=False)


def _subtracted_from(left: Any, right: Any) -> Any:
    return right - left


def _table() -> dict[str, Rule]:
    rules: dict[str, Rule] = {}

    def add(names: str, rule: Rule) -> None:
        rules.update(dict.fromkeys(names.split(), rule))

    add("relu relu6 sigmoid hardsigmoid softplus exp abs square sqrt rsqrt", partial(_elementwise, nonnegative=True))
    keeping = (
        "leakyrelu elu selu celu gelu silu mish hardswish tanh softsign hardshrink softshrink expm1 log1p erf reciprocal"
    )
    add(keeping, partial(_elementwise, nonnegative=None))
    add("logsigmoid log neg tanhshrink sin cos", partial(_elementwise, nonnegative=False))
    add("hardtanh clamp clip clampmin", _clamp)
    add("pow", _power)
    add("prelu", _prelu)
    add("softmax", _softmax)
    for name, function, keeps_sign in (
        ("add", operator.add, True),
        ("sub", operator.sub, False),
        ("rsub", _subtracted_from, False),
        ("mul", operator.mul, True),
        ("div", operator.truediv, True),
    ):
        names = {"sub": "sub isub", "rsub": "rsub", "div": "div truediv itruediv"}.get(name, f"{name} i{name} r{name}")
        add(names, partial(_arithmetic, function=function, keeps_sign=keeps_sign))
    add("batchnorm batchnorm1d batchnorm2d batchnorm3d syncbatchnorm", _channel_norm)
    add("instancenorm instancenorm1d instancenorm2d instancenorm3d", _channel_norm)
    add("groupnorm", _group_norm)
    add("layernorm", _layer_norm)
    add("conv1d conv2d conv3d", _convolution)
    add("convtranspose1d convtranspose2d convtranspose3d", _transposed_convolution)
    add("linear", _linear)
    add("avgpool1d avgpool2d avgpool3d", _average_pooling)
    add("maxpool1d maxpool2d maxpool3d", _max_pooling)
    add("cat concat concatenate", _cat)
    add("chunk", partial(_split, by_size=False))
    add("split", partial(_split, by_size=True))
    add("getitem", _item)
    add("permute", _permute)
    add("transpose swapaxes", _transpose)
    add("reshape view flatten unflatten squeeze unsqueeze mean", _pooled)
    add("pad constantpad3d zeropad3d reflectionpad3d replicationpad3d", _pad)
    add("interpolate upsample", _interpolate)
    add("adaptiveavgpool1d adaptiveavgpool2d adaptiveavgpool3d adaptivemaxpool3d", _pooled_away)
    add("identity dropout dropout1d dropout2d dropout3d alphadropout featurealphadropout", _as_it_was)
    add("contiguous clone detach to float half bfloat16 double typeas", _as_it_was)
    return rules


RULES = _table()


def transfer(operation: Operation) -> Any:
    """Return what is known about the operation's result: a `Distribution`, or a container of them."""
    rule = RULES.get(operation.name)
    result = UNKNOWN if rule is None else rule(operation)
    return replace(UNKNOWN) if result is UNKNOWN else result  # two unknown values are not one value twice
