"""Parameters of which each process has a part (FSDP's DTensors), read and changed as a whole.

That is a collective operation: every process has to come to it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, itself where it is not sharded."""
    found: Tensor = tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]  # a DTensor has it
    return found


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Let a module's Parameters be whole; what they are in the end, the same on every process, is then sharded again."""
    owned = [(each, name, parameter) for each in module.modules() for name, parameter in each._parameters.items()]
    sharded = [
        (each, name, parameter) for each, name, parameter in owned if parameter is not None and _is_sharded(parameter)
    ]
    wholes = [nn.Parameter(whole(own.detach()), own.requires_grad) for _, _, own in sharded]
    for (each, name, _), values in zip(sharded, wholes, strict=True):
        each._parameters[name] = values
    try:
        yield
    finally:
        for (each, name, own), values in zip(sharded, wholes, strict=True):
            each._parameters[name] = own
            _write(own, values.detach())


@torch.no_grad()
def _write(parameter: Tensor, values: Tensor) -> None:
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415 (only where there are DTensors: it takes time)

    parameter.copy_(distribute_tensor(values, parameter.device_mesh, parameter.placements))  # type: ignore[attr-defined]


def _is_sharded(tensor: Tensor) -> bool:
    """Return whether it is a DTensor, by what only that has."""
    return hasattr(tensor, "full_tensor")
