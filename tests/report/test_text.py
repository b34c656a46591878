"""Numbers and tables as people read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_totals import printed_tables, read

from qconvert.report.table import Table
from qconvert.report.text import markdown_table, shown, si, text_table


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1.00 k"),
        (1005, "1.00 k"),  # a tie of the decimal text that the float misses: 1.005 is below it
        (62_208, "62.21 k"),
        (999_994, "999.99 k"),
        (999_995, "1.00 M"),  # not 1000.00 k
        (999_994_999, "999.99 M"),
        (999_995_000, "1.00 G"),
        (1_849_688_064, "1.85 G"),
        (4 * 10**15, "4.00 P"),
        (12_345 * 10**15, "12345.00 P"),  # the prefixes end here
        (0.5, "0.50"),
        (0.004, "0.00"),
        (12.0, "12"),
        (127.302, "127.30"),
    ],
)
def test_si(number: float, text: str):
    assert si(number) == text


@given(st.integers(0, 10**18))
def test_si_is_right_to_half_a_unit_of_its_last_digit(number: int):
    value, tolerance = read(si(number))
    assert abs(value - number) <= tolerance


@given(st.integers(0, 10**15 - 1))
def test_si_has_at_most_three_digits_before_the_point(number: int):
    assert len(si(number).partition(".")[0]) <= 3


@given(st.integers(0, 10**16), st.integers(0, 10**16))
def test_si_keeps_the_order(left: int, right: int):
    small, large = sorted((left, right))
    assert read(si(small))[0] <= read(si(large))[0]


def test_cells_as_shown():
    assert [shown(cell) for cell in (None, (1, 3, 16, 112, 112), 1500, "conv", "", ())] == [
        *("-", "1x3x16x112x112", "1.50 k", "conv", "", "")
    ]


_TABLE = Table(
    ("layer", "type", "parameters", "FLOPs", "reason"),
    (
        ("stem", "Conv3d", 1234, 10, "first"),
        ("a", "BatchNorm3d", 8, 0, "x"),
        ("b", "BatchNorm3d", 16, 0, "y"),
        ("1e5", "Linear", 20, 3, "007"),
    ),
    ("layer", "parameters", "FLOPs"),
    (False, True, True, False),
)


def test_text_table_shows_the_brief_columns_and_folds_the_plain_rows():
    # "Linear" is no plain row, so it stays above the folded ones
    assert text_table(_TABLE) == "\n".join(
        [
            "layer              parameters    FLOPs",
            "---------------  ------------  -------",
            "stem                   1.23 k       10",
            "1e5                        20        3",
            "2 x BatchNorm3d            24        0",
        ]
    )


def test_markdown_table_shows_everything():
    (rows,) = printed_tables(markdown_table(_TABLE))
    assert [row["layer"] for row in rows] == ["stem", "a", "b", "1e5"]
    # words that look like numbers stay as they are: a module may well be called 1e5
    assert rows[3] == {"layer": "1e5", "type": "Linear", "parameters": "20", "FLOPs": "3", "reason": "007"}


def test_markdown_table_keeps_bars_inside_their_cell():
    text = markdown_table(Table(("layer", "reason"), (("conv", "a | b"),)))
    assert text.splitlines()[-1].replace("\\|", "").count("|") == 3


def test_table_without_rows_has_headers():
    assert "layer" in text_table(Table(("layer", "MACs"), ()))
