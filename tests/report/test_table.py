"""A table folded for a terminal."""

from qconvert.report.table import Table

HEADERS = ("layer", "type", "calls", "shape", "bits", "reason")


def test_rows_are_folded_by_type_in_the_order_of_their_first():
    table = Table(
        HEADERS,
        (
            ("b1", "Norm", 1, (1, 8), 10, "float"),
            ("conv", "Conv", 1, (1, 8), 100, "kept"),
            ("d", "Drop", 2, None, 0, ""),
            ("b2", "Norm", 3, (1, 16), 20, "float"),
        ),
        plain=(True, False, True, True),
    )
    assert table.briefly().rows == (
        ("conv", "Conv", 1, (1, 8), 100, "kept"),
        # numbers are added, words stay where all rows agree, and are left out where they do not
        ("2 x Norm", "Norm", 4, "", 30, "float"),
        ("1 x Drop", "Drop", 2, None, 0, ""),
    )


def test_unknown_numbers_stay_unknown():
    table = Table(HEADERS, (("a", "Norm", None, None, 10, ""), ("b", "Norm", None, None, 5, "")), plain=(True, True))
    assert table.briefly().rows == (("2 x Norm", "Norm", None, None, 15, ""),)


def test_sum_of_known_and_unknown_numbers_is_not_shown():
    table = Table(HEADERS, (("a", "Norm", 1, None, 10, ""), ("b", "Norm", None, None, 5, "")), plain=(True, True))
    assert table.briefly().rows == (("2 x Norm", "Norm", "", None, 15, ""),)


def test_brief_columns_are_chosen_after_folding():
    table = Table(HEADERS, (("a", "Norm", 1, None, 10, ""),), brief=("bits", "layer"), plain=(True,))
    assert (table.briefly().headers, table.briefly().rows) == (("bits", "layer"), ((10, "1 x Norm"),))


def test_table_that_says_nothing_of_brevity_is_shown_whole():
    table = Table(HEADERS, (("a", "Norm", 1, None, 10, ""),))
    assert table.briefly() == table
