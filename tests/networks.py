"""Random small networks: plain descriptions, the modules that they build, and a hypothesis strategy that draws them.

A description is nested data, so an example that fails prints what to build, and shrinks. Every block takes and returns a
clip of the same shape, so blocks compose in any order, each with one trap: `PARTS` stand alone, `WRAPS` hold one block,
`JOINS` two.
"""

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from hypothesis import strategies as st
from models import CausalConv3d, CenteredConv3d, PlainConv3d, StandardizedConv3d
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

SIZE = (3, 4, 4)
"""Depth, height and width of every clip."""


# --- descriptions ---


@dataclass(frozen=True)
class Conv:
    """One convolution. ``padding`` is "fit" (the size stays), "same" or "valid"; what changes the size is resized back."""

    kind: str = "Conv3d"
    kernel: tuple[int, int, int] = (3, 3, 3)
    stride: int = 1
    dilation: int = 1
    padding: str = "fit"
    mode: str = "zeros"
    groups: str = "dense"
    bias: bool = True
    dress: str = "plain"


@dataclass(frozen=True)
class Part:
    """A block that stands alone, by its class's name."""

    kind: str


@dataclass(frozen=True)
class Wrap:
    """A block around another."""

    kind: str
    inner: "Node"


@dataclass(frozen=True)
class Join:
    """A block around two others."""

    kind: str
    left: "Node"
    right: "Node"


@dataclass(frozen=True)
class Chain:
    """Blocks one after the other."""

    nodes: tuple["Node", ...]


Node = Conv | Part | Wrap | Join | Chain


@dataclass(frozen=True)
class Network:
    """A whole network: what it is called with and returns, how many channels it has, what is in it."""

    interface: str
    width: int
    body: Node


def build(network: Network) -> nn.Module:
    """Return the network, with the same random weights each time."""
    torch.manual_seed(0)
    body = _build(network.body, network.width)
    if network.interface == "bare":
        return body
    return INTERFACES[network.interface](body)


def example(network: Network) -> Any:
    """Return an example input, the same each time, in the form that `models.run` takes."""
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(2, network.width, *SIZE, generator=generator) for _ in range(2))
    forms = {
        "DictNetwork": ({"clip": first, "gain": 0.5},),
        "KeywordNetwork": {"clip": first, "bias": second},
        "ListNetwork": [first, second],
        "OptionalNetwork": (first, second),
    }
    return forms.get(network.interface, first)


def _build(node: Node, width: int) -> nn.Module:
    match node:
        case Conv():
            return _convolution(node, width)
        case Part():
            return PARTS[node.kind](width)
        case Wrap():
            return WRAPS[node.kind](_build(node.inner, width))
        case Join():
            return JOINS[node.kind](_build(node.left, width), _build(node.right, width))
        case Chain():
            return nn.Sequential(*(_build(inner, width) for inner in node.nodes))


def _convolution(node: Conv, width: int) -> nn.Module:
    if node.kind in FIXED:
        return DRESSES[node.dress](FIXED[node.kind](width, width))
    fit = tuple(node.dilation * (size - 1) // 2 for size in node.kernel)
    conv = GENERAL[node.kind](
        width,
        width,
        node.kernel,
        node.stride,
        fit if node.padding == "fit" else node.padding,
        node.dilation,
        {"dense": 1, "two": 2, "depthwise": width}[node.groups],
        node.bias,
        node.mode,
    )
    dressed = DRESSES[node.dress](conv)
    return dressed if node.stride == 1 and node.padding != "valid" else Resized(dressed)


# --- convolutions ---


class LoudConv3d(nn.Conv3d):
    """Ends in Conv3d's forward, and takes an argument more."""

    def forward(self, x, gain=0.5, *, shift=0.0):
        return super().forward(x + shift) * gain


GENERAL = {cls.__name__: cls for cls in (nn.Conv3d, LoudConv3d, CenteredConv3d)}
FIXED = {cls.__name__: cls for cls in (PlainConv3d, CausalConv3d)}
FIXED["StandardizedConv3d"] = partial(StandardizedConv3d, kernel_size=3, padding=1)


def _old_weight_norm(conv: nn.Conv3d) -> nn.Conv3d:
    with torch.no_grad(), warnings.catch_warnings():  # without a history the model can be deep-copied
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(conv)


def _pruned(conv: nn.Conv3d) -> nn.Conv3d:
    with torch.no_grad():
        return prune.l1_unstructured(conv, "weight", amount=0.5)


def _frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(requires_grad=False)


def _frozen_weight(conv: nn.Conv3d) -> nn.Conv3d:
    conv.weight.requires_grad_(requires_grad=False)
    return conv


def _hooked(module: nn.Module) -> nn.Module:
    module.register_forward_pre_hook(_shifted)
    module.register_forward_hook(_halved)
    return module


def _hooked_backward(module: nn.Module) -> nn.Module:
    module.register_full_backward_hook(_doubled)
    return module


def _shifted(module, args):
    return (args[0] - 0.25, *args[1:])


def _halved(module, args, output):
    return output * 0.5


def _doubled(module, grad_input, grad_output):
    return tuple(gradient if gradient is None else gradient * 2 for gradient in grad_input)


DRESSES: dict[str, Callable[[nn.Conv3d], nn.Conv3d]] = {
    "plain": lambda conv: conv,
    "weight norm": nn.utils.parametrizations.weight_norm,
    "old weight norm": _old_weight_norm,
    "pruned": _pruned,
    "frozen": _frozen,
    "frozen weight": _frozen_weight,
    "hooked": _hooked,
    "hooked backward": _hooked_backward,
}


# --- parts ---


class InPlaceRelu(nn.ReLU):
    def __init__(self, width):
        super().__init__(inplace=True)


class Relu(nn.ReLU):
    def __init__(self, width):
        super().__init__()


class Tanh(nn.Tanh):
    def __init__(self, width):
        super().__init__()


class FrozenBatchNorm(nn.BatchNorm3d):
    """Stays in eval mode while the network trains."""

    def __init__(self, width):
        super().__init__(width)
        self.eval()

    def train(self, mode=True):
        return super().train(mode=False)


class GroupNorm(nn.GroupNorm):
    def __init__(self, width):
        super().__init__(2, width)


class UpAndDown(nn.Module):
    """A transposed convolution up, and a pooling down."""

    def __init__(self, width):
        super().__init__()
        self.up = nn.ConvTranspose3d(width, width, 2, stride=2)

    def forward(self, x):
        return F.avg_pool3d(self.up(x), 2)


class Frames(nn.Module):
    """A 2D convolution over each frame."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        n, c, d, h, w = x.shape
        frames = self.conv(x.transpose(1, 2).reshape(n * d, c, h, w))
        return frames.reshape(n, d, c, h, w).transpose(1, 2)


class ChannelsLast(nn.Module):
    """A linear layer over the channels."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return self.linear(x.movedim(1, -1)).movedim(-1, 1)


class Gate(nn.Module):
    """Squeeze and excitation, by convolutions of one value."""

    def __init__(self, width):
        super().__init__()
        self.reduce = nn.Conv3d(width, 2, 1)
        self.expand = nn.Conv3d(2, width, 1)

    def forward(self, x):
        return x * self.expand(self.reduce(x.mean((2, 3, 4), keepdim=True)).relu()).sigmoid()


class FunctionalConv(nn.Module):
    """A convolution that is no module."""

    def __init__(self, width):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(width, width, 3, 1, 1) / 4)
        self.shift = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return F.conv3d(x, self.kernel, self.shift, padding=(1, 0, 0))


class FunctionalTwice(nn.Module):
    """Two calls with one Parameter."""

    def __init__(self, width):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(width, width, 1, 1, 1))

    def forward(self, x):
        return torch.conv3d(F.conv3d(x, self.kernel).tanh(), weight=self.kernel)


class FunctionalBranches(FunctionalConv):
    """Its code in training is not that in evaluation."""

    def forward(self, x):
        return super().forward(x) if self.training else F.conv3d(x, self.kernel, padding=(1, 0, 0))


class ComputedWeight(nn.Module):
    """A network makes the kernel."""

    def __init__(self, width):
        super().__init__()
        self.make = nn.Linear(width, width * width)

    def forward(self, x):
        width = x.shape[1]
        return F.conv3d(x, self.make(x.mean((0, 2, 3, 4))).view(width, width, 1, 1, 1))


class TiedConvs(nn.Module):
    """Two convolutions, of unlike geometry, share one Parameter; the bias of one is the other's too."""

    def __init__(self, width):
        super().__init__()
        self.encode = nn.Conv3d(width, width, 3, padding=1)
        self.decode = nn.Conv3d(width, width, 3, padding=2, dilation=2)
        self.decode.weight, self.decode.bias = self.encode.weight, self.encode.bias

    def forward(self, x):
        return self.decode(self.encode(x).tanh())


class TiedToFunction(nn.Module):
    """A convolution's weight is also that of a functional one."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv3d(width, width, 3, padding=1)

    def forward(self, x):
        return F.conv3d(self.conv(x).tanh(), self.conv.weight, padding=1)


class TiedToTranspose(nn.Module):
    """A convolution's weight is also used in float, by another operation."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv3d(width, width, 3, padding=1)

    def forward(self, x):
        return F.conv_transpose3d(self.conv(x).tanh(), self.conv.weight, padding=1)


class MutatedBuffers(nn.Module):
    """Its forward writes to buffers, one of them not in checkpoints, and to a number."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv3d(width, width, 1)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("level", torch.zeros(width), persistent=False)
        self.calls = 0

    def forward(self, x):
        y = self.conv(x)
        self.steps += 1
        self.calls += 1
        self.level.lerp_(y.detach().mean((0, 2, 3, 4)), 0.5)
        return (y - self.level.view(-1, 1, 1, 1)) / (self.steps + self.calls)


class Memory(nn.Module):
    """It writes to a buffer through a list and to a tensor that is none."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("level", torch.zeros(()))
        self.levels = [self.level, torch.ones(width, 1, 1, 1)]

    def forward(self, x):
        self.levels[0].add_(1)
        self.levels[1].mul_(0.5)
        return x * self.levels[1] / self.level


class Cache(nn.Module):
    """It keeps what it has returned for the next call."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0))
        self.last = None

    def forward(self, x):
        y = self.conv(x)
        if self.last is not None:
            y = y + self.last
        self.last = y.detach()
        return y


class FunctionalDropout(nn.Module):
    def __init__(self, width):
        super().__init__()

    def forward(self, x):
        return F.dropout(x, 0.3, training=self.training)


class Unbatched(nn.Module):
    """It runs clip by clip."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv3d(width, width, 3, padding=1)

    def forward(self, x):
        return torch.stack([self.conv(clip) for clip in x])


def _by_name(*classes: type[nn.Module]) -> dict[str, type[nn.Module]]:
    return {cls.__name__: cls for cls in classes}


PARTS: dict[str, Callable[[int], nn.Module]] = {
    **_by_name(Relu, InPlaceRelu, Tanh, nn.PReLU, nn.BatchNorm3d, FrozenBatchNorm, GroupNorm, nn.InstanceNorm3d),
    "Dropout3d": lambda width: nn.Dropout3d(0.5),
    **_by_name(UpAndDown, Frames, ChannelsLast, Gate),
    **_by_name(FunctionalConv, FunctionalTwice, FunctionalBranches, ComputedWeight),
    **_by_name(TiedConvs, TiedToFunction, TiedToTranspose),
    **_by_name(MutatedBuffers, Memory, Cache, FunctionalDropout, Unbatched),
}
WITHOUT_CONV3D = PARTS.keys() - {
    "Gate",
    "TiedConvs",
    "TiedToFunction",
    "TiedToTranspose",
    "MutatedBuffers",
    "Cache",
    "Unbatched",
}
FUNCTIONAL = (FunctionalConv, FunctionalTwice, FunctionalBranches, ComputedWeight, TiedToFunction)


# --- blocks around one other ---


class Around(nn.Module):
    """What most of them are: a block with another inside."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner


class Resized(Around):
    def forward(self, x):
        return F.interpolate(self.inner(x), size=x.shape[2:])


class Residual(Around):
    def forward(self, x):
        return x + self.inner(x)


class Twice(Around):
    def forward(self, x):
        return self.inner(self.inner(x).tanh())


class TwoNames(Around):
    """One module under two names, one of them deeper."""

    def __init__(self, inner):
        super().__init__(inner)
        self.others = nn.ModuleDict({"same": inner})

    def forward(self, x):
        return self.others["same"](self.inner(x).tanh())


class TwoOwners(nn.Sequential):
    """Two blocks own one module."""

    def __init__(self, inner):
        super().__init__(Residual(inner), nn.Tanh(), Residual(inner))


class PlainList(Around):
    """What it calls is in a plain list."""

    def __init__(self, inner):
        super().__init__(inner)
        self.layers = [inner]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class TypeCheck(Around):
    """A Proxy is no Tensor: fx takes the wrong branch."""

    def forward(self, x):
        return x + self.inner(x) if isinstance(x, Tensor) else x


class Length(Around):
    def forward(self, x):
        return self.inner(x) / len(x)


class Asserting(Around):
    def forward(self, x):
        assert x.dim() == 5
        assert x.shape[0] == 2
        return self.inner(x)


class Unpacking(Around):
    def forward(self, x):
        first, second = x
        return self.inner(torch.stack((first, second)))


class DictBetween(nn.Module):
    """Its parts pass a dict and return one."""

    def __init__(self, inner):
        super().__init__()
        self.part = _DictPart(inner)

    def forward(self, x):
        results = self.part({"clip": x, "gain": 0.5, "note": "kept"})
        return results["maps"][0] + x if "maps" in results else x


class _DictPart(Around):
    def forward(self, batch):
        return {"maps": [self.inner(batch["clip"]) * batch.get("gain", 1.0), None]}


class ListBetween(nn.Module):
    """Its parts pass a list of clips and return one."""

    def __init__(self, inner):
        super().__init__()
        self.part = _ListPart(inner)

    def forward(self, x):
        return sum(self.part([x, x * 0.5]))


class _ListPart(Around):
    def forward(self, clips):
        return [self.inner(clip) for clip in clips]


class KeywordOnly(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.part = _KeywordPart(inner)

    def forward(self, x, **options):
        return self.part(clip=x, **options)


class _KeywordPart(Around):
    def forward(self, *, clip, gain=0.5, bias=None):
        y = self.inner(clip) * gain
        return y if bias is None else y + bias


class OwnCall(nn.Module):
    """A part of it goes round nn.Module's call."""

    def __init__(self, inner):
        super().__init__()
        self.part = _CallablePart(inner)

    def forward(self, x):
        return self.part(x, gain=0.5)


class _CallablePart(Around):
    def __call__(self, x, gain):
        return self.forward(x) * gain

    def forward(self, x):
        return self.inner(x)


class NoGradMethod(Around):
    @torch.no_grad()
    def features(self, x):
        return self.inner(x)

    def forward(self, x):
        return x + self.features(x)


class NoGradPart(Around):
    def forward(self, x):
        y = self.inner(x)
        with torch.no_grad():
            level = y.abs().mean()
        return y / (1 + level)


class Checkpointed(Around):
    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=True)


class CheckpointedByHooks(Around):
    def forward(self, x):
        return x + checkpoint(self.inner, x, use_reentrant=False)


class Dead(Around):
    """It never calls what it holds, and returns what it is given."""

    def forward(self, x):
        return x


class TrainingOnly(Around):
    def forward(self, x):
        if self.training:
            return x + self.inner(x)
        return x


class Stochastic(Around):
    """Stochastic depth, by torch's generator and by Python's."""

    def forward(self, x):
        if self.training and (torch.rand(()).item() < 0.3 or random.random() < 0.3):  # noqa: S311 (a model's own draw)
            return x
        return x + self.inner(x)


class FrozenPart(Around):
    def __init__(self, inner):
        super().__init__(_frozen(inner))

    def forward(self, x):
        return x + self.inner(x)


class EvalPart(Around):
    """What it holds stays in eval mode."""

    def train(self, mode=True):
        super().train(mode)
        self.inner.eval()
        return self

    def forward(self, x):
        return self.inner(x)


class HookedPart(Around):
    def __init__(self, inner):
        super().__init__(_hooked(inner))

    def forward(self, x):
        return self.inner(x)


class OptionalArgument(nn.Module):
    """A part of it does another thing where an argument is left out, and returns a tuple."""

    def __init__(self, inner):
        super().__init__()
        self.part = _OptionalPart(inner)

    def forward(self, x):
        y, _ = self.part(x)
        y, extra = self.part(y, x, extra=True)
        return y + extra


class _OptionalPart(Around):
    def forward(self, x, skip=None, extra=False):
        y = self.inner(x).tanh()
        if skip is not None:
            y = y + skip
        return (y, x) if extra else (y, None)


class InPlace(Around):
    """Something is overwritten, as long as ``in_place`` is set."""

    in_place = True


class AddInPlace(InPlace):
    """Whether that breaks autograd is up to what is inside."""

    def forward(self, x):
        y = self.inner(x)
        if self.in_place:
            y += x
        else:
            y = y + x
        return y


class AddAfterRelu(InPlace):
    def forward(self, x):
        y = F.relu(self.inner(x))
        if self.in_place:
            y += x
        else:
            y = y + x
        return y


class MulOnSigmoid(InPlace):
    def forward(self, x):
        y = torch.sigmoid(self.inner(x))
        if self.in_place:
            y.mul_(x)
        else:
            y = y.mul(x)
        return y


class LeakyReluOnTanh(InPlace):
    def forward(self, x):
        return F.leaky_relu(torch.tanh(self.inner(x)), 0.1, inplace=self.in_place)


class OverwrittenArgument(InPlace):
    """What it overwrites is the caller's, and what its block has read."""

    def forward(self, x):
        y = self.inner(x)
        if self.in_place:
            x += 0.5
        else:
            x = x + 0.5
        return y + x


class OverwrittenView(InPlace):
    """A view is overwritten, and what it is a view of is read."""

    def forward(self, x):
        y = F.relu(self.inner(x))
        flat = y.flatten(2)
        if not self.in_place:
            return (flat + 0.25).view_as(y)
        flat += 0.25
        return y


class ReadEarlier(InPlace):
    """A product has read what is then overwritten twice."""

    def forward(self, x):
        y = self.inner(x)
        product = y * x.tanh()
        if self.in_place:
            y += 1
            y *= 0.5
        else:
            y = (y + 1) * 0.5
        return y - product


class SetItem(InPlace):
    def forward(self, x):
        y = F.relu(self.inner(x))
        if not self.in_place:
            return torch.cat((x[:, :1], y[:, 1:]), 1)
        y[:, :1] = x[:, :1]
        return y


WRAPS = _by_name(
    *(Residual, Twice, TwoNames, TwoOwners, PlainList, TypeCheck, Length, Asserting, Unpacking),
    *(DictBetween, ListBetween, KeywordOnly, OwnCall, NoGradMethod, NoGradPart, Checkpointed, CheckpointedByHooks),
    *(Dead, TrainingOnly, Stochastic, FrozenPart, EvalPart, HookedPart, OptionalArgument),
    *(AddInPlace, AddAfterRelu, MulOnSigmoid, LeakyReluOnTanh, OverwrittenArgument, OverwrittenView, ReadEarlier, SetItem),
)


# --- blocks around two others ---


class Both(nn.Module):
    """What they are: a block with two inside."""

    def __init__(self, left, right):
        super().__init__()
        self.left = left
        self.right = right


class Sum(Both):
    def forward(self, x):
        return self.left(x) + self.right(x)


class SumInPlace(Both):
    in_place = True

    def forward(self, x):
        y = self.left(x)
        if self.in_place:
            y += self.right(x)
        else:
            y = y + self.right(x)
        return y


class Product(Both):
    def forward(self, x):
        return self.left(x) * self.right(x).sigmoid()


class Concatenated(Both):
    def forward(self, x):
        first, second = torch.cat((self.left(x), self.right(x)), 1).chunk(2, 1)
        return first - second


class Switch(Both):
    """The path depends on a value."""

    def forward(self, x):
        return self.left(x) if x.mean() > 0 else self.right(x)


class Pathways(nn.Module):
    """A list of clips goes through a list of blocks."""

    def __init__(self, left, right):
        super().__init__()
        self.part = _PathwaysPart(left, right)

    def forward(self, x):
        first, second = self.part([x, -x])
        return first + second


class _PathwaysPart(nn.Module):
    def __init__(self, left, right):
        super().__init__()
        self.blocks = nn.ModuleList([left, right])

    def forward(self, clips):
        return [block(clip) for block, clip in zip(self.blocks, clips, strict=True)]


class Auxiliary(Both):
    """In training it returns more, and its caller asks for it."""

    def forward(self, x):
        y = self.left(x)
        return y + self.right(y).tanh() if self.training else y


JOINS = _by_name(Sum, SumInPlace, Product, Concatenated, Switch, Pathways, Auxiliary)


# --- whole networks ---


class DictNetwork(Around):
    def forward(self, batch):
        y = self.inner(batch["clip"]) * batch.get("gain", 1.0)
        return {"maps": [y, (y.relu(), None)], "note": "kept"}


class KeywordNetwork(Around):
    def forward(self, *, clip, gain=0.5, bias=None):
        y = self.inner(clip) * gain
        return y if bias is None else y + bias


class ListNetwork(Around):
    def forward(self, clips):
        return [self.inner(clip) for clip in clips]


class OptionalNetwork(Around):
    def forward(self, x, skip=None, scale: float = 2.0):
        y = self.inner(x)
        return (y, skip * scale) if skip is not None else y


INTERFACES = _by_name(DictNetwork, KeywordNetwork, ListNetwork, OptionalNetwork)


# --- strategies ---

_GEOMETRIES = st.one_of(
    st.builds(
        Conv,
        kind=st.sampled_from([*GENERAL]),
        kernel=st.sampled_from([(3, 3, 3), (1, 1, 1), (1, 3, 3), (3, 1, 1)]),
        stride=st.sampled_from([1, 2]),
        dilation=st.sampled_from([1, 2]),
        mode=st.sampled_from(["zeros", "replicate", "reflect", "circular"]),
        groups=st.sampled_from(["dense", "two", "depthwise"]),
        bias=st.booleans(),
        dress=st.sampled_from([*DRESSES]),
    ),
    st.builds(
        Conv,
        kind=st.sampled_from([*GENERAL]),
        kernel=st.sampled_from([(3, 3, 3), (2, 2, 2), (2, 3, 4)]),
        padding=st.sampled_from(["same", "valid"]),
        mode=st.sampled_from(["zeros", "replicate"]),
        groups=st.sampled_from(["dense", "two", "depthwise"]),
        dress=st.sampled_from([*DRESSES]),
    ),
    st.builds(Conv, kind=st.sampled_from([*FIXED]), dress=st.sampled_from([*DRESSES])),
)
_FUNCTIONAL_PARTS = sorted(cls.__name__ for cls in FUNCTIONAL)
_LEAVES = st.one_of(
    st.just(Conv()),
    st.builds(Part, st.sampled_from([*PARTS])),
    st.builds(Part, st.sampled_from(_FUNCTIONAL_PARTS)),
    _GEOMETRIES,
)


def _larger(inner: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    return st.one_of(
        st.builds(Wrap, st.sampled_from([*WRAPS]), inner),
        st.builds(Chain, st.lists(inner, min_size=2, max_size=3).map(tuple)),
        st.builds(Join, st.sampled_from([*JOINS]), inner, inner),
    )


def _with_conv3d(node: Node) -> Node:
    return node if _holds_conv3d(node) else Chain((node, Conv()))


def _holds_conv3d(node: Node) -> bool:
    match node:
        case Part():
            return node.kind not in WITHOUT_CONV3D
        case Wrap():
            return _holds_conv3d(node.inner)
        case Join():
            return _holds_conv3d(node.left) or _holds_conv3d(node.right)
        case Chain():
            return any(map(_holds_conv3d, node.nodes))
    return True


networks = st.builds(
    Network,
    interface=st.sampled_from(["bare", *INTERFACES]),
    width=st.sampled_from([4, 8]),
    body=st.recursive(_LEAVES, _larger, max_leaves=8).map(_with_conv3d),
)
"""Networks with at least one nn.Conv3d."""
