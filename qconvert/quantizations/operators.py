"""The quantizers' arithmetic as registered operators (`torch.ops.qconvert.*`).

Why operators: torch.fx looks into a plain `autograd.Function` and records only what its forward computes, so a model that
is traced again silently loses the gradient of its latent weights. An operator is one opaque node with its autograd
formula attached, for torch.fx, torch.compile and torch.export alike.

Every operator maps a tensor to one of the same shape, dtype and memory format.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition


@dataclass(frozen=True)
class Comparison:
    """A quantizer to -1 and +1 as a comparison with its threshold.

    Attributes:
        compare: ``compare(x, threshold, out=None)``: one of torch's.
        becomes: what the values become for which it holds, -1 or +1.
    """

    compare: Callable[..., Tensor]
    becomes: int

    def bits(self, x: Tensor, threshold: Tensor | float, out: Tensor | None = None) -> Tensor:
        """Return where ``x - threshold`` becomes +1, as bool, or as 0 and 1 in ``out``."""
        holds = self.compare(x, threshold, out=out)
        if self.becomes == 1:
            return holds
        return holds.logical_not_() if out is None else holds.eq_(0)  # the one is quick with bool, the other with float

    def codes(self, x: Tensor, threshold: Tensor | float, out: Tensor) -> Tensor:
        """Return what ``x - threshold`` becomes, in ``out``."""
        holds = self.compare(x, threshold, out=out)
        return torch.add(x.new_tensor(-self.becomes), holds, alpha=2 * self.becomes, out=out)


@dataclass(frozen=True)
class Formula:
    """The arithmetic of an operator, for a layer that runs it as a part of its own.

    Attributes:
        operator: the registered operator, or a function of torch's.
        forward: ``forward(x, *settings)``.
        slope: ``slope(x, *settings)``, dy/dx; it may be written over ``x``. None is dy/dx = 1.
        elementwise: whether a value depends on no other value of the tensor.
        reach: the slope is 0 for every |x| above it.
        comparison: for a quantizer to -1 and +1, which values become which.
    """

    operator: Callable[..., Tensor]
    forward: Callable[..., Tensor]
    slope: Callable[..., Tensor] | None
    elementwise: bool
    reach: float = math.inf
    comparison: Comparison | None = None


FORMULAS: dict[str, Formula] = {}
"""Every quantizer's formula, by the name of its operator."""


def quantizer_operator(
    name: str,
    forward: Callable[..., Tensor],
    slope: Callable[..., Tensor] | None = None,
    *,
    elementwise: bool = True,
    reach: float = math.inf,
    comparison: Comparison | None = None,
) -> Callable[..., Tensor]:
    """Register ``forward(x, *settings)`` with its gradient under the name ``qconvert::name``.

    Args:
        name: the operator's name.
        forward: the arithmetic, with type annotations; ``settings`` are numbers.
        slope: ``slope(x, *settings)``, dy/dx, which may be written over ``x``. None is the plain straight-through estimator,
            dy/dx = 1 (Bengio et al. 2013, https://arxiv.org/abs/1308.3432), which keeps nothing for the backward pass.
        elementwise: whether a value depends on no other value of the tensor, so that a batch under vmap is one tensor.
        reach: the slope is 0 for every |x| above it.
        comparison: for a quantizer to -1 and +1, which values become which.
    """
    operator = torch.library.custom_op(f"qconvert::{name}", forward, mutates_args=())

    def fake(x: Tensor, *settings: float) -> Tensor:
        return torch.empty_like(x)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *ctx.settings = inputs
        if slope is not None:
            ctx.save_for_backward(x)

    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        numbers = (None,) * len(ctx.settings)
        if slope is None:
            return grad_output, *numbers
        return slope(ctx.saved_tensors[0].clone(), *ctx.settings) * grad_output, *numbers

    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *settings: float) -> tuple[Tensor, int | None]:
        dim = in_dims[0]
        if elementwise or dim is None:
            return operator(x, *settings), dim
        return torch.stack([operator(sample, *settings) for sample in x.unbind(dim)], dim), dim

    spell_out(name, forward)
    operator.register_fake(fake)
    operator.register_autograd(backward, setup_context=keep)
    operator.register_vmap(vmap)
    FORMULAS[name] = Formula(operator, forward, slope, elementwise, reach, comparison)
    return operator


def spell_out(name: str, forward: Callable[..., Tensor]) -> None:
    """Let what knows torch's operators only, as torch.onnx.export does, have ``qconvert::name`` in terms of those."""
    register_decomposition(getattr(torch.ops.qconvert, name).default)(forward)
