"""How a student's tensor is compared with a teacher's: the distances of distillation."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor

LEAST_VARIANCE = 0.01
"""Of a channel, in the mean of all channels: one that is constant in the teacher does not weigh without bound."""


@dataclass(frozen=True)
class Comparison:
    """A distance of a student's tensor from a teacher's of the same shape.

    Attributes:
        distance: the function of the two, to a tensor of shape ().
        shape: what the two must look like: a name for each dimension that there must be.
    """

    distance: Callable[[Tensor, Tensor], Tensor]
    shape: tuple[str, ...] = ()

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the distance, in float32 at least: squares overflow in half precision."""
        wide = torch.promote_types(student.dtype, torch.float32)
        return self.distance(student.to(wide), teacher.to(wide))


def logits_comparisons(temperature: float) -> dict[str, Comparison]:
    """Return the comparisons of outputs, by name."""
    return {
        "kl": Comparison(partial(_kl, temperature=temperature), ("N", "classes")),
        "bce": Comparison(partial(_bce, temperature=temperature)),
        "mse": Comparison(F.mse_loss),
    }


def _kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    ours, theirs = (F.log_softmax(logits / temperature, 1) for logits in (student, teacher))
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1).mean() * temperature**2


def _bce(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    probabilities = torch.sigmoid(teacher / temperature)
    return F.binary_cross_entropy_with_logits(student / temperature, probabilities) * temperature**2


def _match(student: Tensor, teacher: Tensor) -> Tensor:
    variance = teacher.transpose(0, 1).flatten(1).var(1, correction=0)
    unit = variance.clamp(min=LEAST_VARIANCE * variance.mean())
    per_unit = torch.where(unit > 0, 1 / unit, 0.0)
    return ((student - teacher).square().transpose(0, 1).flatten(1).mean(1) * per_unit).mean()


def _attention(student: Tensor, teacher: Tensor) -> Tensor:
    ours, theirs = (F.normalize(features.square().sum(1).flatten(1)) for features in (student, teacher))
    return (ours - theirs).square().sum(1).mean()


FEATURES = {"match": Comparison(_match, ("N", "C")), "attention": Comparison(_attention, ("N", "C", "positions"))}
"""The comparisons of layers, by name."""
