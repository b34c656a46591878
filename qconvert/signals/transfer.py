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
| maximum, minimum, logaddexp of x and y | of each point with one of the other's |
| average pooling over n values, adaptive too | m, v / sqrt(n): neighbours are neither equal (v) nor independent (v / n) |
| max pooling over n values, adaptive too | the largest of n^(3/4) independent ones |
| softmax over channels | e^x / (e^x + the mean of the sum over the others); over another dimension unknown |
| cat, chunk, split, index, permute | the channels, joined, taken apart, moved; a cat along another dimension is a mixture |
| reshape, view, flatten | the same values, channels no longer told apart; of a mean over dimensions only the mean is right |
| dropout, identity, pad, interpolate, flip, roll, casts | as it was |
"""

import operator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from .distribution import UNKNOWN
from .norms import channel_norm, group_norm, layer_norm
from .operation import Operation, Rule
from .pointwise import arithmetic, clamp, elementwise, extremum, power, prelu, softmax, subtracted_from
from .products import convolution, linear, transposed_convolution
from .shapes import (
    adaptive_average_pooling,
    adaptive_max_pooling,
    as_it_was,
    average_pooling,
    cat,
    interpolate,
    item,
    max_pooling,
    pad,
    permute,
    pooled,
    rearranged,
    split,
    transpose,
)


def _table() -> dict[str, Rule]:
    rules: dict[str, Rule] = {}

    def add(names: str, rule: Rule) -> None:
        rules.update(dict.fromkeys(names.split(), rule))

    add(
        "relu relu6 sigmoid hardsigmoid softplus exp abs square sqrt rsqrt zeroslike oneslike",
        partial(elementwise, nonnegative=True),
    )
    keeping = (
        "leakyrelu elu selu celu gelu silu mish hardswish tanh softsign hardshrink softshrink expm1 log1p erf reciprocal"
    )
    add(keeping, partial(elementwise, nonnegative=None))
    add("logsigmoid log neg tanhshrink sin cos threshold", partial(elementwise, nonnegative=False))
    add("hardtanh clamp clip clampmin", clamp)
    add("pow", power)
    add("prelu", prelu)
    add("softmax", softmax)
    for names, function, keeps_sign in (
        ("add iadd radd", operator.add, True),
        ("sub isub", operator.sub, False),
        ("rsub", subtracted_from, False),
        ("mul imul rmul", operator.mul, True),
        ("div truediv itruediv", operator.truediv, True),
        ("maximum", torch.maximum, True),
        ("minimum", torch.minimum, True),
        ("logaddexp", torch.logaddexp, False),
    ):
        add(names, partial(arithmetic, function=function, keeps_sign=keeps_sign))
    add("max", partial(extremum, function=torch.maximum))
    add("min", partial(extremum, function=torch.minimum))
    add("batchnorm batchnorm1d batchnorm2d batchnorm3d syncbatchnorm", channel_norm)
    add("instancenorm instancenorm1d instancenorm2d instancenorm3d", channel_norm)
    add("groupnorm", group_norm)
    add("layernorm", layer_norm)
    add("conv1d conv2d conv3d", convolution)
    add("convtranspose1d convtranspose2d convtranspose3d", transposed_convolution)
    add("linear", linear)
    add("avgpool1d avgpool2d avgpool3d", average_pooling)
    add("maxpool1d maxpool2d maxpool3d", max_pooling)
    add("adaptiveavgpool1d adaptiveavgpool2d adaptiveavgpool3d", adaptive_average_pooling)
    add("adaptivemaxpool1d adaptivemaxpool2d adaptivemaxpool3d", adaptive_max_pooling)
    add("cat concat concatenate", cat)
    add("chunk", partial(split, by_size=False))
    add("split", partial(split, by_size=True))
    add("getitem", item)
    add("permute", permute)
    add("transpose swapaxes", transpose)
    add("reshape view flatten unflatten squeeze unsqueeze mean", pooled)
    add("pad constantpad3d zeropad3d reflectionpad3d replicationpad3d", pad)
    add("interpolate upsample", interpolate)
    add("flip roll", rearranged)
    add("identity dropout dropout1d dropout2d dropout3d alphadropout featurealphadropout", as_it_was)
    add("contiguous clone detach to float half bfloat16 double typeas", as_it_was)
    return rules


RULES = _table()


def transfer(operation: Operation) -> Any:
    """Return what is known about the operation's result: a `Distribution`, or a container of them."""
    rule = RULES.get(operation.name)
    result = UNKNOWN if rule is None else rule(operation)
    return replace(UNKNOWN) if result is UNKNOWN else result  # two unknown values are not one value twice
