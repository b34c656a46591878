"""Moving digits: which handwritten digit moves which way, among pieces of others, for a small 3D ResNet."""

from collections.abc import Mapping
from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor, nn

from ..errors import ModelError
from ..modes import preserved_modes
from ..pipeline import RulesLike
from .base import Recipe

FRAMES, SIDE = 16, 32
"""Of a clip; the side is in pixels, of a frame that is square."""

DIGIT, PIECE = 16, 6
"""Sides of the digit and of a piece of another one, in pixels."""

PIECES = 2
"""Pieces in a clip."""

NOISE = 0.1
"""Standard deviation of each pixel's noise; the ink of a digit is 1."""

DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0))
"""Pixels down and to the right, from a frame to the next."""

TEST_IMAGES, TEST_CLIPS = 597, 2000
"""Images that are never trained on, and the clips that are made of them."""

RULES = {"extends": "default", "rule": [{"layers": "blocks.*.conv*", "shortcut": True, "rprelu": True}]}
"""The default ones, with ReActNet's shortcut and RPReLU around the converted layers."""


class Digits:
    """Say which of 10 digits moves in which of 4 directions.

    Clips: float (N, 1, 16, 32, 32). A handwritten digit of scikit-learn's `load_digits`, 16 pixels high, moves one pixel a
    frame to the right, left, down or up and stays in sight. Pieces of other digits move among it, and every pixel has noise.
    Labels: int64 (N,), 4 times the digit plus the direction. Measured: accuracy on 2,000 clips, always the same, of images
    that are never trained on.
    """

    name = "digits"
    rules: RulesLike = RULES
    float_recipe: Recipe | None = Recipe(steps=6000, batch_size=16, lr=1e-2, labels=1.0, warm_up=0.1)
    recipe = Recipe(steps=8000, batch_size=16, lr=5e-3, latent_lr=0.3, labels=1.0, logits=1.0)
    comparison = "kl"
    layers: tuple[str, ...] = ()

    def float_model(self, seed: int) -> nn.Module:
        """Return a `ResNet3d` that is not trained yet, which takes about ten minutes on one core."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return ResNet3d()

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return clips with their labels."""
        return clips_of(*_images()[0], size, generator)

    def answers(self, outputs: Tensor) -> Tensor:
        """Return all of the logits."""
        return outputs

    def loss(self, outputs: Tensor, clips: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (of the protocol)
        """Return the cross-entropy."""
        return F.cross_entropy(outputs, labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """Return the accuracy."""
        clips, labels = _test_clips()
        with preserved_modes(model):
            answers = torch.cat([model.eval()(part).argmax(1) for part in torch.split(clips, 100)])
        return {"accuracy": float((answers == labels).double().mean())}


class ResNet3d(nn.Module):
    """A 3D ResNet of 3 basic blocks: (N, 1, D, H, W) in, 40 logits out (He et al. 2016, https://arxiv.org/abs/1512.03385)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(1, 16, (3, 5, 5), 2, (1, 2, 2), bias=False), nn.BatchNorm3d(16), nn.ReLU())
        self.blocks = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 64, 2), BasicBlock(64, 64, 1))
        self.head = nn.Sequential(nn.AdaptiveMaxPool3d(1), nn.Flatten(), nn.Linear(64, 10 * len(DIRECTIONS)))

    def forward(self, clips: Tensor) -> Tensor:
        """Return logits of shape (N, 40)."""
        logits: Tensor = self.head(self.blocks(self.stem(clips)))
        return logits


class BasicBlock(nn.Module):
    """Two 3 x 3 x 3 convolutions and a way around them, which is one of 1 x 1 x 1 where shapes change."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm3d(out_channels)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm3d(out_channels)
        self.relu = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut.append(nn.Conv3d(in_channels, out_channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm3d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        inner = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        output: Tensor = self.relu(inner + self.shortcut(x))
        return output


def clips_of(images: Tensor, digits: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return clips of shape (size, 1, 16, 32, 32) made of these images, with their labels.

    Args:
        images: shape (n, 16, 16), ink from 0 to 1.
        digits: what they show, shape (n,).
        size: how many clips.
        generator: where all chance comes from.
    """

    def number(below: int, *shape: int) -> Tensor:
        return torch.randint(below, (size, *shape), generator=generator)

    clips = torch.zeros(size, FRAMES, SIDE, SIDE)
    chosen, directions = number(len(images)), number(len(DIRECTIONS))
    velocity = torch.tensor(DIRECTIONS)[directions]
    travel = (FRAMES - 1) * velocity
    room = SIDE - DIGIT - travel.abs()
    start = (torch.rand(size, 2, generator=generator) * (room + 1)).long() - travel.clamp(max=0)
    _draw(clips, images[chosen], start, velocity)
    for _ in range(PIECES):
        top, left = number(DIGIT - PIECE + 1), number(DIGIT - PIECE + 1)
        pieces = images[number(len(images))].unfold(1, PIECE, 1).unfold(2, PIECE, 1)[torch.arange(size), top, left]
        _draw(clips, pieces, number(SIDE, 2), torch.tensor(DIRECTIONS)[number(len(DIRECTIONS))])
    clips += NOISE * torch.randn(clips.shape, generator=generator)
    return clips.unsqueeze(1), digits[chosen] * len(DIRECTIONS) + directions


def _draw(clips: Tensor, patches: Tensor, start: Tensor, velocity: Tensor) -> None:
    """Draw a patch that moves into each clip, in place; what leaves a frame comes in on the other side.

    Shapes: clips (N, D, H, W), patches (N, h, w), start and velocity (N, 2), in pixels.
    """
    height, width = patches.shape[1:]
    corners = start[:, None] + velocity[:, None] * torch.arange(clips.shape[1])[:, None]
    rows = (corners[..., 0, None] + torch.arange(height)) % clips.shape[2]
    columns = (corners[..., 1, None] + torch.arange(width)) % clips.shape[3]
    sample, frame = torch.arange(len(clips))[:, None, None, None], torch.arange(clips.shape[1])[:, None, None]
    place = (sample, frame, rows[..., None], columns[..., None, :])
    clips[place] = clips[place].maximum(patches[:, None])


@cache
def _images() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the images to train on, shape (n, 16, 16), ink from 0 to 1, and those to test on, each with their digits.

    Raises:
        ModelError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise ModelError(f"the digits need `pip install qconvert[tasks]`: {error}") from error
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, size=(DIGIT, DIGIT), mode="bilinear").squeeze(1)
    digits = torch.from_numpy(data.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return (images[train], digits[train]), (images[test], digits[test])


@cache
def _test_clips() -> tuple[Tensor, Tensor]:
    return clips_of(*_images()[1], TEST_CLIPS, torch.Generator().manual_seed(0))
