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
from .report import compare
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
        without its wrapper, with a warning.

    Raises:
        RuleError: if the rules do not read, or one selects nothing.
        ModelError: if there is no Conv3d, or the model cannot be copied or converted.
        InputError: if the model does not run on the example input.
        In each case the model is as it was.
    """
    plan_, plain = _planned(model, rules)
    if plain is not model:
        warnings.warn(f"the {type(model).__name__} wrapper is taken off: wrap the converted model again", stacklevel=2)
    if report:
        inputs = example_input(plan_.rules.model, plain) if example_inputs is None else example_inputs
        preview = rewrite(structural_copy(plain), plan_)  # shares the tensors: nothing has happened yet if this fails
        print(compare(plain, preview, inputs))  # noqa: T201 (the report is what the caller asked to see)
    return rewrite(plain if inplace else copied(plain), plan_)


def plan(model: nn.Module, rules: RulesLike = "default") -> Plan:
    """Return what `binarize` would do, without doing it: a decision with its rule and reason for every convolution.

    Raises:
        RuleError, ModelError: as `binarize`.
    """
    return _planned(model, rules)[0]


def _planned(model: nn.Module, rules: RulesLike) -> tuple[Plan, nn.Module]:
    loaded = load_rules(rules)
    check_quantizers(loaded)
    traced = trace(model)
    if not any(site.kind == CONV3D for site in traced.sites):
        kinds = sorted({type(module).__name__ for module in traced.model.modules()} & _CONVOLUTIONS)
        raise ModelError(f"{type(traced.model).__name__} has no Conv3d to convert. Its convolutions: {kinds or 'none'}")
    return match(traced.sites, loaded, traced.opaque), traced.model


_CONVOLUTIONS = {f"Conv{transpose}{n}d" for transpose in ("", "Transpose") for n in (1, 2, 3)}
