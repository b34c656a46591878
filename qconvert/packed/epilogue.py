"""`Epilogue`: what comes after a packed layer's sums, in the same pass over its output."""

import math
from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

Operation = Callable[[Tensor], Tensor]


class Epilogue:
    """What comes after a layer's sums, for each output channel, rounded to float32 after each operation as in the model.

    ``y = prelu(norm_factor * (scale * sum + offset + bias) + norm_summand + residual) + last``

    It takes in the operations that follow in a model, as long as they have this form.

    Args:
        scale, offset, bias: the layer's own, float64 (O,).
        operation: what the layer does with its sums.

    Attributes:
        scale, offset, bias: the layer's own, float64 (O,), and so are the others.
        norm_factor, norm_summand: of a BatchNorm.
        slope, last: of a PReLU. The slope is that of values which are not above 0.
        is_normalized: whether there is a norm.
        has_residual: whether something is added.
        is_bent: whether there is a slope.
        operations: what has been taken in, as functions of a tensor (1, O, ...): the layer's own first.
    """

    def __init__(self, scale: Tensor, offset: Tensor, bias: Tensor, operation: Operation) -> None:
        self.scale, self.offset, self.bias = scale, offset, bias
        self.norm_factor, self.slope = torch.ones_like(bias), torch.ones_like(bias)
        self.norm_summand, self.last = torch.zeros_like(bias), torch.zeros_like(bias)
        self.is_normalized = False
        self.has_residual = False
        self.is_bent = False
        self.operations: tuple[Operation, ...] = (operation,)

    def normalize(self, factor: Tensor, summand: Tensor, operation: Operation) -> bool:
        """Take in ``factor * y + summand``, a BatchNorm, and return whether that can be."""
        if self.is_normalized or self.has_residual or self.is_bent:
            return False
        self.norm_factor, self.norm_summand = factor, summand
        self.is_normalized = True
        self.operations = (*self.operations, operation)
        return True

    def add(self) -> bool:
        """Take in ``y + residual``, and return whether that can be."""
        if self.has_residual or self.is_bent:
            return False
        self.has_residual = True
        return True

    def bend(self, slope: Tensor, operation: Operation, before: Tensor | float = 0.0, after: Tensor | float = 0.0) -> bool:
        """Take in ``prelu(y + before) + after``, and return whether that can be."""
        if self.is_bent:
            return False
        self.norm_summand, self.slope, self.last = self.norm_summand + before, slope.expand_as(self.slope), self.last + after
        self.is_bent = True
        self.operations = (*self.operations, operation)
        return True

    @property
    def is_monotone(self) -> bool:
        """Whether a larger sum never turns a comparison of the output back."""
        return not self.has_residual and bool((self.slope >= 0).all())

    def rows(self) -> Tensor:
        """Return the rows of a layer's table, float32 (rows, O), without thresholds."""
        own, norm = (self.scale, self.offset, self.bias), (self.norm_factor, self.norm_summand)
        return torch.stack([*own, *norm, self.slope, self.last, torch.full_like(self.bias, math.inf)]).float()

    @torch.no_grad()
    def whole_thresholds(self, thresholds: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Return sign and threshold, float32 (O,), for which ``sign * sum >= threshold`` is what the model's operations say.

        All of them are monotone, so each channel has one sum at which the comparison of its value with the threshold turns.
        It is found by bisection on the operations themselves, with all that they round.

        Args:
            thresholds: of the layer that reads the bits, (O,).
            most: largest magnitude of a sum.
        """

        def is_above(sums: Tensor) -> Tensor:
            values = reduce(lambda value, operation: operation(value), self.operations, sums.float().view(1, -1, 1, 1, 1))
            return ~(values.flatten() < thresholds)

        low, high = (torch.full(thresholds.shape, float(each), dtype=torch.float64) for each in (-most, most))
        at_low, at_high = is_above(low), is_above(high)
        while (high - low).max() > 1:
            middle = torch.floor((low + high) / 2)
            is_like_low = is_above(middle) == at_low
            low, high = torch.where(is_like_low, middle, low), torch.where(is_like_low, high, middle)
        sign = torch.where(at_low & ~at_high, -1.0, 1.0)
        turn = torch.where(sign < 0, -low, high)
        always = torch.where(at_low, -math.inf, math.inf)
        return sign, torch.where(at_low == at_high, always, turn).float()
