"""`Document`: a report as data and tables, and the formats that any such report is read in."""

import csv
import io
import json
from abc import ABC, abstractmethod
from typing import Any

from .facts import Uncounted
from .html import html_page
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

    uncounted: tuple[Uncounted, ...]

    @property
    @abstractmethod
    def title(self) -> str:
        """One line that says what it is about."""

    @property
    @abstractmethod
    def was_run(self) -> bool:
        """Whether operations were counted."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""

    @abstractmethod
    def layer_table(self) -> Table:
        """Return one row per layer."""

    @abstractmethod
    def totals_table(self) -> Table:
        """Return the sums."""

    def notes(self) -> list[str]:
        """Return the conventions, and what the numbers leave out."""
        notes = [CONVENTIONS if self.was_run else NOT_RUN]
        ran = [f"{entry.name} x{entry.calls}" for entry in self.uncounted if entry.calls]
        idle = [entry.name for entry in self.uncounted if not entry.calls]
        if ran:
            notes.append(f"Ran, but has no MAC formula: {', '.join(ran)}.")
        if idle:
            notes.append(f"Never called, so without operations: {', '.join(idle)}.")
        return notes

    def to_json(self) -> str:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_csv(self) -> str:
        """Return one line per layer, every number exact."""
        table = self.layer_table()
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(table.headers)
        writer.writerows([shown(cell) if isinstance(cell, tuple) else cell for cell in row] for row in table.rows)
        return out.getvalue()

    def to_text(self) -> str:
        """Return tables for a terminal: layers without MACs are added up by type, wide columns are left out."""
        return self._joined(text_table(self.layer_table()), text_table(self.totals_table()), "")

    def to_markdown(self) -> str:
        """Return tables in GitHub's Markdown, with every layer and column."""
        return self._joined(markdown_table(self.layer_table()), markdown_table(self.totals_table()), "- ")

    def to_html(self) -> str:
        """Return one self-contained page, with bars that show where bits and operations go."""
        return html_page(self.title, self.layer_table(), self.totals_table(), self.notes())

    def _joined(self, layers: str, totals: str, bullet: str) -> str:
        notes = "\n".join(f"{bullet}{note}" for note in self.notes())
        return f"{self.title}\n\n{layers}\n\n{totals}\n\n{notes}\n"

    def __str__(self) -> str:
        return self.to_text()
