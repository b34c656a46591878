"""`LSQ`: k-bit uniform quantizer whose step size is learned."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QuantizerError
from .base import Quantization, check_bits
from .levels import Levels
from .operators import spell_out

_SAMPLE_DIMS = 4
"""Of an input (N, C, D, H, W) or (C, D, H, W)."""

_FACTORS = tuple(2 * 2 ** (quarter / 4) for quarter in range(-24, 17))
"""Steps that are tried, in units of ``mean|x| / sqrt(p)``: 2 is the paper's start, 16 bits of a normal take 0.04."""


def _lsq(x: Tensor, step: Tensor, lowest: int, highest: int, is_weight: bool) -> Tensor:
    """Round ``x / step`` to the integers ``lowest .. highest`` and scale back. ``step`` is a 0-d tensor."""
    return torch.round(torch.clamp(x / step, lowest, highest)) * step


lsq = torch.library.custom_op("qconvert::lsq", _lsq, mutates_args=())
spell_out("lsq", _lsq)


@lsq.register_fake
def _(x: Tensor, step: Tensor, lowest: int, highest: int, is_weight: bool) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, step, ctx.lowest, ctx.highest, ctx.is_weight = inputs
    ctx.save_for_backward(x, step)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    x, step = ctx.saved_tensors
    scaled = x / step
    inside = (scaled > ctx.lowest) & (scaled < ctx.highest)
    clamped = torch.clamp(scaled, ctx.lowest, ctx.highest)
    step_gradient = torch.where(inside, torch.round(clamped) - scaled, clamped)
    # Esser et al., section 2.2: keeps the step's update in proportion to the weights' updates. Of inputs it counts the
    # features of one sample: the size of a batch, or of a process's part of it, must not change the gradient
    values = x.numel() if ctx.is_weight else math.prod(x.shape[-_SAMPLE_DIMS:])
    gradient_scale = 1.0 / math.sqrt(max(values, 1) * ctx.highest)
    return grad_output * inside, (grad_output * step_gradient).sum() * gradient_scale, None, None, None


lsq.register_autograd(_backward, setup_context=_keep)


class LSQ(Quantization):
    """Learned step size quantization, for weights and inputs.

    Forward, s = step, n .. p the integer range: ``y = s * round(clamp(x / s, n, p))``, with n = -2**(bits-1),
    p = 2**(bits-1) - 1 if signed, else n = 0, p = 2**bits - 1.
    Gradient: ``dy/dx = 1`` where ``n < x/s < p``, else 0; ``dy/ds = round(x/s) - x/s`` there, else n or p,
    times ``1 / sqrt(M * p)``, M the number of weights, or of one sample's inputs, C * D * H * W.

    Esser et al. 2020, Learned Step Size Quantization, https://arxiv.org/abs/1902.08153.

    The step starts where it changes the latent weights least in the mean square, and for inputs the calibration data; the
    paper's ``2 mean|x| / sqrt(p)`` is coarser, for a normal. Without data the step of inputs starts at the paper's, of a
    standard normal, which is what a BatchNorm hands on. It is a Parameter of shape (1,), which FSDP can shard.

    Args:
        bits: k, 2 to 16 (1 to 16 if unsigned).
        signed: whether negative values have codes.

    Raises:
        QuantizerError: if ``bits`` is out of range.
    """

    name = "lsq"
    elementwise = True
    bit_width = 4

    def __init__(self, bits: int = 4, signed: bool = True) -> None:
        super().__init__()
        if not isinstance(signed, bool):
            raise QuantizerError(f"lsq: signed must be true or false, got {signed!r}")
        self.bit_width = check_bits(bits, self.name, lowest=2 if signed else 1)
        self.signed = signed
        self.lowest = -(2 ** (bits - 1)) if signed else 0
        self.highest = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        mean_magnitude_of_standard_normal = math.sqrt(2 / math.pi)
        self.step = nn.Parameter(torch.tensor([2 * mean_magnitude_of_standard_normal / math.sqrt(self.highest)]))
        self._is_of_weights = False

    @torch.no_grad()
    def start_from(self, weight: Tensor) -> None:
        """Set the step to the one that changes the weight least in the mean square; a weight that is all 0 leaves it."""
        self._is_of_weights = True
        self._start_where_least_changes(weight)

    @torch.no_grad()
    def start_from_inputs(self, values: Tensor) -> None:
        """Set the step to the one that changes the values, of any shape, least in the mean square; all 0 they leave it."""
        self._start_where_least_changes(values)

    def _start_where_least_changes(self, values: Tensor) -> None:
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        steps = values.abs().mean() * values.new_tensor(_FACTORS) / math.sqrt(self.highest)
        errors = [(_lsq(values, step, self.lowest, self.highest, False) - values).square().mean() for step in steps]
        best = steps.index_select(0, torch.stack(errors).argmin().view(1))
        self.step.copy_(torch.where(best > 0, best, self.step))

    def levels(self, quantized: Tensor) -> Levels:
        """Return the multiples of the step."""
        step, count = self.step.to(quantized.dtype).item(), self.highest - self.lowest + 1
        return Levels(self.bit_width, count=count, lowest=self.lowest, step=1, divisor=1, unit=step, dtype=quantized.dtype)

    def quantize(self, x: Tensor) -> Tensor:
        """Return ``x`` on the multiples of the step."""
        step = self.step.to(x.dtype).view(())
        quantized: Tensor = lsq(x, step, self.lowest, self.highest, self._is_of_weights)
        return quantized
