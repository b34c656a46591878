"""Tiny models, one trap each: what real models do that a conversion by tracing can get wrong.

`TRAPS` lists them ready to build and run; `tests/zoo` runs the same checks on them as on the real models.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    """A model that tests run.

    Attributes:
        name: its id in test reports.
        build: makes it, with random weights from torch's global generator.
        inputs: makes its example input, in the form that `qconvert.profile` takes: a tensor or a list is the one argument,
            a tuple holds the arguments, a dict the keyword arguments.
        conv3d: how many nn.Conv3d modules it holds, counted by hand or read off its paper.
        calls: how many times in a row it is to be run (2 where one call leaves something behind for the next).
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    conv3d: int
    calls: int = 1


def seeded() -> None:
    """Start every random generator that a forward may draw from at the same place."""
    torch.manual_seed(0)
    random.seed(0)


def run(model: nn.Module, inputs: Any) -> Any:
    """Call the model on an example input of the form that `Entry.inputs` has."""
    if isinstance(inputs, tuple):
        return model(*inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(inputs)


def _clip() -> Tensor:
    return torch.randn(2, 2, 4, 6, 6)


def _conv(inputs: int = 2, outputs: int = 4) -> nn.Conv3d:
    return nn.Conv3d(inputs, outputs, 3, padding=1)


class ValueControlFlow(nn.Module):
    """The path depends on a value: fx raises here, and a trace with an example would keep one branch only."""

    def __init__(self):
        super().__init__()
        self.bright = _conv()
        self.dark = _conv()

    def forward(self, x):
        return self.bright(x) if x.mean() > 0 else self.dark(x)


class TypeCheck(nn.Module):
    """The path depends on the argument's type. A Proxy is no Tensor, so fx silently takes the wrong branch (as in MONAI)."""

    def __init__(self):
        super().__init__()
        self.conv = _conv()
        self.skip = _conv()

    def forward(self, x):
        y = self.conv(x)
        return y + self.skip(x) if isinstance(x, Tensor) else y


class DictInDictOut(nn.Module):
    """It takes one dict and returns nested containers."""

    def __init__(self):
        super().__init__()
        self.conv = _conv()

    def forward(self, batch):
        y = self.conv(batch["clip"]) * batch.get("gain", 1.0)
        return {"maps": [y, (y.relu(), None)], "note": "kept", "mean": y.mean()}


class KeywordOnly(nn.Module):
    """Its inputs can be passed by name only."""

    def __init__(self):
        super().__init__()
        self.conv = _conv()

    def forward(self, *, clip, gain=2.0, bias=None):
        y = self.conv(clip) * gain
        return y if bias is None else y + bias


class SharedModule(nn.Module):
    """One convolution under two names, called twice: converted twice it would be quantized twice, or half."""

    def __init__(self):
        super().__init__()
        self.conv = _conv(2, 2)
        self.same = self.conv

    def forward(self, x):
        return self.same(self.conv(x).tanh())


class TiedParameter(nn.Module):
    """Two convolutions train one Parameter: a conversion that copies weights unties them."""

    def __init__(self):
        super().__init__()
        self.encode = _conv(2, 2)
        self.decode = _conv(2, 2)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(self.encode(x).tanh())


class PlainList(nn.Module):
    """Its convolutions are called through a plain list, which replacing the registered module does not reach."""

    def __init__(self):
        super().__init__()
        self.first = _conv()
        self.second = _conv(4, 4)
        self.layers = [self.first, self.second]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class FunctionalConv(nn.Module):
    """One of its convolutions is no module."""

    def __init__(self):
        super().__init__()
        self.conv = _conv()
        self.kernel = nn.Parameter(torch.randn(3, 4, 1, 1, 1))

    def forward(self, x):
        return F.conv3d(self.conv(x), self.kernel)


class DeadConv(nn.Module):
    """It holds a convolution that its forward never calls."""

    def __init__(self):
        super().__init__()
        self.conv = _conv()
        self.unused = _conv()

    def forward(self, x):
        return self.conv(x)


class FrozenBatchNorm(nn.Module):
    """Its first BatchNorm stays in eval mode while it trains: train flags are per module, not per model."""

    def __init__(self):
        super().__init__()
        self.conv = _conv()
        self.frozen = nn.BatchNorm3d(4)
        self.head = _conv(4, 4)
        self.live = nn.BatchNorm3d(4)
        self.frozen.eval()

    def forward(self, x):
        return self.live(self.head(self.frozen(self.conv(x))))


class OwnTrainMethod(FrozenBatchNorm):
    """The same, by a train() of its own that is in no hurry to give all modules one mode (a common idiom)."""

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self


class HookedConv(nn.Module):
    """Hooks on the convolution change its input and its output, and keep what passes."""

    def __init__(self):
        super().__init__()
        self.conv = _conv()
        self.kept = []
        self.conv.register_forward_pre_hook(_shifted)
        self.conv.register_forward_hook(self._keep)

    def _keep(self, module, args, output):
        self.kept.append(output.detach().mean())
        return output * 3

    def forward(self, x):
        return self.conv(x), torch.stack(self.kept)


def _shifted(module, args):
    return (args[0] - 0.25,)


class MutatedBuffers(nn.Module):
    """Its forward writes to its buffers, one of which is in no checkpoint: tracing or counting must not."""

    def __init__(self):
        super().__init__()
        self.conv = _conv()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("level", torch.zeros(4), persistent=False)

    def forward(self, x):
        y = self.conv(x)
        self.steps += 1
        self.level.lerp_(y.detach().mean((0, 2, 3, 4)), 0.5)
        return y - self.level.view(-1, 1, 1, 1) * self.steps


class PlainTensors(nn.Module):
    """It writes to tensors that are no buffers: fx runs that for real while it traces."""

    def __init__(self):
        super().__init__()
        self.conv = _conv()
        self.steps = torch.zeros(())
        self.levels = [torch.zeros(4, 1, 1, 1)]

    def forward(self, x):
        self.steps += 1
        self.levels[0].add_(self.steps)
        return self.conv(x) * self.levels[0]


class ListedBuffer(nn.Module):
    """It writes to a buffer through a list (as one does with a memory per level), where fx does not see that it is one."""

    def __init__(self):
        super().__init__()
        self.conv = _conv()
        self.register_buffer("level", torch.zeros(()))
        self.levels = [self.level]

    def forward(self, x):
        self.levels[0].add_(1)
        return self.conv(x) * self.level


class Cache(nn.Module):
    """It keeps the last clip on itself, as streaming models do: a trace would leave a Proxy there."""

    def __init__(self):
        super().__init__()
        self.conv = _conv()
        self.last = None
        self.seen = 0

    def forward(self, x):
        y = self.conv(x)
        if self.last is not None:
            y = y + self.last
        self.last = y.detach()
        self.seen += 1
        return y / self.seen


class Stochastic(nn.Module):
    """Dropout and stochastic depth, by torch's and by Python's generator: a trace bakes `self.training` and the draw in."""

    def __init__(self):
        super().__init__()
        self.stem = _conv()
        self.branch = _conv(4, 4)
        self.drop = nn.Dropout3d(0.5)
        self.late = _conv(4, 4)

    def forward(self, x):
        x = F.dropout(self.stem(x), 0.3, training=self.training)
        if not self.training or torch.rand(()).item() < 0.7:
            x = x + self.drop(self.branch(x))
        if self.training and random.random() < 0.5:  # noqa: S311 (a model's own draw)
            return x
        return self.late(x)


class CausalConv3d(nn.Conv3d):
    """Pads the past only; takes more arguments than a Conv3d (as in the video autoencoders of diffusers)."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 3, padding=(0, 1, 1))
        self.past = self.kernel_size[0] - 1

    def forward(self, x, cache=None, *, gain=1.0):
        head = x.new_zeros(*x.shape[:2], self.past, *x.shape[3:]) if cache is None else cache
        return super().forward(torch.cat((head, x), 2)) * gain


class CausalModel(nn.Module):
    """A Conv3d subclass with a forward of its own that is called with extra arguments."""

    def __init__(self):
        super().__init__()
        self.first = CausalConv3d(2, 4)
        self.second = CausalConv3d(4, 4)

    def forward(self, x):
        x = self.first(x, gain=0.5)
        return self.second(x, x[:, :, -self.second.past :])


class StandardizedConv3d(nn.Conv3d):
    """Never reaches nn.Conv3d.forward, so no other class can put a quantizer under it."""

    def forward(self, x):
        return F.conv3d(x, self.weight - self.weight.mean(), self.bias, self.stride, self.padding)


class StandardizedModel(nn.Module):
    """One convolution that can be converted and one that must be left float."""

    def __init__(self):
        super().__init__()
        self.conv = _conv()
        self.standardized = StandardizedConv3d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.standardized(self.conv(x))


class Paddings(nn.Module):
    """Every way of padding that a Conv3d has, an even kernel among them."""

    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(
            *(nn.Conv3d(2, 2, 3, padding=1, padding_mode=mode) for mode in ("reflect", "replicate", "circular", "zeros")),
            nn.Conv3d(2, 2, (2, 3, 4), padding="same", dilation=(1, 2, 1)),
            nn.Conv3d(2, 2, 2, padding="same", padding_mode="replicate"),
            nn.Conv3d(2, 4, 3, padding="valid", groups=2),
            nn.Conv3d(4, 4, (1, 3, 2), padding=(2, 0, 1), stride=(1, 2, 1), bias=False),
        )

    def forward(self, x):
        return self.convs(x)


class WeightNormed(nn.Module):
    """Its weight is computed from other Parameters at every call (torch's parametrization)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(_conv())
        self.plain = _conv(4, 4)

    def forward(self, x):
        return self.plain(self.conv(x))


class Unbatched(nn.Module):
    """A Conv3d takes a clip without a batch dimension too."""

    def __init__(self):
        super().__init__()
        self.conv = _conv()

    def forward(self, x):
        return torch.stack([self.conv(clip) for clip in x])


TRAPS = (
    Entry("value control flow", ValueControlFlow, _clip, 2),
    Entry("type check", TypeCheck, _clip, 2),
    Entry("dict in dict out", DictInDictOut, lambda: ({"clip": _clip(), "gain": 0.5},), 1),
    Entry("keyword only", KeywordOnly, lambda: {"clip": _clip(), "bias": torch.ones(())}, 1),
    Entry("shared module", SharedModule, _clip, 1),
    Entry("tied parameter", TiedParameter, _clip, 2),
    Entry("plain list", PlainList, _clip, 2),
    Entry("functional conv", FunctionalConv, _clip, 1),
    Entry("dead conv", DeadConv, _clip, 2),
    Entry("frozen batchnorm", FrozenBatchNorm, _clip, 2),
    Entry("own train method", OwnTrainMethod, _clip, 2),
    Entry("hooked conv", HookedConv, _clip, 1, calls=2),
    Entry("mutated buffers", MutatedBuffers, _clip, 1, calls=2),
    Entry("plain tensors", PlainTensors, _clip, 1, calls=2),
    Entry("listed buffer", ListedBuffer, _clip, 1, calls=2),
    Entry("cache", Cache, _clip, 1, calls=2),
    Entry("stochastic", Stochastic, _clip, 3, calls=4),
    Entry("causal subclass", CausalModel, _clip, 2),
    Entry("standardized subclass", StandardizedModel, _clip, 2),
    Entry("paddings", Paddings, _clip, 8),
    Entry("weight norm", WeightNormed, _clip, 2),
    Entry("unbatched", Unbatched, _clip, 1),
    Entry("single conv", _conv, _clip, 1),
)


class TwoConvs(nn.Module):
    """Small enough to count on paper: two convolutions, a BatchNorm and a linear layer, for a clip of 2 x 4 x 6 x 6."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv3d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm3d(8)
        self.second = nn.Conv3d(8, 4, (1, 3, 3), stride=2, padding=(0, 1, 1), bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.second(self.norm(self.first(x)).relu())
        return self.head(x.mean((2, 3, 4)))


class NeedsValues(TwoConvs):
    """The same, but it reads a value in its forward, so shapes alone do not run it."""

    def forward(self, x):
        return super().forward(x * (2.0 if x.sum().item() > 0 else 1.0))
