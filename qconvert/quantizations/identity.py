"""`Identity`: no quantization."""

from torch import Tensor

from .base import Quantization


class Identity(Quantization):
    """Leave the tensor as it is.

    Forward: ``y = x``. Gradient: ``dy/dx = 1``.
    """

    name = "identity"
    elementwise = True
    bit_width = 32

    def quantize(self, x: Tensor) -> Tensor:
        """Return ``x`` itself."""
        return x
