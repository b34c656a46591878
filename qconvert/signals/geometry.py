"""Where the window of a convolution or pooling lies: sizes of outputs, and how much of what it reads is border."""

import math
from dataclasses import dataclass
from typing import Any

Size = tuple[int, int, int]
"""Depth, height, width."""


@dataclass(frozen=True)
class Window:
    """A window that moves over a volume: its numbers for each of D, H, W.

    Attributes:
        kernel, stride, dilation: in values.
        before, after: values of padding on either side.
    """

    kernel: Size
    stride: Size
    dilation: Size
    before: Size
    after: Size

    def output(self, size: Size) -> Size:
        """Return the size of the output for an input of that size (at least 1: smaller volumes do not occur)."""
        depth, height, width = (max(1, self._positions(dim, n)) for dim, n in enumerate(size))
        return depth, height, width

    def inside(self, size: Size) -> float:
        """Return the share of what the window reads, over all its positions, that is no padding."""
        return math.prod(self._inside(dim, n) for dim, n in enumerate(size))

    def _positions(self, dim: int, n: int) -> int:
        reach = self.dilation[dim] * (self.kernel[dim] - 1) + 1
        return (n + self.before[dim] + self.after[dim] - reach) // self.stride[dim] + 1

    def _inside(self, dim: int, n: int) -> float:
        positions, stride = self._positions(dim, n), self.stride[dim]
        if positions < 1:
            return 1.0
        shifts = (tap * self.dilation[dim] - self.before[dim] for tap in range(self.kernel[dim]))
        # position p reads p * stride + shift, which is inside where it is at least 0 and below n
        firsts_and_ends = ((max(0, -(shift // stride)), min(positions, -((shift - n) // stride))) for shift in shifts)
        return sum(max(0, end - first) for first, end in firsts_and_ends) / (positions * self.kernel[dim])


def window(kernel: Any, stride: Any, padding: Any, dilation: Any = 1) -> Window | None:
    """Return the window with a module's or function's settings; None if they are not plain numbers of a 3D one."""
    sizes = [_triple(value) for value in (kernel, kernel if stride is None else stride, dilation)]
    if any(size is None for size in sizes):
        return None
    kernel, stride, dilation = sizes
    if padding == "valid":
        padding = 0
    if padding == "same":
        totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        before, after = _triple([total // 2 for total in totals]), _triple([total - total // 2 for total in totals])
    else:
        before = after = _triple(padding)
    return None if before is None or after is None else Window(kernel, stride, dilation, before, after)


def _triple(value: Any) -> Any:
    """Return (D, H, W) for one number or three; None for anything else."""
    values = (value,) * 3 if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    return values if len(values) == 3 and all(isinstance(n, int) for n in values) else None  # noqa: PLR2004 (D, H, W)
