"""The tables of a rule file as pydantic models that forbid unknown keys, and the words for what is wrong in one.

Imports no torch: which quantizers exist, and what settings they take, is checked by rewrite.py.
"""

import fnmatch
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from .errors import RuleError, did_you_mean
from .sites import Role, Site


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_triple(value: object) -> object:
    return [value] * 3 if isinstance(value, int) and not isinstance(value, bool) else value


def _as_table(value: object) -> object:
    return {"quantizer": value} if isinstance(value, str) else value


def _in_one_message(allowed: str) -> WrapValidator:
    """Report a value that fits none of several types once, instead of once for each type."""

    def validate(value: object, handler: ValidatorFunctionWrapHandler) -> object:
        try:
            return handler(value)
        except ValidationError as error:
            raise ValueError(f"Input should be {allowed}") from error

    return WrapValidator(validate)


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


Finite = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[int, Field(ge=0)]


class Quantizer(_Table):
    """A quantizer by name, with its settings.

    Keys other than these three are handed to the quantizer (``bits``, ``beta``, ``signed``, ...), which checks them.
    """

    model_config = ConfigDict(extra="allow")

    quantizer: str = Field(description="Name of the quantizer, e.g. sign, approxsign, ternary, weightdorefa, lsq.")
    scale: Literal["channel"] | None = Field(
        None, description='weight only: "channel" is a learned factor and offset per output channel.'
    )
    threshold: Annotated[Literal["channel", "auto"] | Finite | None, _in_one_message('"channel", "auto" or a number')] = (
        Field(
            None,
            description="input only: a learned threshold per input channel, starting at this number. "
            '"channel" starts it where it splits the values evenly; "auto": so too, but none if they are symmetric about 0.',
        )
    )

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the quantizer itself."""
        return dict(self.model_extra or {})


QuantizerField = Annotated[Quantizer, BeforeValidator(_as_table, json_schema_input_type=str | Quantizer)]
Globs = Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]
Temperature = Annotated[Finite, Field(ge=0, le=1)]
Triple = Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=3, max_length=3)]


class Rule(_Table):
    """One ``[[rule]]`` table: which layers it selects, and what it sets for them."""

    layers: Globs | None = Field(
        None, description="Glob, or list of globs, over dotted layer names; * crosses dots. Each must match a layer."
    )
    type: str | None = Field(None, description="Glob over class names, e.g. Conv3DSimple.")
    kernel_size: Annotated[Triple, BeforeValidator(_as_triple, json_schema_input_type=int | Triple)] | None = Field(
        None, description="Kernel size, one number or [D, H, W]."
    )
    groups: Literal["dense", "grouped", "depthwise"] | None = Field(
        None, description="dense: 1 group; depthwise: as many as input channels; grouped: between."
    )
    role: Role | None = Field(
        None,
        description="Place in the traced graph: first or last Conv3d on the data path, on a residual shortcut, or half of a "
        "factorised pair (spatial and temporal, depthwise and pointwise).",
    )
    min_in_channels: int | None = Field(None, ge=0, description="At least this many input channels.")
    max_in_channels: int | None = Field(None, ge=0, description="At most this many input channels.")
    min_parameters: int | None = Field(None, ge=0, description="At least this many weights and biases.")

    quantize: bool | None = Field(
        None, description="Whether the layer is converted. Where no rule sets it: whether one sets weight or input."
    )
    weight: QuantizerField | None = Field(None, description="Quantizer of the weight. sign where no rule sets it.")
    input: QuantizerField | None = Field(None, description="Quantizer of the input. sign where no rule sets it.")
    gradient_cancellation_threshold: Finite | None = Field(
        None,
        ge=0,
        description="Input gradients pass where |x - threshold| is at most this; 0 is off. "
        "Where no rule sets it: 1, or off for an identity input.",
    )
    pad_value: Finite | None = Field(
        None, description="Value of the zeros-padding. Where no rule sets it: -1 for a 1-bit input, else 0."
    )
    reason: str | None = Field(None, description="Why; shown in the decision table.")
    optional: bool = Field(False, description="Whether it is fine that the rule selects nothing.")

    @model_validator(mode="after")
    def _sides(self) -> Self:
        if self.weight is not None and self.weight.threshold is not None:
            raise ValueError("weight takes no 'threshold' (that is a setting of input)")
        if self.input is not None and self.input.scale is not None:
            raise ValueError("input takes no 'scale' (that is a setting of weight)")
        return self

    def selects(self, site: Site) -> bool:
        """Return whether the rule selects the site: every selector that it has must agree."""
        return (
            (self.layers is None or any(matches(site, glob) for glob in self.layers))
            and (self.type is None or fnmatch.fnmatchcase(site.type, self.type))
            and self.kernel_size in (None, list(site.kernel_size))
            and self.groups in (None, site.grouping)
            and (self.role is None or self.role in site.roles)
            and (self.min_in_channels is None or site.in_channels >= self.min_in_channels)
            and (self.max_in_channels is None or site.in_channels <= self.max_in_channels)
            and (self.min_parameters is None or site.parameters >= self.min_parameters)
        )

    @cached_property
    def sets(self) -> dict[str, Any]:
        """What the rule sets, by key."""
        values = {key: getattr(self, key) for key in SETTINGS}
        return {key: value for key, value in values.items() if value is not None}


SETTINGS = ("quantize", "weight", "input", "gradient_cancellation_threshold", "pad_value", "reason")


class Model(_Table):
    """The ``[model]`` table: what the rules are for."""

    family: str | None = Field(None, description="Name of the model family.")
    input_shape: Annotated[
        list[Size] | list[list[Size]] | None, _in_one_message("a list of sizes, or a list of such lists")
    ] = Field(
        None,
        min_length=1,
        description="Shape of the example input used for FLOPs; a list of shapes for a model that takes a list.",
    )
    input_dtype: Literal["float", "uint8", "int64"] = Field("float", description="dtype of the example input.")


class Stage(_Table):
    """One ``[[schedule.stage]]`` table: what the layers that it concerns are while it lasts."""

    steps: int = Field(gt=0, description="How many calls of schedule.step() the stage lasts.")
    layers: Globs | None = Field(
        None,
        description="Glob, or list of globs, over the names of converted layers: the others keep what they have. "
        "All of them where it is absent.",
    )
    weight: QuantizerField | None = Field(None, description="Quantizer of the weight; the rule's own where it is absent.")
    input: QuantizerField | None = Field(None, description="Quantizer of the input; the rule's own where it is absent.")
    gradient_cancellation_threshold: Finite | None = Field(
        None, ge=0, description="Half-width of the gradient window; absent: the rule's own, or off for an identity input."
    )
    transition: Literal["step", "linear", "layerwise"] = Field(
        "step",
        description="step: at once; linear: the quantizers before are mixed with these, whose share grows over the stage; "
        "layerwise: one layer after the other.",
    )
    order: Literal["output", "input", "sensitivity"] | None = Field(
        None, description="layerwise only: from the output (the default), from the input, or the least sensitive first."
    )
    temperature: Annotated[list[Temperature], Field(min_length=2, max_length=2)] | None = Field(
        None, description="[from, to]: temperature of progressive_sign, linear over the stage."
    )

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.order is not None and self.transition != "layerwise":
            raise ValueError('order is a setting of transition = "layerwise"')
        for side, spec in (("weight", self.weight), ("input", self.input)):
            for key in ("scale", "threshold"):
                if spec is not None and getattr(spec, key) is not None:
                    raise ValueError(f"{side} takes no {key!r} in a stage: the layer keeps that of its rule")
        return self


class Stages(_Table):
    """The ``[schedule]`` table: what happens to the converted layers while they are trained."""

    stage: list[Stage] = Field([], description="The stages, one after the other. Then the layers are what their rules say.")


class RuleFile(_Table):
    """A rule file as it is written."""

    extends: str | None = Field(None, description="Bundled name or path of a rule file whose rules come first.")
    model: Model = Field(Model(), description="What the rules are for.")
    rule: list[Rule] = Field([], description="The rules, top to bottom.")
    schedule: Stages | None = Field(None, description="Stages of training; replaces that of the file extended.")


def validated(table: Mapping[str, Any], source: str) -> RuleFile:
    """Return the rule file that the table describes.

    Raises:
        RuleError: with a line for each thing that is wrong, naming the source, rule and key.
    """
    try:
        return RuleFile.model_validate(_with_lists(table))
    except ValidationError as error:
        raise RuleError("\n".join(dict.fromkeys(_worded(detail, source) for detail in error.errors()))) from error


def _with_lists(value: object) -> object:
    """Return what TOML would have given: lists where a dict made in Python has tuples."""
    if isinstance(value, Mapping):
        return {key: _with_lists(inner) for key, inner in value.items()}
    return [_with_lists(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _worded(detail: Mapping[str, Any], source: str) -> str:
    """Word one of pydantic's errors: file, rule, key, what was seen, what is allowed."""
    place, *keys = [*detail["loc"]] or [""]
    table: type[BaseModel] = RuleFile
    where = source
    if place == "rule" and keys and isinstance(keys[0], int):
        table = Rule
        where = f"{source}, rule {keys.pop(0) + 1}"
    elif place in _TOP_LEVEL and keys:
        table = _TOP_LEVEL[place]
        where = f"{source}, [{place}]"
        if keys[0] == "stage" and len(keys) > 1:
            table = Stage
            where = f"{where}, stage {keys[1] + 1}"
            del keys[:2]
    else:
        keys.insert(0, place)
    key = str(keys[0]) if keys else ""
    if detail["type"] == "extra_forbidden":
        allowed = list(table.model_fields)
        return f"{where}: unknown key {key!r}. Allowed: {', '.join(allowed)}.{did_you_mean(key, allowed)}"
    # the rest of the location is pydantic's own (which member of a union it tried), but for a table's key
    inner = "".join(f".{part}" for part in keys[1:] if part in Quantizer.model_fields)
    message = re.sub(r" or instance of \w+", "", detail["msg"].removeprefix("Value error, "))
    seen = "" if isinstance(detail["input"], (Rule, Stage)) else f", got {detail['input']!r}"
    suggestion = did_you_mean(detail["input"], _literals(detail)) if isinstance(detail["input"], str) else ""
    return f"{where}: {key}{inner}: {message}{seen}.{suggestion}" if key else f"{where}: {message}{seen}."


_TOP_LEVEL: dict[Any, type[BaseModel]] = {"model": Model, "schedule": Stages}
"""The tables at the top of a file, by key."""


def _literals(detail: Mapping[str, Any]) -> list[str]:
    expected = str(detail.get("ctx", {}).get("expected", ""))
    return [part.strip(" '") for part in expected.replace(" or ", ",").split(",")]


def matches(site: Site, glob: str) -> bool:
    """Return whether the glob matches one of the site's names. ``*`` crosses dots."""
    return any(fnmatch.fnmatchcase(name, glob) for name in site.names)
