"""`QActivation`: the input side of a quantized layer."""

from typing import Any

from torch import Tensor, nn

from ..errors import QuantizerError
from ..quantizations import Quantization, quantizer
from ..quantizations.operators import quantizer_operator


def _gradient_window(x: Tensor, threshold: float) -> Tensor:
    return x.clone()


def _inside(x: Tensor, threshold: float) -> Tensor:
    return x.abs_().le_(threshold)


gradient_window = quantizer_operator("gradient_window", _gradient_window, _inside)


class QActivation(nn.Module):
    """Quantize an input, channel by channel shifted and scaled, with a window on its gradient.

    Forward: ``y = Q(u)``, ``u = (x - threshold) / spread`` (per channel; threshold 0 and spread 1 where there is none).
    Gradient: that of Q at u, over the spread, where ``|u| <= gradient_cancellation_threshold``, else 0. So the window, and
    the shape of Q's gradient, are in units of the channel's spread; a sign itself does not depend on it.

    Shapes: input and output (N, C, D, H, W) or (C, D, H, W).

    The learnable per-channel threshold is ReActNet's RSign (Liu et al. 2020, https://arxiv.org/abs/2003.03488); the window
    is that of Binarized Neural Networks (Hubara et al. 2016, https://arxiv.org/abs/1602.02830).

    Args:
        activation: quantizer, by name or as a module.
        gradient_cancellation_threshold: half-width of the window; None or 0 is off.
        threshold: start of the per-channel thresholds, which are learned, shape (C,); None is no threshold.
        spread: the channels' standard deviation, above 0, shape (C,), which is not learned; None is 1.

    Raises:
        QuantizerError: for an unknown quantizer or a negative window.
    """

    threshold: nn.Parameter | None
    spread: Tensor | None

    def __init__(
        self,
        activation: str | Quantization = "sign",
        gradient_cancellation_threshold: float | None = 1.0,
        *,
        threshold: Tensor | None = None,
        spread: Tensor | None = None,
    ) -> None:
        super().__init__()
        window = gradient_cancellation_threshold
        if window is not None and not (isinstance(window, (int, float)) and window >= 0):
            raise QuantizerError(
                "gradient_cancellation_threshold must be None (off), 0 (off) or above 0, "
                f"got {gradient_cancellation_threshold!r}"
            )
        self.activation_function = quantizer(activation)
        self.gradient_cancellation_threshold = gradient_cancellation_threshold
        self.register_parameter("threshold", None if threshold is None else nn.Parameter(threshold))
        self.register_buffer("spread", spread)

    def forward(self, input_tensor: Tensor) -> Tensor:
        """Return the quantized input."""
        x = self.normalized(input_tensor)
        if self.window > 0:
            x = gradient_window(x, self.window)
        quantized: Tensor = self.activation_function(x)
        return quantized

    def normalized(self, x: Tensor) -> Tensor:
        """Return u, what the quantizer is given for x."""
        if self.threshold is not None:
            x = x - self.threshold.view(-1, 1, 1, 1)
        if self.spread is not None:
            # FSDP's bfloat16 copies are of Parameters: a buffer stays float32, and must not make the input so
            x = (x / self.spread.view(-1, 1, 1, 1)).to(x.dtype)
        return x

    @property
    def window(self) -> float:
        """Half-width of the window; 0 is off."""
        threshold = self.gradient_cancellation_threshold
        return 0.0 if threshold is None else float(threshold)

    def extra_repr(self) -> str:
        """Show the window and whether there are thresholds and spreads."""
        settings: dict[str, Any] = {"gradient_cancellation_threshold": self.gradient_cancellation_threshold}
        settings |= {key: "per channel" for key in ("threshold", "spread") if getattr(self, key) is not None}
        return ", ".join(f"{key}={value}" for key, value in settings.items())
