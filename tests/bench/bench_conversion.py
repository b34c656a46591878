"""How long a conversion and its report take on r3d_18, as ratios. Run: make bench."""

import copy
import logging
import sys

import torch
from fvcore.nn import FlopCountAnalysis
from ratios import Ratio, measure
from tabulate import tabulate
from torchvision.models.video import r3d_18

import qconvert

CONVERSION_BAR = 2.5  # out-of-place binarize(report=False) in units of copy.deepcopy
REPORT_BAR = 1.0  # the before/after report in units of one fvcore count of the float model


def main() -> int:
    """Print both tables; exit with 1 if a bar is missed."""
    logging.disable(logging.WARNING)  # fvcore names every operator that it skips
    model = r3d_18().eval()
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
    return max(show(conversion, CONVERSION_BAR), show(report, REPORT_BAR))


def show(ratios: list[Ratio], bar: float) -> int:
    """Print the ratios; return 0 if all of them are below the bar."""
    rows = [(r.name, f"{r.median:.2f}", f"{r.lowest:.2f} - {r.highest:.2f}", f"{1000 * r.seconds:.1f}") for r in ratios]
    print(tabulate(rows, ["what ran", "ratio", "lowest - highest", "median ms"], disable_numparse=True))
    reached = all(ratio.median <= bar for ratio in ratios[1:])
    print(f"bar: {bar} x, {'reached' if reached else 'MISSED'}; {torch.get_num_threads()} threads\n")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
