"""The running statistics of BatchNorm: taken anew as the average over some batches, or carried over to a converted model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from .moments import Moments


def live_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorms whose running statistics move while the model trains, by name.

    One that is frozen (in eval mode in a model that trains) is left out, and so is one without running statistics.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    return {name: norm for name, norm in norms.items() if norm.running_mean is not None and norm.training == model.training}


def is_untrained(norm: nn.Module) -> bool:
    """Whether the running statistics are what they start from, mean 0 and variance 1."""
    if not isinstance(norm, _NormBase) or norm.running_mean is None or norm.running_var is None or norm.running_mean.is_meta:
        return False
    if isinstance(norm.running_mean, nn.UninitializedBuffer):
        return False
    return not bool(norm.running_mean.any()) and bool((norm.running_var == 1).all())


@contextmanager
def averaging(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Let the norms normalise by the batch, and collect the plain average over all batches that pass meanwhile.

    Their momentum is restored. One that no batch reaches keeps its statistics; all of them do if there is an error.
    """
    momenta = [norm.momentum for norm in norms]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)} for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = None
        norm.reset_running_stats()
    done = False
    try:
        yield
        done = True
    finally:
        for norm, momentum, kept in zip(norms, momenta, before, strict=True):
            norm.momentum = momentum
            if not (done and norm.num_batches_tracked):
                for name, buffer in norm.named_buffers(recurse=False):
                    buffer.copy_(kept[name])


@contextmanager
def carried_over(norms: Mapping[str, _BatchNorm], original: nn.Module) -> Iterator[None]:
    """Keep the statistics that norms of a converted model have from its training, but for what the conversion has changed.

    Meanwhile batch after batch runs through the float model, and then through the converted one. Where a channel reads mean
    ``m`` and standard deviation ``s`` in float, and ``m_q`` and ``s_q`` converted, its running mean and variance become
    ``m_q + a (mean - m)`` and ``a**2 (variance + eps) - eps``, with ``a = s_q / s``: it normalises ``a x + m_q - a m`` as it
    did ``x``. Some batches tell a difference, but not the statistics of a whole training.
    """
    with ExitStack() as stack:
        for name, norm in norms.items():
            carried = _CarriedOver(norm.running_mean, norm.running_var)  # type: ignore[arg-type]  # it has statistics
            for module, watch in ((original.get_submodule(name), carried.watch_float), (norm, carried.watch_converted)):
                stack.callback(module.register_forward_pre_hook(watch, with_kwargs=True).remove)
        yield


class _CarriedOver:
    """One norm's statistics, and what it has read so far in float and converted."""

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        self.mean, self.variance = mean.float().clone(), variance.float().clone()
        self.in_float, self.converted = Moments(), Moments()

    def watch_float(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at what the float model's norm is about to read."""
        self.in_float.add(_channels(args, kwargs))

    def watch_converted(self, norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at what the converted model's norm is about to read, and set its statistics for it."""
        self.converted.add(_channels(args, kwargs))
        was, is_now = self.in_float, self.converted
        factor = torch.where((was.std > 0) & (is_now.std > 0), is_now.std / was.std, 1.0)
        norm.running_mean.copy_(is_now.mean + factor * (self.mean - was.mean))
        norm.running_var.copy_((factor**2 * (self.variance + norm.eps) - norm.eps).clamp(min=0))


def _channels(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return what a norm is called with as values of each channel, shape (C, n)."""
    x: Tensor = (args or tuple(kwargs.values()))[0]
    return x.movedim(1, 0).flatten(1).float()
