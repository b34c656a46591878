"""How much memory a model takes in a process of its own, Linux only. Run by `peak_memory`: python memory.py FILE."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn


def peak_memory(model: nn.Module, x: Tensor) -> float:
    """Return what loading and running a model adds at most to what its process takes before, in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        torch.save((model, x), path)
        ran = subprocess.run([sys.executable, __file__, str(path)], capture_output=True, text=True, check=True)
    return float(ran.stdout)


def main(path: str) -> None:
    """Print the MiB of a model that has been saved with its input."""
    import qconvert  # noqa: F401 (what it takes by itself is no part of the model's)
    from qconvert.kernels.operators import is_compiled

    is_compiled()
    torch.nn.functional.conv3d(torch.ones(1, 8, 4, 8, 8), torch.ones(8, 8, 3, 3, 3))
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = mebibytes("VmRSS")
    model, x = torch.load(path, weights_only=False)  # written above
    with torch.inference_mode():
        model(x)
    print(mebibytes("VmHWM") - before)


def mebibytes(name: str) -> float:
    """Return a number of this process's status."""
    (found,) = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found) / 1024


if __name__ == "__main__":
    main(sys.argv[1])
