"""The loss of a training as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..pictures import new_figure, write

_SMOOTHED_OVER = 50


def draw(losses: Sequence[float], metrics: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draw the loss of each step and its moving average, with what the models reach above it.

    Args:
        losses: of the steps.
        metrics: by name of the model, then by name of the metric.
        path: of the picture; its suffix says of which kind.

    Raises:
        ModelError: if matplotlib is not installed.
        InputError: if the picture cannot be written.
    """
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    axes.plot(losses, color="0.8", label="loss of a step")
    width = min(_SMOOTHED_OVER, len(losses))
    if width:
        mean = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(np.arange(width - 1, len(losses)), mean, label=f"mean of {width} steps")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    lines = (
        f"{name}: {', '.join(f'{key} {value:.4g}' for key, value in reached.items())}" for name, reached in metrics.items()
    )
    axes.set_title("\n".join(lines), fontsize="small")
    write(figure, path)
