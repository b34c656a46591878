"""`Epilogue`: what comes after a packed layer's sums, in the same pass over its output."""

import math

import torch
from torch import Tensor


class Epilogue:
    """What comes after a layer's sums: ``y = prelu(factor * sum + summand + residual) + last``, for each output channel.

    It takes in the operations that follow in a model, as long as they have this form.

    Attributes:
        factor, summand, slope, last: float64 (O,). The slope is that of values which are not above 0.
        has_residual: whether something is added.
    """

    def __init__(self, factor: Tensor, summand: Tensor) -> None:
        self.factor, self.summand = factor, summand
        self.slope, self.last = torch.ones_like(factor), torch.zeros_like(factor)
        self.has_residual = False
        self._is_bent = False

    def scale(self, factor: Tensor, summand: Tensor) -> bool:
        """Take in ``factor * y + summand``, a BatchNorm, and return whether that can be."""
        if self.has_residual or self._is_bent:
            return False
        self.factor, self.summand = self.factor * factor, self.summand * factor + summand
        return True

    def add(self) -> bool:
        """Take in ``y + residual``, and return whether that can be."""
        if self.has_residual or self._is_bent:
            return False
        self.has_residual = True
        return True

    def bend(self, slope: Tensor, before: Tensor | float = 0.0, after: Tensor | float = 0.0) -> bool:
        """Take in ``prelu(y + before) + after``, and return whether that can be."""
        if self._is_bent:
            return False
        self.summand, self.slope, self.last = self.summand + before, slope.expand_as(self.slope), self.last + after
        self._is_bent = True
        return True

    def rows(self) -> Tensor:
        """Return the rows of a layer's table, float32 (rows, O), without thresholds."""
        nothing = torch.full_like(self.factor, math.inf)
        return torch.stack([self.factor, self.summand, self.slope, self.last, nothing]).float()
