"""Pictures: matplotlib, which is an extra, and what is said where it is missing or cannot write."""

from pathlib import Path
from typing import Any

from .errors import InputError, ModelError


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of a size in inches.

    Raises:
        ModelError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise ModelError(f"a picture needs `pip install matplotlib`: {error}") from error
    return Figure(figsize=(width, height), layout="constrained")


def write(figure: Any, path: Path) -> None:
    """Write a figure; the path's suffix says as what kind of picture.

    Raises:
        InputError: if it cannot be written.
    """
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be written: {error}") from error
