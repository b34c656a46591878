"""`reestimate_batchnorm`: running statistics of the network as it is now."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..batches import numbered, run
from ..errors import InputError, ModelError
from ..modes import preserved_modes
from ..running_statistics import averaging, live_norms
from ..trace import unwrapped


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, loader: Iterable[Any]) -> None:
    """Replace the running statistics of the model's BatchNorms by the average over a loader's batches.

    While signs flip, running averages lag behind: take them anew before an evaluation that counts. As
    `torch.optim.swa_utils.update_bn`, but all else is in eval mode (no dropout, signs instead of ramps), as it will be when
    the statistics are used. A BatchNorm that is frozen, or that no batch reaches, keeps its own; if anything fails, all do.
    Modes and momentum are restored.

    Args:
        model: any model with BatchNorms; one in DDP's or torch.compile's wrapper runs without it.
        loader: batches: a tensor; a list or tuple whose first item is the input, as (inputs, labels); or a dict of keyword
            arguments. On the model's device.

    Raises:
        ModelError: if the model has no BatchNorm with running statistics, or all of them are frozen.
        InputError: if these are no batches or there is none, the model does not run on one, or statistics become NaN or
            infinite.
    """
    model = unwrapped(model)
    norms = live_norms(model)
    if not norms:
        raise ModelError(f"{type(model).__name__} has no BatchNorm that collects running statistics (a frozen one does not)")
    with preserved_modes(model):
        model.eval()
        with averaging(list(norms.values())):
            for number, batch in numbered(loader, "loader", "Re-estimating BatchNorm"):
                run(model, _inputs(batch), f"batch {number}", _ADVICE)
            broken = [name for name, norm in norms.items() if not all(each.isfinite().all() for each in norm.buffers())]
            if broken:
                raise InputError(f"statistics that are not finite: {', '.join(broken)}. NaN or infinity in the batches?")


def _inputs(batch: Any) -> Any:
    """Return the inputs of a loader's batch in the form of example inputs."""
    return tuple(batch[:1]) if isinstance(batch, (list, tuple)) else batch


_ADVICE = "A batch is a tensor, a list or tuple whose first item is the input, or a dict of keyword arguments"
