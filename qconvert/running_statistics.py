"""The running statistics of BatchNorm, taken anew as the average over some batches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def live_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorms whose running statistics move while the model trains, by name.

    One that is frozen (in eval mode in a model that trains) is left out, and so is one without running statistics.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    return {name: norm for name, norm in norms.items() if norm.running_mean is not None and norm.training == model.training}


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
