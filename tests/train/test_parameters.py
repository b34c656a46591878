"""`parameter_groups`: which parameter is in which group, by names written out by hand."""

import math
from typing import Any

import pytest
import torch
from models import HookWeightNormed, Pruned, SpectralNormed, TiedParameter, WeightNormed
from small import CHANNELS, STEPS, clip, convert, loss
from torch import nn

import qconvert
from qconvert import InputError, ModelError, QConv3d, QConv3d_NoAct
from qconvert.train import parameter_groups


def names(model: nn.Module, groups: list[dict]) -> dict[str, list[str]]:
    """Return the names of the parameters in each group, in their order."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: [known[id(parameter)] for parameter in group["params"]] for group in groups}


class Network(nn.Module):
    """One parameter of every kind."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(2, 4, 1)
        self.norm = nn.BatchNorm3d(4)
        self.slope = nn.PReLU(4)
        self.conv = QConv3d(4, 4, 1, bias=True, threshold=0.0, scale=1.0, offset=0.0)
        self.steps = QConv3d(4, 4, 1, input_quantization="lsq", weight_quantization="lsq")
        self.float = QConv3d(4, 4, 1, weight_quantization="identity", scale=1.0)
        self.weights = QConv3d_NoAct(4, 4, 1)


def test_every_kind_is_in_its_group():
    model = Network()
    groups = parameter_groups(model, 0.1, 0.01, latent_lr=0.5, added_lr=2)
    assert names(model, groups) == {
        "latent": ["conv.weight", "steps.weight", "weights.weight"],
        "added": [
            *("slope.weight", "conv.scale", "conv.offset", "conv.activation.threshold"),
            *("steps._weight_quantize.step", "steps.activation.activation_function.step", "float.scale"),
        ],
        "rest": ["stem.weight", "stem.bias", "norm.weight", "norm.bias", "conv.bias", "float.weight"],
    }
    settings = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert settings == {"latent": (0.05, 0.0), "added": (0.2, 0.0), "rest": (0.1, 0.01)}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.NAdam])
def test_any_optimizer_takes_them(optimizer: type[torch.optim.Optimizer]):
    made = optimizer(parameter_groups(Network(), 0.1, 0.01, latent_lr=0.0))
    assert [group["name"] for group in made.param_groups] == ["latent", "added", "rest"]
    assert [group["lr"] for group in made.param_groups] == [0.0, 0.1, 0.1]


def test_weight_decay_is_for_the_rest_only():
    model = Network()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(parameter_groups(model, 0.5, 0.5)).step()
    rest = names(model, parameter_groups(model, 0.5))["rest"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] * (0.75 if name in rest else 1)), name


def test_tied_weights_are_there_once_and_latent_if_any_layer_quantizes_them():
    model = convert(TiedParameter())
    assert model.encode.weight is model.decode.weight
    assert names(model, parameter_groups(model, 1))["latent"] == ["encode.weight"]
    only_one = convert(TiedParameter(), {"rule": [{"layers": "decode", "weight": "sign", "input": "sign"}]})
    assert not isinstance(only_one.encode, QConv3d)
    groups = names(only_one, parameter_groups(only_one, 1))
    assert groups == {"latent": ["encode.weight"], "rest": ["encode.bias", "decode.bias"]}


@pytest.mark.parametrize(
    ("build", "latent"),
    [
        (WeightNormed, ["conv.parametrizations.weight.original0", "conv.parametrizations.weight.original1"]),
        (SpectralNormed, ["conv.parametrizations.weight.original"]),
        (HookWeightNormed, ["conv.weight_g", "conv.weight_v"]),
        (Pruned, ["conv.weight_orig"]),
    ],
)
def test_what_a_weight_is_computed_from_is_latent(build: type[nn.Module], latent: list[str]):
    model = convert(build().eval())
    assert isinstance(model.conv, QConv3d)
    assert set(names(model, parameter_groups(model, 1))["latent"]) == {*latent, "plain.weight"}


@pytest.mark.parametrize("rules", [CHANNELS, STEPS], ids=["channels", "steps"])
def test_each_trainable_parameter_is_there_once(rules: dict):
    model = convert(nn.Sequential(nn.Conv3d(2, 4, 3), nn.PReLU(), nn.Conv3d(4, 2, 1)), rules)
    parts = [parameter for group in parameter_groups(model, 1) for parameter in group["params"]]
    assert len(parts) == len({id(parameter) for parameter in parts})
    assert {id(parameter) for parameter in parts} == {id(parameter) for parameter in model.parameters()}


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = Network()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("conv." in name and "weight" not in name)
    groups = parameter_groups(model, 1)
    assert names(model, groups) == {
        "added": ["conv.scale", "conv.offset", "conv.activation.threshold"],
        "rest": ["conv.bias"],
    }


def test_a_float_model_has_the_rest():
    model = nn.Sequential(nn.Conv3d(1, 1, 1), nn.Linear(2, 2))
    (group,) = parameter_groups(model, 0.1, 0.2)
    assert group == {"params": list(model.parameters()), "lr": 0.1, "weight_decay": 0.2, "name": "rest"}


def test_of_a_compiled_model():
    model = convert(nn.Sequential(nn.Conv3d(2, 4, 3), nn.Conv3d(4, 2, 1)))
    expected = parameter_groups(model, 1)
    assert parameter_groups(torch.compile(model), 1) == expected


def test_a_step_with_them_trains():
    model = convert(nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.Conv3d(4, 2, 1)))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.Adam(parameter_groups(model, 0.1, latent_lr=0.0))
    loss(model(clip())).backward()
    optimizer.step()
    unchanged = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert unchanged == ["0.weight", "1.weight"]


@pytest.mark.parametrize("lr", [0, -0.1, math.nan, math.inf, "0.1", None])
def test_a_learning_rate_is_above_0(lr: Any):
    with pytest.raises(InputError, match=rf"^lr must be a number above 0, got {lr!r}$"):
        parameter_groups(Network(), lr)


@pytest.mark.parametrize("name", ["weight_decay", "latent_lr", "added_lr"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "0.1", None])
def test_factors_are_from_0_on(name: str, value: Any):
    with pytest.raises(InputError, match=rf"^{name} must be a number from 0 on, got {value!r}$"):
        parameter_groups(Network(), 0.1, **{name: value})


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Conv3d(1, 1, 1).requires_grad_(requires_grad=False)])
def test_a_model_without_trainable_parameters(model: nn.Module):
    with pytest.raises(ModelError, match=rf"^{type(model).__name__} has no trainable parameter: model.requires_grad_"):
        parameter_groups(model, 0.1)


def test_is_public():
    assert qconvert.train.parameter_groups is parameter_groups
