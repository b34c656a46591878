"""`Stored`: the quantizer of a weight that was loaded as quantized values."""

from torch import Tensor

from .base import Quantization
from .levels import Levels
from .staged import Staged, at_work


class Stored(Quantization):
    """Stands for a quantizer that has done its work: passes its values on.

    Forward: ``y = x``. Gradient: ``dy/dx = 1``. To quantize again would not do: DoReFa and ternary weights change by it.

    Args:
        inner: the quantizer that made the values.
        levels: the values that there are.
    """

    elementwise = True

    def __init__(self, inner: Quantization, levels: Levels) -> None:
        super().__init__()
        self.inner = inner
        self._levels = levels

    @property
    def bit_width(self) -> int:  # type: ignore[override]
        """Bits of the quantizer that made the values."""
        return self.inner.bit_width

    def levels(self, quantized: Tensor) -> Levels:  # noqa: ARG002 (the base class's argument)
        """Return the levels, whatever the values have been cast to since."""
        return self._levels

    def quantize(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x


def bare(quantizer: Quantization) -> Quantization:
    """Return the quantizer that the rules say, without what a file or a schedule has put around it."""
    if isinstance(quantizer, Stored):
        return bare(quantizer.inner)
    return bare(at_work(quantizer)) if isinstance(quantizer, Staged) and quantizer.current is not quantizer else quantizer
