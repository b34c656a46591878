"""A convolution in bytes: whole numbers, equal to those of a float convolution of the codes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor

from qconvert import QConv3d
from qconvert.layers import fused
from qconvert.layers.byte_conv import byte_conv3d, runs_in_bytes

pytestmark = pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="bytes run on x86 only")


def operands(channels: int, outputs: int, groups: int, kernel: Any) -> tuple[Tensor, Tensor]:
    x = torch.rand(2, channels, 5, 7, 6) > 0.5
    weight = torch.randint(0, 2, (outputs, channels // groups, *kernel), dtype=torch.int8) * 2 - 1
    return x, weight


def of_codes(bits: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
    """Return the convolution of -1 and +1 with a border of -1, in double precision."""
    border = [amount for each in reversed(padding) for amount in (each, each)]
    codes = F.pad(torch.where(bits, 1.0, -1.0).double(), border, value=-1.0)
    return F.conv3d(codes, weight.double(), None, stride, 0, dilation, groups)


@pytest.mark.parametrize(
    ("channels", "outputs", "groups"),
    [(1, 1, 1), (63, 5, 1), (64, 64, 1), (65, 3, 1), (127, 2, 1), (128, 8, 4), (6, 6, 6), (6, 4, 2)],
)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
        ((1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1)),
        ((3, 2, 1), (2, 1, 3), (2, 0, 1), (2, 3, 1)),
    ],
)
def test_is_the_convolution_of_the_codes(channels, outputs, groups, kernel, stride, padding, dilation):
    bits, weight = operands(channels, outputs, groups, kernel)
    moved = (stride, padding, dilation, groups)
    output = byte_conv3d(bits, weight, *moved, torch.contiguous_format)
    assert output.dtype == torch.float32
    assert output.is_contiguous()
    assert torch.equal(output.double(), of_codes(bits, weight, *moved))
    assert torch.equal(byte_conv3d(bits[0], weight, *moved, torch.contiguous_format), output[0])


def test_sums_do_not_saturate():
    bits, weight = torch.ones(1, 3072, 5, 5, 5, dtype=torch.bool), torch.ones(2, 3072, 5, 5, 5, dtype=torch.int8)
    moved = ((1, 1, 1), (0, 0, 0), (1, 1, 1), 1)
    assert byte_conv3d(bits, weight, *moved, torch.contiguous_format).flatten().tolist() == [3072 * 125] * 2


def large(memory_format: torch.memory_format) -> tuple[QConv3d, Tensor]:
    """Return a layer, and an input of which a convolution in bytes is worth its while."""
    layer = QConv3d(32, 64, 3, padding=1, input_quantization="approxsign", threshold=0.1, scale="channel").train()
    x = torch.randn(2, 32, 6, 16, 16).to(memory_format=memory_format)
    assert runs_in_bytes(x, layer.weight, (1, 1, 1), (1, 1, 1), (1, 1, 1))
    return layer.to(memory_format=memory_format), x


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_a_step_of_training_runs_in_bytes_and_is_the_same(memory_format, monkeypatch):
    layer, x = large(memory_format)
    with torch.profiler.profile() as profile:
        output = layer(x)
    assert any(event.key == "onednn::qconv3d_pointwise" for event in profile.key_averages())
    monkeypatch.setattr(fused, "runs_in_bytes", lambda *_: False)
    in_float = layer(x)
    assert torch.equal(output, in_float)
    assert output.stride() == in_float.stride() == F.conv3d(x, layer.weight, padding=1).stride()
    with torch.no_grad():
        assert torch.equal(output, layer.eval()(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_do_not_run_in_bytes(dtype):
    layer, x = large(torch.contiguous_format)
    assert not runs_in_bytes(x.to(dtype), layer.weight, (1, 1, 1), (1, 1, 1), (1, 1, 1))


def test_a_small_layer_does_not_run_in_bytes():
    assert not runs_in_bytes(torch.randn(1, 64, 1, 2, 2), torch.randn(64, 64, 3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1))
