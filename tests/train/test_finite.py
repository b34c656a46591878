"""`finite`: the first layer that reads NaN or infinity is named, and nothing else happens."""

import math

import pytest
import torch
from models import FunctionalConv, SpectralNormed, WeightNormed
from small import clip, convert, loss
from torch import Tensor, nn

from qconvert import InputError, ModelError, QConv3d
from qconvert.train import finite


class Network(nn.Module):
    """The second layer's input can be broken on the way."""

    def __init__(self):
        super().__init__()
        self.first = QConv3d(2, 3, 1)
        self.second = QConv3d(3, 4, 1)
        self.gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.gain * self.first(x))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_input(value: float):
    model, x = Network(), clip()
    x[0, 0, :, 0, 0] = value
    assert model(x).isfinite().all()  # a sign hides it
    with (
        finite(model),
        pytest.raises(InputError, match=r"^layer 'first': 4 of 576 input values are NaN or infinite\. A l"),
    ):
        model(x)


def test_between_layers():
    model = Network()
    model.gain = math.inf
    with finite(model), pytest.raises(InputError, match=r"^layer 'second': 864 of 864 input values are NaN or infinite"):
        model(clip())


@pytest.mark.parametrize("name", ["first", "second"])
def test_latent_weight(name: str):
    model = Network()
    weight = model.get_submodule(name).weight
    with torch.no_grad():
        weight[0, 0] = math.nan
    assert model(clip()).isfinite().all()
    with finite(model), pytest.raises(InputError, match=rf"^layer '{name}': 1 of {weight.numel()} latent weights are NaN"):
        model(clip())


@pytest.mark.parametrize("name", ["activation.threshold", "activation.spread", "scale", "offset", "rprelu.slope"])
def test_all_that_a_layer_has_learned(name: str):
    model = nn.Sequential(QConv3d(2, 3, 1, threshold=0.1, spread=2.0, scale=0.5, offset=0.1, rprelu=True))
    owner, _, attribute = f"0.{name}".rpartition(".")
    with torch.no_grad():
        getattr(model.get_submodule(owner), attribute)[1] = math.nan
    size = 2 if name.startswith("activation") else 3
    with finite(model), pytest.raises(InputError, match=rf"^layer '0': 1 of {size} values of '{name}' are NaN or infinite"):
        model(clip())


def test_a_weight_that_is_computed():
    model = convert(WeightNormed())
    with torch.no_grad():
        model.conv.parametrizations.weight.original1[0].zero_()  # 0 / 0
    with finite(model), pytest.raises(InputError, match=r"^layer 'conv': 54 of 216 latent weights are NaN or infinite"):
        model(clip())


def test_looking_at_a_weight_changes_nothing():
    model, twin = (convert(SpectralNormed().eval()).train() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    with finite(model):
        y = model(clip())
    assert torch.equal(y, twin(clip()))
    for key, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_of_a_functional_convolution():
    model = convert(FunctionalConv())
    with finite(model):
        model(clip())
        with pytest.raises(InputError, match=r"^layer '\w+': 288 of 576 input values"):
            model(clip() * torch.tensor([1, math.nan]).view(1, 2, 1, 1, 1))


@pytest.mark.parametrize("end", ["close", "with"])
def test_ends(end: str):
    model, x = Network(), clip() * math.nan
    guard = finite(model)
    with pytest.raises(InputError):
        model(x)
    if end == "close":
        guard.close()
    else:
        with guard:
            pass
    model(x)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_step_stays_one_operator():
    model, x = Network().train(), clip()
    expected = [(y := model(x)), *torch.autograd.grad(loss(y), list(model.parameters()))]
    with finite(model), torch.profiler.profile() as profile:
        y = model(x)
    assert sum(event.count for event in profile.key_averages() if event.key == "qconvert::quantized_conv3d") == 2
    got = [y, *torch.autograd.grad(loss(y), list(model.parameters()))]
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_of_a_compiled_model():
    model = Network()
    guard = finite(model)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(clip()), model(clip()))
    with guard, pytest.raises(InputError, match=r"^layer 'first': 576 of 576"):
        compiled(clip() * math.nan)


def test_a_model_without_converted_layers():
    with pytest.raises(ModelError, match=r"^Conv3d has no converted layer: convert it with qconvert.binarize first"):
        finite(nn.Conv3d(1, 1, 1))
