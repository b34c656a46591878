"""The kernel compiled for other processors than the one at hand: what they have, this one has as well."""

import os
import platform
import subprocess
import sys

import pytest

FEATURES = {
    "nehalem": "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16",
    "haswell": "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16,+avx,+avx2,+bmi,+bmi2,+fma,+f16c,+lzcnt,+movbe",
}
"""None has AVX-512: bits are counted by bytes."""

PROGRAM = """
import torch
import torch.nn.functional as F
from qconvert import QConv3d
from qconvert.kernels.compiled.tile import COUNTS_WORDS
from qconvert.packed.layer import PackedConv3d

assert not COUNTS_WORDS
for inputs, outputs, border in ((70, 33, -1.0), (256, 40, 0.0)):
    layer, x = QConv3d(inputs, outputs, 3, padding=1, pad_value=border).eval(), torch.randn(1, inputs, 3, 4, 5)
    assert torch.equal(PackedConv3d(layer)(x), layer(x))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these processors are x86")
@pytest.mark.parametrize("processor", FEATURES)
def test_it_is_exact_on_processors_with_less(processor: str, tmp_path) -> None:
    environment = {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": FEATURES[processor], "NUMBA_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
