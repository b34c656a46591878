"""`binarize(..., calibration_data=...)`: what it sets, against numpy on what hooks saw; and what it leaves alone."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from models import (
    DeadConv,
    DictInDictOut,
    FrozenBatchNorm,
    FunctionalConv,
    KeywordOnly,
    OwnTrainMethod,
    Residual,
    SharedModule,
)
from small import CHANNELS, STEPS, convert
from test_pipeline import assert_unchanged, snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import qconvert
from qconvert import InputError

POINTS = 32
"""A distribution is known by so many of its values: medians are exact to a step of this many."""


def clips(n: int = 8, mean: float = 0.5, seed: int = 3) -> Tensor:
    return mean + torch.randn(n, 2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    """Return a small network, with a bias, groups, a border and a stride."""
    return nn.Sequential(
        nn.Conv3d(2, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.Conv3d(8, 6, 3, padding=1, groups=2, stride=(1, 2, 2)),
        nn.BatchNorm3d(6),
        nn.ReLU(),
        nn.Conv3d(6, 4, 1),
    )


def trained(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    """Give the model's BatchNorms the statistics of batches, as in a training, and return it in eval mode."""
    torch.optim.swa_utils.update_bn(batches, model)
    return model.eval()


def calibrated(model: nn.Module, data: Any, rules: Any = CHANNELS, **settings: Any) -> nn.Module:
    return convert(model, rules, calibration_data=data, **settings)


def channels(tensor: Tensor) -> np.ndarray:
    return tensor.detach().movedim(-4, 0).flatten(1).double().numpy()


def seen(model: nn.Module, batches: list[Tensor]) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Return what each Conv3d read and put out, by hooks on a copy, a pair for each call."""
    hooked, kept = copy.deepcopy(model), {}
    for name, module in hooked.named_modules():
        if isinstance(module, nn.Conv3d):

            def hook(module, args, output, name=name):
                kept.setdefault(name, []).append((channels(args[0]), channels(output)))

            module.register_forward_hook(hook)
    with torch.no_grad():
        for batch in batches:
            hooked(batch)
    return kept


def in_batch_mode(converted: nn.Module) -> nn.Module:
    """Return a copy whose BatchNorms normalise by the batch, as during the calibration."""
    twin = copy.deepcopy(converted)
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.train()
    return twin


def joined(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    reads, writes = zip(*pairs, strict=True)
    return np.concatenate(reads, 1), np.concatenate(writes, 1)


def share_below(values: np.ndarray, threshold: Tensor) -> np.ndarray:
    return (values < threshold.detach().double().numpy()[:, None]).mean(1)


# --- thresholds, scales and offsets ---


@pytest.mark.parametrize("mean", [-0.5, 0.5])
def test_thresholds_split_what_the_layers_read(mean: float):
    data = [clips(32)]
    model = network().eval()
    for norm in (model[1], model[4]):
        nn.init.constant_(norm.bias, mean)  # behind the ReLU, 69 % or 31 % zeros
    converted = calibrated(model, data)
    for name, pairs in seen(in_batch_mode(converted), data).items():
        reads, _ = joined(pairs)
        activation, spread = converted.get_submodule(name).activation, reads.std(1)
        lowest = reads.min(1)
        is_rectified = name != "0" and mean < 0
        assert ((reads > lowest[:, None]).mean(1) < 0.45).all() == is_rectified, name
        threshold = activation.threshold.detach().numpy()
        if is_rectified:
            assert np.allclose(threshold, lowest + 0.1 * spread, rtol=0.15), name
        else:  # the median, between two of 32 points
            quantiles = np.quantile(reads, [0.5 - 1 / POINTS, 0.5 + 1 / POINTS], axis=1)
            assert (quantiles[0] - 1e-6 <= threshold).all(), name
            assert (threshold <= quantiles[1] + 1e-6).all(), name
        assert np.allclose(activation.spread, spread, rtol=0.15), name
    below = share_below(channels(data[0]), converted[0].activation.threshold)
    assert (np.abs(below - 0.5) < 1 / POINTS).all()


def test_scale_and_offset_give_the_float_layers_moments():
    model, data = network().eval(), [clips()]
    converted = calibrated(model, data)
    of_float, of_converted = seen(model, data), seen(in_batch_mode(converted), data)
    assert of_float.keys() == of_converted.keys() == {"0", "3", "6"}
    for name, pairs in of_float.items():
        wanted, got = joined(pairs)[1], joined(of_converted[name])[1]
        assert np.allclose(got.mean(1), wanted.mean(1), atol=1e-3 * wanted.std()), name
        assert np.allclose(got.std(1), wanted.std(1), rtol=1e-3), name


def test_without_data_they_are_elsewhere():
    """What the tests above compare with is not what the graph tells."""
    model, data = network().eval(), [clips(mean=3.0)]
    told, measured = convert(model), calibrated(model, data)
    for key in ("0.activation.threshold", "0.scale", "3.offset", "4.running_mean"):
        assert not torch.allclose(told.state_dict()[key], measured.state_dict()[key], rtol=0.05), key


OPTIONS = {"rule": [CHANNELS["rule"][0] | {"shortcut": True, "rprelu": True}]}
STANDARDIZED = {"rule": [CHANNELS["rule"][0] | {"weight": {"quantizer": "sign", "scale": "channel", "standardize": True}}]}


def test_scale_and_offset_are_of_the_part_before_shortcut_and_rprelu():
    model, data = nn.Sequential(nn.Conv3d(2, 2, 3, padding=1), nn.Tanh(), nn.Conv3d(2, 4, 1)).eval(), [clips()]
    converted = calibrated(model, data, OPTIONS)
    assert (converted[0].shortcut, converted[2].shortcut) == (True, False)
    of_float, of_converted = seen(model, data), seen(converted, data)
    read, output = joined(of_converted["0"])  # RPReLU is the identity still
    wanted, got = joined(of_float["0"])[1], output - read
    assert np.allclose(got.mean(1), wanted.mean(1), atol=1e-4)
    assert np.allclose(got.std(1), wanted.std(1), rtol=1e-4)
    # the next layer's threshold splits what it really reads, with the shortcut in it
    behind = joined(of_converted["2"])[0]
    assert np.allclose((behind > array_of(converted[2].activation.threshold)).mean(1), 0.5, atol=2 / POINTS)


def array_of(column: Tensor) -> np.ndarray:
    return column.detach().double().numpy()[:, None]


def test_standardized_weights_are_corrected_too():
    model, data = network().eval(), [clips()]
    converted = calibrated(model, data, STANDARDIZED)
    of_float, of_converted = seen(model, data), seen(in_batch_mode(converted), data)
    for name, pairs in of_float.items():
        wanted, got = joined(pairs)[1], joined(of_converted[name])[1]
        assert np.allclose(got.mean(1), wanted.mean(1), atol=1e-3 * wanted.std()), name
        assert np.allclose(got.std(1), wanted.std(1), rtol=1e-3), name


@pytest.mark.parametrize("data", [None, [clips(mean=0.0)]], ids=["graph", "data"])
def test_a_channel_of_equal_negative_weights_keeps_its_direction(data: list[Tensor] | None):
    model = nn.Sequential(nn.Conv3d(2, 2, 1, groups=2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([-0.5, 0.25]).view(2, 1, 1, 1, 1))
    layer = convert(model, STANDARDIZED, calibration_data=data)[0]
    assert (layer.scale[0] < 0 < layer.scale[1]).item()
    x = clips(mean=0.0)
    with torch.no_grad():
        for wanted, got in zip(channels(model(x)), channels(layer(x)), strict=True):
            assert np.corrcoef(wanted, got)[0, 1] > 0.7


def test_a_number_as_threshold_stays():
    rule = {
        "rule": [{"weight": {"quantizer": "sign", "scale": "channel"}, "input": {"quantizer": "sign", "threshold": 0.25}}]
    }
    converted = calibrated(network().eval(), [clips()], rule)
    for index in (0, 3, 6):
        assert (converted[index].activation.threshold == 0.25).all()
        assert converted[index].activation.spread is None


def test_auto_without_a_threshold_gets_a_spread_only():
    rule = {
        "rule": [{"weight": {"quantizer": "sign", "scale": "channel"}, "input": {"quantizer": "sign", "threshold": "auto"}}]
    }
    model = nn.Sequential(nn.Conv3d(2, 4, 1), nn.BatchNorm3d(4), nn.Conv3d(4, 2, 1)).train()
    nn.init.constant_(model[1].weight, 2.0)
    trained(model, [clips()])
    converted = calibrated(model.eval(), [clips()], rule)
    assert converted[2].activation.threshold is None
    assert np.allclose(converted[2].activation.spread, 2.0, rtol=0.06)


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_layers_without_a_scale_keep_their_output(threshold: float | None):
    side = {"quantizer": "sign"} | ({} if threshold is None else {"threshold": threshold})
    rule = {"rule": [{"weight": "sign", "input": side}]}
    model = network().eval()
    told, measured = convert(model, rule), calibrated(model, [clips()], rule)
    assert told.state_dict().keys() == measured.state_dict().keys()
    for index in (0, 3, 6):
        assert measured[index].scale is None
    assert not torch.equal(told[4].running_mean, measured[4].running_mean)


def test_layers_of_more_bits_are_corrected_too():
    rule = {"rule": [{"weight": {"quantizer": "lsq", "scale": "channel"}, "input": STEPS["rule"][0]["input"]}]}
    model, data = network().eval(), [clips()]
    of_float, of_converted = seen(model, data), seen(in_batch_mode(calibrated(model, data, rule)), data)
    for name, pairs in of_float.items():
        wanted, got = joined(pairs)[1], joined(of_converted[name])[1]
        assert np.allclose(got.mean(1), wanted.mean(1), atol=1e-3 * wanted.std()), name
        assert np.allclose(got.std(1), wanted.std(1), rtol=1e-3), name


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("threshold", [None, "channel"])
@pytest.mark.parametrize("bits", [2, 4])
def test_lsq_inputs_start_where_the_step_changes_them_least(signed: bool, threshold: str | None, bits: int):
    inputs = {"quantizer": "lsq", "bits": bits, "signed": signed, "threshold": threshold}
    data = [10 * clips(), 10 * clips(seed=5)]
    layer = calibrated(network().eval(), data, {"rule": [{"weight": "sign", "input": inputs}]})[0].activation
    x = np.concatenate([channels(batch) for batch in data], 1)
    if threshold == "channel":
        x = (x - layer.threshold.detach().numpy()[:, None]) / layer.spread.numpy()[:, None]
    lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)

    def error(step: float) -> float:
        return np.square(np.clip(np.round(x / step), lowest, highest) * step - x).mean()

    least = min(map(error, np.abs(x).mean() * np.geomspace(0.02, 10, 300)))
    step = layer.activation_function.step
    assert error(step.item()) <= 1.2 * least  # its tails are not among the POINTS values by which a channel is known
    assert step.requires_grad


def test_lsq_inputs_that_are_all_0_start_as_without_data():
    inputs = {"quantizer": "lsq", "bits": 3}
    converted = calibrated(nn.Sequential(nn.Conv3d(2, 1, 1)), [0 * clips()], {"rule": [{"input": inputs}]})
    assert converted[0].activation.activation_function.step.item() == pytest.approx(2 * np.sqrt(2 / np.pi / 3))


def test_the_parameters_themselves_are_not_touched():
    model = network().eval()
    converted = calibrated(model, [clips()])
    for name, parameter in model.named_parameters():
        assert torch.equal(converted.get_parameter(name), parameter), name


# --- BatchNorm ---


def test_a_new_batch_norm_gets_the_averages_over_all_batches():
    """Those of a model without anything before the BatchNorm that a batch changes: as torch.optim.swa_utils.update_bn."""
    model = nn.Sequential(nn.BatchNorm3d(2), nn.Conv3d(2, 4, 1))
    batches = [clips(n, mean, seed) for n, mean, seed in ((4, 0.0, 1), (4, 2.0, 2), (4, 5.0, 3))]
    norm = calibrated(model.eval(), batches)[0]
    means, variances = zip(*((channels(b).mean(1), channels(b).var(1, ddof=1)) for b in batches), strict=True)
    assert np.allclose(norm.running_mean, np.mean(means, 0), rtol=1e-4)
    assert np.allclose(norm.running_var, np.mean(variances, 0), rtol=1e-4)
    twin = trained(copy.deepcopy(model), batches)
    torch.testing.assert_close(norm.running_mean, twin[0].running_mean)
    torch.testing.assert_close(norm.running_var, twin[0].running_var)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_a_trained_batch_norm_takes_back_what_the_conversion_does(batches: int, eps: float):
    """Signs of weights that are all 0.5 or -0.5 double what a layer puts out: behind the norm nothing may have changed."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.conv, self.norm = nn.BatchNorm3d(2), nn.Conv3d(2, 4, 1), nn.BatchNorm3d(4, eps)

        def forward(self, x):
            return self.norm(input=self.conv(self.first(x)))

    model, generator = Named(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.conv.weight.sign_().mul_(0.5)
    trained(model, [clips(4, 3.0, 7)])
    data = list(clips(6 * batches).split(6))
    converted = calibrated(model, data, {"rule": [{"weight": "sign", "input": "identity"}]})
    assert torch.equal(converted.first.running_mean, model.first.running_mean)
    assert torch.allclose(converted.first.running_var, model.first.running_var, rtol=1e-5)
    x = torch.randn(2, 2, 4, 8, 8, generator=generator)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(converted.norm.running_var, model.norm.running_var, rtol=0.5)


def test_a_trained_batch_norm_of_a_constant_channel_moves_with_it():
    model = nn.Sequential(nn.Conv3d(2, 2, 1), nn.BatchNorm3d(2))
    trained(model, [clips()])
    nn.init.zeros_(model[0].weight)  # of which the signs are +1
    converted = calibrated(model, [clips(), clips(seed=5)], {"rule": [{"weight": "sign", "input": "identity"}]})
    moved = converted[1].running_mean - model[1].running_mean
    both = torch.cat([clips(), clips(seed=5)])
    torch.testing.assert_close(moved, both.sum(1).mean().expand(2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(converted[1].running_var, model[1].running_var)


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_are_of_what_a_batch_norm_reads_in_the_converted_model(training: bool):
    data = [clips()]
    converted = calibrated(network().train(training), data)
    reads: dict[str, np.ndarray] = {}
    twin = in_batch_mode(converted)
    for name in ("1", "4"):
        twin.get_submodule(name).register_forward_hook(
            lambda _, args, __, name=name: reads.update({name: channels(args[0])})
        )
    with torch.no_grad():
        twin(data[0])
    for name, values in reads.items():
        norm = converted.get_submodule(name)
        assert np.allclose(norm.running_mean, values.mean(1), atol=1e-3), name
        assert np.allclose(norm.running_var, values.var(1, ddof=1), rtol=1e-3), name
        assert norm.momentum == 0.1
        assert norm.training is training


@pytest.mark.parametrize("build", [FrozenBatchNorm, OwnTrainMethod])
def test_a_frozen_batch_norm_keeps_its_statistics(build: Callable[[], nn.Module]):
    model = build().train()
    model.frozen.eval()
    model.frozen.running_mean.fill_(0.5)
    before = copy.deepcopy(model.frozen.state_dict())
    converted = calibrated(model, [clips()])
    for key, value in converted.frozen.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not torch.equal(converted.live.running_mean, model.live.running_mean)
    assert [converted.training, converted.frozen.training, converted.live.training] == [True, False, True]


def test_a_batch_norm_without_statistics_is_no_obstacle():
    model = nn.Sequential(nn.Conv3d(2, 4, 1), nn.BatchNorm3d(4, track_running_stats=False), nn.Conv3d(4, 2, 1))
    assert calibrated(model, [clips()])[1].running_mean is None


# --- batches ---


def test_one_pass_over_a_generator():
    taken = []

    def stream() -> Iterator[Tensor]:
        for batch in clips(6).split(2):
            taken.append(len(batch))
            yield batch

    model = network().eval()
    from_stream = calibrated(model, stream())
    assert taken == [2, 2, 2]
    from_list = calibrated(model, list(clips(6).split(2)))
    assert_same_state(from_stream, from_list)
    assert from_stream[1].num_batches_tracked == 3


def assert_same_state(left: nn.Module, right: nn.Module) -> None:
    assert left.state_dict().keys() == right.state_dict().keys()
    for key, value in left.state_dict().items():
        assert torch.equal(value, right.state_dict()[key]), key


def test_batches_are_let_go():
    references: list[weakref.ref] = []
    alive: list[int] = []

    def stream() -> Iterator[Tensor]:
        for seed in range(8):
            alive.append(sum(reference() is not None for reference in references))
            batch = clips(2, seed=seed)
            references.append(weakref.ref(batch))
            yield batch
            del batch

    calibrated(network().eval(), stream())
    assert len(references) == 8
    assert max(alive) <= 1  # the one before, which the loop still has
    gc.collect()
    assert not any(reference() is not None for reference in references)


def test_what_is_kept_does_not_grow_with_the_number_of_batches():
    from qconvert.calibration import _Layer  # noqa: PLC0415 (the one test of its inside)

    sizes = []
    layer, conv = _Layer("layer"), qconvert.QConv3d(1, 1, 1)
    for _ in range(300):
        layer._read(conv, torch.randn(1, 100))
        sizes.append(len(layer.parts))
    assert max(sizes) <= 10


def test_many_small_batches_are_one_big_one():
    """But for BatchNorm, which sees what a batch is: without one."""
    model = nn.Sequential(nn.Conv3d(2, 4, 3), nn.ReLU(), nn.Conv3d(4, 4, 1), nn.Tanh(), nn.Conv3d(4, 2, 1)).eval()
    data = clips(64)
    many, one = calibrated(model, list(data.split(1))), calibrated(model, [data])
    for index in (0, 2, 4):
        spread = one[index].activation.spread
        torch.testing.assert_close(many[index].activation.spread, spread, rtol=0.06, atol=0)
        moved = (many[index].activation.threshold - one[index].activation.threshold).abs()
        assert (moved < (0.1 if index == 0 else 0.3) * spread).all()
        torch.testing.assert_close(many[index].scale, one[index].scale, rtol=0.1, atol=0)
        # the raw outputs of the first batches are of thresholds that then moved a little
        wanted, got = (layer.offset for layer in (one[index], many[index]))
        assert ((wanted - got).abs() < 0.2).all()


def test_moments_over_batches_of_any_size_are_those_of_all_values():
    """The input convolution, whose float output depends on the data alone: batches of 1, 5 and 2 clips, far apart."""
    model = nn.Sequential(nn.Conv3d(2, 4, 1)).eval()
    parts = [clips(1, 0.0, 1), clips(5, 3.0, 2), clips(2, -2.0, 3)]
    wanted = channels(model[0](torch.cat(parts)))
    rule = {
        "rule": [{"weight": {"quantizer": "sign", "scale": "channel"}, "input": {"quantizer": "sign", "threshold": 0.5}}]
    }
    got = channels(calibrated(model, parts, rule)(torch.cat(parts)))
    assert np.allclose(got.mean(1), wanted.mean(1), atol=1e-4)
    assert np.allclose(got.std(1), wanted.std(1), rtol=1e-4)


@pytest.mark.parametrize(("dark", "bright"), [(64, 64), (100, 300), (5, 100)])
def test_late_batches_count_as_much_as_early_ones(dark: int, bright: int):
    model = nn.Sequential(nn.Conv3d(1, 2, 1)).eval()
    values = [torch.randn(1, 1, 4, 8, 8) + 4 * (number >= dark) for number in range(dark + bright)]
    threshold = calibrated(model, values)[0].activation.threshold
    share = share_below(channels(torch.cat(values, 0)), threshold)
    assert share.item() == pytest.approx(0.5, abs=0.05)


def test_large_batches_count_for_more_than_small_ones():
    model = nn.Sequential(nn.Conv3d(1, 2, 1)).eval()
    values = [torch.randn(n, 1, 4, 8, 8) + mean for n, mean in ((1, 4.0), (20, 0.0), (1, 4.0), (2, 4.0))]
    threshold = calibrated(model, values)[0].activation.threshold
    assert share_below(channels(torch.cat(values, 0)), threshold).item() == pytest.approx(0.5, abs=0.05)


# --- what a batch may be ---


def test_a_dict_holds_keyword_arguments():
    model, x = KeywordOnly().eval(), clips()
    by_name = calibrated(model, [{"clip": x, "gain": 1.0}])
    assert np.allclose(by_name.conv.activation.threshold.detach(), np.median(channels(x), 1), atol=0.1)


def test_a_tuple_holds_arguments_and_may_hold_a_dict():
    by_tuple = calibrated(DictInDictOut().eval(), [({"clip": clips()},)])
    assert np.allclose(by_tuple.conv.activation.threshold.detach(), np.median(channels(clips()), 1), atol=0.1)


def test_a_model_may_write_to_a_batch_and_the_batch_stays():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(2, 2, 1)

        def forward(self, x):
            return self.conv(x.mul_(0))

    x = clips()
    calibrated(Writes().eval(), [x])
    assert torch.equal(x, clips())


# --- errors ---


class Labelled:
    """A loader of (inputs, labels)."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield clips(), torch.zeros(8)


def with_nan(place: int) -> list[Tensor]:
    batches = [clips(2, seed=seed) for seed in range(3)]
    batches[place][0, 0, 0, 0, 0] = float("nan")
    return batches


def one_tensor_each() -> DataLoader:
    return DataLoader(TensorDataset(clips()), batch_size=4)


BAD = {
    "empty": (list, r"^calibration_data has no batch"),
    "used up": (lambda: iter(()), r"^calibration_data has no batch"),
    "labels": (
        Labelled,
        r"^Sequential does not run on calibration batch 1, \(\(8, 2.*\): .*A tuple holds.*: \(batch\[0\] for batch in",
    ),
    "list": (
        one_tensor_each,
        r" batch 1, \[\(4, 2, 4, 8, 8\) torch.float32\]: .*A list is one.*\(batch\[0\] for .* \(tuple\(batch\) for batch",
    ),
    "array": (
        lambda: [clips().numpy()],
        r"^Sequential does not run on calibration batch 1, ndarray \(8, 2, 4, 8, 8\) float32: .*form of example_inputs",
    ),
    "shape": (
        lambda: [clips(), torch.zeros(2, 3, 4, 8, 8)],
        r"^Sequential does not run on calibration batch 2, \(2, 3, 4, 8, 8\) torch.float32: .*form of example_inputs",
    ),
    "nan": (lambda: with_nan(1), r"^calibration batch 2: layer '0' meets values that are not finite"),
    "infinity": (lambda: [clips() / 0], r"^calibration batch 1: layer '0' meets values that are not finite"),
    "size 0": (lambda: [clips(0)], r"^calibration batch 1: layer '0' meets no values"),
    "size 0 at the end": (lambda: [clips(), clips(0)], r"^calibration batch 2: layer '0' meets no values"),
    "number": (lambda: 3, r"^calibration_data is no iterable of batches but 3: pass a list of batches \[x\], a DataLoader"),
    "dataset": (lambda: TensorDataset(clips()), r"^calibration_data is no iterable of batches but <.*: pass a list"),
    "tensor": (clips, r"^calibration_data is one batch, \(8, 2, 4, 8, 8\) torch.float32: pass a list of batches \[x\]"),
    "array itself": (lambda: clips().numpy(), r"^calibration_data is one batch, ndarray \(8, 2, 4, 8, 8\) float32: pass"),
    "dict": (lambda: {"clip": clips()}, r"^calibration_data is one batch, \{'clip': \(8, 2, 4, 8, 8\) torch.*: pass a list"),
    "tuple": (
        lambda: clips().split(4),
        r"^calibration_data is one batch, \(\(4, 2, 4, 8, 8\) torch.*\): pass a list of batches \[x\].* list\(x\)$",
    ),
    "path": (lambda: "clips", r"^calibration_data is no iterable of batches but 'clips': pass a list"),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_failure_says_why_and_changes_nothing(data: Callable[[], Any], message: str, inplace: bool, training: bool):
    model = network().train(training)
    model[1].eval()
    before = snapshot(model)
    with pytest.raises(InputError, match=message) as caught:
        qconvert.binarize(model, CHANNELS, calibration_data=data(), inplace=inplace, report=False)
    assert "example input " not in str(caught.value)
    assert_unchanged(model, before)


def test_a_loader_that_raises_changes_nothing():
    def stream() -> Iterator[Tensor]:
        yield clips()
        raise OSError("disk on fire")

    model = network()
    before = snapshot(model)
    with pytest.raises(OSError, match="disk on fire"):
        qconvert.binarize(model, CHANNELS, calibration_data=stream(), inplace=True, report=False)
    assert_unchanged(model, before)


def test_a_layer_behind_a_division_by_0_is_named():
    class Divides(nn.Module):
        def forward(self, x):
            return x / 0

    model = nn.Sequential(nn.Conv3d(2, 4, 1), Divides(), nn.Conv3d(4, 2, 1))
    with pytest.raises(InputError, match=r"^calibration batch 1: layer '2' meets values that are not finite"):
        qconvert.binarize(model, CHANNELS, calibration_data=[clips()], report=False)


# --- what stays ---


@pytest.mark.parametrize("training", [True, False])
def test_modes_momenta_and_the_original_stay(training: bool):
    model = network().train(training)
    model[4].train(not training)
    model[4].momentum = None
    before = snapshot(model)
    converted = calibrated(model, [clips()])
    assert_unchanged(model, before)
    for name, module in model.named_modules():
        assert converted.get_submodule(name).training is module.training, name
    assert [converted[1].momentum, converted[4].momentum] == [0.1, None]
    assert not any("_quantized_conv" in vars(module) for module in converted.modules())


def test_in_place_is_out_of_place():
    model = network().eval()
    twin, conv = copy.deepcopy(model), model[3]
    assert calibrated(model, [clips()], inplace=True) is model
    assert model[3] is conv
    assert_same_state(model, calibrated(twin, [clips()]))


def test_a_model_in_train_mode_is_calibrated_in_eval_mode():
    """Dropout is off: what the layer behind it reads is all of it."""
    model = nn.Sequential(nn.Conv3d(2, 4, 1), nn.Dropout(0.9), nn.Conv3d(4, 2, 1))
    training, evaluating = (calibrated(model.train(mode), [clips()]) for mode in (True, False))
    assert_same_state(training, evaluating)


def test_a_layer_that_the_data_never_reaches_starts_from_the_graph():
    model = DeadConv().eval()
    told, measured = convert(model), calibrated(model, [clips()])
    for key in ("activation.threshold", "activation.spread", "scale", "offset"):
        assert torch.equal(measured.state_dict()[f"unused.{key}"], told.state_dict()[f"unused.{key}"])
        assert not torch.equal(measured.state_dict()[f"conv.{key}"], told.state_dict()[f"conv.{key}"])


def test_a_shared_layer_is_set_for_all_its_calls():
    model, data = SharedModule().eval(), [clips(32)]
    converted = calibrated(model, data)
    assert converted.conv is converted.same
    reads, _ = joined(seen(converted, data)["conv"])
    assert np.abs(share_below(reads, converted.conv.activation.threshold) - 0.5).max() < 3 / POINTS


def test_a_functional_layer_is_calibrated():
    model, data = FunctionalConv().eval(), [clips(2)]
    converted = calibrated(model, data)
    wanted, got = channels(model(data[0])), channels(converted(data[0]))
    assert np.allclose(got.mean(1), wanted.mean(1), atol=1e-3 * wanted.std())
    assert np.allclose(got.std(1), wanted.std(1), rtol=1e-3)


def test_residual_blocks_keep_the_moments_of_every_layer():
    model, data = Residual().eval(), [clips()]
    converted = calibrated(model, data)
    of_float, of_converted = seen(model, data), seen(in_batch_mode(converted), data)
    assert len(of_float) == 5
    for name, pairs in of_float.items():
        wanted, got = joined(pairs)[1], joined(of_converted[name])[1]
        assert np.allclose(got.mean(1), wanted.mean(1), atol=1e-3 * wanted.std()), name
        assert np.allclose(got.std(1), wanted.std(1), rtol=1e-3), name


def test_half_precision_is_calibrated():
    model, data = network().eval().to(torch.bfloat16), [clips().to(torch.bfloat16)]
    converted = calibrated(model, data)
    assert converted[3].scale.dtype == torch.bfloat16
    expected = calibrated(copy.deepcopy(model).float(), [clips()])
    torch.testing.assert_close(converted[3].scale.float(), expected[3].scale, rtol=0.1, atol=0)
