"""`StagedLayer`: what one layer is at every step of a schedule, and what has to happen where its quantizers change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..layers import QConv3d
from ..layers.computed import weights_at_rest
from ..layers.standardization import fitted_scale
from ..quantizations import Identity, ProgressiveSign, Quantization
from ..quantizations.staged import Staged
from ..rewrite import build
from ..tables import Quantizer, Stage
from .sharded import whole_parameters

BEFORE = -1
"""The stage before the first one. A layer is then, and when the schedule is over, what its rule says."""


@dataclass(frozen=True)
class Moment:
    """A place in a schedule.

    Attributes:
        stage: index of the stage, from 0; the number of stages when it is over.
        passed: how many steps of the stage have passed.
    """

    stage: int
    passed: int


class Side:
    """The quantizers of a layer's weight or input, those of all stages.

    Args:
        layer: the layer.
        owner, attribute: the module that has the quantizer, and its name there.
        specs: what each stage that concerns the layer says; None is the rule's own, as it is there now.
        ratio: as in `Staged`.
    """

    def __init__(
        self,
        layer: QConv3d,
        owner: nn.Module,
        attribute: str,
        specs: Mapping[int, Quantizer | None],
        ratio: torch.Tensor | None = None,
    ) -> None:
        self.owner, self.attribute = owner, attribute
        self.own: Quantization = getattr(owner, attribute)
        distinct: list[Quantizer | None] = [None]
        for spec in specs.values():
            if spec not in distinct:
                distinct.append(spec)
        self._places = {stage: distinct.index(spec) for stage, spec in specs.items()}
        self.staged = Staged([self.own, *(layer._placed(build(spec)) for spec in distinct[1:] if spec is not None)], ratio)

    def place(self, stage: int) -> int:
        """Return the place, among the quantizers, of the one that the stage says; 0 is the rule's own."""
        return self._places.get(stage, 0)

    def quantizer(self, stage: int) -> Quantization:
        """Return that quantizer."""
        return self.staged.quantizers[self.place(stage)]  # type: ignore[return-value]

    def is_first(self, stage: int) -> bool:
        """Whether no stage before had that quantizer."""
        return self.place(stage) not in [place for earlier, place in self._places.items() if earlier < stage]

    def install(self, *, is_over: bool) -> None:
        """Give the layer all its quantizers, or its rule's own alone."""
        wanted = self.own if is_over or len(self.staged.quantizers) == 1 else self.staged
        if getattr(self.owner, self.attribute) is wanted:
            return
        setattr(self.owner, self.attribute, wanted)
        if is_over:
            # what is left in an optimizer has no gradient, so is not stepped
            for quantizer in self.staged.quantizers[1:]:
                quantizer.zero_grad(set_to_none=True)
        else:
            self.staged.train(self.owner.training)


class StagedLayer:
    """One layer through the stages.

    Args:
        layer: the layer, which is not changed yet.
        stages: the stages.
        concerning: the indices of those that concern the layer.

    Attributes:
        turns: for each layerwise stage, how many of its steps pass before the layer is as it says.
    """

    def __init__(self, layer: QConv3d, stages: Sequence[Stage], concerning: Sequence[int]) -> None:
        self.layer, self._stages, self._concerning = layer, stages, concerning
        self.turns: dict[int, int] = {}
        weights = {stage: stages[stage].weight for stage in concerning}
        inputs = {stage: stages[stage].input for stage in concerning}
        is_mixed = any(stages[stage].transition == "linear" for stage in concerning)
        ratio = torch.ones_like(layer.scale).view(-1, 1, 1, 1, 1) if is_mixed and layer.scale is not None else None
        self._weight = Side(layer, layer, "_weight_quantize", weights, ratio)
        with weights_at_rest(layer):
            for quantizer in self._weight.staged.quantizers[1:]:
                quantizer.start_from(layer.weight)  # type: ignore[operator]  # and knows so that it is one of weights
        self._input = Side(layer, layer.activation, "activation_function", inputs)
        self._window = layer.activation.gradient_cancellation_threshold

    def has_progressive_sign(self, stage: int) -> bool:
        """Whether one of the quantizers that the stage gives the layer is a `ProgressiveSign`."""
        return any(isinstance(side.quantizer(stage), ProgressiveSign) for side in (self._weight, self._input))

    def move(self, moment: Moment, *, is_training: bool) -> None:
        """Make the layer what it is at that moment.

        Args:
            moment: the moment.
            is_training: whether training has come to it now, so that what is learned starts where a quantizer is new.
                Else that comes from a checkpoint.
        """
        before, now = self._held(moment)
        is_over = moment.stage == len(self._stages)
        old = self._weight.staged.now
        share = moment.passed / self._stages[now].steps if before != now else 1.0
        for side in (self._weight, self._input):
            side.install(is_over=is_over)
            side.staged.before, side.staged.now, side.staged.share = side.place(before), side.place(now), share
        if is_training and old != self._weight.staged.now:
            self._start_weight(old, now)
        self.layer.activation.gradient_cancellation_threshold = self._window_in(now)
        self._set_temperature(moment, now)

    def _held(self, moment: Moment) -> tuple[int, int]:
        """Return the stage that the layer is as, behind the one that it was as where the two are mixed, else twice."""
        if moment.stage == len(self._stages):
            return moment.stage, moment.stage
        concerning = [BEFORE, *(stage for stage in self._concerning if stage <= moment.stage)]
        if concerning[-1] != moment.stage:
            return concerning[-1], concerning[-1]
        *_, before, now = concerning
        transition = self._stages[now].transition
        if transition == "layerwise" and moment.passed < self.turns[now]:
            return before, before
        return (before, now) if transition == "linear" else (now, now)

    @torch.no_grad()
    def _start_weight(self, old: int, now: int) -> None:
        """Start what a new weight quantizer learns, and bring the layer's scale to that quantizer's unit.

        A sign puts out +-1 where a float weight is a few hundredths: the least-squares scale of either says how many times.
        """
        staged = self._weight.staged  # which is no part of the layer when the schedule is over
        with whole_parameters(self.layer), whole_parameters(staged), weights_at_rest(self.layer):
            weight = self.layer.weight
            before, quantizer = staged.quantizers[old], self._weight.quantizer(now)
            if self._weight.is_first(now):
                quantizer.start_from(weight)
            if self.layer.scale is not None:
                fits = [
                    fitted_scale(each, weight, standardize=self.layer.standardize)  # type: ignore[arg-type]
                    for each in (before, quantizer)
                ]
                is_sound = (fits[0] > 0) & (fits[1] > 0)  # not for weights that are all 0
                ratio = torch.where(is_sound, fits[1] / fits[0], 1.0)
                self.layer.scale.mul_(ratio)
                if staged.ratio is not None:
                    staged.ratio.copy_((1 / ratio).view_as(staged.ratio))

    def _window_in(self, stage: int) -> float | None:
        """Return the half-width of the gradient window."""
        said = self._stages[stage].gradient_cancellation_threshold if stage in self._concerning else None
        if said is not None:
            return said
        # as in rules: a float input has no range to stay in
        is_float = self._input.place(stage) and isinstance(self._input.quantizer(stage), Identity)
        return 0.0 if is_float else self._window

    def _set_temperature(self, moment: Moment, now: int) -> None:
        """Set that of the last stage so far that has one."""
        setting = {stage: ends for stage in self._concerning if (ends := self._stages[stage].temperature) is not None}
        if not setting:
            return
        temperature = None
        for stage, (start, end) in setting.items():
            if stage <= now:
                passed = moment.passed / self._stages[stage].steps if stage == moment.stage else 1.0
                temperature = start + (end - start) * passed
        for side in (self._weight, self._input):
            for quantizer in side.staged.quantizers:
                if isinstance(quantizer, ProgressiveSign):
                    quantizer.temperature = temperature
