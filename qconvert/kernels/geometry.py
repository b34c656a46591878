"""Where a convolution's words lie: offsets of its positions and taps in the packed input, and what its border is."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_WORD_BYTES = 8


class _once:  # noqa: N801 (a decorator)
    """A property that is computed at first: the same object for all threads, for workers are given its address."""

    def __init__(self, compute: Any) -> None:
        self._compute, self._name = compute, compute.__name__
        self.__doc__ = compute.__doc__

    def __get__(self, owner: Any, _: type) -> Any:
        return vars(owner).setdefault(self._name, self._compute(owner))


class Window(NamedTuple):
    """How a kernel moves over its input: sizes and steps in D, H, W; padding before and after each."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, kernel: Sequence[int], stride: Sequence[int], border: Sequence[int], dilation: Sequence[int]) -> Self:
        """Return the window of a convolution, whose border is given in the order of F.pad."""
        padding = tuple(zip(border[-2::-2], border[::-2], strict=True))
        return cls(tuple(kernel), tuple(stride), padding, tuple(dilation))

    def padded(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the sizes of an input with its border."""
        return tuple(each + sum(added) for each, added in zip(size, self.padding, strict=True))

    def inner(self, padded: Sequence[int]) -> tuple[int, ...]:
        """Return the sizes of an input without the border that it has."""
        return tuple(each - sum(added) for each, added in zip(padded, self.padding, strict=True))

    def outputs(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the sizes of the output."""
        return self.outputs_of(self.padded(size))

    def outputs_of(self, padded: Sequence[int]) -> tuple[int, ...]:
        """Return the sizes of the output for an input with its border."""
        axes = zip(padded, self.kernel, self.stride, self.dilation, strict=True)
        return tuple((each - apart * (taps - 1) - 1) // step + 1 for each, taps, step, apart in axes)


class Geometry:
    """The offsets, in bytes, of a window over a packed input [plane][sample][D][H][W with their borders][group][word].

    Args:
        window: how the kernel moves.
        batch: samples.
        size: D, H, W of the input without its border.
        groups: channel groups.
        words: words of a group's channels.
    """

    def __init__(self, window: Window, batch: int, size: tuple[int, ...], groups: int, words: int) -> None:
        self.window, self.batch, self.size, self.words = window, batch, size, words
        self.padded = window.padded(size)
        self.outputs = window.outputs(size)
        self._position_bytes = _WORD_BYTES * groups * words
        self.plane_bytes = batch * int(np.prod(self.padded)) * self._position_bytes

    def _places(self, *axes: Ints) -> Ints:
        """Return the offsets of the points of a grid in the padded input: a sample and D, H, W each."""
        sample, depth, height, width = np.ix_(*axes)
        _, rows, columns = self.padded
        return np.ravel((((sample * self.padded[0] + depth) * rows + height) * columns + width) * self._position_bytes)

    @_once
    def positions(self) -> Ints:
        """Of each output position's first tap."""
        axes = [np.arange(count) * step for count, step in zip(self.outputs, self.window.stride, strict=True)]
        return self._places(np.arange(self.batch), *axes)

    @_once
    def taps(self) -> Ints:
        """Of each word of each tap, from a position."""
        axes = [np.arange(taps) * apart for taps, apart in zip(self.window.kernel, self.window.dilation, strict=True)]
        taps = self._places(np.zeros(1, np.int64), *axes)
        return np.ravel(taps[:, None] + _WORD_BYTES * np.arange(self.words))

    @_once
    def rows(self) -> Ints:
        """Of each row of the input: its first position inside the border."""
        depth, height, _ = (
            before + np.arange(size) for (before, _), size in zip(self.window.padding, self.size, strict=True)
        )
        left = np.array([self.window.padding[2][0]])
        return self._places(np.arange(self.batch), depth, height, left)

    @_once
    def inner(self) -> Ints:
        """Of each position of the input inside the border."""
        axes = [before + np.arange(size) for (before, _), size in zip(self.window.padding, self.size, strict=True)]
        return self._places(np.arange(self.batch), *axes)

    @_once
    def _inside(self) -> list[tuple[NDArray[np.bool_], Ints]]:
        """For each axis the different sets of taps that lie inside the input, [set][tap], and the set of each output."""
        found = []
        for axis, size in enumerate(self.size):
            window = self.window
            taps = np.arange(window.kernel[axis]) * window.dilation[axis] - window.padding[axis][0]
            at = np.arange(self.outputs[axis])[:, None] * window.stride[axis] + taps
            kinds, kind = np.unique((at >= 0) & (at < size), axis=0, return_inverse=True)
            found.append((kinds, kind.ravel()))
        return found

    @_once
    def classes(self) -> Ints:
        """The class of each output position: positions of a class have the same taps in the border."""
        (_, depth), (rows, height), (columns, width) = self._inside
        d, h, w = np.ix_(depth, height, width)
        return np.tile(np.ravel((d * len(rows) + h) * len(columns) + w), self.batch)

    def outside(self, of_taps: Ints) -> Ints:
        """Return for each class the sums over the taps in the border, [class][channel].

        Args:
            of_taps: a number for each channel and tap, [channel][D][H][W].
        """
        depth, height, width = (kinds.astype(np.int64) for kinds, _ in self._inside)
        inside = np.einsum("odhw,ad,bh,cw->abco", of_taps, depth, height, width, optimize=True)
        return np.reshape(of_taps.sum((1, 2, 3)) - inside, (-1, len(of_taps)))


@lru_cache(maxsize=256)
def geometry(window: Window, batch: int, size: tuple[int, ...], groups: int, words: int) -> Geometry:
    """Return the geometry, the same object for the same arguments."""
    return Geometry(window, batch, size, groups, words)
