"""The table of docs/zoo.md: what is seen of a model, and what one that fails does to the others."""

import dataclasses
from collections import Counter

import pytest
from models import TRAPS, Entry
from page import HEADERS, Failure, Row, page, sums
from table import examine, examined
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:.*(constant|convert no layer)")  # the command says so in its table


@pytest.fixture(scope="module")
def row() -> Row:
    """Return what is seen of a model with a convolution of each kind: a module and a function."""
    return examine(_trap("functional conv"))


def _trap(name: str) -> Entry:
    return next(entry for entry in TRAPS if entry.name == name)


def _refuses() -> nn.Module:
    raise OSError("no such library")


def test_row_holds_what_the_model_is(row: Row):
    assert (row.found, row.decided, row.functional, row.converted) == (1, 1, 1, 0)
    assert row.left_float == Counter(["first layer: reads the raw input", "reads few channels: the raw input"])
    assert row.good
    assert row.seconds > 0


def test_row_counts_opaque_modules():
    row = examine(_trap("value control flow"))
    assert [module.type for module in row.opaque] == ["ValueControlFlow"]
    assert row.cells[HEADERS.index("opaque modules")] == "1"
    assert any(note.startswith("1 opaque, `ValueControlFlow`: `TraceError: ") for note in row.notes)


def test_backward_that_fails_in_float_too_is_told_apart(row: Row):
    converted_only = dataclasses.replace(row, backward="RuntimeError: why")
    both = dataclasses.replace(converted_only, float_backward="RuntimeError: why")
    column = HEADERS.index("backward")
    assert [each.cells[column] for each in (row, converted_only, both)] == ["yes", "**no**", "no, nor in float"]
    assert [each.good for each in (row, converted_only, both)] == [True, False, True]


def test_identity_that_is_not_identical_is_seen(row: Row):
    other = dataclasses.replace(row, identical_in_eval=False)
    assert not other.good
    assert other.cells[HEADERS.index("identical in eval()")] == "**no**"
    assert sums([row, other])["identity conversion identical in eval()"] == "1 of 2 (50 %)"


def test_model_that_cannot_be_built_keeps_its_line(capsys):
    seen = examined(Entry("broken", _refuses, lambda: None, 0), "1/1")
    assert seen == Failure("broken", "OSError: no such library")
    assert capsys.readouterr().err.startswith("    1/1  broken")


def test_page_has_every_model(row: Row):
    text = page([row, Failure("broken", "OSError: no `such` library")], [], {"torch": "2"})
    lines = text.splitlines()
    assert "| broken " in "\n".join(lines)
    assert "    - failed: `OSError: no 'such' library`" in lines
    assert "| models that convert " in text
    assert "1 of 2 (50 %)" in text


def test_page_is_the_same_but_for_the_times(row: Row):
    again = dataclasses.replace(examine(_trap("functional conv")), ratio=row.ratio, seconds=row.seconds)
    assert page([again], [again], {}) == page([row], [row], {})
