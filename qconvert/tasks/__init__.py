"""Tasks to train converted models on: data, float model, recipe and measure, for `qconvert train` and the benchmarks."""

from .base import Recipe, Task
from .training import Training, converted, read_checkpoint

__all__ = ["Recipe", "Task", "Training", "converted", "read_checkpoint"]
