"""What a file says beside its tensors: rules, decision table, the settings of each layer, the levels of each weight."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from ..errors import ModelError
from ..layers import QConv3d, QConv3d_NoAct
from ..quantizations import Quantization, quantization_from_name
from ..quantizations.base import MAX_BITS
from ..quantizations.levels import Levels
from ..quantizations.stored import bare
from ..rewrite import build
from ..rules import Decision, Plan, Rules
from ..sites import Site
from ..tables import Finite, Model, Quantizer, Rule, Stage

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_MOST = 2**MAX_BITS


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DecisionRecord(_Record):
    """A row of the decision table: a `Decision`, with its site's name."""

    layer: str
    convert: bool
    rule: str
    reason: str
    weight: Quantizer
    input: Quantizer
    gradient_cancellation_threshold: Finite | None = None
    pad_value: Finite | None = None
    shortcut: bool = False
    rprelu: bool = False
    latent_clip: Finite | None = None

    @classmethod
    def of(cls, decision: Decision) -> Self:
        """Return the row for a decision."""
        what = {key: getattr(decision, key) for key in ("convert", "rule", "reason", "weight", "input")}
        return cls(layer=decision.site.name, **decision.settings | what)

    def on(self, site: Site) -> Decision:
        """Return the decision about a site of another model."""
        return Decision(site, **{key: getattr(self, key) for key in type(self).model_fields if key != "layer"})


class LabelledRule(_Record):
    """A rule, with the label that messages show."""

    label: str
    rule: Rule


class LabelledStage(_Record):
    """A stage of the schedule, with the label that messages show."""

    label: str
    stage: Stage


class PlanRecord(_Record):
    """The `Plan` by which the model was converted: its rules and its decisions about 3D convolutions."""

    source: str
    rules: list[LabelledRule]
    model: Model
    schedule: list[LabelledStage]
    decisions: list[DecisionRecord]

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """Return the record of a plan."""
        rules = plan.rules
        return cls(
            source=rules.source,
            rules=[LabelledRule(label=label, rule=rule) for label, rule in rules.rules],
            model=rules.model,
            schedule=[LabelledStage(label=label, stage=stage) for label, stage in rules.schedule],
            decisions=[DecisionRecord.of(decision) for decision in plan.decisions if decision.site.is_conv3d],
        )

    def to_rules(self) -> Rules:
        """Return the rules."""
        rules = tuple((each.label, each.rule) for each in self.rules)
        return Rules(self.source, rules, self.model, tuple((each.label, each.stage) for each in self.schedule))


PerChannel = Literal["threshold", "spread", "scale", "offset"]


class LayerRecord(_Record):
    """What a quantized layer is: the arguments of its constructor, and which of its settings per channel there are."""

    weight: Quantizer
    input: Quantizer | None = None
    gradient_cancellation_threshold: Finite | None = None
    pad_value: Finite
    standardize: bool = False
    shortcut: bool = False
    rprelu: bool = False
    latent_clip: Finite | None = None
    per_channel: list[PerChannel]

    @classmethod
    def of(cls, layer: QConv3d_NoAct) -> Self:
        """Return the record of a layer.

        Raises:
            QConvertError: if a quantizer cannot be built again from its name and settings, or a number is not finite.
        """
        activation = layer.activation if isinstance(layer, QConv3d) else None
        owners: dict[PerChannel, Any] = {"threshold": activation, "spread": activation, "scale": layer, "offset": layer}
        try:
            return cls(
                weight=_named(layer._weight_quantize),
                input=None if activation is None else _named(activation.activation_function),
                gradient_cancellation_threshold=None if activation is None else activation.gradient_cancellation_threshold,
                pad_value=layer.pad_value,
                standardize=layer.standardize,
                shortcut=layer.shortcut,
                rprelu=layer.rprelu is not None,
                latent_clip=layer.latent_clip,
                per_channel=[key for key, owner in owners.items() if getattr(owner, key, None) is not None],
            )
        except ValidationError as error:
            raise ModelError(_worded(error)) from error

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of ``_quantize``; what there is per channel starts at 1."""
        keys = ("pad_value", "standardize", "shortcut", "rprelu", "latent_clip")
        given = {key: getattr(self, key) for key in keys} | dict.fromkeys(self.per_channel, 1.0)
        given["weight_quantization"] = build(self.weight)
        if self.input is not None:
            given["input_quantization"] = build(self.input)
            given["gradient_cancellation_threshold"] = self.gradient_cancellation_threshold
        return given


def _named(quantizer: Quantization) -> Quantizer:
    quantizer = bare(quantizer)
    cls, name = type(quantizer), quantizer.name
    if quantization_from_name(name) is not cls:
        raise ModelError(f"{cls.__name__} is not the quantizer {name!r}: register it under a name of its own")
    return Quantizer(quantizer=name, **quantizer.settings)


class WeightRecord(_Record):
    """The `Levels` of a packed weight, its shape, and the quantizer that made it."""

    quantizer: str
    shape: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=5, max_length=5)]
    dtype: Literal["float16", "bfloat16", "float32", "float64"]
    bits: Annotated[int, Field(ge=1, le=MAX_BITS)]
    count: Annotated[int, Field(ge=1, le=_MOST)]
    lowest: Annotated[int, Field(ge=-_MOST, le=_MOST)]
    step: Annotated[int, Field(ge=1, le=_MOST)]
    divisor: Annotated[int, Field(ge=1, le=_MOST)]
    unit: Finite

    @classmethod
    def of(cls, levels: Levels, shape: torch.Size, quantizer: str) -> Self:
        """Return the record of a weight."""
        dtype = str(levels.dtype).removeprefix("torch.")
        fields = {key: getattr(levels, key) for key in ("bits", "count", "lowest", "step", "divisor", "unit")}
        return cls(quantizer=quantizer, shape=list(shape), dtype=dtype, **fields)  # type: ignore[arg-type]  # is checked

    @property
    def levels(self) -> Levels:
        """The levels."""
        fields = {key: getattr(self, key) for key in ("bits", "count", "lowest", "step", "divisor", "unit")}
        return Levels(dtype=_DTYPES[self.dtype], **fields)


class Header(_Record):
    """The tables of a file.

    Attributes:
        plan: by which the model was converted; None for one that was built with quantized layers.
        layers: every quantized layer, by its name.
        weights: every packed weight, by the name of its tensor.
    """

    plan: PlanRecord | None
    layers: dict[str, LayerRecord]
    weights: dict[str, WeightRecord]

    def to_metadata(self) -> dict[str, str]:
        """Return each table as JSON.

        Raises:
            ModelError: if it has a setting that JSON does not bring back as it was.
        """
        try:
            tables = {key: adapter.dump_json(getattr(self, key), exclude_defaults=True) for key, adapter in _TABLES.items()}
        except PydanticSerializationError as error:
            raise ModelError(f"a setting cannot be written as JSON: {error}") from error
        metadata = {key: table.decode() for key, table in tables.items()}
        if Header.from_metadata(metadata).layers != self.layers:
            raise ModelError("a quantizer has settings that JSON does not bring back: use numbers, strings and lists")
        return metadata

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Self:
        """Return the tables that are in the metadata.

        Raises:
            ModelError: naming the first entry that is missing or wrong.
        """
        tables = {}
        for key, adapter in _TABLES.items():
            if key not in metadata:
                raise ModelError(f"{key} is missing")
            try:
                tables[key] = adapter.validate_json(metadata[key])
            except ValidationError as error:
                raise ModelError(_worded(error, key)) from error
        return cls(**tables)


_TABLES: dict[str, TypeAdapter[Any]] = {
    "plan": TypeAdapter(PlanRecord | None),
    "layers": TypeAdapter(dict[str, LayerRecord]),
    "weights": TypeAdapter(dict[str, WeightRecord]),
}


def _worded(error: ValidationError, *place: str) -> str:
    """Word the first of pydantic's errors: where, what, and what was seen."""
    detail = error.errors()[0]
    where = ".".join(map(str, (*place, *detail["loc"])))
    return f"{where}: {detail['msg']}, got {str(detail['input'])[:80]!r}"
