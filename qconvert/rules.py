"""Rule files: TOML -> `Rules`, and `Rules` + sites -> `Plan`. Imports no torch.

Rules are read top to bottom. Every rule that selects a layer applies to it, and a later one overrides an earlier one key
by key. A rule that selects nothing is an error, unless it says ``optional = true``.
"""

import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .errors import RuleError, did_you_mean
from .sites import Opaque, Overwrite, Site, conv3d_names
from .tables import SETTINGS, Model, Quantizer, Rule, RuleFile, Stage, matches, validated


@dataclass(frozen=True)
class Rules:
    """The rules that apply, with those of extended files in front.

    Attributes:
        source: where they come from, for messages.
        rules: the rules, each with the label that messages and the decision table show.
        model: what they are for.
        schedule: the stages of training, each with its label.
    """

    source: str
    rules: tuple[tuple[str, Rule], ...]
    model: Model = Model()
    schedule: tuple[tuple[str, Stage], ...] = ()


@dataclass(frozen=True)
class Decision:
    """What happens to one site, by which rule, and why.

    Attributes:
        site: the convolution.
        convert: whether it becomes a QConv3d.
        weight, input, gradient_cancellation_threshold, pad_value, shortcut, rprelu, latent_clip: the settings of the
            QConv3d; None is its default.
        rule: label of the last rule that had a say ("" for none).
        reason: why.
    """

    site: Site
    convert: bool
    rule: str
    reason: str
    weight: Quantizer = Quantizer(quantizer="sign")
    input: Quantizer = Quantizer(quantizer="sign")
    gradient_cancellation_threshold: float | None = None
    pad_value: float | None = None
    shortcut: bool = False
    rprelu: bool = False
    latent_clip: float | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What the rules set for the layer, as plain data."""
        keys = ("gradient_cancellation_threshold", "pad_value", "shortcut", "rprelu", "latent_clip")
        quantizers = {"weight": self.weight.model_dump(), "input": self.input.model_dump()}
        return quantizers | {key: getattr(self, key) for key in keys}

    @property
    def depends_on_data(self) -> bool:
        """Whether what the layer starts from, or is worth, depends on the values that it reads."""
        return self.input.quantizer != "identity" or self.weight.scale is not None or isinstance(self.input.threshold, str)

    @property
    def options(self) -> tuple[str, ...]:
        """The names of the optional settings that are on."""
        on = {"standardize": self.weight.standardize, "shortcut": self.shortcut, "rprelu": self.rprelu}
        return tuple(name for name, is_on in on.items() if is_on)


@dataclass(frozen=True)
class Plan:
    """The decision table: one decision for every site, and what else the trace has found.

    Attributes:
        rules: the rules.
        decisions: what happens to each site.
        opaque: the modules that the trace could not look into.
        overwrites: the operations in place that break autograd. Those without an obstacle are rewritten.
    """

    rules: Rules
    decisions: tuple[Decision, ...]
    opaque: tuple[Opaque, ...] = ()
    overwrites: tuple[Overwrite, ...] = ()

    @property
    def converted(self) -> tuple[Decision, ...]:
        """The decisions to convert."""
        return tuple(decision for decision in self.decisions if decision.convert)

    def to_text(self) -> str:
        """Return the decision table for a terminal: a row for each 3D convolution, a line for each other kind of layer."""
        headers = ("layer", "type", "kernel", "in", "out", "role", "decision", "rule", "reason")
        rows = [_shown(decision) for decision in self.decisions if decision.site.is_conv3d]
        found = len(rows)
        lines = [
            tabulate(rows, headers, disable_numparse=True),
            "",
            f"{found} Conv3d found, {len(self.converted)} to convert.",
            *_others(decision.site for decision in self.decisions),
            *map(str, (*self.opaque, *self.overwrites)),
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.to_text()


def _shown(decision: Decision) -> tuple[str, ...]:
    site = decision.site
    sides = f"W: {decision.weight.quantizer}, A: {decision.input.quantizer}"
    verdict = ", ".join([sides, *decision.options]) if decision.convert else "float"
    kernel = "x".join(map(str, site.kernel_size)) + ("" if site.groups == 1 else f" {site.grouping}")
    channels = (str(site.in_channels or ""), str(site.out_channels or ""))
    return (site.name, site.type, kernel, *channels, ", ".join(sorted(site.roles)), verdict, decision.rule, decision.reason)


def _others(sites: Iterable[Site]) -> list[str]:
    """Return a line for each kind of layer that is no 3D convolution."""
    parameters: dict[str, list[int]] = {}
    for site in sites:
        if not site.is_conv3d:
            parameters.setdefault(site.kind, []).append(site.parameters)
    return [f"{len(each)} {kind}, {sum(each):,} parameters: not a Conv3d, float." for kind, each in parameters.items()]


def load_rules(rules: "str | Path | Mapping[str, Any] | Rules") -> Rules:
    """Return the rules of a path, a bundled name, a dict of the same structure, or a `Rules` object.

    Raises:
        RuleError: if there are no such rules, or they do not read.
    """
    if isinstance(rules, Rules):
        return rules
    if isinstance(rules, Mapping):
        return _resolved(validated(rules, "rules"), "rules", Path(), ())
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
    return _resolved(validated(table, path.name), path.name, path.parent, (*within, path))


def _found(name: str | Path, folder: Path) -> Path:
    bundled = bundled_rules()
    if str(name) in bundled:
        return bundled[str(name)]
    if "\n" in str(name):
        raise RuleError("rules must be a path, a bundled name or a dict; this looks like the text of a rule file")
    path = folder / name
    if path.is_file():
        return path.resolve()
    known = ", ".join(bundled)
    raise RuleError(
        f"no rule file {str(name)!r}, and no bundled rules of that name. Bundled: {known}.{did_you_mean(str(name), bundled)}"
    )


def _resolved(file: RuleFile, label: str, folder: Path, within: tuple[Path, ...]) -> Rules:
    rules = tuple((f"{label}, rule {number}", rule) for number, rule in enumerate(file.rule, start=1))
    stages = () if file.schedule is None else file.schedule.stage
    schedule = tuple((f"{label}, [schedule], stage {number}", stage) for number, stage in enumerate(stages, start=1))
    if file.extends is None:
        return Rules(label, rules, file.model, schedule)
    try:
        base = _load(file.extends, folder, within)
    except RuleError as error:
        raise RuleError(f"{label}: extends: {error}") from error
    model = base.model.model_copy(update=file.model.model_dump(exclude_unset=True))
    return Rules(label, (*base.rules, *rules), model, base.schedule if file.schedule is None else schedule)


def match(
    sites: Iterable[Site], rules: Rules, opaque: tuple[Opaque, ...] = (), overwrites: tuple[Overwrite, ...] = ()
) -> Plan:
    """Decide for every site what happens to it.

    Raises:
        RuleError: if a rule, or one glob of a rule, selects no Conv3d and is not optional.
    """
    sites = tuple(sites)
    for label, rule in rules.rules:
        _check_selects(rule, label, sites)
    return Plan(rules, tuple(_decide(site, rules) for site in sites), opaque, overwrites)


def _check_selects(rule: Rule, label: str, sites: tuple[Site, ...]) -> None:
    if rule.optional:
        return
    convs = [site for site in sites if site.is_conv3d]
    for glob in rule.layers or ():
        if not any(matches(site, glob) for site in convs):
            instead = _instead(site for site in sites if matches(site, glob))
            raise RuleError(f"{label}: layers: {glob!r} selects no Conv3d{instead}. {nearest(glob, conv3d_names(convs))}")
    if not any(rule.selects(site) for site in convs):
        selectors = rule.model_dump(exclude_none=True, exclude={*SETTINGS, "optional"})
        instead = _instead(site for site in sites if rule.selects(site))
        hint = "Add `optional = true` if that is fine."
        raise RuleError(f"{label}: no Conv3d has all of {selectors}{instead}. {hint} {nearest('', conv3d_names(convs))}")


def _instead(others: Iterable[Site]) -> str:
    """Say what a rule fits that is no Conv3d and so is not selected."""
    kinds = Counter(site.kind for site in others)
    return f", only {', '.join(f'{count} {kind}' for kind, count in kinds.items())}" if kinds else ""


def nearest(glob: str, names: Iterable[str]) -> str:
    """Say which of the names of layers are the nearest to a glob that selects none of them."""
    names = [name or "(the model itself)" for name in names]
    common = sorted(names, key=lambda name: -_common_prefix(name, glob))[:5]
    more = f", ... ({len(names)} in all)" if len(names) > len(common) else ""
    return f"Nearest: {', '.join(common)}{more}.{did_you_mean(glob, names)}"


def _common_prefix(name: str, glob: str) -> int:
    return next((index for index, (a, b) in enumerate(zip(name, glob, strict=False)) if a != b), min(len(name), len(glob)))


def _decide(site: Site, rules: Rules) -> Decision:
    if not site.is_conv3d:
        return Decision(site, False, "", f"not a Conv3d ({site.kind})")
    sets: dict[str, Any] = {}
    last = ""
    refusal: tuple[str, str] | None = None  # the rule that says quantize = false, and its reason
    for label, rule in rules.rules:
        if rule.selects(site):
            sets |= rule.sets
            last = label
            if rule.quantize is not None:
                refusal = None if rule.quantize else (label, rule.reason or "quantize = false")
    quantize = sets.pop("quantize", "weight" in sets or "input" in sets)
    reason = sets.pop("reason", "")
    if site.converted:
        return Decision(site, False, last, "already a QConv3d, left as it is")
    if quantize and site.blocker is not None:
        return Decision(site, False, last, site.blocker)
    if refusal is not None:
        return Decision(site, False, *refusal)
    if not quantize:
        nothing = "no rule sets weight, input or quantize" if last else "no rule selects it"
        return Decision(site, False, last, reason or nothing)
    reason = reason or "selected"
    if sets.get("shortcut") and site.no_shortcut is not None:
        sets["shortcut"] = False
        reason = f"{reason}; no shortcut: {site.no_shortcut}"
    return Decision(site, True, last, reason, **sets)
