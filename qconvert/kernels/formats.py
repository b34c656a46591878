"""In which memory format a convolution puts its output out."""

import torch
from torch import Tensor

_DIMENSIONS = 5


def is_channels_last(*tensors: Tensor) -> bool:
    """Return whether a float convolution of these, inputs or weights, puts out channels_last_3d in the usual format's place.

    One of them is enough that is in that format, and not in both, as where there is one channel.
    """
    unusual = [each for each in tensors if each.dim() == _DIMENSIONS and not each.is_contiguous()]
    return any(each.is_contiguous(memory_format=torch.channels_last_3d) for each in unusual)


def memory_format(*, channels_last: bool) -> torch.memory_format:
    """Return torch's name of the format."""
    return torch.channels_last_3d if channels_last else torch.contiguous_format
