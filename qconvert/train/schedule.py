"""`Schedule`: staged training, driven by one call for each step."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..diagnosis import diagnose
from ..errors import ModelError, RuleError
from ..observer import converted_layers
from ..pipeline import check_rules
from ..quantizations.staged import Staged
from ..rewrite import plan_of
from ..rules import nearest
from ..tables import Stage
from ..trace import unwrapped
from .compatible import check_same
from .staged_layer import Moment, StagedLayer

Stages = Sequence[tuple[str, Stage]]
"""Each stage with the label that messages show."""


class Schedule:
    """Other quantizers for a converted model's layers while it is trained, stage by stage; then those of its rules.

    What a layer is follows from the stages and the number of the step alone. While the schedule runs, the quantizers of all
    stages are in the model, so that an optimizer built after the schedule has their Parameters; when it is over, the model
    is as without one. A quantizer that learns starts from the weights that are there when its stage begins, and the
    layer's scale is then brought to the new quantizer's unit.

    Activations first: Martinez et al. 2020, Real-to-Binary, https://arxiv.org/abs/2003.11535; Liu et al. 2020, ReActNet,
    https://arxiv.org/abs/2003.03488. Bits going down: Zhuang et al. 2018, https://arxiv.org/abs/1711.00205.

    Args:
        model: a converted model, not yet wrapped in DDP.
        stages: dicts of the structure of ``[[schedule.stage]]``, or those of `Rules.schedule`. None takes the stages of the
            rules by which the model was converted.
        batch: an input, in the form of example inputs: what ``order = "sensitivity"`` is measured with.
        total_steps: how often `step` will be called, for a check that the schedule is not longer.

    Raises:
        RuleError: if there are no stages, one does not read or fits no layer, or they take more than ``total_steps``.
        ModelError: if the model has no QConv3d, is wrapped in DDP, or another schedule of it is not over.
        InputError: if the model does not run on the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Mapping[str, Any] | Stage] | None = None,
        *,
        batch: Any = None,
        total_steps: int | None = None,
    ) -> None:
        if isinstance(model, DistributedDataParallel):
            raise ModelError("build the schedule first, then wrap the model in DDP: it adds Parameters, which DDP must see")
        model = unwrapped(model)
        layers = dict(converted_layers(model))
        _check_model(model)
        labelled = _labelled(model, stages)
        self._stages = tuple(stage for _, stage in labelled)
        if total_steps is not None and self.steps > total_steps:
            raise RuleError(
                f"the schedule takes {self.steps} steps and the training {total_steps}: the layers would not get to the "
                "quantizers of their rules. Shorten its stages or train longer"
            )
        self._concerned = [_concerned(model, label, stage) for label, stage in labelled]
        self._layers = {
            name: StagedLayer(layer, self._stages, [n for n, names in enumerate(self._concerned) if name in names])
            for name, layer in layers.items()
        }
        for number, (label, stage) in enumerate(labelled):
            if stage.temperature and not any(layer.has_progressive_sign(number) for layer in self._layers.values()):
                raise RuleError(f"{label}: temperature: no layer that it concerns has the quantizer 'progressive_sign' then")
        decisions = plan.converted if (plan := plan_of(model)) else ()
        self._rules: dict[str, dict[str, Any]] = {name: {} for name in layers} | {
            each.site.name: each.settings for each in decisions
        }
        self._by_sensitivity = _by_sensitivity(model, labelled, batch)
        self._step = 0
        self._set_turns()
        self._move(is_training=True)

    @property
    def steps(self) -> int:
        """How many steps all stages take."""
        return sum(stage.steps for stage in self._stages)

    @property
    def stage(self) -> int | None:
        """Index of the present stage, from 0; None when the schedule is over."""
        return None if self.is_done else self._moment.stage

    @property
    def is_done(self) -> bool:
        """Whether the schedule is over, and the layers have the quantizers of their rules."""
        return self._step == self.steps

    def step(self) -> None:
        """Go on by one step: call it behind ``optimizer.step()``, or once an epoch. When the schedule is over, nothing."""
        if not self.is_done:
            self._step += 1
            self._move(is_training=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the step, and what it belongs to: the stages, the layers' rules, the order by sensitivity."""
        stages = [stage.model_dump(exclude_defaults=True) for stage in self._stages]
        return {"step": self._step, "stages": stages, "rules": dict(self._rules), "by_sensitivity": self._by_sensitivity}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go to the step of a checkpoint.

        What is learned comes with the model's own state. Load that after this: when the schedule is over, it has other keys.

        Raises:
            ModelError: if the checkpoint is of other stages or other rules, saying what differs.
        """
        own = self.state_dict()
        if state_dict.keys() != own.keys():
            raise ModelError(f"this is no state of a Schedule: its keys are {[*state_dict]}, those of one {[*own]}")
        check_same("stage", *(dict(enumerate(each["stages"], start=1)) for each in (state_dict, own)))
        check_same("layer", state_dict["rules"], own["rules"])
        if not 0 <= state_dict["step"] <= self.steps:
            raise ModelError(f"there is no step {state_dict['step']} in a schedule of {self.steps}")
        self._step, self._by_sensitivity = state_dict["step"], state_dict["by_sensitivity"]
        self._set_turns()
        self._move(is_training=False)

    @property
    def _moment(self) -> Moment:
        passed = self._step
        for number, stage in enumerate(self._stages):
            if passed < stage.steps:
                return Moment(number, passed)
            passed -= stage.steps
        return Moment(len(self._stages), 0)

    def _move(self, *, is_training: bool) -> None:
        for layer in self._layers.values():
            layer.move(self._moment, is_training=is_training)

    def _set_turns(self) -> None:
        """Spread the layers of each layerwise stage evenly over its steps; the first one has its turn at once."""
        orders = {"input": [*self._layers], "output": [*self._layers][::-1], "sensitivity": self._by_sensitivity or []}
        for number, (stage, concerned) in enumerate(zip(self._stages, self._concerned, strict=True)):
            if stage.transition == "layerwise":
                order = [name for name in orders[stage.order or "output"] if name in concerned]
                for place, name in enumerate(order):
                    self._layers[name].turns[number] = place * stage.steps // len(order)


def _check_model(model: nn.Module) -> None:
    """Find a model that cannot have a schedule."""
    if not any(True for _ in converted_layers(model)):
        raise ModelError(f"{type(model).__name__} has no QConv3d to schedule: convert it with qconvert.binarize first")
    busy = [name for name, layer in converted_layers(model) if any(isinstance(part, Staged) for part in layer.modules())]
    if busy:
        raise ModelError(f"another schedule of this model is not over: it has the quantizers of {', '.join(busy)}")


def _labelled(model: nn.Module, stages: Sequence[Mapping[str, Any] | Stage] | None) -> Stages:
    """Return the stages that are given, else those of the model's rules."""
    if stages is not None:
        found = check_rules({"schedule": {"stage": stages}})
        if not found.schedule:
            raise RuleError("a schedule needs a stage, got none")
        return found.schedule
    plan = plan_of(model)
    if plan is None:
        raise RuleError(f"this {type(model).__name__} was not converted by rules: pass the stages")
    if not plan.rules.schedule:
        raise RuleError(f"{plan.rules.source} has no [[schedule.stage]]: write one, or pass the stages")
    return plan.rules.schedule


def _concerned(model: nn.Module, label: str, stage: Stage) -> set[str]:
    """Return the names of the layers that the stage concerns."""
    layers = dict(converted_layers(model))
    if stage.layers is None:
        return set(layers)
    first_names = {layer: name for name, layer in layers.items()}
    all_names = {n: first_names[m] for n, m in model.named_modules(remove_duplicate=False) if m in first_names}
    found = set()
    for glob in stage.layers:
        selected = fnmatch.filter(all_names, glob)
        if not selected:
            raise RuleError(f"{label}: layers: {glob!r} selects no converted layer. {nearest(glob, all_names)}")
        found |= {all_names[name] for name in selected}
    return found


def _by_sensitivity(model: nn.Module, stages: Stages, batch: Any) -> list[str] | None:
    """Return the layers' names, the one with the highest signal-to-noise ratio first, if a stage goes by that."""
    asking = [label for label, stage in stages if stage.order == "sensitivity"]
    if not asking:
        return None
    if batch is None:
        raise RuleError(f'{asking[0]}: order = "sensitivity" is measured with a batch: Schedule(model, ..., batch=batch)')
    snr = {layer.name: layer.snr_db for layer in diagnose(model, batch).layers}
    lowest = float("-inf")
    return sorted(snr, key=lambda name: lowest if (ratio := snr[name]) is None else ratio, reverse=True)
