"""`signals`: what each convolution reads and puts out, told from the graph, against hooks on a run of the model.

The run is on Gaussian clips, which is what the pass takes the model's input to be.
"""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from models import FunctionalConv, Residual, SharedModule, Unbatched
from torch import Tensor, nn

from qconvert import trace
from qconvert.signals.distribution import UNKNOWN
from qconvert.signals.propagation import Signal, signals

SIZE = (6, 12, 12)
MEAN, STD = 0.3, 0.3
"""Largest error of a mean, in standard deviations of what was measured, and relative error of a standard deviation.

The pass takes operands, and the values in a window, to be independent and all places to be alike, which behind a convolution
with a border they are not: with random weights of few channels that is worth up to a third, and half for a convolution's own
output. Statistics of another layer are off by more, and a sign that is claimed is checked exactly.
"""
OUTPUT = {"mean": 0.5, "std": 0.5}


def clips() -> Tensor:
    return torch.randn(16, 2, *SIZE)


def settled(model: nn.Module) -> nn.Module:
    """Give every BatchNorm random affine parameters and the statistics of what it reads; return the model in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 1)
            module.momentum = None
    with torch.no_grad():
        model.train()(clips())
    return model.eval()


def measured(model: nn.Module, x: Tensor) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Return what each Conv3d read and put out, channel by channel, over all its calls."""
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module, args, output):
            reads, writes = seen.setdefault(name, ([], []))
            reads.append(args[0].movedim(-4, 0).flatten(1).float())
            writes.append(output.movedim(-4, 0).flatten(1).float())

        return hook

    hooked = copy.deepcopy(model)
    for name, module in hooked.named_modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(keep(name))
    with torch.no_grad():
        hooked(x)
    return seen


def near(told: object, values: list[Tensor], mean: float = MEAN, std: float = STD) -> None:
    """Compare channel by channel."""
    together = torch.cat(values, 1)
    expected, spread = together.mean(1), together.std(1)
    told = told.wide(len(expected))
    assert ((told.mean - expected).abs() <= mean * spread).all(), (told.mean, expected, spread)
    assert ((told.std / spread - 1).abs() <= std).all(), (told.std, spread)
    if told.nonnegative:
        assert together.min() >= 0


class Branches(nn.Module):
    """A branch for each half of the channels, put together again; with functions and methods."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm3d(8)
        self.left = nn.Conv3d(4, 6, 3, padding=1)
        self.right = nn.Conv3d(4, 3, 1)
        self.last = nn.Conv3d(9, 4, 3, stride=2, groups=1, bias=False)

    def forward(self, x):
        left, right = F.relu(self.norm(self.stem(x))).chunk(2, dim=1)
        joined = torch.cat([self.left(left), self.right(right).sigmoid()], dim=1)
        return self.last(F.leaky_relu(joined, 0.2))


class Frames(nn.Module):
    """Differences of frames, a gate, channels-last layers: what is no chain of modules."""

    def __init__(self):
        super().__init__()
        self.motion = nn.Conv3d(2, 8, 3, padding=1)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Conv3d(8, 4, 1)

    def forward(self, x):
        y = self.motion(x[:, :, 1:] - x[:, :, :-1]) * 2
        y = self.mix(F.gelu(y).permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
        return self.head(2 * y + 1)


class Shared(nn.Module):
    """One convolution reads a rectified value, and then what it has made of that."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(4, 4, 3, padding=1)
        self.stem = nn.Conv3d(2, 4, 1)

    def forward(self, x):
        return self.conv(3 + self.conv(self.stem(x).relu()).tanh())


class Half(nn.Module):
    """It asks for a size and uses it as a bound."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(2, 8, 1)
        self.rest = nn.Conv3d(4, 2, 1)

    def forward(self, x):
        y = self.stem(x)
        return self.rest(y[:, : y.shape[1] // 2])


def sequential() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv3d(2, 8, 3, padding=1, bias=False), nn.BatchNorm3d(8), nn.ReLU()),
        nn.Sequential(nn.Conv3d(8, 6, 3, stride=2, padding=1, groups=2), nn.InstanceNorm3d(6), nn.Hardtanh(-0.5, 2)),
        nn.Sequential(nn.Conv3d(6, 4, (1, 3, 3), padding=(0, 2, 2), dilation=(1, 2, 2)), nn.PReLU(4)),
        nn.Conv3d(4, 3, 1),
    )


NETWORKS = {
    "sequential": sequential,
    "residual": Residual,
    "branches": Branches,
    "frames": Frames,
    "shared": Shared,
}
every_network = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)


@every_network
def test_a_convolutions_input_and_output_have_the_moments_of_a_run(build: Callable[[], nn.Module]):
    model = settled(build())
    seen = measured(model, clips())
    told = signals(trace(model), SIZE)
    assert told.keys() == seen.keys()
    for name, (reads, writes) in seen.items():
        near(told[name].input, reads)
        near(told[name].output, writes, **OUTPUT)
        assert told[name].input.channels == model.get_submodule(name).in_channels
        assert told[name].anytime.points.equal(told[name].input.points)  # no BatchNorm that has never been trained


@every_network
def test_the_pass_changes_nothing(build: Callable[[], nn.Module]):
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    signals(trace(model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_what_is_known_not_to_be_negative():
    told = signals(trace(sequential().eval()))
    assert {name: signal.input.nonnegative for name, signal in told.items()} == {
        "0.0": False, "1.0": True, "2.0": False, "3": False,
    }  # fmt: skip
    # behind a normalisation everything is known; behind the next one too
    assert {name: signal.input.known for name, signal in told.items()} == {
        "0.0": False, "1.0": False, "2.0": True, "3": True,
    }  # fmt: skip
    assert signals(trace(settled(sequential())))["1.0"].input.known
    assert signals(trace(sequential().train()))["1.0"].input.known  # its statistics are the batch's


@pytest.mark.parametrize("size", [(2, 2, 2), (16, 32, 32)])
def test_the_size_of_the_input_says_how_much_is_border(size: tuple[int, int, int]):
    model = nn.Sequential(nn.Conv3d(32, 4, 3, padding=1, bias=False), nn.Conv3d(4, 1, 1))
    reads = measured(model, torch.randn(256 if size[0] == 2 else 1, 32, *size))["1"][0]
    near(signals(trace(model), size)["1"].input, reads, std=0.1)


def test_a_volume_shrinks_on_its_way():
    model = nn.Sequential(
        nn.Conv3d(2, 4, 3, stride=(1, 2, 2)), nn.MaxPool3d(2), nn.ConvTranspose3d(4, 4, 2, stride=2), nn.Conv3d(4, 4, 1)
    )
    told, x = signals(trace(model), (8, 16, 16)), torch.zeros(1, 2, 8, 16, 16)
    assert told["0"].input.size == (8, 16, 16)
    assert told["0"].output.size == tuple(model[0](x).shape[2:])
    assert told["3"].input.size == tuple(model[:3](x).shape[2:])


def test_a_bound_that_is_computed_leaves_all_channels_alike():
    model = Half()
    signal, stem = signals(trace(model), SIZE)["rest"], measured(model, clips())["stem"][1]
    near(signal.input, [stem[0].flatten()[None].expand(4, -1)])


# --- a BatchNorm that has never been trained ---


def untrained() -> nn.Sequential:
    """Its first convolution puts out values far from 0 and far apart, which only a BatchNorm that trains puts right."""
    model = nn.Sequential(nn.Conv3d(2, 8, 1), nn.BatchNorm3d(8), nn.Conv3d(8, 4, 1))
    with torch.no_grad():
        model[0].weight.mul_(20)
        model[0].bias.fill_(30)
    return model


@pytest.mark.parametrize("training", [True, False])
def test_input_and_output_are_those_of_the_mode_that_the_model_is_in(training: bool):
    model = untrained().train(training)
    (reads, writes) = measured(model, clips())["2"]
    signal = signals(trace(model), SIZE)["2"]
    near(signal.input, reads, 0.1, 0.1)
    near(signal.output, writes, 0.1, 1.0)  # of 8 values that are made of 2: far from independent


def test_anytime_is_both_modes_of_a_model_that_waits_for_its_training():
    model = untrained().eval()
    seen = {mode: measured(copy.deepcopy(model).train(mode), clips())["2"][0][0] for mode in (True, False)}
    anytime = signals(trace(model), SIZE)["2"].anytime
    both = [seen[False]] * 7 + [seen[True]]
    near(anytime, both, 0.1, 0.1)
    assert anytime.points[0].sub(torch.quantile(torch.cat(both, 1)[0], (torch.arange(32) + 0.5) / 32)).abs().mean() < 1
    assert not model.training


def test_a_model_that_trains_is_taken_as_it_trains():
    signal = signals(trace(untrained().train()), SIZE)["2"]
    assert signal.anytime is signal.input


# --- what cannot be followed ---


class Switch(nn.Module):
    """Control flow that depends on a value."""

    def __init__(self, *children: nn.Module):
        super().__init__()
        self.children_in_a_row = nn.ModuleList(children)

    def forward(self, x):
        for child in self.children_in_a_row:
            x = child(x)
        return -x if x.mean() > 100 else x


def test_inside_an_opaque_module_children_follow_each_other():
    model = settled(
        nn.Sequential(
            nn.Conv3d(2, 4, 3, padding=1),
            nn.BatchNorm3d(4),
            nn.ReLU(),
            Switch(nn.Conv3d(4, 6, 1), nn.BatchNorm3d(6), nn.ReLU(), nn.Conv3d(6, 4, 1), nn.BatchNorm3d(4), nn.ReLU()),
            nn.Conv3d(4, 2, 1),
        )
    )
    traced = trace(model)
    assert [opaque.name for opaque in traced.opaque] == ["3"]
    told, seen = signals(traced, SIZE), measured(model, clips())
    assert told.keys() == seen.keys()
    for name in ("0", "3.children_in_a_row.0", "3.children_in_a_row.3", "4"):
        near(told[name].input, seen[name][0], **OUTPUT)
    # an order that is a guess makes nothing known, nor what the module does behind its last child
    assert [told[name].input.known for name in told] == [False, False, False, False]
    assert [told[name].input.nonnegative for name in told] == [False] * 4


def test_nothing_is_known_of_what_an_opaque_module_without_convolutions_returns():
    model = settled(
        nn.Sequential(nn.Conv3d(2, 4, 1), nn.BatchNorm3d(4), nn.ReLU(), Switch(), nn.Conv3d(4, 4, 1), nn.Conv3d(4, 4, 1))
    )
    told = signals(trace(model))
    assert not told["4"].input.known
    assert not told["4"].input.nonnegative
    assert not told["4"].output.known


class Difference(nn.Module):
    """The difference of a value and of what an opaque module makes of it, or of two inputs."""

    def __init__(self, opaque: bool):
        super().__init__()
        self.opaque = Switch() if opaque else None
        self.conv = nn.Conv3d(2, 2, 1)

    def forward(self, x, y, z):
        return self.conv(y - self.opaque(y)) if self.opaque is not None else self.conv(y - z)


@pytest.mark.parametrize("opaque", [True, False])
def test_two_values_that_nothing_is_known_about_do_not_cancel(opaque: bool):
    assert signals(trace(Difference(opaque)))["conv"].input.std.tolist() == pytest.approx([2**0.5] * 2, rel=0.05)


class Unused(nn.Module):
    """One of its convolutions is never called; another is reached only through a loop that fx cannot follow."""

    def __init__(self):
        super().__init__()
        self.used = nn.Conv3d(2, 2, 1)
        self.unused = nn.Conv3d(2, 2, 1)

    def forward(self, x):
        return self.used(x)


def test_a_convolution_that_no_graph_reaches_has_no_signal():
    assert signals(trace(Unused())).keys() == {"used"}


def test_a_model_that_is_one_convolution():
    conv = nn.Conv3d(2, 4, 3)
    signal = signals(trace(conv), SIZE)[""]
    near(signal.output, measured(conv, clips())[""][1])
    assert not signal.input.known


def test_clips_one_by_one_are_an_opaque_module():
    assert signals(trace(Unbatched()))["conv"].input.channels == 2


# --- shared and functional ones ---


def test_a_shared_convolution_reads_all_that_it_is_called_with():
    model = Shared().eval()
    signal, (reads, writes) = signals(trace(model), SIZE)["conv"], measured(model, clips())["conv"]
    assert len(reads) == 2
    assert abs(reads[0].mean() - reads[1].mean()) > 1
    near(signal.input, reads, 0.1, 0.15)
    near(signal.output, writes)


def test_a_convolution_of_two_names_has_the_signal_of_both():
    assert signals(trace(SharedModule())).keys() == {"conv"}


def test_a_convolution_that_two_opaque_modules_share_has_one_signal():
    conv = nn.Conv3d(2, 2, 1)
    assert signals(trace(nn.Sequential(Switch(conv), Switch(conv)))).keys() == {"0.children_in_a_row.0"}


class FunctionalBlock(nn.Module):
    """Two functional convolutions, of a rectified value and of one that is not."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(8, 2, 3, 3, 3) / 7)
        self.second = nn.Parameter(torch.randn(2, 8, 1, 1, 1) / 3)
        self.bias = nn.Parameter(torch.randn(2) / 4)

    def forward(self, x):
        return F.conv3d(F.conv3d(x, self.first, padding=1).relu(), self.second, self.bias)


def test_functional_convolutions_have_the_signals_of_convolutions():
    block = FunctionalBlock()
    model = nn.Sequential(block, nn.ReLU(), block, nn.Sequential(FunctionalBlock()), nn.Conv3d(2, 2, 1))
    told, x = signals(trace(model), SIZE), clips()
    assert told.keys() == {"4", "0.conv3d", "0.conv3d_1", "3.0.conv3d", "3.0.conv3d_1"}
    with torch.no_grad():
        reads: dict[str, list[Tensor]] = {}
        for name, part in (("0", block), ("0", block), ("3.0", model[3][0])):
            y = F.conv3d(x, part.first, padding=1).relu()
            reads.setdefault(f"{name}.conv3d", []).append(x)
            reads.setdefault(f"{name}.conv3d_1", []).append(y)
            x = F.conv3d(y, part.second, part.bias)
            x = x.relu() if len(reads["0.conv3d"]) == 1 else x
    for name, tensors in reads.items():
        near(told[name].input, [tensor.transpose(0, 1).flatten(1) for tensor in tensors], 0.5, 1.5)
    assert (told["0.conv3d"].input.mean > 0.02).all()  # the mean of the model's input and of a rectified value
    assert told["0.conv3d_1"].input.nonnegative
    assert signals(trace(FunctionalConv())).keys() == {"conv", "conv3d"}


# --- devices and dtypes ---


def test_a_model_on_the_meta_device_has_unknown_signals():
    with torch.device("meta"):
        model = Branches()
    told = signals(trace(model))
    assert told.keys() == {"stem", "left", "right", "last"}
    for signal in told.values():
        assert not signal.output.known
        assert signal.input.points.device.type == "cpu"
        assert signal.input.points.isfinite().all()
    assert told["left"].input.nonnegative  # which the graph alone says


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_precision_has_nearly_the_same_signals(dtype: torch.dtype):
    model = settled(sequential())
    expected, told = signals(trace(model)), signals(trace(copy.deepcopy(model).to(dtype)))
    assert told.keys() == expected.keys()
    for name, signal in told.items():
        assert signal.input.points.dtype == torch.float32
        torch.testing.assert_close(signal.input.points, expected[name].input.points, rtol=0.02, atol=0.02)
        torch.testing.assert_close(signal.output.points, expected[name].output.points, rtol=0.02, atol=0.02)


def test_a_lazy_batch_norm_is_no_obstacle():
    told = signals(trace(nn.Sequential(nn.Conv3d(2, 4, 1), nn.LazyBatchNorm3d(), nn.Conv3d(4, 4, 1))))
    assert not told["2"].input.known


class Written(nn.Module):
    """A BatchNorm that is written out, on buffers; and a constant that is not a buffer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 1)
        self.register_buffer("shift", torch.tensor([0.0, 1.0, -2.0, 5.0]))
        self.gain = nn.Parameter(torch.tensor([1.0, 3.0, 0.5, 2.0]))
        self.head = nn.Conv3d(4, 2, 1)

    def forward(self, x):
        return self.head(self.conv(x) * (self.gain * 2).view(1, -1, 1, 1, 1) - self.shift.view(-1, 1, 1, 1).add_(1))


def test_small_buffers_are_computed_with_and_stay_as_they_are():
    model = Written()
    told = signals(trace(model), SIZE)
    assert model.shift.tolist() == [0.0, 1.0, -2.0, 5.0]
    near(told["head"].input, measured(model, clips())["head"][0], 0.1, 0.1)


def test_every_signal_is_a_signal():
    for signal in signals(trace(Residual())).values():
        assert isinstance(signal, Signal)
        assert signal.input is not UNKNOWN
