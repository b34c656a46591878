"""Floats to the bit planes of their codes, and back: what the compiled worker of bits.py does, in torch's operations."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor

WORD = 64
"""Channels in a word."""

PIECE = 16
"""Channels that are packed at once."""


def words_of(codes: Tensor, planes: int) -> Tensor:
    """Return the bit planes of codes, shape (..., C) -> (planes, ..., ceil(C / 64)), int64; bits behind channel C are 0."""
    codes = F.pad(codes, (0, -codes.shape[-1] % WORD))
    codes = codes.view(*codes.shape[:-1], -1, WORD)
    places = torch.arange(WORD, device=codes.device)
    return torch.stack([((codes >> plane & 1) << places).sum(-1) for plane in range(planes)])


def weighted(planes: Sequence[Tensor], channels: int) -> Tensor:
    """Return ``2 u - n`` for the codes u of bit planes, each of shape (..., ceil(C / 64)): float32 (..., C).

    It is the sum of each plane's -1 and +1, times ``2 ** plane``.
    """
    places = torch.arange(WORD, device=planes[0].device)
    bits = [(plane.unsqueeze(-1) >> places & 1).flatten(-2)[..., :channels] for plane in planes]
    return torch.stack([(2 * each - 1) << number for number, each in enumerate(bits)]).sum(0).float()


def in_pieces(values: Tensor, groups: int) -> Tensor:
    """Return values per channel, shape (C,), as (groups, channels of a group, rounded up to whole pieces)."""
    values = values.view(groups, -1)
    return F.pad(values, (0, -values.shape[1] % PIECE))
