"""Tiny models, one trap each: what real models do that a conversion by tracing can get wrong.

`TRAPS` lists them ready to build and run; `tests/zoo` runs the same checks on them as on the real models.
"""

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint


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


class Length(nn.Module):
    """It asks for the length of its argument, which a Proxy does not have."""

    def __init__(self):
        super().__init__()
        self.conv = _conv()

    def forward(self, x):
        return self.conv(x) / len(x)


class ListInListOut(nn.Module):
    """It takes a list, a pathway each, and returns one: fx has one Proxy for the list, which cannot be iterated over."""

    def __init__(self):
        super().__init__()
        self.pathways = nn.ModuleList([_conv(), _conv()])

    def forward(self, clips):
        return [pathway(clip) for pathway, clip in zip(self.pathways, clips, strict=True)]


class MutatedInputs(nn.Module):
    """It overwrites what it is given, a list and the tensor in it: whoever runs it a second time must have made a copy."""

    def __init__(self):
        super().__init__()
        self.slow = _conv()
        self.fast = _conv()

    def forward(self, clips):
        clips[0] = self.slow(clips[0])
        clips[1].mul_(0.5)
        clips.append(self.fast(clips.pop()))
        return clips[0] + clips[1]


@dataclass
class Clip:
    """An input that torch's pytree does not look into."""

    frames: Tensor
    gain: float = 1.0


@dataclass
class Maps:
    """An output. Registered with torch's pytree so that the tests look into it."""

    first: Tensor
    second: Tensor


pytree.register_dataclass(Maps)


class DataclassInDataclassOut(nn.Module):
    """Dataclasses carry its tensors, between its modules too."""

    def __init__(self):
        super().__init__()
        self.encode = _DataclassEncoder()
        self.decode = _conv(4, 2)

    def forward(self, clip):
        maps = self.encode(clip)
        return Maps(maps.first, self.decode(maps.second))


class _DataclassEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = _conv()

    def forward(self, clip):
        y = self.conv(clip.frames) * clip.gain
        return Maps(y, y.tanh())


class VariableKeywords(nn.Module):
    """It takes any keyword and hands them on."""

    def __init__(self):
        super().__init__()
        self.inner = KeywordOnly()

    def forward(self, x, **options):
        return self.inner(clip=x, **options)


class NoGradPart(nn.Module):
    """A method of it runs without gradients (a teacher, a frozen stem): its convolution gets none, converted or not."""

    def __init__(self):
        super().__init__()
        self.stem = _conv()
        self.head = _conv(4, 4)

    @torch.no_grad()
    def features(self, x):
        return self.stem(x)

    def forward(self, x):
        y = self.head(self.features(x))
        with torch.no_grad():
            level = y.abs().mean()
        return y / level


class Checkpointed(nn.Module):
    """Its middle is run a second time in the backward pass (gradient checkpointing), by an autograd.Function."""

    use_reentrant = True

    def __init__(self):
        super().__init__()
        self.stem = _conv()
        self.block = nn.Sequential(_conv(4, 4), nn.Dropout3d(0.5), nn.Tanh())

    def forward(self, x):
        return checkpoint(self.block, self.stem(x), use_reentrant=self.use_reentrant)


class CheckpointedByHooks(Checkpointed):
    """The same in torch's newer way, by hooks on the tensors that are saved."""

    use_reentrant = False


class ScriptTypeCheck(nn.Module):
    """The path depends on the argument's type, asked in TorchScript's way: False for a Proxy."""

    def __init__(self):
        super().__init__()
        self.conv = _conv()
        self.other = _conv()

    def forward(self, clips):
        if torch.jit.isinstance(clips, list[Tensor]):
            return self.conv(clips[0]) + self.other(clips[1])
        return self.conv(clips)


class OwnCall(nn.Module):
    """It has a part that overrides ``__call__`` and goes round nn.Module's: neither hooks nor fx see that call."""

    def __init__(self):
        super().__init__()
        self.block = _CallableBlock()
        self.head = _conv(4, 4)

    def forward(self, x):
        return self.head(self.block(x, gain=0.5))


class _CallableBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = _conv()

    def __call__(self, x, gain):
        return self.forward(x) * gain

    def forward(self, x):
        return self.conv(x).tanh()


class TrainingOnly(nn.Module):
    """One of its convolutions runs in training only (an auxiliary head), and then it returns more."""

    def __init__(self):
        super().__init__()
        self.conv = _conv()
        self.auxiliary = _conv(4, 4)

    def forward(self, x):
        y = self.conv(x)
        if self.training:
            return y, self.auxiliary(y)
        return y


class FrozenParameters(nn.Module):
    """Its stem is not trained: that flag is each Parameter's own."""

    def __init__(self):
        super().__init__()
        self.stem = _conv().requires_grad_(requires_grad=False)
        self.head = _conv(4, 4)
        self.head.bias.requires_grad_(requires_grad=False)

    def forward(self, x):
        return self.head(self.stem(x))


class BackwardHooked(nn.Module):
    """Hooks on the convolution change the gradient that comes and the one that goes."""

    def __init__(self):
        super().__init__()
        self.stem = _conv()
        self.conv = _conv(4, 4)
        self.conv.register_full_backward_pre_hook(_doubled)
        self.conv.register_full_backward_hook(_halved)

    def forward(self, x):
        return self.conv(self.stem(x))


def _doubled(module, grad_output):
    return tuple(gradient * 2 for gradient in grad_output)


def _halved(module, grad_input, grad_output):
    return tuple(gradient / 2 for gradient in grad_input)


class StateDictHooked(nn.Module):
    """Its convolution's checkpoints call the weight ``kernel``: hooks rename it, when one is made and when one is read."""

    def __init__(self):
        super().__init__()
        self.conv = _conv()
        self.conv.register_state_dict_post_hook(_kernel_out)
        self.conv.register_load_state_dict_pre_hook(_kernel_in)
        self.conv.register_load_state_dict_post_hook(_nothing_unexpected)

    def forward(self, x):
        return self.conv(x)


def _kernel_out(module, state, prefix, local_metadata):
    state[f"{prefix}kernel"] = state.pop(f"{prefix}weight")


def _kernel_in(module, state, prefix, *_):
    if f"{prefix}kernel" in state:
        state[f"{prefix}weight"] = state.pop(f"{prefix}kernel")


def _nothing_unexpected(module, incompatible):
    assert not incompatible.unexpected_keys


class PlainConv3d(nn.Conv3d):
    """Has a constructor of its own and Conv3d's forward (as torchvision's Conv3DSimple)."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 3, padding=1, bias=False)

    @staticmethod
    def kinds():
        return "plain"


class InheritedForward(nn.Module):
    """Conv3d subclasses that fx walks into by default, asked for what they are besides."""

    def __init__(self):
        super().__init__()
        self.first = PlainConv3d(2, 4)
        self.second = PlainConv3d(4, 4)

    def forward(self, x):
        assert isinstance(self.second, PlainConv3d)
        return self.second(self.first(x).tanh()) * len(self.second.kinds())


class CenteredConv3d(nn.Conv3d):
    """Makes another weight and another input, then calls Conv3d's inner method."""

    def forward(self, x):
        return self._conv_forward(x - x.mean(), self.weight - self.weight.mean(), self.bias)


class ConvForward(nn.Module):
    """A Conv3d subclass whose forward goes round nn.Conv3d.forward, and is to be converted all the same."""

    def __init__(self):
        super().__init__()
        self.conv = _conv()
        self.centered = CenteredConv3d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.centered(self.conv(x))


class FourierConv3d(nn.Conv3d):
    """Multiplies spectra: no convolution runs anywhere (MONAI has such layers)."""

    def forward(self, x):
        size = x.shape[2:]
        spectrum = torch.einsum("ncdhw,ocdhw->nodhw", torch.fft.rfftn(x, size), torch.fft.rfftn(self.weight, size).conj())
        return torch.fft.irfftn(spectrum, size) + self.bias.view(-1, 1, 1, 1)


class Fourier(nn.Module):
    """A Conv3d subclass that never convolves: it stays float.

    Not in `TRAPS`, whose tests count MACs as if every Conv3d did.
    """

    def __init__(self):
        super().__init__()
        self.conv = _conv()
        self.fourier = FourierConv3d(4, 4, 3)

    def forward(self, x):
        return self.fourier(self.conv(x))


class ComputedWeight(nn.Module):
    """A network makes the kernel of its functional convolution (a hypernetwork)."""

    def __init__(self):
        super().__init__()
        self.conv = _conv()
        self.make = nn.Linear(4, 3 * 4)

    def forward(self, x):
        y = self.conv(x)
        return torch.conv3d(y, self.make(y.mean((0, 2, 3, 4))).view(3, 4, 1, 1, 1))


class ParameterElsewhere(nn.Module):
    """A convolution's weight is used by something else too, in float: an autoencoder whose decoder is the transpose."""

    def __init__(self):
        super().__init__()
        self.encode = _conv()

    def forward(self, x):
        return F.conv_transpose3d(self.encode(x).tanh(), self.encode.weight, padding=1)


class SpectralNormed(nn.Module):
    """Its weight is computed too, and in training each look at it changes buffers (a power iteration)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.utils.parametrizations.spectral_norm(_conv())
        self.plain = _conv(4, 4)

    def forward(self, x):
        return self.plain(self.conv(x))


class HookWeightNormed(nn.Module):
    """The old weight_norm: a hook computes the weight, which is no Parameter, before every call."""

    def __init__(self):
        super().__init__()
        # without a history the weight can be deep-copied, which the tests do with every model
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in half of the world's checkpoints
            self.conv = nn.utils.weight_norm(_conv())
        self.plain = _conv(4, 4)

    def forward(self, x):
        return self.plain(self.conv(x))


class Pruned(nn.Module):
    """A hook masks the weight before every call: most of it is exactly 0, and has a sign all the same."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():  # as for the old weight_norm
            self.conv = prune.l1_unstructured(_conv(), "weight", amount=0.75)
        self.plain = _conv(4, 4)

    def forward(self, x):
        return self.plain(self.conv(x))


class LazyConv(nn.Module):
    """Its convolution has neither a weight nor a number of input channels before it runs. Not in `TRAPS`: it has no size."""

    def __init__(self):
        super().__init__()
        self.stem = nn.LazyConv3d(4, 3, padding=1)
        self.head = _conv(4, 4)

    def forward(self, x):
        return self.head(self.stem(x))


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
    Entry("length", Length, _clip, 1),
    Entry("list in list out", ListInListOut, lambda: [_clip(), _clip()], 2),
    Entry("mutated inputs", MutatedInputs, lambda: [_clip(), _clip()], 2),
    Entry("dataclass in dataclass out", DataclassInDataclassOut, lambda: Clip(_clip(), gain=0.5), 2),
    Entry("variable keywords", VariableKeywords, lambda: {"x": _clip(), "gain": 0.5, "bias": torch.ones(())}, 1),
    Entry("no grad part", NoGradPart, _clip, 2),
    Entry("checkpointed", Checkpointed, _clip, 2),
    Entry("checkpointed by hooks", CheckpointedByHooks, _clip, 2),
    Entry("script type check", ScriptTypeCheck, lambda: [_clip(), _clip()], 2),
    Entry("own call", OwnCall, _clip, 2),
    Entry("training only", TrainingOnly, _clip, 2),
    Entry("frozen parameters", FrozenParameters, _clip, 2),
    Entry("backward hooked", BackwardHooked, _clip, 2),
    Entry("state dict hooked", StateDictHooked, _clip, 1),
    Entry("inherited forward", InheritedForward, _clip, 2),
    Entry("conv forward", ConvForward, _clip, 2),
    Entry("computed weight", ComputedWeight, _clip, 1),
    Entry("parameter elsewhere", ParameterElsewhere, _clip, 1),
    Entry("spectral norm", lambda: SpectralNormed().eval(), _clip, 2),
    Entry("hook weight norm", HookWeightNormed, _clip, 2),
    Entry("pruned", Pruned, _clip, 2),
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


class Residual(nn.Module):
    """What most video networks are made of, wide enough for the default rules: a stem, two residual blocks and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(2, 8, 3, padding=1, bias=False), nn.BatchNorm3d(8), nn.ReLU())
        self.blocks = nn.Sequential(ResidualBlock(8), ResidualBlock(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3, 4)))


class ResidualBlock(nn.Module):
    """Two convolutions around which the input goes."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm3d(channels)

    def forward(self, x):
        y = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(y)) + x).relu()
