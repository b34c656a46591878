"""The losses of a training, and what the model reached on the way, as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..pictures import write

_SMOOTHED_OVER = 50


def draw(
    figure: Any,
    losses: Sequence[float],
    measured: Mapping[int, Mapping[str, float]],
    reached: Mapping[str, Mapping[str, float]],
    path: Path,
) -> None:
    """Draw the loss of each step with its moving average, and below it a curve for each metric.

    Args:
        figure: an empty figure.
        losses: of the steps.
        measured: the metrics by step, then by name.
        reached: in the end, by name of the model, then by name of the metric.
        path: of the picture; its suffix says of which kind.

    Raises:
        InputError: if the picture cannot be written.
    """
    names = list(dict.fromkeys(name for metrics in measured.values() for name in metrics))
    top, *others = figure.subplots(1 + len(names), 1, sharex=True, squeeze=False, height_ratios=[3, *[1] * len(names)])[:, 0]
    top.plot(range(1, len(losses) + 1), losses, color="0.8", label="loss of a step")
    width = min(_SMOOTHED_OVER, len(losses))
    if width:
        mean = np.convolve(losses, np.ones(width) / width, mode="valid")
        top.plot(np.arange(width, len(losses) + 1), mean, label=f"mean of {width} steps")
    top.set_ylabel("loss")
    top.legend()
    for axes, name in zip(others, names, strict=True):
        axes.plot(list(measured), [metrics[name] for metrics in measured.values()], marker=".")
        axes.set_ylabel(name)
    figure.axes[-1].set_xlabel("step")
    lines = (
        f"{model}: {', '.join(f'{key} {value:.4g}' for key, value in metrics.items())}" for model, metrics in reached.items()
    )
    top.set_title("\n".join(lines), fontsize="small")
    write(figure, path)
