"""`Moments`: mean and standard deviation per channel, of values that come in parts."""

import torch
from torch import Tensor


class Moments:
    """Mean and standard deviation per channel of all that was added."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0  # sum of squared distances from the mean

    def add(self, values: Tensor) -> None:
        """Add values of shape (C, n) (Chan et al. 1979, parallel updating of moments)."""
        count, mean = values.shape[1], values.mean(1)
        total, distance = self.count + count, mean - self.mean
        self._squares = self._squares + values.var(1, correction=0) * count + distance**2 * (self.count * count / total)
        self.mean = self.mean + distance * (count / total)
        self.count = total

    @property
    def std(self) -> Tensor:
        """The standard deviation of each channel, shape (C,)."""
        return torch.as_tensor(self._squares / max(self.count, 1)).sqrt()
