"""`ProgressiveSign`: a ramp that becomes a sign while training goes on."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor

from ..errors import QuantizerError
from .base import BinaryQuantization
from .operators import quantizer_operator

EPSILON = 1e-7
"""Narrowest half-width of the ramp: at temperature 1 the division stays finite."""


def _ramp(x: Tensor, half_width: float) -> Tensor:
    return F.hardtanh(x / half_width)


ramp = quantizer_operator("ramp", _ramp)


class ProgressiveSign(BinaryQuantization):
    """Ramp of shrinking width in training, sign in evaluation.

    Forward in training: ``y = clamp(x / max(1 - t, 1e-7), -1, 1)`` with temperature ``t = 1 - alpha ** (-beta * scale)``;
    in evaluation ``y = -1 if x < 0 else +1``. Gradient: ``dy/dx = 1``.

    From bitorch (https://github.com/hpi-xnor/bitorch). There the scale is by default one global variable of the process;
    here it belongs to the quantizer and is set by whoever trains: ``quantizer.scale = epoch / epochs``. Or set the
    temperature itself, which from then on does not depend on the scale: ``quantizer.temperature = epoch / epochs``.

    Args:
        use_global_scaling: taken for bitorch's sake; there is no global scale here, so it changes nothing.
        initial_scale: progress at the start, 0 (widest ramp) to 1 (practically a sign).
        custom_transform: another map from scale to temperature.
        alpha: base of the default transform, > 0.
        beta: factor of the default transform's exponent.

    Raises:
        QuantizerError: if ``alpha`` is not above 0.
    """

    name = "progressive_sign"
    elementwise = True

    def __init__(
        self,
        use_global_scaling: bool = True,  # noqa: ARG002
        initial_scale: float = 0.0,
        custom_transform: Callable[[float], float] | None = None,
        alpha: float = 4,
        beta: float = 10,
    ) -> None:
        super().__init__()
        if not alpha > 0:
            raise QuantizerError(f"progressive_sign: alpha must be above 0, got {alpha!r}")
        if custom_transform is not None and not callable(custom_transform):
            raise QuantizerError(f"progressive_sign: custom_transform must be a function, got {custom_transform!r}")
        self.scale = float(initial_scale)
        self.custom_transform = custom_transform
        self.alpha = alpha
        self.beta = beta
        self._temperature: float | None = None

    @property
    def temperature(self) -> float:
        """Temperature that was set, else the one that belongs to the present scale. Setting None is going back to that."""
        if self._temperature is not None:
            return self._temperature
        if self.custom_transform is not None:
            return self.custom_transform(self.scale)
        return float(1 - self.alpha ** (-self.beta * self.scale))

    @temperature.setter
    def temperature(self, temperature: float | None) -> None:
        self._temperature = temperature

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, the scale as it is now."""
        transform = {} if self.custom_transform is None else {"custom_transform": self.custom_transform}
        return {"initial_scale": self.scale, "alpha": self.alpha, "beta": self.beta} | transform

    @property
    def operator(self) -> str:  # type: ignore[override]
        """The ramp in training, the sign in evaluation."""
        return "ramp" if self.training else "sign"

    @property
    def operator_settings(self) -> tuple[float, ...]:
        """The half-width of the ramp."""
        return (max(1.0 - self.temperature, EPSILON),) if self.training else ()
