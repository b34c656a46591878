"""`Operation`: one node of a graph, as the rules of the graph pass see it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .distribution import UNKNOWN, Distribution

RANK = 5
"""Dimensions of a tensor (N, C, D, H, W)."""


@dataclass(frozen=True)
class Operation:
    """One node of a graph: what it runs, on what.

    Attributes:
        name: what it is in lower case without underscores, the same for a module, a function and a method: "relu".
        run: the operation itself.
        args, kwargs: its operands: `Distribution` for a tensor that depends on the input; settings and weights as they are.
        module: the module that it calls, if it does.
        training: whether normalisations take the statistics of the batch.
    """

    name: str
    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    module: nn.Module | None = None
    training: bool = False

    @property
    def x(self) -> Distribution:
        """The first operand."""
        first = self.args[0] if self.args else self.kwargs.get("input")
        return first if isinstance(first, Distribution) else UNKNOWN

    def setting(self, name: str, position: int, default: Any = None) -> Any:
        """Return an attribute of the module, or an argument of the function by its name or position."""
        if self.module is not None:
            return getattr(self.module, name, default)
        return self.kwargs.get(name, self.args[position] if len(self.args) > position else default)


Rule = Callable[[Operation], Any]


def is_plain(weight: object) -> bool:
    """Whether it is a tensor with values."""
    return isinstance(weight, Tensor) and not isinstance(weight, nn.UninitializedParameter) and not weight.is_meta


def as_column(constant: object) -> Tensor | None:
    """Return a number, or a tensor of one value per channel, as a column beside the points."""
    if isinstance(constant, (int, float)):
        return torch.tensor([[float(constant)]], dtype=torch.float32, device="cpu")
    if isinstance(constant, Tensor) and not constant.is_meta and constant.numel() == max(constant.shape, default=1):
        return constant.detach().float().cpu().reshape(-1, 1)
    return None
