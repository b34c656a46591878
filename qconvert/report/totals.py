"""The totals of a report: sums over its layers, and the two conventions for one number of operations."""

from dataclasses import asdict, dataclass
from typing import Any

from .facts import Facts

BITS_PER_MIB = 8 * 2**20


@dataclass(frozen=True)
class Totals:
    """Sums over a model. Counts of operations are for one forward pass, None if the model was not run.

    Attributes:
        parameters: number of Parameter values; a shared Parameter counts once.
        parameter_bits: bits that they need in storage.
        buffer_bits: bits of the buffers that a checkpoint holds.
        macs: multiply-accumulates of all precisions.
        float_macs: those with an operand of more than 8 bits.
        flops: 2 x float_macs.
        bops: 2 x weight bits x input bits x MACs of the others.
    """

    parameters: int
    parameter_bits: int
    buffer_bits: int
    macs: int | None
    float_macs: int | None
    flops: int | None
    bops: int | None
    macs_by_precision: dict[str, int]

    @property
    def ops(self) -> float | None:
        """OPs = FLOPs + BOPs / 64, the convention of Bi-Real Net and ReActNet."""
        return None if self.flops is None or self.bops is None else self.flops + self.bops / 64

    @property
    def mebibytes(self) -> float:
        """Size of Parameters and buffers in MiB."""
        return (self.parameter_bits + self.buffer_bits) / BITS_PER_MIB

    def to_dict(self) -> dict[str, Any]:
        """Return the totals as plain data."""
        return {**asdict(self), "ops": self.ops, "mebibytes": self.mebibytes}


def add_up(facts: Facts) -> Totals:
    """Return the totals of the layers."""
    layers, was_run = facts.layers, facts.was_run
    by_precision: dict[str, int] = {}
    for layer in layers:
        if layer.macs:
            label = layer.precision or "float"
            by_precision[label] = by_precision.get(label, 0) + layer.macs
    return Totals(
        parameters=sum(layer.parameters for layer in layers),
        parameter_bits=sum(layer.parameter_bits for layer in layers),
        buffer_bits=sum(layer.buffer_bits for layer in layers),
        macs=sum(layer.macs or 0 for layer in layers) if was_run else None,
        float_macs=sum(layer.macs or 0 for layer in layers if not layer.is_low_bit) if was_run else None,
        flops=sum(layer.flops or 0 for layer in layers) if was_run else None,
        bops=sum(layer.bops or 0 for layer in layers) if was_run else None,
        macs_by_precision=by_precision,
    )
