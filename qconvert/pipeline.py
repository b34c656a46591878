"""The whole flow on one screen: trace, match, rewrite, report.

model --trace--> Traced --match(rules)--> Plan --rewrite--> converted model --compare--> Report
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .errors import ModelError
from .example import example_input
from .report import Report, compare
from .rewrite import check_quantizers, rewrite
from .rules import Plan, Rules, load_rules, match
from .sites import CONV3D
from .trace import copied, structural_copy, trace

RulesLike = str | Path | Mapping[str, Any] | Rules


def binarize(
    model: nn.Module,
    rules: RulesLike = "default",
    *,
    example_inputs: Any = None,
    inplace: bool = False,
    report: bool = True,
) -> nn.Module:
    """Replace the 3D convolutions that the rules name by `QConv3d`, keeping the pretrained weights.

    Args:
        model: any model with a Conv3d: pretrained or not, in any mode, on any device.
        rules: path of a rule file, name of bundled rules, a dict of the same structure, or `Rules`.
        example_inputs: what the report counts operations with: a tensor (or a list, for a model that takes one), a tuple
            of arguments, or a dict of keyword arguments. Default: the rules' ``[model] input_shape``; without one the
            report has no operations.
        inplace: convert the model itself instead of a deep copy.
        report: print the before/after report.

    Returns:
        A model of the same class, with the same Parameters (of the copy, unless in place), state-dict keys, modes, hooks,
        devices and dtypes. Keys are added for what is learned beside the weights: ``<layer>.activation.threshold``,
        ``<layer>.scale``, ``<layer>.*.step`` (LSQ). A model wrapped in DataParallel, DDP or torch.compile comes back
        without its wrapper, with a warning. If anything fails, the model that came in is as it was.

    Raises:
        RuleError: if the rules do not read, or one selects nothing.
        ModelError: if there is no Conv3d, or the model cannot be copied or converted.
        InputError: if the model does not run on the example input.
    """
    decided, plain = _planned(model, rules)
    if plain is not model:
        warnings.warn(f"the {type(model).__name__} wrapper is taken off: wrap the converted model again", stacklevel=2)
    if not decided.converted:
        warnings.warn("the rules convert no layer of this model; qconvert.plan() says why for each", stacklevel=2)
    if report:
        print(_preview(plain, decided, example_inputs))  # noqa: T201 (what the caller asked to see)
    return rewrite(plain if inplace else copied(plain), decided)


def plan(model: nn.Module, rules: RulesLike = "default") -> Plan:
    """Return what `binarize` would do, without doing it: a decision with its rule and reason for every convolution.

    Raises:
        RuleError, ModelError: as `binarize`.
    """
    return _planned(model, rules)[0]


def preview(model: nn.Module, rules: RulesLike = "default", example_inputs: Any = None) -> Report:
    """Return the report that `binarize` prints, without converting the model.

    Raises:
        RuleError, ModelError, InputError: as `binarize`.
    """
    decided, plain = _planned(model, rules)
    return _preview(plain, decided, example_inputs)


def check_rules(rules: RulesLike) -> Rules:
    """Return the rules, read and with every quantizer that they name tried.

    Raises:
        RuleError: if they do not read, or a quantizer does not exist or take its settings.
    """
    loaded = load_rules(rules)
    check_quantizers(loaded)
    return loaded


def _planned(model: nn.Module, rules: RulesLike) -> tuple[Plan, nn.Module]:
    loaded = check_rules(rules)
    traced = trace(model)
    if not any(site.kind == CONV3D for site in traced.sites):
        kinds = sorted({type(module).__name__ for module in traced.model.modules()} & _CONVOLUTIONS)
        name = type(traced.model).__name__
        raise ModelError(f"{name} has no Conv3d to convert. Its convolutions: {', '.join(kinds) or 'none'}")
    return match(traced.sites, loaded, traced.opaque), traced.model


def _preview(model: nn.Module, decided: Plan, example_inputs: Any) -> Report:
    inputs = example_input(decided.rules.model, model) if example_inputs is None else example_inputs
    # converts a copy that shares the Parameters: if the report fails, nothing has happened to the model
    return compare(model, rewrite(structural_copy(model), decided), inputs)


_CONVOLUTIONS = {f"Conv{transposed}{n}d" for transposed in ("", "Transpose") for n in (1, 2, 3)}
