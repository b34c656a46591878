"""`flip_rate`: against signs counted with numpy."""

import copy
import io

import numpy as np
import pytest
import torch
import torch.distributed as dist
from models import SharedModule, WeightNormed
from small import convert
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.utils.tensorboard import SummaryWriter

from qconvert import ModelError, QConv3d, QConv3d_NoAct
from qconvert.quantizations import LSQ
from qconvert.train import flip_rate

BINARY = ["sign", "approxsign", "swishsign", "steheaviside", "progressive_sign", "weightdorefa"]


def signs(weight: torch.Tensor) -> np.ndarray:
    return weight.detach().numpy() >= 0


@torch.no_grad()
def moved(layer: nn.Module) -> float:
    """Move the weights, and return the share that changed its sign."""
    before = signs(layer.weight)
    layer.weight.add_(torch.randn_like(layer.weight), alpha=0.1)
    return float((signs(layer.weight) != before).mean())


@pytest.mark.parametrize("weights", BINARY)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 1), (8, 4, 3)], ids=str)
def test_is_the_share_of_changed_signs(shape: tuple[int, int, int], weights: str):
    layer = QConv3d(*shape, weight_quantization=weights)
    assert flip_rate(layer) == {"": 0.0}
    for _ in range(3):
        expected = moved(layer)
        assert flip_rate(layer) == {"": pytest.approx(expected, abs=1e-12)}
    assert flip_rate(layer) == {"": 0.0}


def test_every_weight_can_flip():
    layer = QConv3d(3, 5, 3)
    flip_rate(layer)
    with torch.no_grad():
        layer.weight.neg_()
    assert flip_rate(layer) == {"": 1.0}


def test_of_zeros_and_ones():
    layer = QConv3d(1, 4, 1, weight_quantization=LSQ(1, signed=False))
    nn.init.ones_(layer.weight)
    flip_rate(layer)
    with torch.no_grad():
        layer.weight[0].neg_()
    assert flip_rate(layer) == {"": 0.25}


def test_a_ramp_has_the_sign_of_evaluation_and_keeps_its_mode():
    layer = QConv3d(1, 4, 1, weight_quantization="progressive_sign").train()
    nn.init.zeros_(layer.weight)  # +1 in evaluation
    flip_rate(layer)
    with torch.no_grad():
        layer.weight[0] = 1e-9
    assert flip_rate(layer) == {"": 0.0}
    assert layer._weight_quantize.training


def test_names_the_layers_with_weights_of_1_bit():
    model = nn.Sequential(
        *(nn.Conv3d(2, 2, 1), QConv3d(2, 2, 1), QConv3d_NoAct(2, 2, 1), QConv3d(2, 2, 1, weight_quantization="lsq")),
        QConv3d(2, 2, 1, weight_quantization="identity"),
        QConv3d(2, 2, 1, weight_quantization="ternary"),
    )
    flip_rate(model)
    with torch.no_grad():
        model[2].weight[0, 0].neg_()
    assert flip_rate(torch.compile(model)) == {"1": 0.0, "2": 0.25}


def test_rates_are_read_back_by_tensorboard(tmp_path):
    model = nn.Sequential(QConv3d(3, 4, 1), nn.Sequential(QConv3d(4, 2, 1)))
    flip_rate(model)
    with torch.no_grad():
        model[1][0].weight[0].neg_()
    with SummaryWriter(tmp_path) as writer:
        writer.add_scalars("flip_rate", flip_rate(model), 7)
    read = {}
    for folder in tmp_path.iterdir():
        if folder.is_dir():  # add_scalars writes one for each key
            events = EventAccumulator(str(folder)).Reload()
            read[folder.name] = [(event.step, event.value) for event in events.Scalars("flip_rate")]
    assert read == {"flip_rate_0": [(7, 0.0)], "flip_rate_1.0": [(7, 0.5)]}


def test_a_shared_layer_is_there_once():
    assert list(flip_rate(convert(SharedModule()))) == ["conv"]


def test_of_a_computed_weight():
    model = convert(WeightNormed())
    flip_rate(model)
    with torch.no_grad():
        model.conv.parametrizations.weight.original0[0].neg_()
    assert flip_rate(model)["conv"] == 0.25


def test_hooks_of_the_quantizer_are_not_called():
    layer = QConv3d(1, 1, 1)
    layer._weight_quantize.register_forward_hook(lambda *_: pytest.fail("called"))
    flip_rate(layer)


def test_what_is_remembered_is_a_bit_per_weight_and_in_no_state_dict():
    layer = QConv3d(3, 5, 3)  # 405 weights
    keys = set(layer.state_dict())
    flip_rate(layer)
    assert set(layer.state_dict()) == keys
    assert not list(layer.buffers())
    assert layer._last_signs.dtype == torch.uint8
    assert len(layer._last_signs) == 51
    assert np.array_equal(np.unpackbits(layer._last_signs.numpy(), bitorder="little")[:405], signs(layer.weight).ravel())


def test_copies_remember_and_go_their_own_way():
    model = nn.Sequential(QConv3d(1, 4, 1))
    flip_rate(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    copies = [copy.deepcopy(model), torch.load(stored, weights_only=False)]
    with torch.no_grad():
        for twin in copies:
            twin[0].weight[0].neg_()
    assert [flip_rate(twin) for twin in copies] == [{"0": 0.25}, {"0": 0.25}]
    assert flip_rate(model) == {"0": 0.0}


def test_of_sharded_weights():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer = QConv3d(1, 4, 1)
        flip_rate(layer)
        weight = layer.weight.detach().clone()
        weight[1].neg_()
        layer.weight = nn.Parameter(distribute_tensor(weight, init_device_mesh("cpu", (1,)), [Shard(0)]))
        assert flip_rate(layer) == {"": 0.25}
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("model", [nn.Conv3d(1, 1, 1), QConv3d(1, 1, 1, weight_quantization="lsq")])
def test_a_model_without_binary_weights(model: nn.Module):
    with pytest.raises(ModelError, match=r"Conv3d has no layer with weights of 1 bit: convert it with qconvert.binarize"):
        flip_rate(model)
