"""CSV files cut into rows, so that what is wrong with one takes no other with it. Called by `formats`.

A cell in quotes may hold line breaks, so one quote too many swallows all lines up to the next. Such a record is taken
apart again: its first line is the bad row, and reading goes on at its second.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from tunesmith_api.keys import Reason
from tunesmith_store.errors import UserError
from tunesmith_trainer.data.rows import NOT_UTF8, RawRow, TaskColumns
from tunesmith_trainer.tasks.base import BadRow

__all__ = ["csv_rows"]

DELIMITERS = (",", ";", "\t", "|")
LONGEST_RECORD = 64 << 20
"""Characters of a record of many lines: of more, a quote is taken to be unclosed."""


class _Lines:
    """Lines of a file that can be given back, and taken for no more than a record's worth."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines, self._returned = lines, deque[str]()
        self.number = 0
        """How many have been taken for good."""
        self._taken: list[str] = []
        self._size = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._taken and self._size > LONGEST_RECORD:
            raise StopIteration
        line = self._returned.popleft() if self._returned else next(self._lines)
        self._taken.append(line)
        self._size += len(line)
        return line

    def keep(self) -> list[str]:
        """End a record: return its lines."""
        taken, self._taken, self._size = self._taken, [], 0
        self.number += len(taken)
        return taken

    def give_back(self, lines: Sequence[str]) -> None:
        """Have lines read again."""
        self._returned.extendleft(reversed(lines))
        self.number -= len(lines)


def csv_rows(file: io.BufferedReader, name: str, delimiter: str, columns: TaskColumns) -> Iterator[RawRow]:
    """Yield the rows of a CSV file in UTF-8; `delimiter` is what its name says, another is found by the header.

    Raises:
        UserError: its header names a column twice.
    """
    csv.field_size_limit(sys.maxsize)
    # bytes that are no UTF-8 become surrogates: so a bad row doesn't end the file
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        lines = _Lines(iter(text))
        first = next(lines, "")
        lines.keep()
        lines.give_back([first] if first else [])
        delimiter = _delimiter(first, delimiter, columns)
        header = next(csv.reader(lines, delimiter=delimiter), [])
        lines.keep()
        if len(set(header)) != len(header):
            twice = next(field for field in header if header.count(field) > 1)
            raise UserError(Reason.DATASET_INVALID, f"{name} has two columns named {twice!r}; rename one of them")
        while (found := _record(lines, delimiter, len(header))) is not None:
            start, cells = found
            if isinstance(cells, BadRow) or cells:
                content = cells if isinstance(cells, BadRow) else _row(header, cells, columns)
                yield RawRow(f"{name} line {start}", content)
    finally:
        text.detach()


def _delimiter(header: str, expected: str, columns: TaskColumns) -> str:
    """Return what parts the header into names of columns that can be read; what is expected where nothing does."""
    known = {*columns.all, *columns.other_forms}

    def named(delimiter: str) -> int:
        return len(known & set(next(csv.reader([header], delimiter=delimiter), [])))

    return max((expected, *DELIMITERS), key=named)


def _record(lines: _Lines, delimiter: str, width: int) -> tuple[int, list[str] | BadRow] | None:
    """Return the next record's first line number, and its cells or what is wrong with it; None at the end."""
    start = lines.number + 1
    try:
        cells, wrong = next(csv.reader(lines, delimiter=delimiter), None), ""
    except csv.Error as error:
        cells, wrong = None, str(error)
    taken = lines.keep()
    if not taken:
        return None
    if not wrong and len(taken) > 1:  # perhaps by a quote that nobody closed
        wrong = _fault_of(taken, delimiter, width)
    if wrong:
        lines.give_back(taken[1:])
        return start, BadRow(f"is not valid CSV ({wrong}); a quote in it may not be closed, or not doubled")
    return start, cells or []


def _fault_of(lines: Sequence[str], delimiter: str, width: int) -> str:
    """Return what is wrong with a record of several lines; "" where it is whole."""
    try:
        cells = next(csv.reader(lines, delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        return str(error)
    return "" if len(cells) == width else f"{len(cells)} cells where the header has {width}"


def _row(header: Sequence[str], cells: Sequence[str], columns: TaskColumns) -> Mapping[str, Any] | BadRow:
    if len(cells) != len(header):
        return BadRow(f"has {len(cells)} cells where the header has {len(header)}; check its quotes")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return BadRow(NOT_UTF8)
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    for field in (*columns.lists, *columns.numbers):
        cell = row.get(field, "").strip()
        if cell.startswith("[") or field in columns.numbers:
            with suppress(ValueError):  # plain text is left as it is: the task says whether it may be
                row[field] = json.loads(cell)
    return row
