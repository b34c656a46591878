"""The kernel compiled for other processors than the one at hand, which has what they have, and where there is no cache."""

import ctypes
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
from numba import carray
from numba.core import caching

from qconvert.kernels.compiled.compiling import compiled_worker

FEATURES = {
    "nehalem": "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16",
    "haswell": "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16,+avx,+avx2,+bmi,+bmi2,+fma,+f16c,+lzcnt,+movbe",
}
"""None has AVX-512: bits are counted by bytes."""

PROGRAM = """
import torch
import torch.nn.functional as F
from torch import nn
from qconvert import QConv3d, pack
from qconvert.kernels.compiled import bits, convolution, planar, sums
from qconvert.kernels.compiled.tile import COUNTS_WORDS
from qconvert.packed.layer import PackedConv3d
from qconvert.quantizations import InputDoReFa

assert not COUNTS_WORDS
print(*(each.compiled().cache_hits for each in (bits, convolution, planar, sums)))
for inputs, outputs, border in ((70, 33, -1.0), (256, 40, 0.0)):
    layer, x = QConv3d(inputs, outputs, 3, padding=1, pad_value=border).eval(), torch.randn(1, inputs, 3, 4, 5)
    assert torch.equal(PackedConv3d(layer)(x), layer(x))
layer, x = QConv3d(70, 33, 3, input_quantization=InputDoReFa(2)).eval(), torch.randn(1, 70, 3, 4, 5)
assert torch.allclose(PackedConv3d(layer)(x), layer(x), rtol=1e-5, atol=1e-4)
model = nn.Sequential(QConv3d(64, 64, 3, padding=1), nn.BatchNorm3d(64), nn.ReLU(), QConv3d(64, 64, 3, threshold=0.5)).eval()
packed, x = pack(model), torch.randn(2, 64, 3, 4, 5)
assert [each.gives for each in packed.summary().layers] == ["bits", "floats"]
assert torch.equal(packed(x), model(x))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these processors are x86")
@pytest.mark.parametrize("processor", FEATURES)
def test_it_is_exact_on_processors_with_less(processor: str, tmp_path) -> None:
    environment = {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": FEATURES[processor], "NUMBA_CACHE_DIR": str(tmp_path)}
    for compiled in ("0 0 0 0", "1 1 1 1"):  # the second process finds what the first one has compiled
        ran = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=os.environ | environment, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.strip() == compiled


def test_without_a_folder_to_write_to_it_compiles_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(pointer):
        a = carray(pointer, 1)
        a[0] = 2 * a[0]

    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    numbers = np.array([21], np.int64)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled_worker(doubled).address)(numbers.ctypes.data)
    assert numbers[0] == 42
