"""Floats to the bit planes of their codes, and back: what the compiled worker of bits.py does, in torch's operations."""

import torch
from torch import Tensor

WORD = 64
"""Channels in a word."""


def words_of(codes: Tensor, planes: int) -> Tensor:
    """Return the bit planes of codes, shape (..., C) -> (planes, ..., ceil(C / 64)), int64; bits behind channel C are 0."""
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % WORD)).unflatten(-1, (-1, WORD))
    places = torch.arange(WORD, device=codes.device)
    return torch.stack([((codes >> plane & 1) << places).sum(-1) for plane in range(planes)])


def signs_of(words: Tensor, channels: int) -> Tensor:
    """Return -1 and +1 for each bit, shape (..., ceil(C / 64)) -> (..., C), float32."""
    places = torch.arange(WORD, device=words.device)
    bits = (words.unsqueeze(-1) >> places & 1).flatten(-2)[..., :channels]
    return bits.float() * 2 - 1
