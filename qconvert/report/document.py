"""`Document`: a report as data and tables, and the formats that any such report is read in."""

import csv
import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from .facts import Uncounted
from .html import html_page
from .options import Option
from .table import Table
from .text import markdown_table, shown, text_table

CONVENTIONS = (
    "1 MAC = one multiply and one add = 2 FLOPs. Counted: convolutions, linear layers, matrix products, attention, for one "
    "forward pass of the example input. A MAC has the precision of the larger of its operands, so 1-bit weights with float "
    "inputs save bits, not FLOPs."
)
NOT_RUN = (
    "No operations counted: pass example_inputs (on the command line --input), or set [model] input_shape in the rules."
)


class Document(ABC):
    """A report. Subclasses say what is in it."""

    @property
    @abstractmethod
    def title(self) -> str:
        """One line that says what it is about."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""

    @abstractmethod
    def layer_table(self) -> Table:
        """Return one row per layer."""

    @abstractmethod
    def notes(self) -> list[str]:
        """Return the conventions, and what the numbers leave out."""

    def tables(self) -> tuple[Table, ...]:
        """Return what a text shows, from top to bottom."""
        return (self.layer_table(),)

    def to_json(self) -> str:
        """Return `to_dict` as JSON; a number that JSON does not have is the string "inf", "-inf" or "nan"."""
        return json.dumps(_json_value(self.to_dict()), indent=2)

    def to_csv(self) -> str:
        """Return one line per layer, every number exact."""
        table = self.layer_table()
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(table.headers)
        writer.writerows([shown(cell) if isinstance(cell, tuple) else cell for cell in row] for row in table.rows)
        return out.getvalue()

    def to_text(self) -> str:
        """Return tables for a terminal: wide columns are left out, rows that say little are added up by type."""
        return self._joined(text_table, "")

    def to_markdown(self) -> str:
        """Return tables in GitHub's Markdown, with every layer and column."""
        return self._joined(markdown_table, "- ")

    def _joined(self, as_text: Callable[[Table], str], bullet: str) -> str:
        notes = "\n".join(f"{bullet}{note}" for note in self.notes())
        return "\n\n".join([self.title, *map(as_text, self.tables()), notes]) + "\n"

    def __str__(self) -> str:
        return self.to_text()


def _json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_value(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class CostDocument(Document):
    """A report about bits and operations."""

    uncounted: tuple[Uncounted, ...]
    options: tuple[Option, ...]

    @property
    @abstractmethod
    def was_run(self) -> bool:
        """Whether operations were counted."""

    @abstractmethod
    def totals_table(self) -> Table:
        """Return the sums."""

    def tables(self) -> tuple[Table, ...]:
        """Return the layers and the totals."""
        return self.layer_table(), self.totals_table()

    def notes(self) -> list[str]:
        """Return the conventions, what the numbers leave out, and what optional settings add."""
        notes = [CONVENTIONS if self.was_run else NOT_RUN]
        ran = [f"{entry.name} x{entry.calls}" for entry in self.uncounted if entry.calls]
        idle = [entry.name for entry in self.uncounted if not entry.calls]
        if ran:
            notes.append(f"Ran, but has no MAC formula: {', '.join(ran)}.")
        if idle:
            notes.append(f"Never called, so without operations: {', '.join(idle)}.")
        return [*notes, *map(str, self.options)]

    def to_html(self) -> str:
        """Return one self-contained page, with bars that show where bits and operations go."""
        return html_page(self.title, self.layer_table(), self.totals_table(), self.notes())
