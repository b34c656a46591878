"""`RPReLU`: the activation behind a binary convolution, with learned shifts on both sides."""

import torch
from torch import Tensor, nn


class RPReLU(nn.Module):
    """Shift, bend and shift back, channel by channel, all learned: ``y = PReLU(x - shift) + summand``.

    Forward: ``y = u + summand`` where ``u = x - shift`` is above 0, else ``y = slope * u + summand``.

    Shapes: input and output (N, C, D, H, W) or (C, D, H, W); shift, slope and summand (C,).

    ReActNet (Liu et al. 2020, https://arxiv.org/abs/2003.03488). There the slopes start at 0.25, for networks that are
    trained from scratch. Here they start at 1 and the shifts at 0, which is the identity: what a pretrained network computes
    is not changed by it.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.ones(channels))
        self.summand = nn.Parameter(torch.zeros(channels))

    def reset_parameters(self) -> None:
        """Start anew, as the identity."""
        nn.init.zeros_(self.shift)
        nn.init.ones_(self.slope)
        nn.init.zeros_(self.summand)

    def forward(self, x: Tensor) -> Tensor:
        """Return the shifted, bent and shifted values."""
        shift, slope, summand = (each.view(-1, 1, 1, 1) for each in (self.shift, self.slope, self.summand))
        x = x - shift
        # F.prelu takes the second dimension for the channels, which without a batch is the depth
        return torch.where(x > 0, x, slope * x) + summand

    def extra_repr(self) -> str:
        """Show the number of channels."""
        return f"{self.shift.numel()}"
