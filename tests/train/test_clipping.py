"""`clip_latent_weights`: against numpy's clip, and on sharded weights."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from models import Pruned, WeightNormed
from small import convert
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from qconvert import ModelError, QConv3d, QConv3d_NoAct
from qconvert.train import clip_latent_weights


def network() -> nn.Sequential:
    return nn.Sequential(QConv3d(3, 4, 3), QConv3d(4, 4, 1), QConv3d_NoAct(4, 2, 1), nn.Conv3d(2, 2, 1))


@pytest.fixture
def mesh():
    """One process that shards, in memory only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_each_layer_has_its_own_bound():
    model = network()
    before = [layer.weight.detach().numpy().copy() for layer in model]
    model[0].latent_clip, model[2].latent_clip = 0.1, 0.05
    parameters = list(model.parameters())
    clip_latent_weights(model)
    for layer, weight, bound in zip(model, before, (0.1, np.inf, 0.05, np.inf), strict=True):
        expected = np.clip(weight, np.float32(-bound), np.float32(bound))
        assert np.array_equal(layer.weight.detach().numpy(), expected)
        assert np.isinf(bound) or (np.abs(weight) > bound).any()
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    assert all(parameter.grad_fn is None and parameter.requires_grad for parameter in parameters)


def test_the_bound_comes_from_a_rule():
    rules = {"rule": [{"weight": "sign", "input": "sign"}, {"layers": "1", "latent_clip": 0.05}]}
    model = convert(nn.Sequential(nn.Conv3d(3, 4, 3), nn.Conv3d(4, 4, 3)), rules)
    before = [layer.weight.detach().clone() for layer in model]
    clip_latent_weights(model)
    assert torch.equal(model[0].weight, before[0])
    assert torch.equal(model[1].weight, before[1].clip(-0.05, 0.05))
    assert (before[1].abs() > 0.05).any()


def test_by_default_nothing_is_clipped():
    model = network()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    clip_latent_weights(model)
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))
    assert "latent_clip" not in str(model.state_dict().keys())


def test_of_sharded_weights(mesh):
    layer = QConv3d(3, 4, 3)
    layer.latent_clip = 0.1
    expected = layer.weight.detach().clip(-0.1, 0.1)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
    clip_latent_weights(layer)
    assert isinstance(layer.weight, DTensor)
    assert torch.equal(layer.weight.full_tensor(), expected)


@pytest.mark.parametrize("build", [WeightNormed, Pruned])
def test_a_computed_weight_cannot_be_clipped(build: type[nn.Module]):
    model = convert(build())
    model.conv.latent_clip = model.plain.latent_clip = 1e-3
    before = model.plain.weight.detach().clone()
    with pytest.raises(ModelError, match=r"^layer 'conv' has latent_clip, but its weight is computed.* Remove what comp"):
        clip_latent_weights(model)
    assert torch.equal(model.plain.weight, before)
