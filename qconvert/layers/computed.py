"""Weights that are no Parameters: parametrizations and hooks compute them from Parameters of other names."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

_SOURCES = ("weight_g", "weight_v", "weight_orig")
"""Of the old weight_norm; of prune and the old spectral_norm."""


def is_trained(conv: nn.Conv3d) -> bool:
    """Whether the weight, or what a hook computes it from at the next call, has a gradient."""
    if "weight" in conv._parameters:
        return conv.weight.requires_grad
    sources = [conv._parameters.get(name) for name in _SOURCES]
    return conv.weight.requires_grad or any(source is not None and source.requires_grad for source in sources)


@contextmanager
def weights_at_rest(model: nn.Module) -> Iterator[None]:
    """Let weights be looked at without a change: in training, each look at a spectral_norm iterates its buffers."""
    lists = [module for module in model.modules() if isinstance(module, ParametrizationList)]
    training = {inner: inner.training for outer in lists for inner in outer.modules()}
    for inner in training:
        inner.training = False
    try:
        yield
    finally:
        for inner, mode in training.items():
            inner.training = mode
