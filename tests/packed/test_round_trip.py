"""What was saved comes back: outputs bit for bit, out of a file of the bits that the report counts."""

import copy

import pytest
import torch
from hypothesis import given
from models import (
    TRAPS,
    CausalModel,
    ConvForward,
    Entry,
    FunctionalConv,
    Residual,
    SharedModule,
    TiedParameter,
    TwoConvs,
    WeightNormed,
)
from networks import Network, build, networks
from small import CHANNELS, PLAIN, STEPS, assert_equal, clip, convert, output
from test_random_networks import assert_identical, outputs, some
from test_random_networks import pytestmark as marks
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import qconvert
from qconvert.errors import ModelError
from qconvert.quantizations import Quantization, register_custom_quantization, registry
from qconvert.quantizations.levels import Levels
from qconvert.report.facts import collect
from qconvert.report.totals import add_up

pytestmark = marks

TERNARY = {"rule": [{"weight": {"quantizer": "ternary", "scale": "channel"}, "input": "sign"}]}
DOREFA = {"rule": [{"weight": {"quantizer": "weightdorefa", "bits": 3}, "input": {"quantizer": "inputdorefa", "bits": 2}}]}
EVERYTHING = {
    "rule": [
        {
            "weight": {"quantizer": "weightdorefa", "bits": 2, "standardize": True, "scale": "channel"},
            "input": {"quantizer": "swishsign", "beta": 2.5, "threshold": 0.25},
            "rprelu": True,
            "shortcut": True,
            "latent_clip": 1.5,
            "pad_value": 1.0,
        }
    ]
}
RULES = {
    "channels": CHANNELS,
    "plain": PLAIN,
    "steps": STEPS,
    "ternary": TERNARY,
    "dorefa": DOREFA,
    "everything": EVERYTHING,
}
every_rule = pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
SIGN = {"rule": [{"weight": "sign", "input": "sign"}]}


def trained(model: nn.Module) -> nn.Module:
    """As after training: no value is where a conversion starts it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9).add_(0.05)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.25)
    return model


def reported_bits(model: nn.Module) -> int:
    totals = add_up(collect(model))
    return totals.parameter_bits + totals.buffer_bits


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def there_and_back(model: nn.Module, fresh: nn.Module, path, **settings) -> nn.Module:
    """Save, load into the fresh model, and save what was loaded: the same tensors again."""
    file = qconvert.save(model, path, **settings)
    assert path.stat().st_size == file.file_bytes
    loaded = qconvert.load(path, fresh)
    again = qconvert.save(loaded, path.with_name("again.safetensors"), **settings)
    assert (again.tensor_bits, again.padding_bits) == (file.tensor_bits, file.padding_bits)
    once, twice = (qconvert.packed.file.read(each) for each in (path, again.path))
    assert once.tensors.keys() == twice.tensors.keys()
    assert_equal([twice.tensors[key] for key in once.tensors], list(once.tensors.values()))
    assert once.header.weights == twice.header.weights
    return loaded


# --- every kind of model ---


@pytest.mark.parametrize("entry", TRAPS, ids=lambda entry: entry.name)
@pytest.mark.parametrize("rules", [CHANNELS, STEPS, EVERYTHING], ids=["channels", "steps", "everything"])
def test_models_with_a_trap(entry: Entry, rules, tmp_path):
    converted = trained(convert(entry.build().eval(), rules))
    loaded = there_and_back(converted, entry.build(), tmp_path / "m.safetensors")
    if entry.calls == 1:  # the others keep something that no state dict holds
        assert_equal(output(loaded, entry), output(converted, entry))


@given(network=networks)
@some(0.6)
def test_random_networks(network: Network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    for rules in (CHANNELS, STEPS, EVERYTHING):
        converted = trained(convert(build(network), rules)).eval()
        if any(isinstance(module, qconvert.QConv3d) for module in converted.modules()):
            file = qconvert.save(converted, folder / "m.safetensors")
            loaded = there_and_back(converted, build(network), folder / "m.safetensors")
            assert file.float_weights or file.tensor_bits - file.padding_bits == reported_bits(converted)
            assert_identical(outputs(loaded, network, calls=1), outputs(converted, network, calls=1))


class Grouped(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.conv = nn.Conv3d(channels, 2 * channels, 3, padding=1, groups=groups)
        self.norm = nn.BatchNorm3d(2 * channels)

    def forward(self, x):
        return self.norm(self.conv(x))


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (63, 1), (64, 64), (65, 5), (127, 1), (128, 2)])
@every_rule
def test_edge_sizes(channels, groups, rules, tmp_path):
    converted = trained(convert(Grouped(channels, groups), rules)).eval()
    loaded = there_and_back(converted, Grouped(channels, groups), tmp_path / "m.safetensors")
    x = torch.randn(2, channels, 2, 3, 4)
    assert torch.equal(run(loaded, x), run(converted, x))


@pytest.mark.parametrize("quantizer", ["weightdorefa", "lsq"])
@pytest.mark.parametrize("bits", [*range(2, 9), 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_number_of_bits(quantizer, bits, dtype, tmp_path):
    rules = {"rule": [{"weight": {"quantizer": quantizer, "bits": bits}, "input": "identity"}]}
    converted = trained(convert(Residual().to(dtype), rules)).eval()
    loaded = there_and_back(converted, Residual().to(dtype), tmp_path / "m.safetensors")
    assert torch.equal(run(loaded, clip().to(dtype)), run(converted, clip().to(dtype)))


# --- bits ---


@pytest.mark.parametrize(
    "build", [TwoConvs, Residual, SharedModule, TiedParameter, FunctionalConv, CausalModel, WeightNormed]
)
@every_rule
def test_bits_of_the_file_are_those_of_the_report(build, rules, tmp_path):
    converted = convert(build(), rules)
    file = qconvert.save(converted, tmp_path / "m.safetensors")
    assert file.tensor_bits - file.padding_bits == reported_bits(converted)
    assert file.file_bytes == file.path.stat().st_size == file.tensor_bits // 8 + file.header_bytes
    widths = [layer.bit_width for layer in converted.modules() if isinstance(layer, Quantization)]
    assert 0 <= file.padding_bits < 8 * sum(widths)


@pytest.mark.parametrize("rules", [CHANNELS, STEPS], ids=["channels", "steps"])
def test_a_loaded_model_has_the_same_report(rules, tmp_path):
    converted = convert(Residual(), rules)
    file = qconvert.save(converted, tmp_path / "m.safetensors")
    loaded = qconvert.load(file.path, Residual())
    assert reported_bits(loaded) == reported_bits(converted)
    layers = [(layer.name, layer.precision) for layer in collect(loaded).layers]
    assert layers == [(layer.name, layer.precision) for layer in collect(converted).layers]


# --- weights that stay float, by name ---


class TwoNames(nn.Module):
    """Two convolutions with one weight."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv3d(3, 3, 3, padding=1), nn.Conv3d(3, 3, 3, padding=1)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(x))


def rules_of(one, two):
    return {"rule": [{"layers": "one", "weight": one}, {"layers": "two", "weight": two}]}


X3 = torch.randn(1, 3, 3, 4, 5, generator=torch.Generator().manual_seed(3))


def test_tied_weights_that_are_quantized_alike_are_packed_once(tmp_path):
    converted = convert(TwoNames(), rules_of("sign", "approxsign")).eval()
    file = qconvert.save(converted, tmp_path / "m.safetensors")
    assert file.float_weights == {}
    loaded = qconvert.load(file.path, TwoNames())
    assert loaded.one.weight is loaded.two.weight
    assert torch.equal(run(loaded, X3), run(converted, X3))


@pytest.mark.parametrize("other", ["ternary", {"quantizer": "sign", "standardize": True}])
def test_tied_weights_that_are_quantized_differently(other, tmp_path):
    converted = convert(TwoNames(), rules_of("sign", other)).eval()
    file = qconvert.save(converted, tmp_path / "m.safetensors")
    assert set(file.float_weights.values()) == {"'one' and 'two' share it and quantize it differently"}
    assert torch.equal(run(qconvert.load(file.path, TwoNames()), X3), run(converted, X3))


def test_a_weight_that_a_float_layer_has_too(tmp_path):
    converted = convert(TwoNames(), {"rule": [{"layers": "one", "weight": "sign"}]}).eval()
    file = qconvert.save(converted, tmp_path / "m.safetensors")
    assert file.float_weights == {"one": "'two' computes with it in float"}
    assert torch.equal(run(qconvert.load(file.path, TwoNames()), X3), run(converted, X3))


class ReadsTheWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 3, 3, padding=1)

    def forward(self, x):
        return self.conv(x) * self.conv.weight.abs().mean()


def test_a_weight_that_a_forward_reads(tmp_path):
    converted = convert(ReadsTheWeight(), SIGN).eval()
    file = qconvert.save(converted, tmp_path / "m.safetensors")
    assert file.float_weights == {"conv": "a forward reads it, and not for a convolution alone"}
    assert torch.equal(run(qconvert.load(file.path, ReadsTheWeight()), X3), run(converted, X3))


def test_a_parametrized_weight(tmp_path):
    converted = convert(nn.Sequential(weight_norm(nn.Conv3d(3, 3, 3))), SIGN).eval()
    file = qconvert.save(converted, tmp_path / "m.safetensors")
    assert list(file.float_weights) == ["0"]
    assert "take its parametrization (weight_norm, prune) off" in file.float_weights["0"]
    assert torch.equal(run(qconvert.load(file.path, nn.Sequential(weight_norm(nn.Conv3d(3, 3, 3)))), X3), run(converted, X3))


def test_a_subclass_that_computes_its_weight(tmp_path):
    converted = convert(ConvForward(), CHANNELS).eval()
    file = qconvert.save(converted, tmp_path / "m.safetensors")
    assert file.float_weights
    assert all("computes the weight that it convolves with" in reason for reason in file.float_weights.values())
    assert torch.equal(run(qconvert.load(file.path, ConvForward()), clip()), run(converted, clip()))


class NeedsMore(nn.Conv3d):
    def forward(self, x, gain):
        return super().forward(x * gain)


class WithGain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = NeedsMore(3, 3, 3)

    def forward(self, x):
        return self.conv(x, 2.0)


def test_a_forward_that_does_not_run_by_itself(tmp_path):
    converted = convert(WithGain(), SIGN).eval()
    file = qconvert.save(converted, tmp_path / "m.safetensors")
    assert file.float_weights["conv"].startswith("the forward of QNeedsMore does not run by itself: TypeError: ")
    assert torch.equal(run(qconvert.load(file.path, WithGain()), X3), run(converted, X3))


def test_a_subclass_that_only_pads_is_packed(tmp_path):
    converted = convert(CausalModel(), CHANNELS).eval()
    assert qconvert.save(converted, tmp_path / "m.safetensors").float_weights == {}


class Halves(Quantization):
    """Rounds to halves: 4 levels, told or not."""

    name = "halves of the round trip"
    bit_width = 2

    def __init__(self, is_open: bool = True) -> None:
        super().__init__()
        self.is_open = is_open

    def quantize(self, x):
        return (x * 2).round().clamp(-2, 1) / 2

    def levels(self, quantized):
        known = Levels(2, count=4, lowest=-2, step=1, divisor=1, unit=0.5, dtype=quantized.dtype)
        return known if self.is_open else None


@pytest.mark.parametrize("is_open", [True, False])
def test_a_quantizer_of_the_users_own(is_open, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_by_name", dict(registry._by_name))
    register_custom_quantization(Halves)
    rules = {"rule": [{"weight": {"quantizer": Halves.name, "is_open": is_open}, "input": "identity"}]}
    converted = convert(TwoConvs(), rules).eval()
    file = qconvert.save(converted, tmp_path / "m.safetensors")
    reason = f"its quantizer {Halves.name!r} does not say its levels"
    assert file.float_weights == ({} if is_open else dict.fromkeys(("first", "second"), reason))
    assert torch.equal(run(qconvert.load(file.path, TwoConvs()), clip()), run(converted, clip()))


# --- other ways to a converted model ---


def test_converted_in_two_steps(tmp_path):
    once = convert(TwoConvs(), {"rule": [{"layers": "first", "weight": "ternary"}]})
    twice = convert(once, {"rule": [{"weight": {"quantizer": "lsq", "bits": 3}}]}).eval()
    loaded = there_and_back(twice, TwoConvs(), tmp_path / "m.safetensors")
    assert torch.equal(run(loaded, clip()), run(twice, clip()))


def test_built_with_quantized_layers(tmp_path):
    def made():
        return nn.Sequential(
            qconvert.QConv3d(2, 3, 3, weight_quantization="ternary", scale="channel", rprelu=True),
            qconvert.QConv3d_NoAct(3, 2, 1, bias=True, pad_value=0.5),
        )

    model = trained(made()).eval()
    loaded = there_and_back(model, made(), tmp_path / "m.safetensors")
    assert torch.equal(run(loaded, clip()), run(model, clip()))


def test_into_a_model_converted_alike_or_a_function(tmp_path):
    converted = trained(convert(TwoConvs(), STEPS)).eval()
    file = qconvert.save(converted, tmp_path / "m.safetensors")
    for model in (TwoConvs, convert(TwoConvs(), STEPS), qconvert.load(file.path, TwoConvs()), nn.DataParallel(TwoConvs())):
        assert torch.equal(run(qconvert.load(file.path, model), clip()), run(converted, clip()))


def test_settings_changed_after_the_conversion(tmp_path):
    converted = convert(TwoConvs(), CHANNELS).eval()
    converted.first.pad_value = 0.75
    converted.first.activation.threshold = None
    converted.second.offset = None
    loaded = there_and_back(converted, TwoConvs(), tmp_path / "m.safetensors")
    assert torch.equal(run(loaded, clip()), run(converted, clip()))


def test_a_loaded_model_has_its_plan(tmp_path):
    converted = convert(Residual(), "default")
    loaded = qconvert.load(qconvert.save(converted, tmp_path / "m.safetensors").path, Residual())
    plans = [qconvert.rewrite.plan_of(model) for model in (loaded, converted)]
    assert plans[0].rules == plans[1].rules
    assert plans[0].to_text() == plans[1].to_text()


# --- modes, dtypes, latent weights, schedules ---


def test_saving_changes_nothing_and_loading_gives_evaluation_mode(tmp_path):
    converted = convert(Residual().train(), CHANNELS)
    before = copy.deepcopy(converted)
    file = qconvert.save(converted, tmp_path / "m.safetensors")
    assert [type(module) for module in converted.modules()] == [type(module) for module in before.modules()]
    assert all(module.training for module in converted.modules())
    assert_equal(list(converted.state_dict().values()), list(before.state_dict().values()))
    given_model = Residual().train()
    state = copy.deepcopy(given_model.state_dict())
    loaded = qconvert.load(file.path, given_model)
    assert not any(module.training for module in loaded.modules())
    assert all(module.training for module in given_model.modules())
    assert {type(module) for module in given_model.modules() if isinstance(module, nn.Conv3d)} == {nn.Conv3d}
    assert_equal(list(given_model.state_dict().values()), list(state.values()))


def test_progressive_sign_is_stored_as_in_evaluation(tmp_path):
    rules = {"rule": [{"weight": {"quantizer": "progressive_sign", "alpha": 3}, "input": "progressive_sign"}]}
    converted = convert(TwoConvs().train(), rules)
    loaded = qconvert.load(qconvert.save(converted, tmp_path / "m.safetensors").path, TwoConvs())
    assert torch.equal(run(loaded, clip()), run(converted.eval(), clip()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_in_the_file(dtype, tmp_path):
    converted = trained(convert(Residual(), STEPS)).eval()
    loaded = there_and_back(converted, Residual(), tmp_path / "m.safetensors", dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    for name, ours in loaded.named_modules():
        if isinstance(ours, qconvert.QConv3d):  # the codes, and what they stand for, are exact
            layer = converted.get_submodule(name)
            assert torch.equal(ours.weight, layer._weight_quantize(layer.weight))
        if isinstance(ours, nn.BatchNorm3d):
            assert torch.equal(ours.running_var, converted.get_submodule(name).running_var.to(dtype).float())
    torch.testing.assert_close(run(loaded, clip()), run(converted, clip()), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_models_of_another_dtype(dtype, tmp_path):
    converted = trained(convert(TwoConvs().to(dtype), STEPS)).eval()
    loaded = there_and_back(converted, TwoConvs().to(dtype), tmp_path / "m.safetensors")
    assert torch.equal(run(loaded, clip().to(dtype)), run(converted, clip().to(dtype)))
    wide = qconvert.load(tmp_path / "m.safetensors", TwoConvs())
    assert wide.first.weight.dtype == torch.float32
    narrow = qconvert.load(tmp_path / "m.safetensors", TwoConvs()).to(torch.bfloat16)
    qconvert.save(narrow, tmp_path / "narrow.safetensors")  # what was cast since still has its codes


@every_rule
def test_latent_weights_train_on_as_before(rules, tmp_path):
    converted = trained(convert(TwoConvs(), rules))
    file = qconvert.save(converted, tmp_path / "m.safetensors", latent=True)
    assert set(file.float_weights.values()) == {"latent=True"}
    loaded = qconvert.load(file.path, TwoConvs()).train()
    assert list(loaded.state_dict()) == list(converted.state_dict())
    assert_equal(list(loaded.state_dict().values()), list(converted.state_dict().values()))
    for model in (loaded, converted):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(clip()).square().mean().backward()
            optimizer.step()
    assert_equal(list(loaded.state_dict().values()), list(converted.state_dict().values()))
    assert [parameter.requires_grad for parameter in loaded.parameters()] == [
        p.requires_grad for p in converted.parameters()
    ]


def test_packed_weights_do_not_train(tmp_path):
    loaded = qconvert.load(qconvert.save(convert(TwoConvs(), CHANNELS), tmp_path / "m.safetensors").path, TwoConvs())
    frozen = {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad}
    assert frozen == {"first.weight", "second.weight"}
    loaded.train()(clip()).sum().backward()
    assert loaded.first.weight.grad is None


STAGES = [
    {"steps": 1, "weight": {"quantizer": "lsq", "bits": 4}, "input": {"quantizer": "lsq", "bits": 2}},
    {"steps": 2, "weight": "ternary", "transition": "linear"},
]


def test_the_quantizer_at_work_in_a_schedule(tmp_path):
    converted = convert(TwoConvs(), CHANNELS)
    schedule = qconvert.train.Schedule(converted, STAGES)
    trained(converted).eval()
    loaded = there_and_back(converted, TwoConvs(), tmp_path / "m.safetensors")
    assert loaded.first._weight_quantize.bit_width == 4
    assert torch.equal(run(loaded, clip()), run(converted, clip()))
    with pytest.raises(ModelError, match=r"^layer 'first' has several quantizers, .* Store the schedule's"):
        qconvert.save(converted, tmp_path / "m.safetensors", latent=True)
    schedule.step()
    schedule.step()
    with pytest.raises(ModelError, match=r"^layer 'first' has several quantizers, .* Go on to the end of the stage$"):
        qconvert.save(converted, tmp_path / "m.safetensors")
    schedule.step()
    loaded = there_and_back(converted, TwoConvs(), tmp_path / "m.safetensors")
    assert torch.equal(run(loaded, clip()), run(converted, clip()))
