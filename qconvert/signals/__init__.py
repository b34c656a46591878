"""The graph pass: what every convolution reads and puts out, told from the graph, and what a new layer starts from."""

from .distribution import POINTS, Distribution, mixture
from .propagation import Signal, signals
from .start import OutputStart, constant_layers, input_start, output_start

__all__ = [
    "POINTS",
    "Distribution",
    "OutputStart",
    "Signal",
    "constant_layers",
    "input_start",
    "mixture",
    "output_start",
    "signals",
]
