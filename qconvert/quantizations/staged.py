"""`Staged`: several quantizers for one place, of which a schedule says which one is at work."""

from collections.abc import Iterable

from torch import Tensor, nn

from .base import Quantization
from .identity import Identity


class Staged(Quantization):
    """Several quantizers for the same tensor: one of them is at work, or two of them are mixed.

    Forward: ``y = Q_now(x)``; where ``before`` is another one, ``y = share * Q_now(x) + (1 - share) * ratio * Q_before(x)``.
    Gradient: that of this formula. Without a ratio the mix is `mix_linear` of bitorch (https://github.com/hpi-xnor/bitorch).

    Args:
        quantizers: the quantizers; the first one is at work until something else is said.
        ratio: start of what brings the quantizer before to the unit of the one now: a tensor that is multiplied with its
            values. None is no such factor.

    Attributes:
        before, now: places of the two quantizers in the list.
        share: share of the one now in a mix, 0 to 1.
    """

    ratio: Tensor | None

    def __init__(self, quantizers: Iterable[Quantization], ratio: Tensor | None = None) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(quantizers)
        self.register_buffer("ratio", ratio)
        self.before = self.now = 0
        self.share = 1.0

    @property
    def current(self) -> Quantization:
        """The quantizer at work, the mix itself while there is one."""
        return self if self.before != self.now else self._at(self.now)

    @property
    def bit_width(self) -> int:  # type: ignore[override]
        """Bits of the quantizer at work; of a float in a mix, whose values have no code."""
        return Identity.bit_width if self.before != self.now else self._at(self.now).bit_width

    def start_from(self, weight: Tensor) -> None:
        """Set what each quantizer learns to its starting value for these weights."""
        for quantizer in self.quantizers:
            quantizer.start_from(weight)  # type: ignore[operator]

    def quantize(self, x: Tensor) -> Tensor:
        """Return ``x`` quantized by the one at work, or by the mix."""
        now: Tensor = self._at(self.now)(x)
        if self.before == self.now:
            return now
        before: Tensor = self._at(self.before)(x)
        if self.ratio is not None:
            before = before * self.ratio
        return now * self.share + before * (1.0 - self.share)

    def _at(self, place: int) -> Quantization:
        return self.quantizers[place]  # type: ignore[return-value]


def at_work(quantizer: Quantization) -> Quantization:
    """Return the quantizer that is at work in the place of this one: itself, but for several."""
    return quantizer.current if isinstance(quantizer, Staged) else quantizer
