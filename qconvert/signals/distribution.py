"""`Distribution`: what is known, channel by channel, about the values of a tensor that has not been computed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import Tensor

from .geometry import Size

POINTS = 32
"""Values that stand for a channel's distribution. A share of its values is known to about 1 / POINTS."""


def _standard_normal() -> Tensor:
    quantiles = (torch.arange(POINTS, dtype=torch.float64, device="cpu") + 0.5) / POINTS
    points: Tensor = torch.special.ndtri(quantiles)
    return (points / points.std(correction=0)).float()[None]  # variance 1 although the tails are cut


STANDARD_NORMAL = _standard_normal()
# pairs the points of one value with those of an independent one: of the orders (a k + b) mod 32, the one that leaves normal
# and rectified normal values the least correlated (0.03)
_SHUFFLE = (torch.arange(POINTS, device="cpu") * 15 + 26) % POINTS


_JUST_ABOVE = 0.1
"""Distance from the lowest value that leaves most of the others above, in standard deviations."""

_ABOVE_A_GUESS = 0.01
"""The same where it is not known that 0 is the lowest value, nor that it is not: next to nothing for any other value."""

_BALANCED = 0.1
"""Largest difference between the shares of values above and below 0 at which they count as balanced."""


@dataclass(frozen=True, eq=False)
class Distribution:
    """The values of a tensor: for each channel `POINTS` equally likely ones.

    Attributes:
        points: shape (C, POINTS), ascending: the quantiles (k + 1/2) / POINTS. C is 1 where channels are not told apart.
        nonnegative: whether it is certain that no value is below 0.
        known: whether all of it follows from the model; False if something was assumed to be standard normal.
        axis: the dimension of the tensor that holds the channels: 1, or -1 behind a permutation to channels-last.
        size: depth, height and width of the tensor, as far as they are known.
    """

    points: Tensor
    nonnegative: bool = False
    known: bool = True
    axis: int = 1
    size: Size | None = None

    @classmethod
    def normal(cls, mean: Tensor | float = 0.0, std: Tensor | float = 1.0) -> Self:
        """Return normal distributions, of shape-(C,) means and standard deviations."""
        mean, std = (torch.as_tensor(value, dtype=torch.float32, device="cpu").reshape(-1, 1) for value in (mean, std))
        return cls(mean + std * STANDARD_NORMAL)

    @property
    def channels(self) -> int:
        """How many channels are told apart."""
        return len(self.points)

    def holds_channels(self, dim: object) -> bool:
        """Whether the dimension, of a tensor (N, C, D, H, W), is the channels'."""
        return dim in {1: (1, -4), -1: (4, -1)}.get(self.axis, ())

    @cached_property
    def mean(self) -> Tensor:
        """The mean of each channel, shape (C,)."""
        return self.points.mean(1)

    @cached_property
    def std(self) -> Tensor:
        """The standard deviation of each channel, shape (C,)."""
        centred = self.points - self.mean[:, None]
        return _norm(centred, self.points[:, -1:] > self.points[:, :1])[:, 0]

    @cached_property
    def split(self) -> Tensor:
        """The value that splits each channel the most evenly into values below it and values at or above it, shape (C,).

        The median; where at least half of the values are the lowest one (the zeros of a ReLU, where a split at 0 would leave
        nothing below it), a tenth of the standard deviation above that. Of a value that is not known, which may have passed
        a ReLU that is not known either, at least a hundredth of it above 0.
        """
        lowest = self.points[:, 0]
        median = self.points[:, POINTS // 2 - 1 : POINTS // 2 + 1].mean(1)
        others = (self.points > lowest[:, None]).sum(1)
        split = torch.where(others > POINTS // 2, median, lowest + _JUST_ABOVE * self.spread)
        if self.known:
            return split
        # the distance of the quartiles, which a few values far off do not widen
        middle = self.points[:, 3 * POINTS // 4] - self.points[:, POINTS // 4]
        guess = _ABOVE_A_GUESS * torch.where(middle > 0, middle, self.spread)
        return torch.where(self.points[:, -1] > guess, split.maximum(guess), split)

    @cached_property
    def spread(self) -> Tensor:
        """The standard deviation of each channel; of one that is constant the mean of the others', or 1."""
        std = self.std
        return torch.where(std > 0, std, std[std > 0].mean().nan_to_num(1.0))

    @property
    def is_symmetric(self) -> bool:
        """Whether every channel is known to have about as many values below 0 as above it: between 45 and 55 %."""
        balance = (self.points > 0).float().mean(1) - (self.points < 0).float().mean(1)
        return self.known and not self.nonnegative and bool((balance.abs() <= _BALANCED).all())

    def to(self, points: Tensor, *, nonnegative: bool) -> "Distribution":
        """Return the distribution that has these points, in any order; unknown if they are not all finite."""
        if not math.isfinite(points.sum()):
            return replace(UNKNOWN, nonnegative=nonnegative, size=self.size)
        if (points[:, 1:] < points[:, :-1]).any():  # looking is quicker than sorting, and most functions keep the order
            points = _ascending(points)
        return replace(self, points=points, nonnegative=nonnegative)

    def map(self, function: Callable[[Tensor], Tensor], *, nonnegative: bool) -> "Distribution":
        """Return the distribution of a function of the value: the function of each point."""
        return self.to(function(self.points), nonnegative=nonnegative)

    def wide(self, channels: int) -> "Distribution":
        """Return it for that many channels; if it tells another number apart, each of them gets all of the values."""
        if self.channels == channels:
            return self
        return replace(self, points=self.pooled().points.expand(channels, POINTS))

    def pooled(self) -> "Distribution":
        """Return the distribution over all channels."""
        if self.channels == 1:
            return self
        values = _ascending(self.points.flatten()).view(POINTS, -1)
        return replace(self, points=values[None, :, self.channels // 2])

    def aligned(self, other: "Distribution") -> tuple["Distribution", "Distribution"]:
        """Return both with the same number of channels."""
        if self.channels == other.channels:
            return self, other
        if 1 in (self.channels, other.channels) and self.axis == other.axis:
            channels = max(self.channels, other.channels)
            return self.wide(channels), other.wide(channels)
        return self.pooled(), other.pooled()

    def combine(
        self, other: "Distribution", function: Callable[[Tensor, Tensor], Tensor], *, nonnegative: bool
    ) -> "Distribution":
        """Return the distribution of a function of two values, taken to be independent of each other."""
        left, right = self.aligned(other)
        result = left.to(function(left.points, right.points[:, _SHUFFLE]), nonnegative=nonnegative)
        return replace(result, known=result.known and right.known)

    def standardized(self, groups: int) -> "Distribution":
        """Return it with mean 0 and variance 1 over each of that many groups of channels."""
        values = self.points.reshape(groups, -1)
        centred = values - values.mean(1, keepdim=True)
        spread = _norm(centred, values.amax(1, keepdim=True) > values.amin(1, keepdim=True))
        # a channel that is constant stays so: its normalisation divides 0 by the epsilon
        points = centred / torch.where(spread > 0, spread, 1.0)
        return replace(self, points=points.view_as(self.points), nonnegative=False)

    def largest_of(self, number: float) -> "Distribution":
        """Return the distribution of the largest of that many independent values: quantile q becomes q ** (1 / number)."""
        quantiles = (torch.arange(POINTS, dtype=torch.float32, device="cpu") + 0.5) / POINTS
        place = (quantiles ** (1 / number) * POINTS - 0.5).clamp(0, POINTS - 1)
        below = place.floor().long()
        above = (below + 1).clamp(max=POINTS - 1)
        return replace(self, points=torch.lerp(self.points[:, below], self.points[:, above], place - below))


def _ascending(values: Tensor) -> Tensor:
    """Return the values sorted along the last dimension: numpy's sort is several times as quick as torch's."""
    return torch.from_numpy(np.sort(values.numpy()))


def _norm(centred: Tensor, varies: Tensor) -> Tensor:
    """Return the standard deviation of rows around 0, shape (rows, 1), 0 where nothing varies. Quicker than torch.std."""
    norm: Tensor = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    return norm / math.sqrt(centred.shape[1]) * varies


UNKNOWN = replace(Distribution.normal(), known=False)
"""A value that nothing is known about: taken to be standard normal, as inputs are prepared and normalisations hand on."""


def mixture(parts: Sequence[Distribution], weights: Sequence[float] | None = None) -> Distribution:
    """Return the distribution of a value that is drawn from each of the parts, as often as its weight says."""
    if len(parts) == 1:
        return parts[0]
    channels = {part.channels for part in parts}
    same = [part.wide(max(channels)) if len(channels - {1}) <= 1 else part.pooled() for part in parts]
    points = torch.cat([part.points for part in same], 1)
    order = torch.from_numpy(np.argsort(points.numpy()))
    points = points.gather(1, order)
    shares = torch.tensor(weights or [1.0] * len(parts), dtype=torch.float64, device="cpu")
    mass = (shares / shares.sum()).repeat_interleave(POINTS)[order] / POINTS
    quantiles = ((torch.arange(POINTS, dtype=torch.float64, device="cpu") + 0.5) / POINTS).expand(len(points), POINTS)
    # each point stands at the middle of its mass; a quantile lies between two of them
    middle = mass.cumsum(1) - mass / 2
    above = torch.searchsorted(middle, quantiles.contiguous()).clamp(1, points.shape[1] - 1)
    ends = middle.gather(1, above - 1), middle.gather(1, above)
    share = ((quantiles - ends[0]) / (ends[1] - ends[0])).clamp(0, 1).to(points.dtype)
    values = torch.lerp(points.gather(1, above - 1), points.gather(1, above), share)
    nonnegative, known = (all(getattr(part, flag) for part in parts) for flag in ("nonnegative", "known"))
    return replace(parts[0], points=values, nonnegative=nonnegative, known=known)
