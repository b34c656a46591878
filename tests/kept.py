"""The memory that a step of training keeps for its backward pass."""

import torch
from torch import Tensor, nn


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Return the memory that a forward keeps for its backward pass, each storage once, Parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(x)
    del output  # the graph, and with it what it keeps, lives until here: no address is used twice
    return sum(kept.values())
