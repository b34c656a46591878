"""The whole flow on one screen: trace, match, rewrite, report.

model --trace--> Traced --match(rules)--> Plan --rewrite--> converted model --compare--> Report
"""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .calibration import calibrate
from .errors import CONSTANT_IN_DATA, CONSTANT_MEASURED_BY, CONSTANT_MENDED_BY, ConstantInputWarning, ModelError
from .example import example_input
from .lazy import initialized, lazy_modules
from .report import Report, compare
from .rewrite import check_quantizers, rewrite
from .rules import Plan, Rules, load_rules, match
from .signals import Signal, constant_layers, signals
from .trace import Traced, copied, structural_copy, trace, unwrapped

RulesLike = str | Path | Mapping[str, Any] | Rules


def binarize(
    model: nn.Module,
    rules: RulesLike = "default",
    *,
    example_inputs: Any = None,
    calibration_data: Iterable[Any] | None = None,
    inplace: bool = False,
    report: bool = True,
) -> nn.Module:
    """Replace the 3D convolutions that the rules name by `QConv3d`, keeping the pretrained weights.

    Args:
        model: any model with a Conv3d: pretrained or not, in any mode, on any device.
        rules: path of a rule file, name of bundled rules, a dict of the same structure, or `Rules`.
        example_inputs: what the report counts operations with: a tensor (or a list, for a model that takes one), a tuple
            of arguments, or a dict of keyword arguments. Default: the rules' ``[model] input_shape``; without one the
            report has no operations. Lazy modules get their weights from it, unless in place.
        calibration_data: batches of the form of ``example_inputs``: a list of them, a generator, or a DataLoader that yields
            the inputs alone. One pass over them measures where thresholds, LSQ steps, scales and offsets start (without data
            the graph tells), and moves the BatchNorm statistics as far as the conversion moves what they read. Statistics
            that are still 0 and 1 are taken from the data.
        inplace: convert the model itself instead of a deep copy. Report and calibration run on copies all the same.
        report: print the before/after report.

    Returns:
        A model of the same class, with the same Parameters (of the copy, unless in place), state-dict keys, modes, hooks,
        devices and dtypes. Keys are added for what is learned beside the weights: ``<layer>.activation.threshold``,
        ``<layer>.scale``, ``<layer>.*.step`` (LSQ). A model wrapped in DataParallel, DDP or torch.compile comes back
        without its wrapper, with a warning. If anything fails, the model that came in is as it was.

    Raises:
        RuleError: if the rules do not read, or one selects nothing.
        ModelError: if there is no Conv3d, or the model cannot be copied or converted.
        InputError: if the model does not run on the example input or the calibration data.

    Warns:
        ConstantInputWarning: naming the converted layers that would see a constant, and what mends them.
    """
    loaded, plain = check_rules(rules), unwrapped(model)
    decided, traced = _planned(plain if inplace else _with_weights(plain, loaded, example_inputs), loaded)
    if plain is not model:
        warnings.warn(f"the {type(model).__name__} wrapper is taken off: wrap the converted model again", stacklevel=2)
    plain, known = traced.model, _signals(traced, decided)
    if not decided.converted:
        warnings.warn("the rules convert no layer of this model; qconvert.plan() says why for each", stacklevel=2)
    if report:
        print(_preview(plain, decided, known, example_inputs))  # noqa: T201 (what the caller asked to see)
    calibration = None
    if calibration_data is not None:
        # on a copy that shares only Parameters that it leaves alone: if it fails, nothing has happened to the model
        calibration = calibrate(rewrite(structural_copy(plain), decided, known), decided, calibration_data)
    with torch.inference_mode(mode=False):  # what is made there cannot be trained
        converted = rewrite(plain if inplace else copied(plain), decided, known)
    inputs = {name: signal.input for name, signal in known.items()}
    if calibration is not None:
        converted.load_state_dict(calibration.state, strict=False)
        inputs |= calibration.inputs
    dead = constant_layers(converted, decided, inputs)
    if dead:
        message = _about_constants(dead, decided, is_calibrated=calibration is not None)
        warnings.warn(message, ConstantInputWarning, stacklevel=2)
    return converted


def plan(model: nn.Module, rules: RulesLike = "default") -> Plan:
    """Return what `binarize` would do, without doing it: a decision with its rule and reason for every convolution.

    Raises:
        RuleError, ModelError: as `binarize`.
    """
    return _planned(model, check_rules(rules))[0]


def preview(model: nn.Module, rules: RulesLike = "default", example_inputs: Any = None) -> Report:
    """Return the report that `binarize` prints, without converting the model.

    Raises:
        RuleError, ModelError, InputError: as `binarize`.
    """
    loaded = check_rules(rules)
    decided, traced = _planned(_with_weights(unwrapped(model), loaded, example_inputs), loaded)
    return _preview(traced.model, decided, _signals(traced, decided), example_inputs)


def check_rules(rules: RulesLike) -> Rules:
    """Return the rules, read and with every quantizer that they name tried.

    Raises:
        RuleError: if they do not read, or a quantizer does not exist or take its settings.
    """
    loaded = load_rules(rules)
    check_quantizers(loaded)
    return loaded


def _with_weights(model: nn.Module, rules: Rules, example_inputs: Any) -> nn.Module:
    """Return the model; where it has lazy modules and there is an example input, a copy in which they have their weights."""
    if not lazy_modules(model):
        return model
    inputs = example_input(rules.model, model) if example_inputs is None else example_inputs
    return model if inputs is None else initialized(model, inputs)


def _planned(model: nn.Module, loaded: Rules) -> tuple[Plan, Traced]:
    traced = trace(model)
    if not any(site.is_conv3d for site in traced.sites):
        kinds = sorted({type(module).__name__ for module in traced.model.modules()} & _CONVOLUTIONS)
        name = type(traced.model).__name__
        raise ModelError(f"{name} has no Conv3d to convert. Its convolutions: {', '.join(kinds) or 'none'}")
    return match(traced.sites, loaded, traced.opaque, traced.overwrites), traced


def _signals(traced: Traced, decided: Plan) -> dict[str, Signal]:
    """Return what is known about the data of the convolutions, if it makes a difference to the plan."""
    return signals(traced) if any(decision.depends_on_data for decision in decided.converted) else {}


def _preview(model: nn.Module, decided: Plan, known: Mapping[str, Signal], example_inputs: Any) -> Report:
    inputs = example_input(decided.rules.model, model) if example_inputs is None else example_inputs
    # converts a copy that shares the Parameters: if the report fails, nothing has happened to the model
    return compare(model, rewrite(structural_copy(model), decided, known), inputs)


def _about_constants(dead: list[str], decided: Plan, *, is_calibrated: bool) -> str:
    started = {each.site.name for each in decided.converted if isinstance(each.input.threshold, str)}
    advice = [] if started.issuperset(dead) else [CONSTANT_MENDED_BY]
    if not started.isdisjoint(dead):
        advice.append(CONSTANT_IN_DATA if is_calibrated else CONSTANT_MEASURED_BY)
    return (
        f"{len(dead)} of {len(decided.converted)} converted layers see a constant and learn nothing: {', '.join(dead)}. "
        "Their input is on one side of the quantizer's threshold everywhere (sign(x >= 0) behind a ReLU is +1). "
        f"{' '.join(advice)}"
    )


_CONVOLUTIONS = {f"Conv{transposed}{n}d" for transposed in ("", "Transpose") for n in (1, 2, 3)}
