"""`Summary`: what runs on bits in a packed model, what does not, and why."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..report.document import Document
from ..report.table import Table


@dataclass(frozen=True)
class PackedLayer:
    """A QConv3d of the model that was packed.

    Attributes:
        name: its dotted name.
        precision: bits of weights and inputs, such as "W1A1".
        reason: why it runs as it did before; None for a layer that runs on bits.
        takes_in: the operations behind it that happen in the same pass over its output.
        gives: what it puts out: "floats", "bits" for the layer behind it, or "floats, bits".
    """

    name: str
    precision: str
    reason: str | None
    takes_in: tuple[str, ...] = ()
    gives: str = "floats"

    @property
    def runs_on(self) -> str:
        """Bits, or what it ran on before."""
        return "bits" if self.reason is None else "as before"


@dataclass(frozen=True)
class Summary(Document):
    """What `pack` has done.

    Attributes:
        layers: every QConv3d of the model.
        opaque: parts of the model that run as they did, layer by layer, and why none of their operations are taken in.
        is_compiled: whether bits are counted by the compiled kernel.
        difference: largest difference from the outputs of the model that was packed, on the example inputs; None without.
    """

    layers: tuple[PackedLayer, ...]
    opaque: Mapping[str, str]
    is_compiled: bool
    difference: float | None = None

    @property
    def title(self) -> str:
        """One line that says what it is about."""
        on_bits = sum(layer.reason is None for layer in self.layers)
        return f"Packed: {on_bits} of {len(self.layers)} converted layers run on bits."

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "opaque": dict(self.opaque)}

    def layer_table(self) -> Table:
        """Return one row per layer."""
        rows = [
            (each.name, each.precision, each.runs_on, ", ".join(each.takes_in), each.gives, each.reason)
            for each in self.layers
        ]
        return Table(("layer", "precision", "runs on", "takes in", "gives", "reason"), tuple(rows))

    def notes(self) -> list[str]:
        """Return what the table leaves out."""
        notes = []
        if not self.is_compiled:
            notes.append("No compiled kernel: bits are counted in torch's operations, slowly. pip install qconvert[cpu]")
        notes += [f"Layer by layer: {name or 'the model'}: {reason}" for name, reason in self.opaque.items()]
        if self.difference is not None:
            notes.append(f"Largest difference on the example inputs: {self.difference:.2g}.")
        return notes
