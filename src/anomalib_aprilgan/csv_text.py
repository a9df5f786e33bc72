"""Tables as CSV that a spreadsheet opens without running anything, and that reads back as it was."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

# What spreadsheets take for the beginning of a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def as_csv(rows: Iterable[Sequence[object]]) -> bytes:
    """Lines of CSV, every field quoted, in UTF-8; bytes of file names that are no UTF-8 stay as they are."""
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table with a header; a ValueError, which names the file, where it is none."""
    text = path.read_bytes().decode(errors="surrogateescape")
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        found = list(rows)
    except csv.Error as error:
        msg = f"{path} is no table of CSV ({error})."
        raise ValueError(msg) from error
    if rows.fieldnames is None or any(None in row or None in row.values() for row in found):
        msg = f"{path} is no whole table of CSV: its rows have other fields than its header."
        raise ValueError(msg)
    return found


def whole_records(content: bytes) -> bytes:
    """A table, every field quoted, without the end of it that was only begun; quoted fields may hold line breaks."""
    is_quoted, end, start = False, 0, 0
    while (line_end := content.find(b"\n", start)) >= 0:
        is_quoted ^= content.count(b'"', start, line_end) % 2 == 1
        start = line_end + 1
        if not is_quoted:
            end = start
    return content[:end]


def safe_path(path: str) -> str:
    """A path that no spreadsheet takes for a formula: a relative one then begins with ``./``."""
    return f"./{path}" if path.startswith(_FORMULA) else path


def safe_name(name: str) -> str:
    """A name that no spreadsheet takes for a formula: it then begins with an apostrophe; see ``plain_name``."""
    return f"'{name}" if name.startswith(_FORMULA) else name


def plain_name(name: str) -> str:
    """What ``safe_name`` was given."""
    return name[1:] if name[:1] == "'" and name[1:].startswith(_FORMULA) else name
