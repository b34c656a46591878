"""The counts against other people's: torchvision's published ones, torch's FlopCounterMode and fvcore."""

import copy
import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
import torch
from models import run
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import REAL, entry

import qconvert


@pytest.mark.parametrize(
    ("name", "weights", "size"),
    [
        pytest.param("r3d_18", "R3D_18_Weights", 112, id="r3d_18"),
        pytest.param("mc3_18", "MC3_18_Weights", 112, id="mc3_18"),
        pytest.param("r2plus1d_18", "R2Plus1D_18_Weights", 112, id="r2plus1d_18"),
        pytest.param("s3d", "S3D_Weights", 224, id="s3d"),
    ],
)
class TestTorchvision:
    """Its published `_ops` are the MACs of convolutions and linear layers for 16 frames, in units of 1e9."""

    def test_macs(self, name: str, weights: str, size: int):
        meta, model = _published(name, weights)
        profile = qconvert.profile(model, torch.zeros(1, 3, 16, size, size))
        assert round(profile.totals.macs / 1e9, 3) == meta["_ops"]
        assert profile.totals.flops == 2 * profile.totals.macs

    def test_parameters(self, name: str, weights: str, size: int):
        meta, model = _published(name, weights)
        totals = qconvert.profile(model).totals
        assert totals.parameters == meta["num_params"]
        # the files that torchvision publishes hold these bits, and a few hundred bytes for the name of each tensor
        overhead = meta["_file_size"] - totals.mebibytes
        assert 0 < overhead * 2**20 < 500 * len(model.state_dict())


def _published(name: str, weights: str) -> tuple[dict[str, Any], nn.Module]:
    video = pytest.importorskip("torchvision.models.video")
    return next(iter(getattr(video, weights))).meta, getattr(video, name)()


class Counted(NamedTuple):
    """A model in eval mode (operations are counted so), an example input, and our MACs."""

    name: str
    model: nn.Module
    inputs: Any
    macs: int


@pytest.fixture(scope="module")
def counted(request) -> Counted:
    name, rules = request.param
    found = entry(name)
    model = found.build().eval()
    if rules:
        model = qconvert.binarize(model, rules, report=False)
    inputs = found.inputs()
    return Counted(name, model, inputs, qconvert.profile(model, inputs).totals.macs)


def _models(float_names: Iterable[str], converted_names: Iterable[str]) -> pytest.MarkDecorator:
    params = [pytest.param((name, None), id=f"{name}, float") for name in float_names]
    params += [pytest.param((name, "bitorch"), id=f"{name}, bitorch") for name in converted_names]
    return pytest.mark.parametrize("counted", params, indirect=True)


_CONVERTED = (
    "torchvision r3d_18",
    "pytorchvideo x3d_s",
    "monai UNETR",
    "transnetv2 pretrained",
    "transformers VideoMAE",
)


@_models((found.name for found in REAL), _CONVERTED)
def test_flop_counter_mode(counted: Counted):
    """Torch's counter, on a real run. It has the formulas that we use, so what this checks is everything around them.

    Some releases have no formula for the CPU's fused attention: it runs as matrix products.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(counted.model, copy.deepcopy(counted.inputs))  # SlowFast writes into its list
    assert counter.get_total_flops() == 2 * counted.macs > 0


# fvcore's operators that are multiply-accumulates. It also counts normalisations (an affine BatchNorm: 2 per value) and
# interpolation, which are neither convolution nor matrix product, and which `_ops` leaves out too.
_MAC_OPERATORS = ("conv", "linear", "matmul", "bmm", "addmm", "einsum")

# Our MACs minus fvcore's, by hand
_FVCORE_MISSES = {
    # it has no formula for scaled_dot_product_attention: 2 layers x 2 heads x tokens^2 x 16 channels x 2 products
    "transformers VideoMAE": 2 * 2 * 8**2 * 16 * 2,
    "transformers ViViT": 2 * 2 * 9**2 * 16 * 2,  # a class token more
    # the same, one head: encoder and decoder attend 8 x 8 pixels of 16 channels, each in 3 frames
    "diffusers AutoencoderKLWan": 6 * 64**2 * 16 * 2,
    # it reads torch.jit.trace, which drops what no output depends on: here a head of 8 -> 2 channels for 8^3 voxels
    "monai DynUNet": 8 * 2 * 8**3,
    # numpy's estimate of an einsum is not always the matrix product that torch makes of it: a few MACs less in each block
    "torchvision mvit_v2_s": 24,
}


@_models(
    (
        *_FVCORE_MISSES,
        "torchvision r3d_18",
        "torchvision s3d",
        "torchvision swin3d_t",
        "pytorchvideo slowfast_r50",
        "pytorchvideo csn",
        "monai UNet",  # transposed convolutions
        "monai VNet",
        "monai UNETR",
        "transnetv2 pretrained",
        "timm_3d resnet10t",
    ),
    _CONVERTED,
)
def test_fvcore(counted: Counted):
    """Formulas of its own, on a torch.jit trace."""
    fvcore = pytest.importorskip("fvcore.nn")
    logging.getLogger("fvcore").setLevel(logging.ERROR)  # it lists what it has no formula for
    analysis = fvcore.FlopCountAnalysis(counted.model, (copy.deepcopy(counted.inputs),))
    analysis.uncalled_modules_warnings(enabled=False)
    operators: Counter[str] = analysis.by_operator()
    assert sum(operators[name] for name in _MAC_OPERATORS) == counted.macs - _FVCORE_MISSES.get(counted.name, 0)
