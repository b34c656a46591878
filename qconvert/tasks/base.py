"""`Task`: data, a float model, and what is measured, for a training that anyone can repeat."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..pipeline import RulesLike


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: Adam, whose learning rates rise at first and fall as a cosine to 0.

    Attributes:
        steps: optimizer steps.
        batch_size: clips in a batch.
        lr: learning rate of what is not quantized.
        latent_lr, added_lr: as in `qconvert.train.parameter_groups`.
        labels: factor of the loss against the labels, 0 for none.
        logits: factor of the distillation from the float model's answers, 0 for none.
        features: factor of the distillation from the outputs of the task's layers, 0 for none.
        warm_up: share of the steps in which the learning rates rise.
        frozen_after: share of the steps after which BatchNorm and dropout are in eval mode, for the rest to fit the
            statistics that are there in use: those of a batch of one clip are far from them.
    """

    steps: int
    batch_size: int
    lr: float
    latent_lr: float = 1.0
    added_lr: float = 1.0
    labels: float = 0.0
    logits: float = 0.0
    features: float = 0.0
    warm_up: float = 0.05
    frozen_after: float = 1.0


class Task(Protocol):
    """What a training needs to know of its data.

    Attributes:
        name: its name on the command line.
        rules: rules that fit its model.
        float_recipe: how its float model is trained before; None where that is pretrained.
        recipe: how its converted model is trained.
        comparison: how answers are compared in a distillation, as in `qconvert.train.distill`.
        layers: layers whose outputs are compared there.
    """

    name: str
    rules: RulesLike
    float_recipe: Recipe | None
    recipe: Recipe
    comparison: str
    layers: tuple[str, ...]

    def float_model(self, seed: int) -> nn.Module:
        """Return the float model, pretrained or to be trained."""

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Any]:
        """Return clips to train on, with their labels (None where the float model gives them)."""

    def answers(self, outputs: Any) -> Any:
        """Return what of the outputs is measured, and compared in a distillation."""

    def loss(self, outputs: Any, clips: Tensor, labels: Any) -> Tensor:
        """Return the loss against the labels."""

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """Return what the model reaches, in eval mode, on data that is never trained on; its training flags stay."""
