"""Tables as CSV: nothing that a spreadsheet runs, and whole records alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from anomalib_aprilgan.csv_text import as_csv, plain_name, read_csv, safe_name, safe_path, whole_records

ROWS = [["image_path", "score"], ["a\nb.png", "1"], ['"quoted", one\r\n.png', "2"], ["\udcff.png", "3"]]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes(as_csv(ROWS))
    assert [list(row.values()) for row in read_csv(tmp_path / "table.csv")] == ROWS[1:]


def test_of_a_table_that_was_cut_anywhere_the_whole_records_are_left() -> None:
    ends = [len(as_csv(ROWS[:number])) for number in range(len(ROWS) + 1)]
    content = as_csv(ROWS)
    for length in range(len(content) + 1):
        assert len(whole_records(content[:length])) == max(end for end in ends if end <= length)


@pytest.mark.parametrize("text", ["=cmd()", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_formulas_become_text_and_come_back(text: str) -> None:
    assert safe_path(text) == f"./{text}"
    assert safe_name(text)[0] == "'"
    assert plain_name(safe_name(text)) == text


@pytest.mark.parametrize("text", ["nut", "'nut", "", "a=b", "'", "/data/=x.png"])
def test_other_texts_stay(text: str) -> None:
    assert safe_path(text) == safe_name(text) == plain_name(text) == text


@pytest.mark.parametrize("content", [b"", b'"a","b"\n"1"\n', b'"a"\n"1","2"\n'])
def test_what_is_no_whole_table_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"table\.csv is no whole table of CSV"):
        read_csv(tmp_path / "table.csv")
