"""`profile` and `compare`: what one model costs, and what a conversion changes."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..layers import QConv3d_NoAct
from ..rewrite import plan_of
from ..sites import Opaque, Overwrite
from ..trace import unwrapped
from .document import CostDocument
from .facts import Layer, Uncounted, collect
from .options import Option
from .table import Cell, Table
from .totals import Totals, add_up


@dataclass(frozen=True)
class Profile(CostDocument):
    """What one model costs, layer by layer and in total.

    Attributes:
        model: the model's class name.
        layers: every layer that holds Parameters or buffers, or computes MACs.
        totals: their sums.
        uncounted: what ran without a MAC formula or was never called.
        options: what optional settings of quantized layers add.
    """

    model: str
    layers: tuple[Layer, ...]
    totals: Totals
    uncounted: tuple[Uncounted, ...]
    options: tuple[Option, ...] = ()

    @property
    def title(self) -> str:
        """The model's class name."""
        return f"{self.model}: parameter bits and operations"

    @property
    def was_run(self) -> bool:
        """Whether operations were counted."""
        return self.totals.macs is not None

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as plain data: ``totals``, ``layers``, ``uncounted``, ``options``."""
        return {
            "model": self.model,
            "totals": self.totals.to_dict(),
            "layers": [_layer_dict(layer) for layer in self.layers],
            "uncounted": [asdict(entry) for entry in self.uncounted],
            "options": [asdict(option) for option in self.options],
        }

    def layer_table(self) -> Table:
        """Return the layers as a table."""
        headers = ("layer", "type", "precision", "calls", "input", "output", "parameters", "bits", "MACs", "FLOPs", "BOPs")
        rows = tuple(
            (
                *(layer.name, layer.type, layer.precision, layer.calls, layer.input_shape, layer.output_shape),
                *(layer.parameters, layer.parameter_bits, layer.macs, layer.flops, layer.bops),
            )
            for layer in self.layers
        )
        shown = ("layer", "type", "precision", "parameters", "bits", "MACs", "FLOPs", "BOPs")
        return Table(headers, rows, shown, tuple(_is_plain(layer) for layer in self.layers))

    def totals_table(self) -> Table:
        """Return the totals as a table."""
        return Table(("total", "value"), tuple(_total_rows(self.totals)))


@dataclass(frozen=True)
class Row:
    """One layer before and after a conversion.

    Attributes:
        before, after: its facts; None where the model has no such layer.
        decision: "converted" or "float".
        rule: label of the rule that decided, "" for none.
        reason: why.
    """

    before: Layer | None
    after: Layer | None
    decision: str
    rule: str
    reason: str

    @property
    def layer(self) -> Layer:
        """The layer as it is now, or as it was where it is gone."""
        return self.after or self.before or _NOTHING

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain data."""
        decided = {"decision": self.decision, "rule": self.rule, "reason": self.reason}
        sides = {"before": _layer_dict(self.before or _NOTHING), "after": _layer_dict(self.after or _NOTHING)}
        return {**_layer_dict(self.layer), **decided, **sides}


@dataclass(frozen=True)
class Report(CostDocument):
    """A model before and after a conversion, layer by layer and in total.

    Attributes:
        model: the model's class name.
        rows: every layer that holds Parameters or buffers, or computes MACs.
        before, after: the totals.
        uncounted: what ran without a MAC formula or was never called, after the conversion.
        opaque: the modules that torch.fx could not look into, and why.
        overwrites: the operations in place that broke autograd, rewritten or left.
        options: what optional settings of quantized layers add.
    """

    model: str
    rows: tuple[Row, ...]
    before: Totals
    after: Totals
    uncounted: tuple[Uncounted, ...]
    opaque: tuple[Opaque, ...]
    overwrites: tuple[Overwrite, ...] = ()
    options: tuple[Option, ...] = ()

    @property
    def title(self) -> str:
        """How many Conv3d there are, and how many were converted."""
        convs = [row for row in self.rows if row.layer.is_conv3d]
        converted = sum(row.decision == "converted" for row in convs)
        return f"{self.model}: {len(convs)} Conv3d found, {converted} converted"

    @property
    def was_run(self) -> bool:
        """Whether operations were counted."""
        return self.after.macs is not None

    def notes(self) -> list[str]:
        """Return the conventions, what the numbers leave out, what could not be traced, and what was rewritten."""
        return [*super().notes(), *map(str, (*self.opaque, *self.overwrites))]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, by the names of the attributes; rows are ``layers``, ``before`` and ``after`` in ``totals``."""
        return {
            "model": self.model,
            "totals": {"before": self.before.to_dict(), "after": self.after.to_dict()},
            "layers": [row.to_dict() for row in self.rows],
            "uncounted": [asdict(entry) for entry in self.uncounted],
            "opaque": [asdict(module) for module in self.opaque],
            "overwrites": [asdict(operation) for operation in self.overwrites],
            "options": [asdict(option) for option in self.options],
        }

    def layer_table(self) -> Table:
        """Return the layers as a table."""
        headers = (
            *("layer", "type", "decision", "precision", "calls", "input", "output", "parameters"),
            *("bits before", "bits after", "MACs", "FLOPs before", "FLOPs after", "BOPs after", "rule", "reason"),
        )
        rows = tuple(_cells(row) for row in self.rows)
        shown = (
            *("layer", "decision", "precision", "parameters", "bits before", "bits after"),
            *("FLOPs before", "FLOPs after", "BOPs after"),
        )
        return Table(headers, rows, shown, tuple(_is_plain(row.layer) for row in self.rows))

    def totals_table(self) -> Table:
        """Return the totals as a table."""
        rows = tuple((*row, _ratio(*row[1:])) for row in _total_rows(self.before, self.after))
        return Table(("total", "before", "after", "before / after"), rows)


_NOTHING = Layer("", "", macs=0)


def profile(model: nn.Module, example_inputs: Any = None) -> Profile:
    """Return what the model costs. It is not changed, and not run for real unless it cannot be run on shapes alone.

    Args:
        model: any model.
        example_inputs: a tensor (or a list, for a model that takes one), a tuple of arguments, or a dict of keyword
            arguments. None: bits only, counts of operations are None.

    Raises:
        InputError: if the model does not run on the inputs.
    """
    facts = collect(model, example_inputs)
    return Profile(type(unwrapped(model)).__name__, facts.layers, add_up(facts), facts.uncounted, facts.options)


def compare(before: nn.Module, after: nn.Module, example_inputs: Any = None) -> Report:
    """Return what changes from one model to the other, layer by layer. Neither is changed.

    Args:
        before: a model.
        after: its conversion.
        example_inputs: as for `profile`; both models are run on it.

    Raises:
        InputError: if one of the models does not run on the inputs.
    """
    old, new = collect(before, example_inputs), collect(after, example_inputs)
    old_layers = {layer.name: layer for layer in old.layers}
    new_layers = {layer.name: layer for layer in new.layers}
    plan = plan_of(unwrapped(after))
    decisions = {decision.site.name: decision for decision in plan.decisions} if plan else {}
    converted = {name for name, module in unwrapped(after).named_modules() if isinstance(module, QConv3d_NoAct)}
    rows = []
    for name in {**old_layers, **new_layers}:
        decision = decisions.get(name)
        is_conv3d = any(name in layers and layers[name].is_conv3d for layers in (old_layers, new_layers))
        reason = decision.reason if decision else "no conversion recorded" if is_conv3d else "not a Conv3d"
        verdict = "converted" if name in converted else "float"
        rows.append(Row(old_layers.get(name), new_layers.get(name), verdict, decision.rule if decision else "", reason))
    opaque, overwrites = (plan.opaque, plan.overwrites) if plan else ((), ())
    name = type(unwrapped(before)).__name__
    return Report(name, tuple(rows), add_up(old), add_up(new), new.uncounted, opaque, overwrites, new.options)


def _layer_dict(layer: Layer) -> dict[str, Any]:
    return {**asdict(layer), "precision": layer.precision, "flops": layer.flops, "bops": layer.bops}


def _is_plain(layer: Layer) -> bool:
    """Whether the layer has no row of its own in a terminal: neither a Conv3d nor anything with MACs."""
    return not layer.is_conv3d and not layer.macs


def _cells(row: Row) -> tuple[Cell, ...]:
    layer, before, after = row.layer, row.before or _NOTHING, row.after or _NOTHING
    return (
        *(layer.name, layer.type, row.decision, layer.precision, layer.calls, layer.input_shape, layer.output_shape),
        *(layer.parameters, before.parameter_bits, after.parameter_bits),
        *(layer.macs, before.flops, after.flops, after.bops, row.rule, row.reason),
    )


def _total_rows(*totals: Totals) -> list[tuple[Cell, ...]]:
    precisions = dict.fromkeys(label for side in totals for label in side.macs_by_precision)
    by_precision: list[tuple[Cell, ...]] = [
        (f"- {label}", *(side.macs_by_precision.get(label, 0) for side in totals)) for label in precisions
    ]
    return [
        ("parameters", *(side.parameters for side in totals)),
        ("parameter bits", *(side.parameter_bits for side in totals)),
        ("buffer bits", *(side.buffer_bits for side in totals)),
        ("size (MiB)", *(side.mebibytes for side in totals)),
        ("MACs", *(side.macs for side in totals)),
        *by_precision,
        ("FLOPs (2 x float MACs)", *(side.flops for side in totals)),
        ("BOPs (2 x W bits x A bits x MACs)", *(side.bops for side in totals)),
        ("OPs (FLOPs + BOPs / 64)", *(side.ops for side in totals)),
    ]


def _ratio(before: Cell, after: Cell) -> str:
    if not isinstance(before, (int, float)) or not isinstance(after, (int, float)) or not before or not after:
        return ""
    return f"{before / after:.2f} x"
