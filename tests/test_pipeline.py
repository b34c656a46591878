"""`binarize` end to end: what comes back, what is kept, and that a failure changes nothing."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torchvision.models.video import r3d_18
from torchvision.models.video.resnet import Conv3DSimple

import qconvert
from qconvert import InputError, ModelError, QConv3d, RuleError, binarize

SIGNS = {"rule": [{"weight": "sign", "input": "sign"}]}
CHANNELS = {
    "rule": [
        {"weight": {"quantizer": "sign", "scale": "channel"}, "input": {"quantizer": "approxsign", "threshold": 0.25}},
        {"layers": "0", "quantize": False},
    ]
}


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1),
        nn.BatchNorm3d(4),
        nn.ReLU(),
        Conv3DSimple(4, 6),
        nn.ReLU(),
        nn.Conv3d(6, 2, 1, bias=False),
    )


def snapshot(model: nn.Module) -> dict:
    """Everything that a conversion could change."""
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "modules": {name: (id(module), type(module), module.training) for name, module in model.named_modules()},
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        "hooks": {name: list(module._forward_hooks.values()) for name, module in model.named_modules()},
    }


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = snapshot(model)
    assert after["state"].keys() == before["state"].keys()
    assert all(torch.equal(after["state"][key], before["state"][key]) for key in before["state"])
    assert {key: after[key] for key in after if key != "state"} == {key: before[key] for key in before if key != "state"}


def test_out_of_place_by_default():
    model = small()
    before = snapshot(model)
    converted = binarize(model, SIGNS, report=False)
    assert_unchanged(model, before)
    assert type(converted) is nn.Sequential
    assert [isinstance(converted[index], QConv3d) for index in (0, 3, 5)] == [True] * 3
    assert isinstance(converted[3], Conv3DSimple)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in converted.parameters()}
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in converted.state_dict().items())


def test_in_place_keeps_the_very_parameters_and_objects():
    model = small()
    conv, parameters = model[3], dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert binarize(model, SIGNS, inplace=True, report=False) is model
    assert model[3] is conv
    assert isinstance(conv, QConv3d)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    latent = model[5].weight.detach().clone()
    model(torch.randn(2, 1, 4, 4, 4)).square().sum().backward()
    optimizer.step()  # built before the conversion
    assert not torch.equal(model[5].weight, latent)


def test_added_keys_are_thresholds_and_scales_only():
    model = small()
    converted = binarize(model, CHANNELS, report=False)
    added = set(converted.state_dict()) - set(model.state_dict())
    assert added == {f"{layer}.{key}" for layer in (3, 5) for key in ("activation.threshold", "scale", "offset")}
    assert torch.equal(converted[3].activation.threshold, torch.full((4,), 0.25))
    assert (converted[3].scale > 0).all()
    result = converted.load_state_dict(small().state_dict(), strict=False)
    assert (set(result.missing_keys), result.unexpected_keys) == (added, [])
    plain = binarize(model, SIGNS, report=False)
    plain.load_state_dict(model.state_dict(), strict=True)


def test_modes_devices_dtypes_formats_and_flags_survive():
    model = small().to(torch.float64, memory_format=torch.channels_last_3d)
    model[1].eval()  # a frozen BatchNorm in a training model
    model[3].weight.requires_grad_(requires_grad=False)
    converted = binarize(model, CHANNELS, report=False)
    assert [module.training for module in converted] == [True, False, True, True, True, True]
    assert not converted[3].weight.requires_grad
    assert all(p.dtype is torch.float64 for p in converted.parameters())
    assert converted[3].weight.is_contiguous(memory_format=torch.channels_last_3d)
    meta = binarize(small().to("meta"), CHANNELS, report=False)
    assert {p.device.type for p in meta.parameters()} == {"meta"}


def test_hooks_keep_firing_and_their_handles_keep_working():
    model = small()
    seen = []
    handle = model[3].register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    model[3].register_forward_pre_hook(lambda module, args: seen.append("pre"))
    binarize(model, SIGNS, inplace=True, report=False)(torch.randn(1, 1, 4, 4, 4))
    assert seen == ["pre", "QConv3DSimple"]
    handle.remove()
    seen.clear()
    model(torch.randn(1, 1, 4, 4, 4))
    assert seen == ["pre"]


def test_shared_modules_and_tied_weights_stay_shared():
    conv = nn.Conv3d(2, 2, 1)
    model = nn.ModuleDict({"a": conv, "b": conv, "tied": nn.Conv3d(2, 2, 1)})
    model["tied"].weight = conv.weight
    model.plain_list = [conv]
    converted = binarize(model, SIGNS, report=False)
    assert converted["a"] is converted["b"]
    assert converted.plain_list[0] is converted["a"]
    assert isinstance(converted["a"], QConv3d)
    assert converted["tied"].weight is converted["a"].weight


def test_wrapped_models_come_back_without_their_wrapper():
    model = small()
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        with pytest.warns(UserWarning, match="wrapper is taken off"):
            converted = binarize(wrapped, SIGNS, report=False)
        assert type(converted) is nn.Sequential


def test_a_bare_convolution_converts():
    conv = nn.Conv3d(2, 3, 1)
    converted = binarize(conv, SIGNS, report=False)
    assert isinstance(converted, QConv3d)
    assert type(conv) is nn.Conv3d
    assert torch.equal(converted.weight, conv.weight)


def test_a_partly_converted_model_keeps_what_it_has():
    once = binarize(small(), CHANNELS, report=False)  # leaves layer 0
    twice = binarize(once, SIGNS, report=False)
    assert type(twice[0]) is QConv3d
    assert twice[3].scale is not None
    assert twice[3].activation.activation_function.name == "approxsign"
    with pytest.warns(UserWarning, match="convert no layer"):
        thrice = binarize(twice, SIGNS, report=False)
    assert [type(module) for module in thrice] == [type(module) for module in twice]


def test_a_second_conversion_keeps_the_reasons_of_the_first():
    once = binarize(small(), {"rule": [{"layers": "0", "weight": "sign", "reason": "first"}]}, report=False)
    twice = binarize(once, {"rule": [{"layers": "3", "weight": "sign", "reason": "second"}]}, report=False)
    rows = {row.layer.name: (row.decision, row.reason) for row in qconvert.compare(small(), twice).rows}
    assert (rows["0"], rows["3"]) == (("converted", "first"), ("converted", "second"))
    assert rows["5"] == ("float", "no rule selects it")


def test_what_is_added_to_a_frozen_layer_is_frozen():
    model = small()
    model[3].requires_grad_(requires_grad=False)
    converted = binarize(model, CHANNELS, report=False)
    assert not any(p.requires_grad for p in converted[3].parameters())
    assert all(p.requires_grad for p in converted[5].parameters())


def test_copies_and_pickles_of_a_converted_model(tmp_path):
    converted = binarize(small().eval(), CHANNELS, report=False)
    x = torch.randn(1, 1, 4, 4, 4)
    expected = converted(x)
    for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):  # noqa: S301 (our own bytes)
        assert torch.equal(other(x), expected)
        assert [type(module) for module in other] == [type(module) for module in converted]
    torch.save({"model": converted, "x": x, "y": expected}, tmp_path / "model.pt")
    script = (
        "import sys, torch; saved = torch.load(sys.argv[1], weights_only=False);"
        "sys.exit(0 if torch.equal(saved['model'](saved['x']), saved['y']) else 1)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path / "model.pt")], check=False).returncode == 0


def test_prints_the_report_unless_told_not_to(capsys):
    binarize(small(), SIGNS, example_inputs=torch.zeros(1, 1, 4, 4, 4))
    printed = capsys.readouterr().out
    assert printed.startswith("Sequential: 3 Conv3d found, 3 converted")
    assert "BOPs" in printed
    binarize(small(), SIGNS, report=False)
    assert capsys.readouterr().out == ""


def test_report_without_an_input_says_how_to_get_operations(capsys):
    binarize(small(), SIGNS)
    assert "pass example_inputs" in capsys.readouterr().out


def test_input_shape_of_the_rules_is_used(capsys):
    binarize(small(), {**SIGNS, "model": {"input_shape": [1, 1, 4, 4, 4]}})
    macs = 64 * (4 * 27 + 6 * 4 * 27 + 2 * 6)
    assert f"{macs / 1000:.2f} k" in capsys.readouterr().out


@pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "copy"])
@pytest.mark.parametrize(
    ("rules", "example_inputs", "error", "message"),
    [
        ({"rule": [{"wieght": "sign"}]}, None, RuleError, "unknown key 'wieght'"),
        ({"rule": [{"weight": "sing"}]}, None, RuleError, "unknown quantizer 'sing'"),
        ({"rule": [{"weight": "sign"}, {"layers": "9"}]}, None, RuleError, "'9' selects no Conv3d"),
        ({"rule": [{"weight": {"quantizer": "lsq", "bits": 99}}]}, None, RuleError, "bits must be"),
        (SIGNS, torch.zeros(1, 2, 4, 4, 4), InputError, "Sequential does not run on the example input .*channels"),
        (SIGNS, torch.zeros(4, 4), InputError, "does not run on the example input"),
        (SIGNS, "a word", InputError, "does not run on the example input 'a word'"),
        (SIGNS, (torch.zeros(1, 1, 4, 4, 4),) * 2, InputError, "does not run"),
    ],
    ids=["key", "quantizer", "glob", "bits", "channels", "rank", "type", "arguments"],
)
def test_bad_input_leaves_the_model_as_it_was(rules, example_inputs, error, message, inplace):
    model = small()
    model[1].eval()
    model[3].register_forward_hook(lambda *_: None)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        binarize(model, rules, example_inputs=example_inputs, inplace=inplace)
    assert_unchanged(model, before)


def test_a_forward_that_raises_leaves_the_model_as_it_was():
    class Raises(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 1, 1)

        def forward(self, x):
            raise ValueError("no such luck")

    model = Raises()
    before = snapshot(model)
    with pytest.raises(InputError, match=r"Raises does not run on the example input .* ValueError: no such luck"):
        binarize(model, SIGNS, example_inputs=torch.zeros(1, 1, 1, 1, 1), inplace=True)
    assert_unchanged(model, before)
    assert isinstance(binarize(model, SIGNS, report=False).conv, QConv3d)  # nothing has to run for a conversion


def test_an_interruption_half_way_leaves_the_model_as_it_was(monkeypatch):
    model = small()
    before = snapshot(model)
    become, calls = qconvert.rewrite._become, []

    def interrupted(old, new):
        calls.append(old)
        if len(calls) == 3:
            raise KeyboardInterrupt
        become(old, new)

    monkeypatch.setattr(qconvert.rewrite, "_become", interrupted)
    with pytest.raises(KeyboardInterrupt):
        binarize(model, SIGNS, inplace=True, report=False)
    assert len(calls) == 3
    assert_unchanged(model, before)


def test_models_without_a_conv3d_are_refused():
    with pytest.raises(ModelError, match=r"Sequential has no Conv3d to convert. Its convolutions: Conv2d, ConvTranspose3d"):
        binarize(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ConvTranspose3d(1, 1, 1), nn.Linear(1, 1)))
    with pytest.raises(ModelError, match="Its convolutions: none"):
        qconvert.plan(nn.Linear(1, 1))


def test_a_plan_says_what_and_why_for_every_convolution():
    model = nn.Sequential(*small(), nn.ConvTranspose3d(2, 1, 2))
    plan = qconvert.plan(model, CHANNELS)
    assert [(d.site.name, d.convert) for d in plan.decisions] == [("0", False), ("3", True), ("5", True), ("6", False)]
    text = str(plan)
    assert "3 Conv3d found, 2 to convert." in text
    assert "1 ConvTranspose3d, 17 parameters: not a Conv3d, float." in text
    assert plan.decisions[-1].reason == "not a Conv3d (ConvTranspose3d)"
    assert all(decision.reason for decision in plan.decisions)
    untraceable = qconvert.plan(r3d_18(), "bitorch")
    assert len(untraceable.converted) == 20


def test_every_bundled_rule_file_converts_its_torchvision_model():
    from torchvision.models import video  # noqa: PLC0415

    found = {name: qconvert.plan(getattr(video, name)(), name) for name in ("r3d_18", "mc3_18", "r2plus1d_18", "s3d")}
    assert {name: (len(plan.decisions), len(plan.converted)) for name, plan in found.items()} == {
        "r3d_18": (20 + 1, 16),  # the Linear of the head
        "mc3_18": (20 + 1, 16),
        "r2plus1d_18": (37 + 1, 32),
        "s3d": (78, 75),
    }
    for plan in found.values():
        assert all(decision.reason not in ("selected", "no rule selects it") for decision in plan.decisions)
