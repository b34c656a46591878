"""A report as one self-contained HTML page."""

from html import escape

from .table import Table
from .text import shown

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; color: #1c2330; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; white-space: nowrap; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #e3e7ee; text-align: left; }
th { position: sticky; top: 0; background: #fff; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.bar { display: grid; grid-template-columns: 18rem 1fr 9rem; gap: .7rem; align-items: center; font-size: 12px; }
.bar span:first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bar span:last-child { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.track { display: block; height: .7rem; background: #f0f2f6; border-radius: .2rem; }
.fill { display: block; height: 100%; background: #3566d6; border-radius: .2rem; }
"""

_BAR_HEADERS = ("bits", "bits before", "bits after", "FLOPs", "FLOPs before", "FLOPs after", "BOPs", "BOPs after")
_MOST_BARS = 15


def html_page(title: str, layers: Table, totals: Table, notes: list[str]) -> str:
    """Return the page: totals, bars that show where bits and operations go, every layer, notes."""
    bars = "".join(_bars(layers, header) for header in _BAR_HEADERS if header in layers.headers)
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>{_table(totals)}"
        f"<ul>{listed}</ul>{bars}<h2>Layers</h2>{_table(layers)}</body></html>\n"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(header)}</th>" for header in table.headers)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(cell: object) -> str:
    if isinstance(cell, (int, float)):
        return f'<td class="number" title="{cell:,}">{escape(shown(cell))}</td>'
    return f"<td>{escape(shown(cell))}</td>"  # type: ignore[arg-type]  # rows hold cells


def _bars(layers: Table, header: str) -> str:
    """Return a bar for each of the largest layers of a column, as its share of the column's sum."""
    name, column = layers.column("layer"), layers.column(header)
    values = [(str(row[name]), value) for row in layers.rows if isinstance(value := row[column], (int, float)) and value]
    if not values:
        return ""
    whole = sum(value for _, value in values)
    largest = sorted(values, key=lambda entry: -entry[1])
    drawn = "".join(_bar(label, value / whole, shown(value)) for label, value in largest[:_MOST_BARS])
    rest = sum(value for _, value in largest[_MOST_BARS:])
    if rest:
        drawn += _bar(f"{len(largest) - _MOST_BARS} more layers", rest / whole, shown(rest))
    return f"<h2>Where the {escape(header)} are</h2>{drawn}"


def _bar(label: str, share: float, value: str) -> str:
    return (
        f'<div class="bar"><span title="{escape(label)}">{escape(label)}</span>'
        f'<span class="track"><span class="fill" style="width:{100 * share:.2f}%"></span></span>'
        f"<span>{escape(value)} ({100 * share:.1f} %)</span></div>"
    )
