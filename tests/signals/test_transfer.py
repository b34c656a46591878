"""`transfer`: every rule of the graph pass against torch's own operation on samples of the operands' distributions."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from dataclasses import replace as changed
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from test_distribution import rectified
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from qconvert.signals.distribution import POINTS, UNKNOWN, Distribution
from qconvert.signals.operation import Operation
from qconvert.signals.transfer import RULES, transfer

SIZE = (4, 8, 8)
CLIPS = 64
MEAN, STD = 0.06, 0.06
"""Largest error of a mean, in standard deviations of the result, and relative error of a standard deviation.

Samples are drawn from the 32 points themselves (how well those stand for a normal value is test_distribution.py's): what is
left is the sampling error, 1 / sqrt(16384) for one channel's values and a few times that for heavy tails, and the error of
the result's own 32 points. A case whose rule is an estimate states a wider one.
"""


def told(values: Distribution, **changes: Any) -> Distribution:
    """Return the distribution, of a tensor of the usual size."""
    return changed(values, **({"size": SIZE} | changes))


NORMAL = told(Distribution.normal(torch.tensor([0.0, 1.0, -0.5, 0.5]), torch.tensor([1.0, 2.0, 0.5, 1.0])))
OTHER = told(Distribution.normal(torch.tensor([2.0, -1.0, 0.0, 3.0]), torch.tensor([0.5, 1.0, 3.0, 1.0])))
RECTIFIED = told(NORMAL.map(torch.relu, nonnegative=True))
POSITIVE = told(NORMAL.map(lambda points: 0.5 + points.abs(), nonnegative=True))
POOLED = told(Distribution.normal(0.5, 2.0))
LAST = told(NORMAL, axis=-1)
CENTRED = told(Distribution.normal(torch.zeros(64), torch.linspace(0.5, 1.5, 64)))
WIDE = told(Distribution.normal(torch.linspace(-2, 2, 64), torch.linspace(0.5, 1.5, 64)), axis=-1)


@dataclass(frozen=True)
class Case:
    """One way to call an operation.

    Attributes:
        call: a module, a function, or the name of a method.
        args, kwargs: operands; the distributions among them are sampled.
        shape: of the samples behind batch and channels.
        equal: how many neighbours along each dimension of the shape have the same value.
        mean, std: tolerances; None where the rule makes no statement about it.
        training: whether the walk is that of a model that trains.
    """

    call: Any
    args: tuple[Any, ...] = (NORMAL,)
    kwargs: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = SIZE
    equal: tuple[int, ...] = ()
    mean: float | None = MEAN
    std: float | None = STD
    training: bool = False

    def __str__(self) -> str:
        settings = [
            arg for arg in pytree.tree_leaves((self.args, self.kwargs)) if not isinstance(arg, (Distribution, Tensor))
        ]
        return f"{self.call} {settings}"

    @property
    def name(self) -> str:
        """What the pass calls the operation, which does not depend on the spelling."""
        spelled = self.call if isinstance(self.call, str) else getattr(self.call, "__name__", type(self.call).__name__)
        return spelled.replace("_", "").lower()

    @property
    def run(self) -> Callable[..., Any]:
        """The operation as a function."""
        if isinstance(self.call, str):
            return lambda x, *args, **kwargs: getattr(x, self.call)(*args, **kwargs)
        return self.call

    def told(self) -> Any:
        """Return what the pass says about the result."""
        module = self.call if isinstance(self.call, nn.Module) else None
        run = module.forward if module is not None else self.run
        return transfer(Operation(self.name, run, self.args, self.kwargs, module, self.training))

    def sampled(self) -> Any:
        """Return what torch computes from samples."""
        drawn: dict[int, Tensor] = {}

        def draw(value: Any) -> Any:
            if not isinstance(value, Distribution):
                return value
            if id(value) not in drawn:
                drawn[id(value)] = samples(value, self.shape, self.equal)
            return drawn[id(value)]

        args, kwargs = pytree.tree_map(draw, (self.args, self.kwargs))
        with torch.no_grad():
            return self.run(*args, **kwargs)


def samples(x: Distribution, shape: tuple[int, ...] = SIZE, equal: tuple[int, ...] = (), channels: int = 4) -> Tensor:
    """Return (N, C, *shape), or (N, *shape, C), of independent values; channels that are not told apart are alike."""
    wide = x.points if len(x.points) > 1 else x.points.expand(channels, POINTS)
    steps = equal or (1,) * len(shape)
    coarse = [n // step for n, step in zip(shape, steps, strict=True)]
    values = wide.gather(1, torch.randint(POINTS, (len(wide), CLIPS * math.prod(coarse)))).view(len(wide), CLIPS, *coarse)
    for dim, step in enumerate(steps, start=2):
        values = values.repeat_interleave(step, dim)
    return values.movedim(0, 1 if x.axis == 1 else -1).contiguous()


def agree(result: Any, sampled: Any, case: Case) -> None:
    """Compare with the samples: mean, standard deviation, sign and size."""
    if isinstance(sampled, (tuple, list)):
        parts = result if isinstance(result, (tuple, list)) else [result] * len(sampled)
        for part, tensor in zip(parts, sampled, strict=True):
            agree(part, tensor, case)
        return
    sampled = sampled.float()
    values = sampled.flatten()[None]
    if result.channels > 1:
        assert sampled.shape[result.axis] == result.channels
        values = sampled.movedim(result.axis, 0).flatten(1)
    mean, std = values.mean(1), values.std(1, correction=0)
    if case.mean is not None:
        errors = (result.mean - mean).abs()
        assert (errors <= case.mean * std + 1e-5).all(), f"{case}: mean {result.mean} is {mean}, std {std}"
    if case.std is not None:
        assert_close(result.std, std, rtol=case.std, atol=1e-5, msg=lambda text: f"{case}: std: {text}")
    if result.nonnegative:
        assert values.min() >= 0, str(case)
    if result.size is not None and sampled.dim() == 5:
        assert result.size == tuple(sampled.shape[2:] if result.axis == 1 else sampled.shape[1:4]), str(case)


def seeded(build: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Return a module with random weights, the same each time; normalisations get random affine parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = build(*args, **kwargs)
        if "Norm" in type(module).__name__ and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    return module


def trained(norm: nn.Module) -> nn.Module:
    """Give a normalisation the statistics of `NORMAL`, as training does."""
    norm.running_mean.copy_(NORMAL.mean)
    norm.running_var.copy_(NORMAL.std**2)
    return norm.eval()


def every(
    name: str, *args: Any, module: Any = None, function: bool = True, method: bool = True, **settings: Any
) -> list[Case]:
    """Return the spellings of an elementwise operation, of values of either sign and of values that are not negative."""
    cases = []
    for x in settings.pop("inputs", (NORMAL, RECTIFIED)):
        if module is not None:
            cases.append(Case(module, (x,), **settings))
        if function:
            cases.append(Case(getattr(F, name, None) or getattr(torch, name), (x, *args), **settings))
        if method:
            cases.append(Case(name, (x, *args), **settings))
    return cases


COLUMN = torch.tensor([0.5, -2.0, 1.0, 3.0]).view(1, 4, 1, 1, 1)
POSITIVE_COLUMN = COLUMN.abs()
HEAVY = 0.15
"""The tolerance for exp, products and quotients, whose largest values weigh the most."""


def arithmetic(
    function: Callable[..., Any], *methods: str, divisor: Distribution = OTHER, numbers=(3.0, -0.5)
) -> list[Case]:
    """Return an operation on two values, a value and itself, a number, a tensor of one value per channel; and reversed."""
    itself = [] if divisor is POSITIVE else [(NORMAL, NORMAL), (RECTIFIED, RECTIFIED)]
    operands = [(NORMAL, divisor), (RECTIFIED, POSITIVE), (NORMAL, POOLED if divisor is OTHER else divisor), *itself]
    operands += [(x, number) for x in (NORMAL, RECTIFIED, POOLED) for number in numbers]
    operands += [(x, column) for x in (NORMAL, RECTIFIED, POOLED) for column in (COLUMN, POSITIVE_COLUMN)]
    tolerance = {"mean": 0.08, "std": HEAVY}
    cases = [Case(spelled, pair, **tolerance) for pair in operands for spelled in (function, *methods)]
    x = POSITIVE if divisor is POSITIVE else NORMAL
    return cases + [Case(function, (start, x), **tolerance) for start in (2.0, -1.0, COLUMN)]


def extremum(function: Any) -> list[Case]:
    """Return the larger or smaller of two values, of a value and itself negated, of a value and one per channel."""
    pairs = [(NORMAL, OTHER), (RECTIFIED, POSITIVE), (NORMAL, POOLED), (NORMAL, COLUMN), (RECTIFIED, torch.zeros(1))]
    return [Case(function, pair, mean=0.08, std=0.1) for pair in pairs]


def in_place(name: str, divisor: Distribution = OTHER) -> list[Case]:
    function = getattr(operator, name)
    return [Case(function, pair, mean=0.08, std=HEAVY) for pair in ((NORMAL, divisor), (NORMAL, 2.0), (RECTIFIED, COLUMN))]


def reversed_method(name: str) -> list[Case]:
    return [Case(name, pair) for pair in ((NORMAL, 3.0), (RECTIFIED, 2.0), (NORMAL, COLUMN))]


def batch_norm(kind: type[nn.Module], rank: int) -> list[Case]:
    shape = SIZE[3 - rank :] if rank > 1 else (256,)
    settings = {"shape": shape} | ({"mean": 0.08} if rank == 2 else {})
    cases = [
        Case(trained(seeded(kind, 4)), **settings),
        Case(trained(seeded(kind, 4, affine=False)), **settings),
        Case(seeded(kind, 4).eval(), **settings),  # untrained: next to nothing happens
    ]
    if kind is not nn.SyncBatchNorm:  # which trains on a GPU only
        cases.append(Case(seeded(kind, 4).train(), training=True, **settings))
    return cases


WEIGHT, BIAS = torch.tensor([0.5, 2.0, 1.0, 1.5]), torch.tensor([0.0, -1.0, 1.0, 3.0])

# outputs that meet the same inputs are not independent samples
CONV = {"mean": 0.1, "std": 0.12}


def convolution(kind: type[nn.Module], function: Callable[..., Any], rank: int) -> list[Case]:
    shape = SIZE[3 - rank :] if rank > 1 else (256,)
    plain = seeded(kind, 4, 6, 3)
    return [Case(plain, (x,), shape=shape, **CONV) for x in (NORMAL, RECTIFIED, POOLED) if rank == 3 or x is not POOLED] + [
        Case(seeded(kind, 4, 6, 3, groups=2, bias=False), shape=shape, **CONV),
        Case(seeded(kind, 4, 8, 1, groups=4), (RECTIFIED,), shape=shape, **CONV),
        Case(seeded(kind, 4, 6, 2, stride=2), shape=shape, **CONV),
        Case(function, (NORMAL, plain.weight, plain.bias), shape=shape, **CONV),
        Case(function, (NORMAL, plain.weight), {"bias": plain.bias, "stride": 2}, shape=shape, **CONV),
        Case(function, (NORMAL, torch.cat([plain.weight[:, :2]] * 2), None, 1, 0, 1, 2), shape=shape, **CONV),
    ]


KERNEL = seeded(nn.Conv3d, 64, 6, 3).weight
BORDER = [
    Case(seeded(nn.Conv3d, 64, 6, 3, padding=1), (CENTRED,), **CONV),
    Case(seeded(nn.Conv3d, 64, 6, (1, 5, 5), padding=(0, 4, 4), dilation=(1, 2, 2)), (CENTRED,), **CONV),
    Case(seeded(nn.Conv3d, 64, 6, (3, 1, 3), padding="same"), (CENTRED,), **CONV),
    Case(F.conv3d, (CENTRED, KERNEL, None, (1, 2, 2), (1, 1, 0)), **CONV),
    Case(F.conv3d, (CENTRED, KERNEL), {"padding": 1, "dilation": (1, 2, 2)}, **CONV),
    # where the mean is not 0, outputs at the border differ from the others, which the rule does not say
    Case(seeded(nn.Conv3d, 4, 6, 3, padding=1), mean=0.35, std=0.2),
    Case(seeded(nn.Conv3d, 4, 6, 3, padding=1, stride=(1, 2, 2)), (RECTIFIED,), mean=0.35, std=0.2),
    # a border that repeats values is none; but they are not independent
    Case(seeded(nn.Conv3d, 4, 6, 3, padding=1, padding_mode="replicate"), mean=0.1, std=0.25),
    # channels last, which it reads as (N, C, D, H, W): not all in equal parts
    Case(seeded(nn.Conv3d, 4, 6, 3), (LAST,), mean=0.35, std=0.12),
]


def transposed_convolution(kind: type[nn.Module], rank: int) -> list[Case]:
    shape = SIZE[3 - rank :] if rank > 1 else (256,)
    alike = seeded(kind, 4, 6, 2, stride=2)
    with torch.no_grad():
        alike.weight.copy_(alike.weight.flatten(2)[..., :1].view(4, 6, *(1,) * rank).expand_as(alike.weight))
    # which weights meet an output depends on its place; each of these meets as good as, or exactly, the same ones
    return [
        Case(seeded(kind, 64, 6, 2, stride=2), (CENTRED,), shape=shape, std=0.15),
        Case(seeded(kind, 64, 6, 4, stride=2, padding=1, bias=False), (CENTRED,), shape=shape, std=0.15),
        *(Case(alike, (x,), shape=shape) for x in (NORMAL, RECTIFIED)),
    ]


def pooling(name: str, rank: int, *, largest: bool) -> list[Case]:
    """Windows of 16 values, of which as many differ as the rule says: 16^(1/2) for a mean, 16^(3/4) for a maximum."""
    kind = f"{'Max' if largest else 'Avg'}Pool{rank}d"
    kernel, equal, shape = {
        1: (16, (2,) if largest else (4,), (512,)),
        2: (4, (1, 2) if largest else (2, 2), (16, 32)),
        3: ((1, 4, 4), (1, 1, 2) if largest else (1, 2, 2), (4, 16, 16)),
    }[rank]
    settings = {"shape": shape, "equal": equal} | (LARGEST if largest else {})
    inputs = [changed(x, size=shape if rank == 3 else None) for x in (NORMAL, RECTIFIED, POOLED)]
    cases = [Case(getattr(nn, kind)(kernel), (x,), **settings) for x in inputs]
    cases += [Case(getattr(F, name), (x, kernel), **settings) for x in inputs[:1]]
    cases += [Case(getattr(F, name), (x,), {"kernel_size": kernel}, **settings) for x in inputs[:1]]
    if rank == 3 and not largest:
        x = changed(NORMAL, size=(4, 16, 16))
        cases.append(Case(nn.AvgPool3d(4), (x,), shape=(4, 16, 16), equal=(2, 2, 2)))
    if rank == 3 and largest:
        x = changed(NORMAL, size=SIZE)  # overlapping, with a border: of its size only
        cases.append(Case(nn.MaxPool3d(3, (1, 2, 2), 1), (x,), mean=None, std=None))
    return cases


def adaptive(kind: type[nn.Module], function: Callable[..., Any], rank: int) -> list[Case]:
    """To the size that it has, to windows of which as many values differ as the rule says, and to one value."""
    shape = SIZE[3 - rank :] if rank > 1 else (64,)
    size = shape if rank > 1 else shape[0]
    cases = [Case(kind(size), (RECTIFIED,), shape=shape), Case(function, (NORMAL, size), shape=shape)]
    if rank < 3:
        # how many values it takes together is only known of a volume
        return cases + ([Case(kind(1), shape=shape, mean=1.5, std=None)] if "Avg" in kind.__name__ else [])
    is_mean = "Avg" in kind.__name__
    x, y = (changed(value, size=(4, 16, 16)) for value in (NORMAL, RECTIFIED))
    settings = {"shape": (4, 16, 16), "equal": (1, 2, 2) if is_mean else (1, 1, 2)} | ({} if is_mean else LARGEST)
    return [
        *cases,
        *(Case(kind((4, 4, 4)), (value,), **settings) for value in (x, y)),
        Case(kind((None, 4, 4)), (x,), **settings),
        Case(function, (x,), {"output_size": (4, 4, 4)}, **settings),
        # of one value for each clip: the size, and a mean that is about right
        *(
            Case(call, args, mean=1.5 if is_mean else None, std=None)
            for call, args in ((kind(1), (NORMAL,)), (function, (NORMAL, 1)))
        ),
    ]


LARGEST = {"mean": 0.1, "std": 0.1}
"""The points end at the quantile 1 - 1 / 64, of the largest value too."""


def kept(*names: str, **kwargs: Any) -> dict[str, list[Case]]:
    """Return methods that leave the values alone."""
    return {name: [Case(name, (x,), kwargs) for x in (NORMAL, RECTIFIED)] for name in names}


def dropout(name: str, module: nn.Module) -> list[Case]:
    shape = {"dropout1d": (256,), "dropout2d": (16, 16)}.get(name, SIZE)
    cases = [Case(module.eval(), (x,), shape=shape) for x in (NORMAL, RECTIFIED)]
    return [*cases, Case(getattr(F, name), (NORMAL, 0.5, False), shape=shape)]


TWO = (NORMAL, OTHER)
NARROW = told(Distribution.normal(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0])))


def concatenation(function: Callable[..., Any]) -> list[Case]:
    return [
        Case(function, (TWO, 1)),
        Case(function, ([NORMAL, NARROW], -4)),
        Case(function, ([RECTIFIED, POSITIVE, RECTIFIED],), {"dim": 1}),
        Case(function, ((NORMAL,), 1)),
        Case(function, (TWO,), std=0.1),
        Case(function, (TWO, 2), std=0.1),
        Case(function, ((NORMAL, RECTIFIED, OTHER), 0), mean=0.1, std=0.1),
        Case(function, ((LAST, told(OTHER, axis=-1)), -1)),
        Case(function, ((LAST, told(NARROW, axis=-1)), 4)),
        Case(function, ((LAST, told(OTHER, axis=-1)),), std=0.1),
    ]


CASES: dict[str, list[Case]] = {
    "relu": [*every("relu", module=nn.ReLU()), Case(nn.ReLU(inplace=True)), Case(F.relu, (NORMAL,), {"inplace": True})],
    "relu6": every("relu6", module=nn.ReLU6(), method=False),
    "sigmoid": every("sigmoid", module=nn.Sigmoid()),
    "hardsigmoid": every("hardsigmoid", module=nn.Hardsigmoid(), method=False),
    "softplus": [*every("softplus", module=nn.Softplus(2), method=False)[::2], Case(F.softplus, (NORMAL, 2))],
    "exp": every("exp", std=HEAVY),
    "abs": every("abs"),
    "square": every("square"),
    "sqrt": every("sqrt", inputs=(RECTIFIED, POSITIVE)),
    "rsqrt": every("rsqrt", inputs=(POSITIVE,)),
    "leakyrelu": every("leaky_relu", 0.3, module=nn.LeakyReLU(0.3), method=False),
    "elu": [*every("elu", module=nn.ELU(), method=False), Case(F.elu, (NORMAL,), {"alpha": 2.0})],
    "selu": every("selu", module=nn.SELU(), method=False),
    "celu": every("celu", module=nn.CELU(), method=False),
    "gelu": [*every("gelu", module=nn.GELU(), method=False), Case(F.gelu, (NORMAL,), {"approximate": "tanh"})],
    "silu": every("silu", module=nn.SiLU(), method=False),
    "mish": every("mish", module=nn.Mish(), method=False),
    "hardswish": every("hardswish", module=nn.Hardswish(), method=False),
    "tanh": every("tanh", module=nn.Tanh()),
    "softsign": every("softsign", module=nn.Softsign(), method=False),
    "hardshrink": every("hardshrink", module=nn.Hardshrink(), method=False),
    "softshrink": every("softshrink", module=nn.Softshrink(), method=False),
    "expm1": every("expm1", std=HEAVY),
    "log1p": every("log1p", inputs=(RECTIFIED, POSITIVE)),
    "erf": every("erf"),
    "reciprocal": every("reciprocal", inputs=(POSITIVE,)),
    "logsigmoid": every("logsigmoid", module=nn.LogSigmoid(), method=False),
    "log": every("log", inputs=(POSITIVE,)),
    "neg": [*every("neg"), Case(operator.neg)],
    "tanhshrink": every("tanhshrink", module=nn.Tanhshrink(), method=False, std=0.1),
    "sin": every("sin"),
    "cos": every("cos"),
    "hardtanh": [
        *every("hardtanh", -0.5, 2.0, module=nn.Hardtanh(-0.5, 2.0), method=False),
        Case(nn.Hardtanh(0.0, 1.0)),
        Case(F.hardtanh),
        Case(F.hardtanh, (NORMAL, 0.0, 1.0)),
        Case(nn.Hardtanh(-2, -1), (RECTIFIED,)),
    ],
    "clamp": every("clamp", -1.0, 1.5)
    + [
        Case("clamp", (x,), {bound: value}, mean=mean, std=STD)
        for x in (NORMAL, RECTIFIED)
        for bound, value, mean in (("min", 0.25, MEAN), ("min", -1.0, MEAN), ("max", 0.75, MEAN), ("max", -0.5, MEAN))
    ],
    "clip": every("clip", 0.0, 1.5),
    "clampmin": every("clamp_min", 0.5) + every("clamp_min", -0.5),
    "pow": every("pow", 2)
    + every("pow", 3, std=HEAVY)
    + every("pow", 4, std=HEAVY)
    + every("pow", 0.5, inputs=(RECTIFIED, POSITIVE))
    + every("pow", -1, inputs=(POSITIVE,))
    + [Case(operator.pow, (NORMAL, 2)), Case(torch.pow, (NORMAL,), {"exponent": 2.0})],
    "prelu": [Case(nn.PReLU(init=0.3), (x,)) for x in (NORMAL, RECTIFIED)]
    + [Case(F.prelu, (x, torch.tensor([0.1, 2.0, -1.0, 0.5]))) for x in (NORMAL, RECTIFIED, POOLED)],
    "zeroslike": every("zeros_like", method=False),
    "oneslike": every("ones_like", method=False),
    "threshold": [*every("threshold", 0.0, 0.0, method=False), Case(nn.Threshold(0.5, -1.0), (NORMAL,))],
    "maximum": extremum(torch.maximum),
    "minimum": extremum(torch.minimum),
    "max": [*extremum(torch.max), *extremum("max")],
    "min": [*extremum(torch.min), *extremum("min")],
    "logaddexp": extremum(torch.logaddexp),
    "softmax": [
        Case(call, (x, *args), mean=0.1, std=0.15)
        for x, dims in ((CENTRED, (1, -4)), (told(CENTRED, axis=-1), (4, -1)))
        for dim in dims
        for call, args in ((nn.Softmax(dim), ()), (F.softmax, (dim,)), ("softmax", (dim,)))
    ]
    + [
        Case(call, (x, *args), mean=None, std=None)
        for x in (NORMAL, RECTIFIED)
        for call, args in ((nn.Softmax(2), ()), (F.softmax, (3,)), ("softmax", (-1,)))
    ],
    "add": [*arithmetic(operator.add, "add"), Case(torch.add, TWO)],
    "sub": [*arithmetic(operator.sub, "sub"), Case(torch.sub, TWO)],
    "mul": [*arithmetic(operator.mul, "mul"), Case(torch.mul, TWO, std=HEAVY)],
    "div": [
        Case(torch.div, (NORMAL, POSITIVE), mean=0.08, std=HEAVY),
        Case("div", (NORMAL, 2.0)),
        Case("div", (RECTIFIED, -2.0)),
    ],
    "truediv": [*arithmetic(operator.truediv, divisor=POSITIVE), Case(operator.truediv, (NORMAL, NORMAL))],
    "iadd": in_place("iadd"),
    "isub": in_place("isub"),
    "imul": in_place("imul"),
    "itruediv": in_place("itruediv", POSITIVE),
    "radd": reversed_method("__radd__"),
    "rsub": [*reversed_method("__rsub__"), Case(torch.rsub, TWO, std=0.1), Case(torch.rsub, (RECTIFIED, -1.0))],
    "rmul": reversed_method("__rmul__"),
    "batchnorm": [
        Case(F.batch_norm, (NORMAL, NORMAL.mean, NORMAL.std**2, WEIGHT, BIAS)),
        Case(F.batch_norm, (NORMAL, None, None), {"weight": WEIGHT, "bias": BIAS, "training": True}),
        Case(F.batch_norm, (RECTIFIED, RECTIFIED.mean, RECTIFIED.std**2)),
    ],
    "batchnorm1d": batch_norm(nn.BatchNorm1d, 1),
    "batchnorm2d": batch_norm(nn.BatchNorm2d, 2),
    "batchnorm3d": batch_norm(nn.BatchNorm3d, 3),
    "syncbatchnorm": batch_norm(nn.SyncBatchNorm, 3),
    "instancenorm": [
        Case(F.instance_norm, (NORMAL,), {"weight": WEIGHT, "bias": BIAS}),
        Case(F.instance_norm, (RECTIFIED,)),
    ],
    **{
        f"instancenorm{rank}d": [
            Case(seeded(kind, 4, affine=affine), (x,), shape=SIZE[3 - rank :] if rank > 1 else (256,))
            for affine in (True, False)
            for x in (NORMAL, RECTIFIED)
        ]
        for rank, kind in ((1, nn.InstanceNorm1d), (2, nn.InstanceNorm2d), (3, nn.InstanceNorm3d))
    },
    "groupnorm": [Case(seeded(nn.GroupNorm, groups, 4), (x,)) for groups in (1, 2, 4) for x in (NORMAL, RECTIFIED)]
    + [Case(F.group_norm, (NORMAL, 2, WEIGHT, BIAS)), Case(F.group_norm, (NORMAL, 2))]
    + [Case(F.group_norm, (NORMAL,), {"num_groups": 2, "weight": WEIGHT, "bias": BIAS})],
    # over 64 channels, whose mean and variance are those of all but for 1 / sqrt(64)
    "layernorm": [
        Case(seeded(nn.LayerNorm, 64), (WIDE,), mean=0.12, std=0.12),
        Case(F.layer_norm, (WIDE, (64,), torch.linspace(0.5, 2, 64), torch.linspace(-1, 1, 64)), mean=0.12, std=0.12),
        Case(nn.LayerNorm((4, *SIZE), elementwise_affine=False)),
        Case(nn.LayerNorm((4, *SIZE))),
        Case(nn.LayerNorm(8), (POOLED,), mean=0.12, std=0.12),  # along the width: the channels, from here on
        Case(F.layer_norm, (RECTIFIED, (4, *SIZE))),
    ],
    "conv1d": convolution(nn.Conv1d, F.conv1d, 1),
    "conv2d": convolution(nn.Conv2d, F.conv2d, 2),
    "conv3d": convolution(nn.Conv3d, F.conv3d, 3) + BORDER,
    "convtranspose1d": transposed_convolution(nn.ConvTranspose1d, 1),
    "convtranspose2d": transposed_convolution(nn.ConvTranspose2d, 2),
    "convtranspose3d": transposed_convolution(nn.ConvTranspose3d, 3),
    "linear": [
        Case(seeded(nn.Linear, 4, 6), (LAST,)),
        Case(seeded(nn.Linear, 64, 6, bias=False), (WIDE,)),
        Case(F.linear, (LAST, seeded(nn.Linear, 4, 6).weight, BIAS.repeat(2)[:6])),
        Case(F.linear, (WIDE, seeded(nn.Linear, 64, 6).weight), {"bias": BIAS.repeat(2)[:6]}),
        Case(seeded(nn.Linear, 8, 6), (POOLED,)),  # along the width
    ],
    "avgpool1d": pooling("avg_pool1d", 1, largest=False),
    "avgpool2d": pooling("avg_pool2d", 2, largest=False),
    "avgpool3d": pooling("avg_pool3d", 3, largest=False),
    "maxpool1d": pooling("max_pool1d", 1, largest=True),
    "maxpool2d": pooling("max_pool2d", 2, largest=True),
    "maxpool3d": pooling("max_pool3d", 3, largest=True),
    "adaptiveavgpool1d": adaptive(nn.AdaptiveAvgPool1d, F.adaptive_avg_pool1d, 1),
    "adaptiveavgpool2d": adaptive(nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d, 2),
    "adaptiveavgpool3d": adaptive(nn.AdaptiveAvgPool3d, F.adaptive_avg_pool3d, 3),
    "adaptivemaxpool1d": adaptive(nn.AdaptiveMaxPool1d, F.adaptive_max_pool1d, 1),
    "adaptivemaxpool2d": adaptive(nn.AdaptiveMaxPool2d, F.adaptive_max_pool2d, 2),
    "adaptivemaxpool3d": adaptive(nn.AdaptiveMaxPool3d, F.adaptive_max_pool3d, 3),
    "flip": [Case("flip", (x, dims)) for x in (NORMAL, RECTIFIED) for dims in ((2,), (1, 3), [-1])]
    + [Case(torch.flip, (LAST,), {"dims": (1,)}), Case(torch.flip, (LAST, (4,)))],
    "roll": [Case("roll", (x, 1, dims)) for x in (NORMAL, RECTIFIED) for dims in (2, (1,), -1)]
    + [Case(torch.roll, (NORMAL, 1), mean=0.1, std=0.1), Case(torch.roll, (NORMAL,), {"shifts": 1, "dims": 1})],
    "cat": concatenation(torch.cat),
    "concat": concatenation(torch.concat),
    "concatenate": concatenation(torch.concatenate),
    "chunk": [
        Case("chunk", (NORMAL, 2, 1)),
        Case(torch.chunk, (RECTIFIED, 2), {"dim": 1}),
        Case("chunk", (NORMAL, 3, -4)),
        Case("chunk", (NORMAL,), {"chunks": 4, "dim": 1}),
        Case("chunk", (POOLED, 2, 1)),
        Case("chunk", (LAST, 2, -1)),
        Case("chunk", (NORMAL, 2)),
        Case("chunk", (NORMAL, 2, 2)),
    ],
    "split": [
        Case("split", (NORMAL, 2, 1)),
        Case(torch.split, (RECTIFIED, [1, 3]), {"dim": 1}),
        Case("split", (NORMAL, 3, -4)),
        Case("split", (NORMAL,), {"split_size": 1, "dim": 1}),
        Case("split", (POOLED, 2, 1)),
        Case("split", (LAST, 2, 4)),
        Case("split", (NORMAL, 32)),
        Case(torch.split, (NORMAL,), {"split_size_or_sections": [3, 1], "dim": 1}),
    ],
    "getitem": [
        Case(operator.getitem, (TWO, 1)),
        Case(operator.getitem, ([RECTIFIED, OTHER], -2)),
        *(
            Case(operator.getitem, (x, index), mean=0.12, std=0.15)  # few samples are left
            for x in (NORMAL, RECTIFIED, LAST)
            for index in (
                (slice(None), slice(1, 3)),
                (slice(None), slice(None, None, 2), 0),
                (slice(None), slice(None), slice(1, None)),
                (slice(None), 2),
                (slice(None), [2, 0]),
                (slice(8), slice(None)),
                slice(8),
                (..., slice(1, 3)),
                (..., slice(1, 3), slice(None)),
                (..., 0),
                (slice(None), ..., slice(1, 3)),
                (slice(None), slice(None), 1),
                (slice(None), slice(1, 3), ...),
                (..., slice(2), slice(None), slice(None), slice(None)),
                (slice(None), None),
            )
        ),
    ],
    "permute": [
        Case("permute", (NORMAL, 0, 2, 3, 4, 1)),
        Case(torch.permute, (NORMAL, (0, 2, 3, 4, 1))),
        Case("permute", (LAST, [0, 4, 1, 2, 3])),
        Case("permute", (LAST,), {"dims": (0, -1, 1, 2, 3)}),
        Case("permute", (NORMAL, 0, 1, 3, 4, 2)),
        Case("permute", (NORMAL, 0, 2, 1, 3, 4)),
        Case("permute", (NORMAL, 1, 0, 2, 3, 4)),
        Case("permute", (LAST, 0, 2, 3, 1, 4)),
        Case("permute", (POOLED, 0, 2, 1, 3, 4)),
    ],
    **{
        name: [
            Case(name, (x, *dims))
            for x in (NORMAL, LAST, told(NORMAL, size=None), told(LAST, size=None))
            for dims in ((1, 2), (-1, 1), (2, 3), (3, 4), (-4, -3), (1, 4), (0, 1), (-3, -2))
        ]
        + [
            Case(getattr(torch, name), (x,), dict(zip(words, dims, strict=True)))
            for x in (NORMAL, LAST)
            for dims in ((1, 2), (2, -1))
        ]
        for name, words in (("transpose", ("dim0", "dim1")), ("swapaxes", ("axis0", "axis1")))
    },
    "reshape": [Case("reshape", (x, CLIPS, -1)) for x in (NORMAL, RECTIFIED)]
    + [Case(torch.reshape, (NORMAL, (CLIPS, 2, -1)))],
    "view": [Case("view", (NORMAL, CLIPS, 8, 2, 8, 8))],
    "flatten": [Case(nn.Flatten(), (RECTIFIED,)), Case("flatten", (NORMAL, 2)), Case(torch.flatten, (LAST, 1))],
    "unflatten": [Case(nn.Unflatten(1, (2, 2))), Case("unflatten", (NORMAL, 1, (2, 2)))],
    "squeeze": [Case("squeeze", (RECTIFIED, 2), shape=(1, 16, 16)), Case(torch.squeeze, (NORMAL, 2), shape=(1, 16, 16))],
    "unsqueeze": [Case("unsqueeze", (NORMAL, 2)), Case(torch.unsqueeze, (RECTIFIED, 0))],
    # of a mean it says the mean
    "mean": [Case("mean", (told(x, size=None), (2, 3, 4)), mean=0.1, std=None) for x in (POOLED, RECTIFIED)]
    + [Case(torch.mean, (NORMAL,), {"dim": 1}, mean=0.1, std=None)],
    # the border of 1 in 9 values is not counted
    "pad": [
        Case(F.pad, (RECTIFIED, (1, 0)), mean=0.3, std=0.2),
        Case(F.pad, (RECTIFIED, (1, 1, 0, 1, 1, 0), "replicate")),
        Case(F.pad, (NORMAL, (1, 1, 1, 1, 1, 1)), {"mode": "reflect"}),
        Case(F.pad, (NORMAL, (1, 0)), {"value": -0.5}, mean=0.5, std=0.2),
        Case(F.pad, (RECTIFIED, (0, 1), "constant", -1.0), mean=None, std=None),
        Case(F.pad, (NORMAL, (0, 0, -1, -2))),
    ],
    "constantpad3d": [Case(nn.ConstantPad3d((1, 0, 0, 0, 0, 0), v), (RECTIFIED,), mean=None, std=None) for v in (0.5, -0.5)],
    "zeropad3d": [Case(nn.ZeroPad3d((0, 1, 0, 0, 0, 0)), (x,), mean=0.3, std=0.2) for x in (NORMAL, RECTIFIED)],
    "reflectionpad3d": [Case(nn.ReflectionPad3d(1), (x,)) for x in (NORMAL, RECTIFIED)],
    "replicationpad3d": [Case(nn.ReplicationPad3d((1, 1, 0, 0, 0, 2)), (x,)) for x in (NORMAL, RECTIFIED)],
    "interpolate": [
        Case(F.interpolate, (NORMAL,), {"scale_factor": 2}),
        Case(F.interpolate, (RECTIFIED, None, 0.5)),
        Case(F.interpolate, (NORMAL, (4, 16, 16))),
        Case(F.interpolate, (NORMAL,), {"scale_factor": (1, 2, 2)}),
    ],
    "upsample": [Case(nn.Upsample(scale_factor=2)), Case(nn.Upsample(size=(4, 16, 16)), (RECTIFIED,))],
    "identity": [Case(nn.Identity(), (x,)) for x in (NORMAL, RECTIFIED)],
    "dropout": dropout("dropout", nn.Dropout()),
    "dropout1d": dropout("dropout1d", nn.Dropout1d()),
    "dropout2d": dropout("dropout2d", nn.Dropout2d()),
    "dropout3d": dropout("dropout3d", nn.Dropout3d()),
    "alphadropout": dropout("alpha_dropout", nn.AlphaDropout()),
    "featurealphadropout": dropout("feature_alpha_dropout", nn.FeatureAlphaDropout()),
    **kept("contiguous", "clone", "detach", "float", "half", "bfloat16", "double"),
    "to": [Case("to", (NORMAL, torch.float16)), Case("to", (RECTIFIED,), {"dtype": torch.float64})],
    "typeas": [Case("type_as", (NORMAL, OTHER)), Case("type_as", (RECTIFIED, torch.zeros(1, dtype=torch.float64)))],
}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_says_what_samples_have(name: str):
    assert CASES[name]
    for case in CASES[name]:
        assert case.name == name
        agree(case.told(), case.sampled(), case)


def test_there_is_a_case_for_each_rule_and_for_nothing_else():
    assert CASES.keys() == RULES.keys()


def test_a_rectified_normal_value_has_the_moments_of_the_closed_formula():
    mean, std = [-1.0, 0.0, 0.5, 2.0], [1.0, 3.0, 0.5, 1.0]
    result = Case(nn.ReLU(), (Distribution.normal(torch.tensor(mean), torch.tensor(std)),)).told()
    expected = torch.tensor([rectified(m, s) for m, s in zip(mean, std, strict=True)]).T
    # how well 32 points stand for a normal value: test_distribution.py's tolerances
    assert ((result.mean - expected[0]).abs() < 0.01 * torch.tensor(std)).all()
    assert ((result.std - expected[1]).abs() < 0.05 * torch.tensor(std)).all()
    assert result.nonnegative


def test_a_normal_value_stays_one_through_a_convolution():
    """Its third and fourth moment, of which no case says anything."""
    result = Case(seeded(nn.Conv3d, 64, 6, 3), (CENTRED,)).told()
    unit = (result.points - result.mean[:, None]) / result.std[:, None]
    assert_close(unit, Distribution.normal().points.expand(6, POINTS), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["replicate", "reflect", "circular"])
def test_a_border_that_repeats_values_is_none(mode: str):
    """The padding is worth nothing, where zeros are."""
    repeated = Case(seeded(nn.Conv3d, 4, 6, 3, padding=1, padding_mode=mode)).told()
    assert_close(repeated.points, Case(seeded(nn.Conv3d, 4, 6, 3)).told().points)
    assert (Case(seeded(nn.Conv3d, 4, 6, 3, padding=1)).told().std < 0.9 * repeated.std).all()


ALWAYS = "relu relu6 sigmoid hardsigmoid softplus exp abs square softmax"
NEVER = (
    "neg logsigmoid tanhshrink sin cos sub isub rsub batchnorm batchnorm3d instancenorm3d groupnorm layernorm "
    "conv1d conv2d conv3d convtranspose3d linear"
)
WHERE_THE_OPERAND_IS = (
    "leakyrelu elu selu celu gelu silu mish hardswish tanh softsign hardshrink softshrink expm1 erf prelu cat "
    "concat concatenate chunk split getitem permute transpose reshape view flatten unflatten squeeze unsqueeze "
    "mean interpolate upsample identity dropout dropout3d contiguous clone detach to float half double typeas "
    "avgpool1d avgpool3d maxpool1d maxpool3d adaptiveavgpool3d adaptivemaxpool3d reflectionpad3d replicationpad3d "
    "zeropad3d"
)


def assumed(case: Case, **flags: bool) -> Case:
    """Return the case with other flags of all its operands."""
    args = pytree.tree_map(lambda value: changed(value, **flags) if isinstance(value, Distribution) else value, case.args)
    return changed(case, args=args)


def claims(case: Case, x: Distribution) -> bool:
    """Return whether the result is known to be not negative, if all operands are (like) x."""
    results = pytree.tree_leaves(assumed(case, nonnegative=x.nonnegative).told())
    return all(result.nonnegative for result in results)


@pytest.mark.parametrize("name", ALWAYS.split())
def test_never_below_0_for_any_operand(name: str):
    assert all(claims(case, x) for case in CASES[name] for x in (NORMAL, RECTIFIED))


@pytest.mark.parametrize("name", NEVER.split())
def test_below_0_for_some_operand_that_is_not(name: str):
    assert not any(claims(case, x) for case in CASES[name] for x in (NORMAL, RECTIFIED))


@pytest.mark.parametrize("name", WHERE_THE_OPERAND_IS.split())
def test_never_below_0_where_the_operand_is_not(name: str):
    assert all(claims(case, RECTIFIED) for case in CASES[name])
    assert not any(claims(case, NORMAL) for case in CASES[name])


@pytest.mark.parametrize(
    ("function", "other", "certain"),
    [
        (operator.add, POSITIVE, True),
        (operator.mul, POSITIVE, True),
        (operator.truediv, POSITIVE, True),
        (operator.add, 2.0, True),
        (operator.mul, 0.5, True),
        (operator.truediv, 2, True),
        (operator.add, POSITIVE_COLUMN, True),
        (operator.add, NORMAL, False),
        (operator.mul, NORMAL, False),
        (operator.add, -1.0, False),
        (operator.mul, -1, False),
        (operator.mul, COLUMN, False),
        (operator.sub, 1.0, False),
        (operator.sub, POSITIVE, False),
    ],
)
def test_arithmetic_keeps_what_is_not_negative(function: Callable[..., Any], other: Any, certain: bool):
    assert Case(function, (RECTIFIED, other)).told().nonnegative is certain
    if function in (operator.add, operator.mul):
        assert Case(function, (other, RECTIFIED)).told().nonnegative is certain


@pytest.mark.parametrize(
    ("call", "args", "certain"),
    [
        ("clamp", (0.0, None), True),
        ("clamp", (-1.0, 2.0), False),
        ("clamp", (None, 2.0), False),
        ("clamp_min", (0,), True),
        (F.hardtanh, (0.0, 1.0), True),
        (F.hardtanh, (), False),
        (nn.Hardtanh(0, 1), (), True),
        (nn.Hardtanh(), (), False),
        ("pow", (2,), True),
        ("pow", (4.0,), True),
        ("pow", (3,), False),
        ("square", (), True),
    ],
)
def test_what_is_cut_off_or_squared_is_not_negative(call: Any, args: tuple, certain: bool):
    assert Case(call, (NORMAL, *args)).told().nonnegative is certain


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("exp", (Distribution.normal(0.0, 1000.0),)),  # overflows
        ("log", (NORMAL,)),
        ("sqrt", (NORMAL,)),
        ("reciprocal", (RECTIFIED,)),
        ("true_divide", (NORMAL, 2.0)),
        ("cumsum", (NORMAL, 1)),
        ("matmul", (NORMAL, OTHER)),
        ("add", (NORMAL, OTHER, 2)),
        ("add", (NORMAL, "2")),
        ("mul", (NORMAL, torch.ones(2, 3))),
        ("mul", (NORMAL, torch.ones(4))),  # along the width
        ("mul", (NORMAL, torch.ones(1, 4, 1, 1))),  # along the depth
        ("mul", (NORMAL, torch.ones(1, 4, 1, 1, 1, device="meta"))),
        ("relu", (NORMAL, OTHER)),
        ("clamp", (NORMAL, torch.zeros(4))),
        ("clamp", (NORMAL, OTHER)),
        ("prelu", (NORMAL, OTHER)),
        ("prelu", (NORMAL, torch.ones(4, device="meta"))),
        ("conv3d", (NORMAL, OTHER)),
        ("conv3d", (NORMAL, torch.ones(2, 4, 1, 1, 1, device="meta"))),
        ("conv3d", (NORMAL, torch.ones(2, 4, 1, 1, 1), None, 1, 0, 1, UNKNOWN)),
        ("conv_transpose3d", (NORMAL, torch.ones(4, 2, 1, 1, 1))),
        ("linear", (LAST, OTHER)),
        ("group_norm", (NORMAL, 3)),
        ("group_norm", (NORMAL, UNKNOWN)),
        ("cat", ((NORMAL, torch.ones(1)), 1)),
        ("cat", (NORMAL,)),
        ("getitem", ((NORMAL, OTHER), 2)),
        ("getitem", (OTHER.mean, NORMAL)),
        ("softmax", (NORMAL, 2)),
        ("softmax", (POOLED, 1)),
        ("max", (NORMAL, 1)),
        ("min", (NORMAL,)),
        ("where", (NORMAL, NORMAL, 0.0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_anything_else_is_unknown(name: str, args: tuple):
    result = transfer(Operation(name.replace("_", ""), getattr(F, name, getattr(torch, name, None)), args))
    assert not result.known


def test_operands_by_name_are_not_taken_for_settings():
    assert not transfer(Operation("add", torch.add, (NORMAL, OTHER), {"alpha": 2})).known
    assert not transfer(Operation("div", torch.div, (NORMAL, 2.0), {"rounding_mode": "floor"})).known
    assert not transfer(Operation("relu", F.relu, (), {"input": NORMAL})).known
    assert not Case(seeded(nn.ConvTranspose3d, 4, 4, 2, groups=2)).told().known


@pytest.mark.parametrize(
    "name", ["relu", "conv3d", "maxpool3d", "permute", "reshape", "add", "cat", "chunk", "getitem", "pad", "linear"]
)
def test_what_is_made_of_unknown_values_is_unknown(name: str):
    case = CASES[name][0]
    results = pytree.tree_leaves(assumed(case, known=False).told())
    assert results
    assert not any(result.known for result in results)


@pytest.mark.parametrize("norm", [nn.BatchNorm3d(4), nn.InstanceNorm3d(4), nn.GroupNorm(2, 4), nn.LayerNorm(64)], ids=repr)
def test_what_a_normalisation_makes_of_an_unknown_value_is_known(norm: nn.Module):
    assert Case(norm, (UNKNOWN,), training=True).told().known
    assert not Case(nn.BatchNorm3d(4).eval(), (UNKNOWN,)).told().known  # it has never been trained: it does nothing


def test_a_normalisation_trusts_its_statistics_more_than_the_operand():
    norm = trained(seeded(nn.BatchNorm3d, 4))
    result = Case(norm, (OTHER,)).told()
    assert_close(result.mean, norm.bias.detach(), rtol=0, atol=1e-5)
    assert_close(result.std, norm.weight.detach(), rtol=1e-4, atol=0)


PARTS = [
    ("getitem", (slice(None), slice(None), slice(1, None))),
    ("getitem", slice(1, None)),
    ("getitem", 0),
    ("chunk", 2, 2),
    ("split", 1),
    ("transpose", 2, 3),
]


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize("x", [NORMAL, POOLED, UNKNOWN])
def test_the_difference_of_two_parts_is_not_0(part: tuple, x: Distribution):
    """A difference of frames, as in temporal difference networks; or of two values that nothing is known about."""
    name, *settings = part
    first, second = (transfer(Operation(name, getattr(torch, name, operator.getitem), (x, *settings))) for _ in range(2))
    difference = transfer(Operation("sub", operator.sub, (first, second)))
    assert_close(difference.std, x.std * math.sqrt(2), rtol=0.05, atol=0)
    assert (transfer(Operation("sub", operator.sub, (first, first))).std == 0).all()
    assert (transfer(Operation("sub", operator.sub, (x, first))).std > 0).all()


def test_the_difference_of_two_unknown_values_is_not_0():
    first, second = (transfer(Operation("cumsum", torch.cumsum, (NORMAL, 1))) for _ in range(2))
    assert_close(
        transfer(Operation("sub", operator.sub, (first, second))).std, torch.tensor([math.sqrt(2)]), rtol=0.05, atol=0
    )


@pytest.mark.parametrize("bound", [UNKNOWN, 2.5])
def test_a_slice_whose_bounds_are_computed_tells_no_channels_apart(bound: Any):
    part = Case(operator.getitem, (NORMAL, (slice(None), slice(None, bound)))).told()
    assert part.channels == 1
    assert Case(operator.getitem, (NORMAL, (slice(None), slice(8, None)))).told().channels == 1  # there is no such channel
    other = Case(operator.getitem, (NORMAL, (slice(None), slice(None), slice(None, bound)))).told()
    assert (other.channels, other.size) == (4, None)
    assert Case("split", (NORMAL, [bound, bound], 1)).told().channels == 1
    assert Case("chunk", (NORMAL, bound, 1)).told().channels == 1


def test_slopes_tell_channels_apart():
    result = Case(F.prelu, (NARROW, torch.tensor([0.1, 2.0, -1.0, 0.5]))).told()
    assert result.channels == 4


def test_channels_of_zeros_tell_none_apart():
    """The shortcut of a ResNet without parameters."""
    assert Case(F.pad, (NORMAL, (0, 0, 0, 0, 0, 0, 0, 4))).told().channels == 1
    assert Case(F.pad, (NORMAL, (0, 0, 0, 0, 0, 0, 0, 0))).told().channels == 4


def test_an_index_that_moves_the_channels_tells_none_apart():
    part = Case(operator.getitem, (NORMAL, (0, slice(1, 3)))).told()
    assert (part.channels, part.size) == (1, None)


def test_a_concatenation_with_channels_that_are_not_told_apart_tells_none():
    assert Case(torch.cat, ((NORMAL, POOLED), 1)).told().channels == 1
