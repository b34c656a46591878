"""Traced + Plan -> converted model: each layer that the plan names becomes a QConv3d, everything else stays.

The module object itself becomes the new layer, so every reference to it (a second name, a plain list, a hook's closure)
sees the conversion, and it keeps its Parameters.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import nn

from .errors import QConvertError, QuantizerError, RuleError
from .layers import QConv3d
from .layers.computed import weights_at_rest
from .layers.qconv3d import default_pad_value
from .layers.standardization import latent
from .layers.subclass import own_state
from .quantizations import Identity, Quantization, quantizer
from .rules import Decision, Plan, Rules
from .signals import OutputStart, Signal, input_start, output_start
from .surgery import operate, surgeries
from .tables import Quantizer

_PLAN_ATTRIBUTE = "_qconvert_plan"
"""Where a converted model keeps its plan, for reports and files made from the model alone."""


def check_quantizers(rules: Rules) -> None:
    """Build every quantizer that the rules and the stages of their schedule name.

    Raises:
        RuleError: naming the rule or stage, if one does not exist or does not take its settings.
    """
    for label, rule in (*rules.rules, *rules.schedule):
        for key in ("weight", "input"):
            spec: Quantizer | None = getattr(rule, key)
            if spec is not None:
                try:
                    build(spec)
                except QuantizerError as error:
                    raise RuleError(f"{label}: {key}: {error}") from error


def build(spec: Quantizer) -> Quantization:
    """Return a new quantizer of that name with those settings.

    Raises:
        QuantizerError: if it does not exist or does not take the settings.
    """
    return quantizer(spec.quantizer, **spec.settings)


def rewrite(model: nn.Module, plan: Plan, signals: Mapping[str, Signal] = MappingProxyType({})) -> nn.Module:
    """Convert the layers that the plan names, in place, and return the model.

    Args:
        model: the model.
        plan: what happens to which layer.
        signals: what is known about the layers' data, by name: where their thresholds and scales start.

    If anything fails, the model is as it was.

    Raises:
        QConvertError: naming the layer that cannot be converted.
    """
    with weights_at_rest(model), ExitStack() as undo:
        for name, surgery in surgeries(plan).items():
            module = model.get_submodule(name)
            undo.callback(_restore, module, type(module), own_state(module))
            with _named(f"module {name!r}"):
                operate(module, surgery)
        layers = [
            (model.get_submodule(name), _new_layer(model, decision, signals.get(name)))
            for name, decision in ((decision.site.name, decision) for decision in plan.converted)
        ]
        for old, new in layers:
            undo.callback(_restore, old, type(old), own_state(old))
            _become(old, new)
        undo.pop_all()
    vars(model)[_PLAN_ATTRIBUTE] = _with_earlier_decisions(plan, plan_of(model))
    return model


def _with_earlier_decisions(plan: Plan, earlier: Plan | None) -> Plan:
    """Return the plan with what was converted and rewritten before, by the decisions that did it."""
    converted = {decision.site.name: decision for decision in earlier.converted} if earlier else {}
    kept = (
        converted.get(decision.site.name, decision) if decision.site.converted else decision for decision in plan.decisions
    )
    rewritten = [overwrite for overwrite in earlier.overwrites if overwrite.obstacle is None] if earlier else []
    return replace(plan, decisions=tuple(kept), overwrites=(*rewritten, *plan.overwrites))


def plan_of(model: nn.Module) -> Plan | None:
    """Return the plan by which the model was converted, None if it was not."""
    plan: Plan | None = vars(model).get(_PLAN_ATTRIBUTE)
    return plan


def _new_layer(model: nn.Module, decision: Decision, signal: Signal | None) -> QConv3d:
    conv: nn.Conv3d = model.get_submodule(decision.site.name)  # type: ignore[assignment]  # the trace found it to be one
    window = decision.gradient_cancellation_threshold
    with _named(f"layer {decision.site.name!r} ({decision.rule})"):
        inputs, weights = build(decision.input), build(decision.weight).to(conv.weight.device)
        standardize = decision.weight.standardize
        weights.start_from(latent(conv.weight.detach(), standardize=standardize))
        if window is None:
            window = 0.0 if isinstance(inputs, Identity) else 1.0  # a float input has no range to stay in
        before = input_start(decision.input.threshold, inputs, signal)
        after = OutputStart(None, None)
        if decision.weight.scale is not None:
            border = default_pad_value(inputs) if decision.pad_value is None else decision.pad_value
            after = output_start(conv, inputs, weights, border, before, signal, standardize=standardize)
        return QConv3d.from_float(
            conv,
            input_quantization=inputs,
            weight_quantization=weights,
            gradient_cancellation_threshold=window,
            pad_value=decision.pad_value,
            threshold=before.threshold,
            spread=before.spread,
            scale=after.scale,
            offset=after.offset,
            standardize=standardize,
            shortcut=decision.shortcut,
            rprelu=decision.rprelu,
            latent_clip=decision.latent_clip,
        )


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Say in an error where it happened."""
    try:
        yield
    except QConvertError as error:
        raise type(error)(f"{place}: {error}") from error


def _become(old: nn.Module, new: nn.Module) -> None:
    """Turn ``old`` into ``new``, which has its state and more."""
    _restore(old, type(new), vars(new))


def _restore(module: nn.Module, cls: type[nn.Module], state: dict[str, Any]) -> None:
    module.__class__ = cls
    attributes = vars(module)
    for key in attributes.keys() - state.keys():
        del attributes[key]
    for key, value in state.items():
        present = attributes.get(key)
        if isinstance(present, (dict, set)) and type(present) is type(value):
            # the same dict object: a hook's handle finds its hook there
            present.clear()
            present.update(value)
        else:
            attributes[key] = value
