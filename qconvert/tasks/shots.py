"""Shot detection: the pretrained TransNetV2 on its own video, taught by itself in float."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor, nn

from ..demo import transnet, video_frames
from ..modes import preserved_modes
from ..pipeline import RulesLike
from .base import Recipe

TRAINED_ON = 3700
"""Frames from here on are never trained on."""

WINDOW = 100
"""Frames of a clip."""

TOLERANCE = 2
"""Frames by which a cut may be off."""


class Shots:
    """Find the cuts of a video: the float model says where they are.

    Clips: 100 frames each of the video's first 3,700, uint8 (N, 100, 27, 48, 3), cut together, mirrored, reversed and
    brightened at random. Measured on the frames from 3,700 on: F1 of the cuts (probability above 0.5, within 2 frames of one
    of the float model's), and the correlation of the probabilities with the float model's.
    """

    name = "shots"
    rules: RulesLike = "transnetv2"
    float_recipe: Recipe | None = None
    recipe = Recipe(steps=900, batch_size=1, lr=1e-3, latent_lr=5.0, logits=1.0, features=0.3)
    comparison = "bce"
    layers: tuple[str, ...] = ("SDDCNN.0", "SDDCNN.1", "SDDCNN.2")

    def float_model(self, seed: int) -> nn.Module:  # noqa: ARG002 (there is but one)
        """Return the pretrained TransNetV2; it depends on no seed."""
        return transnet()

    @cached_property
    def frames(self) -> Tensor:
        """The video, uint8 (frames, 27, 48, 3)."""
        return torch.stack(list(video_frames()))

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, None]:
        """Return clips; the float model gives the labels."""
        return torch.stack([_clip(self.frames[:TRAINED_ON], generator) for _ in range(size)]), None

    def answers(self, outputs: Any) -> Tensor:
        """Return the logits of a cut at each frame; those of its surroundings are for training TransNetV2 only."""
        one: Tensor = outputs[0]
        return one

    def loss(self, outputs: Any, clips: Tensor, labels: None) -> Tensor:  # noqa: ARG002 (the float model gives them)
        """Return the cross-entropy with the float model's decisions."""
        with torch.no_grad():
            decisions = self.answers(self._teacher(clips)) > 0
        return F.binary_cross_entropy_with_logits(self.answers(outputs), decisions.float())

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """Return F1 of the cuts, and the correlation of the probabilities."""
        probabilities = _probabilities(model, self.frames[TRAINED_ON:])
        found, expected = cuts(probabilities), cuts(self._expected)
        return {
            "f1": f1(found, expected),
            "correlation": float(torch.corrcoef(torch.stack([probabilities, self._expected]))[0, 1]),
            "cuts": float(len(found)),
            "cuts of the float model": float(len(expected)),
        }

    @cached_property
    def _teacher(self) -> nn.Module:
        return transnet()

    @cached_property
    def _expected(self) -> Tensor:
        return _probabilities(self._teacher, self.frames[TRAINED_ON:])


def _probabilities(model: Any, frames: Tensor) -> Tensor:
    with preserved_modes(model):
        probabilities: Tensor = model.eval().predict_frames(frames, quiet=True)[0]
    return probabilities


def _clip(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Return a clip that is cut together from parts of the video, 4 on average: it is cuts that there is to learn from."""
    alike = _chance(0.5, generator)  # all parts are changed alike, as in one video, or each for itself

    def part() -> Tensor:
        found = _part(frames, generator)
        return found if alike else _changed(found, generator)

    clip = part()
    while _chance(0.75, generator):
        other, place = part(), _number(WINDOW, generator)
        length = 1 if _chance(0.8, generator) else 2 + _number(20, generator)  # a cut, or a dissolve
        share = ((torch.arange(WINDOW) - place) / length).clamp(0, 1).view(-1, 1, 1, 1)
        clip = torch.lerp(clip, other, share)
    clip = _changed(clip, generator) if alike else clip
    return clip.clamp(0, 255).to(torch.uint8)


def _part(frames: Tensor, generator: torch.Generator) -> Tensor:
    pace = 1 if _chance(0.7, generator) else 2
    start = _number(len(frames) - WINDOW * pace + 1, generator)
    return frames[start : start + WINDOW * pace : pace].float()


def _changed(clip: Tensor, generator: torch.Generator) -> Tensor:
    """Return a clip reversed, mirrored, in other colours and brightness, at random."""
    for dim, chance in ((0, 0.3), (1, 0.2), (2, 0.5)):
        clip = clip.flip(dim) if _chance(chance, generator) else clip
    if _chance(0.3, generator):
        clip = clip[..., torch.randperm(3, generator=generator)]
    contrast, brightness = torch.rand(2, generator=generator).tolist()
    changed: Tensor = (clip - 128) * (0.7 + 0.6 * contrast) + 128 + 40 * (brightness - 0.5)
    return changed


def _number(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=generator))


def _chance(share: float, generator: torch.Generator) -> bool:
    return float(torch.rand((), generator=generator)) < share


def cuts(probabilities: Tensor) -> list[float]:
    """Return the middle of each run of frames whose probability, of shape (frames,), is above 0.5."""
    is_cut = F.pad((probabilities > 0.5).int(), (1, 1))  # noqa: PLR2004 (a probability)
    starts, ends = ((is_cut.diff() == step).nonzero().flatten().tolist() for step in (1, -1))
    return [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]


def f1(found: list[float], expected: list[float]) -> float:
    """Return the F1 of cuts, each of which counts for one of the others at most `TOLERANCE` frames from it."""
    left = list(expected)
    hits = 0
    for cut in found:
        near = [other for other in left if abs(other - cut) <= TOLERANCE]
        if near:
            left.remove(min(near, key=lambda other: abs(other - cut)))
            hits += 1
    return 2 * hits / max(1, len(found) + len(expected))
