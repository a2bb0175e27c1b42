"""benchmarks/csv_rows.py: tables that go on where they were stopped, wherever that was."""

import argparse

import pytest
from conftest import benchmark

from agent.errors import UsageError

csv_rows = benchmark("csv_rows")
COLUMNS = ("net", "error")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rows.csv"
    for net, error in (("a", 3.31697), ("b", 2.5)):
        csv_rows.append_row(path, COLUMNS, {"net": net, "error": error})
    return path


@pytest.mark.parametrize("cut", range(1, 7))
def test_a_last_line_that_was_cut_off_is_not_there_and_the_next_row_takes_its_place(path, cut):
    path.write_bytes(path.read_bytes()[:-cut])
    assert csv_rows.read_rows(path, COLUMNS) == [{"net": "a", "error": "3.31697"}]
    csv_rows.append_row(path, COLUMNS, {"net": "c", "error": 1.0})
    assert path.read_text() == "net,error\na,3.31697\nc,1.0\n"


def test_an_empty_file_gets_its_head(path):
    path.write_text("")
    assert csv_rows.read_rows(path, COLUMNS) == []
    csv_rows.append_row(path, COLUMNS, {"net": "c", "error": 1.0})
    assert path.read_text() == "net,error\nc,1.0\n"


def test_another_table_and_a_place_where_no_file_can_be_are_refused(path):
    with pytest.raises(UsageError, match=r"is another table \(its columns are net,error\): give another --out"):
        csv_rows.read_rows(path, ("run", "return"))
    for place in (path.parent, path.parent / "no" / "rows.csv"):
        with pytest.raises(UsageError, match="must be a folder, and the name a file's"):
            csv_rows.read_rows(place, COLUMNS)


def test_numbers_that_cannot_be_are_refused():
    assert csv_rows.at_least_one("12") == 12
    assert csv_rows.seed_number("0") == 0
    assert csv_rows.positive("0.5") == 0.5
    for kind, text in (
        (csv_rows.at_least_one, "0"), (csv_rows.at_least_one, "-5"), (csv_rows.seed_number, "1" * 20),
        (csv_rows.seed_number, "-1"), (csv_rows.positive, "nan"), (csv_rows.positive, "inf"), (csv_rows.positive, "0"),
    ):  # fmt: skip
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            kind(text)
