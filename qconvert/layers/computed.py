"""Weights that are no Parameters: parametrizations and hooks compute them from Parameters of other names."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from ..modes import preserved_modes

_NAMES = ("weight", "weight_g", "weight_v", "weight_orig")
"""Plain; of the old weight_norm; of prune and the old spectral_norm."""


def weight_parameters(conv: nn.Conv3d) -> list[nn.Parameter]:
    """Return the Parameter that is the weight, or those that a parametrization or a hook computes it from."""
    if is_parametrized(conv, "weight"):
        return list(conv.parametrizations["weight"].parameters())  # type: ignore[union-attr, index]
    own = [conv._parameters.get(name) for name in _NAMES]
    return [parameter for parameter in own if parameter is not None]


def is_trained(conv: nn.Conv3d) -> bool:
    """Whether the weight, or what a hook computes it from at the next call, has a gradient."""
    return conv.weight.requires_grad or any(source.requires_grad for source in weight_parameters(conv))


@contextmanager
def weights_at_rest(model: nn.Module) -> Iterator[None]:
    """Let weights be looked at without a change: in training, each look at a spectral_norm iterates its buffers."""
    lists = nn.ModuleList(module for module in model.modules() if isinstance(module, ParametrizationList))
    with preserved_modes(lists):
        lists.eval()
        yield
