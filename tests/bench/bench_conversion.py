"""How long a conversion and its report take on r3d_18, and how much memory one in place, as ratios. Run: make bench."""

import copy
import gc
import logging
import sys
from pathlib import Path

import torch
from fvcore.nn import FlopCountAnalysis
from ratios import Ratio, measure
from tabulate import tabulate
from torch import nn
from torchvision.models.video import r3d_18

import qconvert

CONVERSION_BAR = 4.0  # out-of-place binarize(report=False) in units of copy.deepcopy
MEMORY_BAR = 0.05  # most memory that a conversion in place takes on top of the model, in units of the model's
REPORT_BAR = 1.0  # the before/after report in units of one fvcore count of the float model


def main() -> int:
    """Print both tables; exit with 1 if a bar is missed."""
    logging.disable(logging.WARNING)  # fvcore names every operator that it skips
    memory = show_memory(with_statistics(r3d_18()))  # first: later what others have freed would be used again, unseen
    model = with_statistics(r3d_18())
    rules = qconvert.load_rules("r3d_18")
    x = torch.zeros(1, 3, 16, 112, 112)
    converted = qconvert.binarize(model, rules, report=False)
    conversion = measure(
        {
            "copy.deepcopy(model)": lambda: copy.deepcopy(model),
            "binarize(model, report=False)": lambda: qconvert.binarize(model, rules, report=False),
            "binarize(deepcopy(model), inplace=True)": lambda: qconvert.binarize(
                copy.deepcopy(model), rules, inplace=True, report=False
            ),
        },
        rounds=31,
    )
    report = measure(
        {
            "fvcore FlopCountAnalysis(model, x).total()": lambda: FlopCountAnalysis(model, x).total(),
            "compare(model, converted, x)": lambda: qconvert.compare(model, converted, x),
        },
        rounds=15,
    )
    return max(show(conversion, CONVERSION_BAR), show(report, REPORT_BAR), memory)


@torch.no_grad()
def with_statistics(model: nn.Module) -> nn.Module:
    """Return the model in evaluation mode, with running statistics, as a pretrained one has them."""
    model.train()(torch.randn(2, 3, 4, 32, 32))
    return model.eval()


def show(ratios: list[Ratio], bar: float) -> int:
    """Print the ratios; return 0 if all of them are below the bar."""
    rows = [(r.name, f"{r.median:.2f}", f"{r.lowest:.2f} - {r.highest:.2f}", f"{1000 * r.seconds:.1f}") for r in ratios]
    print(tabulate(rows, ["what ran", "ratio", "lowest - highest", "median ms"], disable_numparse=True))
    reached = all(ratio.median <= bar for ratio in ratios[1:])
    print(f"bar: {bar} x, {'reached' if reached else 'MISSED'}; {torch.get_num_threads()} threads\n")
    return 0 if reached else 1


def show_memory(model: nn.Module) -> int:
    """Print what a conversion in place allocates at most, on top of the model; return 0 if it is below the bar."""
    small = nn.Sequential(nn.Conv3d(16, 16, 3), nn.BatchNorm3d(16), nn.ReLU(), nn.Conv3d(16, 16, 3), nn.Conv3d(16, 16, 3))
    qconvert.binarize(small, "default", report=False)  # what a first conversion imports is not the model's
    size = sum(parameter.nbytes for parameter in model.parameters())
    gc.collect()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: forget the highest value so far
    qconvert.binarize(model, "r3d_18", inplace=True, report=False)
    share = (_resident("VmHWM") - before) / size
    print(f"binarize(model, inplace=True): at most {100 * share:.1f} % of the model's memory on top of it")
    print(f"bar: {100 * MEMORY_BAR:.0f} %, {'reached' if share <= MEMORY_BAR else 'MISSED'}\n")
    return 0 if share <= MEMORY_BAR else 1


def _resident(key: str) -> int:
    """Return the process's memory as Linux has it, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


if __name__ == "__main__":
    sys.exit(main())
