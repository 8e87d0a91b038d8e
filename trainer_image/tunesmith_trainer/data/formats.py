"""Files cut into rows: JSON Lines, JSON, CSV, Parquet and plain text. Called by `sources`.

What is wrong with one row is left in the row (`RawRow.content`); what is wrong with a whole file is a UserError.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from typing import Any

from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1.dataset import DataFormat
from tunesmith_store.errors import UserError
from tunesmith_trainer.data.rows import RawRow, TaskColumns
from tunesmith_trainer.tasks.base import BadRow

__all__ = ["FileKind", "kind_of", "read_file"]

BOM = b"\xef\xbb\xbf"
PARQUET_ROWS = 512
"""Rows of a Parquet file that are in memory at once."""


class FileKind(StrEnum):
    """How one file is written."""

    JSONL = "jsonl"
    JSON = "json"
    CSV = "csv"
    TSV = "tsv"
    PARQUET = "parquet"
    TEXT = "text"


BY_EXTENSION = {
    "jsonl": FileKind.JSONL,
    "ndjson": FileKind.JSONL,
    "json": FileKind.JSON,
    "csv": FileKind.CSV,
    "tsv": FileKind.TSV,
    "parquet": FileKind.PARQUET,
    "txt": FileKind.TEXT,
}
BY_FORMAT = {
    DataFormat.JSONL: FileKind.JSONL,
    DataFormat.CSV: FileKind.CSV,
    DataFormat.PARQUET: FileKind.PARQUET,
    DataFormat.TEXT: FileKind.TEXT,
}


def kind_of(uri: str, form: DataFormat) -> FileKind | None:
    """Return how a file is written, by the format asked for and its extension; None if neither says."""
    found = BY_EXTENSION.get(uri.rpartition("/")[2].rpartition(".")[2].lower())
    if form is DataFormat.AUTO:
        return found
    if form is DataFormat.CSV and found is FileKind.TSV:
        return FileKind.TSV
    if form is DataFormat.JSONL and found is FileKind.JSON:
        return FileKind.JSON
    return BY_FORMAT[form]


def read_file(file: io.BufferedReader, kind: FileKind, name: str, columns: TaskColumns, text: str) -> Iterator[RawRow]:
    """Yield the rows of a file, in order; blank lines are passed over.

    Args:
        file: open for reading in binary.
        kind: how it is written.
        name: how messages call it.
        columns: what the task reads; no more is read of a file that can be read by column.
        text: field that a line of a text file goes to.

    Raises:
        UserError: the file is not what it should be.
    """
    readers: dict[FileKind, Callable[[], Iterator[RawRow]]] = {
        FileKind.JSONL: lambda: _json_lines(file, name),
        FileKind.JSON: lambda: _json(file, name),
        FileKind.CSV: lambda: _csv(file, name, ",", columns),
        FileKind.TSV: lambda: _csv(file, name, "\t", columns),
        FileKind.PARQUET: lambda: _parquet(file, name, columns),
        FileKind.TEXT: lambda: _text(file, name, text),
    }
    return readers[kind]()


def _lines(file: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line) of the lines that aren't blank."""
    for number, line in enumerate(file, 1):
        bare = line.removeprefix(BOM) if number == 1 else line
        if bare.strip():
            yield number, bare


def _json_lines(file: io.BufferedReader, name: str) -> Iterator[RawRow]:
    for number, line in _lines(file):
        yield RawRow(f"{name} line {number}", line)


def _json(file: io.BufferedReader, name: str) -> Iterator[RawRow]:
    """A list of objects, or an object on each line."""
    head = file.peek(64).removeprefix(BOM).lstrip()
    if not head.startswith(b"["):
        yield from _json_lines(file, name)
        return
    try:
        items = json.loads(file.read().removeprefix(BOM))
    except (ValueError, RecursionError) as error:
        message = f"{name} is not valid JSON ({error}); it must hold a list of objects, or one object on each line"
        raise UserError(Reason.DATASET_INVALID, message) from error
    for number, item in enumerate(items, 1):
        good = isinstance(item, dict)
        yield RawRow(f"{name} item {number}", item if good else BadRow(f"is no object but {type(item).__name__}"))


def _csv(file: io.BufferedReader, name: str, delimiter: str, columns: TaskColumns) -> Iterator[RawRow]:
    csv.field_size_limit(sys.maxsize)
    # bytes that are no UTF-8 become surrogates: so a bad row doesn't end the file
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter)
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            twice = next(field for field in header if header.count(field) > 1)
            raise UserError(Reason.DATASET_INVALID, f"{name} has two columns named {twice!r}; rename one of them")
        end = reader.line_num
        for cells in reader:
            start, end = end + 1, reader.line_num
            if cells:
                yield RawRow(f"{name} line {start}", _csv_row(header, cells, columns))
    except csv.Error as error:
        raise UserError(Reason.DATASET_INVALID, f"{name} line {reader.line_num} is not valid CSV: {error}") from error
    finally:
        text.detach()


def _csv_row(header: Sequence[str], cells: Sequence[str], columns: TaskColumns) -> Mapping[str, Any] | BadRow:
    if len(cells) != len(header):
        return BadRow(f"has {len(cells)} cells where the header has {len(header)}; check its quotes")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return BadRow("is not valid UTF-8")
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    for field in (*columns.lists, *columns.numbers):
        cell = row.get(field, "").strip()
        if cell.startswith("[") or field in columns.numbers:
            with suppress(ValueError):  # plain text is left as it is: the task says whether it may be
                row[field] = json.loads(cell)
    return row


def _parquet(file: io.BufferedReader, name: str, columns: TaskColumns) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file, pre_buffer=True)
        present = table.schema_arrow.names
        # where one is missing the message lists what there is: so all is read
        wanted = [field for field in columns.all if field in present]
        complete = set(columns.required) <= set(wanted)
        number = 0
        for batch in table.iter_batches(PARQUET_ROWS, columns=wanted if complete else None):
            for row in batch.to_pylist():
                number += 1
                yield RawRow(f"{name} row {number}", row)
    except pyarrow.ArrowException as error:
        raise UserError(Reason.DATASET_INVALID, f"{name} can't be read as Parquet: {error}") from error


def _text(file: io.BufferedReader, name: str, text: str) -> Iterator[RawRow]:
    for number, line in _lines(file):
        try:
            yield RawRow(f"{name} line {number}", {text: line.decode().rstrip("\r\n")})
        except UnicodeDecodeError as error:
            yield RawRow(f"{name} line {number}", BadRow(f"is not valid UTF-8 ({error})"))
