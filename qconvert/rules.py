"""Rule files: TOML -> `Rules`, and `Rules` + sites -> `Plan`. Imports no torch.

Rules are read top to bottom. Every rule that selects a layer applies to it, and a later one overrides an earlier one key
by key. A rule that selects nothing is an error, unless it says ``optional = true``.
"""

import fnmatch
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
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
from tabulate import tabulate

from .errors import RuleError, did_you_mean
from .sites import CONV3D, Opaque, Site, conv3d_names


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_triple(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        return [value] * 3
    return list(value) if isinstance(value, tuple) else value


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
        None, description='weight only: "channel" is a learned factor per output channel that starts at mean |w|.'
    )
    threshold: Annotated[Literal["channel"] | Finite | None, _in_one_message('"channel" or a number')] = Field(
        None,
        description='input only: a learned threshold per input channel, starting at this number ("channel" starts it at 0).',
    )

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the quantizer itself."""
        return dict(self.model_extra or {})


QuantizerField = Annotated[Quantizer, BeforeValidator(_as_table, json_schema_input_type=str | Quantizer)]
Triple = Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=3, max_length=3)]


class Rule(_Table):
    """One ``[[rule]]`` table: which layers it selects, and what it sets for them."""

    layers: Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])] | None = Field(
        None, description="Glob, or list of globs, over dotted layer names; * crosses dots. Each must match a layer."
    )
    type: str | None = Field(None, description="Glob over class names, e.g. Conv3DSimple.")
    kernel_size: Annotated[Triple, BeforeValidator(_as_triple, json_schema_input_type=int | Triple)] | None = Field(
        None, description="Kernel size, one number or [D, H, W]."
    )
    groups: Literal["dense", "grouped", "depthwise"] | None = Field(
        None, description="dense: 1 group; depthwise: as many as input channels; grouped: between."
    )
    role: Literal["first", "last", "shortcut"] | None = Field(
        None, description="Place in the traced graph: first or last Conv3d on the data path, or on a residual shortcut."
    )
    min_in_channels: int | None = Field(None, ge=0, description="At least this many input channels.")
    max_in_channels: int | None = Field(None, ge=0, description="At most this many input channels.")
    min_parameters: int | None = Field(None, ge=0, description="At least this many weights and biases.")

    quantize: bool | None = Field(None, description="Whether the layer is converted. Setting weight or input implies true.")
    weight: QuantizerField | None = Field(None, description="Quantizer of the weight. sign where no rule sets it.")
    input: QuantizerField | None = Field(None, description="Quantizer of the input. sign where no rule sets it.")
    gradient_cancellation_threshold: Finite | None = Field(
        None,
        ge=0,
        description="Input gradients pass where |x - threshold| is at most this; 0 is off. 1 where no rule sets it.",
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
        values = {key: getattr(self, key) for key in _SETTINGS}
        return {key: value for key, value in values.items() if value is not None}


_SETTINGS = ("quantize", "weight", "input", "gradient_cancellation_threshold", "pad_value", "reason")


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


class RuleFile(_Table):
    """A rule file as it is written."""

    extends: str | None = Field(None, description="Bundled name or path of a rule file whose rules come first.")
    model: Model = Field(Model(), description="What the rules are for.")
    rule: list[Rule] = Field([], description="The rules, top to bottom.")


@dataclass(frozen=True)
class Rules:
    """The rules that apply, with those of extended files in front.

    Attributes:
        source: where they come from, for messages.
        rules: the rules, each with the label that messages and the decision table show.
        model: what they are for.
    """

    source: str
    rules: tuple[tuple[str, Rule], ...]
    model: Model = Model()


@dataclass(frozen=True)
class Decision:
    """What happens to one site, by which rule, and why.

    Attributes:
        site: the convolution.
        convert: whether it becomes a QConv3d.
        weight, input, gradient_cancellation_threshold, pad_value: the settings of the QConv3d.
        rule: label of the last rule that had a say ("" for none).
        reason: why.
    """

    site: Site
    convert: bool
    rule: str
    reason: str
    weight: Quantizer = Quantizer(quantizer="sign")
    input: Quantizer = Quantizer(quantizer="sign")
    gradient_cancellation_threshold: float = 1.0
    pad_value: float | None = None


@dataclass(frozen=True)
class Plan:
    """The decision table: one decision for every site, and the modules that the trace could not look into."""

    rules: Rules
    decisions: tuple[Decision, ...]
    opaque: tuple[Opaque, ...] = ()

    @property
    def converted(self) -> tuple[Decision, ...]:
        """The decisions to convert."""
        return tuple(decision for decision in self.decisions if decision.convert)

    def to_text(self) -> str:
        """Return the decision table for a terminal."""
        headers = ("layer", "type", "kernel", "in", "out", "role", "decision", "rule", "reason")
        table = tabulate([_shown(decision) for decision in self.decisions], headers, disable_numparse=True)
        sites = [decision.site for decision in self.decisions if decision.site.kind == CONV3D]
        notes = [f"Not traceable: {entry.name or 'the model'} ({entry.type}): {entry.reason}" for entry in self.opaque]
        return "\n".join([table, "", f"{len(sites)} Conv3d found, {len(self.converted)} to convert.", *notes])

    def __str__(self) -> str:
        return self.to_text()


def _shown(decision: Decision) -> tuple[str, ...]:
    site = decision.site
    verdict = f"W: {decision.weight.quantizer}, A: {decision.input.quantizer}" if decision.convert else "float"
    kernel = "x".join(map(str, site.kernel_size))
    role = ", ".join(sorted(site.roles)) + ("" if site.groups == 1 else f" {site.grouping}")
    channels = (str(site.in_channels or ""), str(site.out_channels or ""))
    return (site.name, site.type, kernel, *channels, role.strip(), verdict, decision.rule, decision.reason)


def load_rules(rules: "str | Path | Mapping[str, Any] | Rules") -> Rules:
    """Return the rules of a path, a bundled name, a dict of the same structure, or a `Rules` object.

    Raises:
        RuleError: if there are no such rules, or they do not read.
    """
    if isinstance(rules, Rules):
        return rules
    if isinstance(rules, Mapping):
        return _resolved(_validated(rules, "rules"), "rules", Path(), ())
    if isinstance(rules, (str, Path)):
        return _load(rules, Path(), ())
    raise RuleError(f"rules must be a path, a bundled name, a dict or Rules, got {type(rules).__name__}")


def bundled_rules() -> dict[str, Path]:
    """Return the rule files that come with qconvert, by name."""
    folder = Path(__file__).parent / "bundled"  # in an installed wheel
    if not folder.is_dir():
        folder = Path(__file__).parent.parent / "rules"  # in a checkout
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _load(name: str | Path, folder: Path, within: tuple[Path, ...]) -> Rules:
    path = _found(name, folder)
    if path in within:
        raise RuleError(f"{path.name}: extends itself, by way of {' -> '.join(file.name for file in within)}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise RuleError(f"{path}: not TOML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RuleError(f"{path}: cannot be read: {error}") from error
    return _resolved(_validated(table, str(path)), path.name, path.parent, (*within, path))


def _found(name: str | Path, folder: Path) -> Path:
    bundled = bundled_rules()
    if str(name) in bundled:
        return bundled[str(name)]
    path = folder / name
    if path.is_file():
        return path.resolve()
    known = ", ".join(bundled)
    raise RuleError(
        f"no rule file {str(name)!r}, and no bundled rules of that name. Bundled: {known}.{did_you_mean(str(name), bundled)}"
    )


def _resolved(file: RuleFile, label: str, folder: Path, within: tuple[Path, ...]) -> Rules:
    rules = tuple((f"{label}, rule {number}", rule) for number, rule in enumerate(file.rule, start=1))
    if file.extends is None:
        return Rules(label, rules, file.model)
    try:
        base = _load(file.extends, folder, within)
    except RuleError as error:
        raise RuleError(f"{label}: extends: {error}") from error
    return Rules(label, (*base.rules, *rules), base.model.model_copy(update=file.model.model_dump(exclude_unset=True)))


def _validated(table: Mapping[str, Any], source: str) -> RuleFile:
    try:
        return RuleFile.model_validate(dict(table))
    except ValidationError as error:
        raise RuleError("\n".join(dict.fromkeys(_worded(detail, source) for detail in error.errors()))) from error


def _worded(detail: Mapping[str, Any], source: str) -> str:
    """Word one of pydantic's errors: file, rule, key, what was seen, what is allowed."""
    place, *keys = [*detail["loc"]] or [""]
    table: type[BaseModel] = RuleFile
    where = source
    if place == "rule" and keys and isinstance(keys[0], int):
        table = Rule
        where = f"{source}, rule {keys.pop(0) + 1}"
    elif place == "model" and keys:
        table = Model
        where = f"{source}, [model]"
    else:
        keys.insert(0, place)
    key = str(keys[0]) if keys else ""
    if detail["type"] == "extra_forbidden":
        allowed = list(table.model_fields)
        return f"{where}: unknown key {key!r}. Allowed: {', '.join(allowed)}.{did_you_mean(key, allowed)}"
    # the rest of the location is pydantic's own (which member of a union it tried), but for a table's key
    inner = "".join(f".{part}" for part in keys[1:] if part in Quantizer.model_fields)
    message = detail["msg"].removeprefix("Value error, ")
    seen = "" if isinstance(detail["input"], Rule) else f", got {detail['input']!r}"
    suggestion = did_you_mean(detail["input"], _literals(detail)) if isinstance(detail["input"], str) else ""
    return f"{where}: {key}{inner}: {message}{seen}.{suggestion}" if key else f"{where}: {message}{seen}."


def _literals(detail: Mapping[str, Any]) -> list[str]:
    expected = str(detail.get("ctx", {}).get("expected", ""))
    return [part.strip(" '") for part in expected.replace(" or ", ",").split(",")]


def matches(site: Site, glob: str) -> bool:
    """Return whether the glob matches one of the site's names. ``*`` crosses dots."""
    return any(fnmatch.fnmatchcase(name, glob) for name in site.names)


def match(sites: Iterable[Site], rules: Rules, opaque: tuple[Opaque, ...] = ()) -> Plan:
    """Decide for every site what happens to it.

    Raises:
        RuleError: if a rule, or one glob of a rule, selects no Conv3d and is not optional.
    """
    sites = tuple(sites)
    candidates = [site for site in sites if site.kind == CONV3D]
    for label, rule in rules.rules:
        _check_selects(rule, label, candidates)
    return Plan(rules, tuple(_decide(site, rules) for site in sites), opaque)


def _check_selects(rule: Rule, label: str, sites: list[Site]) -> None:
    if rule.optional:
        return
    for glob in rule.layers or ():
        if not any(matches(site, glob) for site in sites):
            raise RuleError(f"{label}: layers: {glob!r} selects no Conv3d. {_nearest(glob, sites)}")
    if not any(rule.selects(site) for site in sites):
        selectors = rule.model_dump(exclude_none=True, exclude={*_SETTINGS, "optional"})
        raise RuleError(
            f"{label}: no Conv3d has all of {selectors}. Add `optional = true` if that is fine. {_nearest('', sites)}"
        )


def _nearest(glob: str, sites: list[Site]) -> str:
    names = conv3d_names(sites)
    common = sorted(names, key=lambda name: -_common_prefix(name, glob))[:5]
    more = f", ... ({len(names)} in all)" if len(names) > len(common) else ""
    return f"Nearest: {', '.join(common)}{more}.{did_you_mean(glob, names)}"


def _common_prefix(name: str, glob: str) -> int:
    return next((index for index, (a, b) in enumerate(zip(name, glob, strict=False)) if a != b), min(len(name), len(glob)))


def _decide(site: Site, rules: Rules) -> Decision:
    if site.kind != CONV3D:
        return Decision(site, False, "", f"not a Conv3d ({site.kind})")
    sets: dict[str, Any] = {}
    last = ""
    for label, rule in rules.rules:
        if rule.selects(site):
            sets |= rule.sets
            last = label
    quantize = sets.pop("quantize", "weight" in sets or "input" in sets)
    reason = sets.pop("reason", None)
    if site.converted:
        return Decision(site, False, last, "already a QConv3d, left as it is")
    if quantize and site.blocker is not None:
        return Decision(site, False, last, site.blocker)
    if not quantize:
        return Decision(site, False, last, reason or ("quantize = false" if last else "no rule selects it"))
    return Decision(site, True, last, reason or "selected", **sets)
