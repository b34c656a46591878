"""Tables as text: for a terminal, and for Markdown."""

from collections.abc import Mapping
from types import MappingProxyType

from tabulate import tabulate

from .table import Cell, Measure, Table

_PREFIXES = ("", " k", " M", " G", " T", " P")
_STEP = 1000


def si(number: float) -> str:
    """Return a count with an SI prefix and two decimals: 1849688064 -> "1.85 G". Below 1000 it is exact."""
    if abs(number) < _STEP:
        return f"{number:g}" if number == int(number) else f"{number:.2f}"
    power = 0
    while round(abs(number), 2) >= _STEP and power < len(_PREFIXES) - 1:
        number /= _STEP
        power += 1
    return f"{number:.2f}{_PREFIXES[power]}"


def shown(cell: Cell) -> str:
    """Return a cell as people read it; "-" for what is not known."""
    if cell is None:
        return "-"
    if isinstance(cell, tuple):
        return "x".join(map(str, cell))
    if isinstance(cell, Measure):
        return f"{cell:.3g}"
    return si(cell) if isinstance(cell, (int, float)) else cell


def text_table(table: Table) -> str:
    """Return the table for a terminal."""
    return _tabulated(table.briefly(), "simple")


def markdown_table(table: Table) -> str:
    """Return the whole table in GitHub's Markdown."""
    return _tabulated(table, "github", {"|": "\\|", "\n": " "})


def _tabulated(table: Table, style: str, escapes: Mapping[str, str | int | None] = MappingProxyType({})) -> str:
    numeric = {
        column for column in range(len(table.headers)) if any(isinstance(row[column], (int, float)) for row in table.rows)
    }
    align = ["right" if column in numeric else "left" for column in range(len(table.headers))]
    rows = [[shown(cell).translate(str.maketrans(dict(escapes))) for cell in row] for row in table.rows]
    return tabulate(rows, table.headers, tablefmt=style, colalign=align if rows else None, disable_numparse=True)
