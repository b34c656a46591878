"""`Table`: a report's numbers in rows and columns, before anyone decides how they look."""

from dataclasses import dataclass


class Measure(float):
    """A measured number, of any magnitude: shown with three significant digits rather than as a count."""


Cell = str | int | float | tuple[int, ...] | None


@dataclass(frozen=True)
class Table:
    """Rows under headers.

    Attributes:
        headers: the column names.
        rows: a cell for each column; numbers are exact.
        brief: the columns that a terminal shows (all if empty).
        plain: for each row, whether a terminal may fold it with others of its ``type`` (none if empty).
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    brief: tuple[str, ...] = ()
    plain: tuple[bool, ...] = ()

    def column(self, header: str) -> int:
        """Return the index of a column."""
        return self.headers.index(header)

    def briefly(self) -> "Table":
        """Return the table as a terminal shows it: the brief columns, the plain rows added up by type."""
        plain = self.plain or (False,) * len(self.rows)
        kept = [row for row, folds in zip(self.rows, plain, strict=True) if not folds]
        by_type: dict[Cell, list[tuple[Cell, ...]]] = {}
        for row, folds in zip(self.rows, plain, strict=True):
            if folds:
                by_type.setdefault(row[self.column("type")], []).append(row)
        kept += [self._folded(kind, rows) for kind, rows in by_type.items()]
        columns = [self.column(header) for header in self.brief or self.headers]
        return Table(
            tuple(self.headers[column] for column in columns),
            tuple(tuple(row[column] for column in columns) for row in kept),
        )

    def _folded(self, kind: Cell, rows: list[tuple[Cell, ...]]) -> tuple[Cell, ...]:
        """Add up rows of one type: numbers are summed, words are kept where all rows say the same."""
        cells: list[Cell] = []
        for values in zip(*rows, strict=True):
            numbers = [value for value in values if isinstance(value, (int, float))]
            same = values[0] if all(value == values[0] for value in values) else ""
            cells.append(sum(numbers) if len(numbers) == len(values) else same)
        cells[self.column("layer")] = f"{len(rows)} x {kind}"
        return tuple(cells)
