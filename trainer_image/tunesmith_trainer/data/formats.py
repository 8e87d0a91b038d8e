"""Files cut into rows: JSON Lines, JSON, CSV, Parquet, Arrow and plain text. Called by `sources`.

What is wrong with one row is left in the row (`RawRow.content`); what is wrong with a whole file is a UserError.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from itertools import chain
from typing import Any

from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1.dataset import DataFormat
from tunesmith_store.errors import UserError
from tunesmith_trainer.data.arrow_rows import plain_rows
from tunesmith_trainer.data.csv_rows import csv_rows
from tunesmith_trainer.data.rows import NOT_UTF8, RawRow, TaskColumns
from tunesmith_trainer.data.streams import bare_name
from tunesmith_trainer.tasks.base import BadRow

__all__ = ["BINARY", "FileKind", "kind_of", "read_file"]

NEEDED = "it must hold a list of objects, or one object on each line"
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
    ARROW = "arrow"
    TEXT = "text"


BINARY = {FileKind.PARQUET, FileKind.ARROW}
"""Kinds that are read from their end, and compressed within."""
BY_EXTENSION = {
    "jsonl": FileKind.JSONL,
    "ndjson": FileKind.JSONL,
    "json": FileKind.JSON,
    "csv": FileKind.CSV,
    "tsv": FileKind.TSV,
    "parquet": FileKind.PARQUET,
    "arrow": FileKind.ARROW,
    "feather": FileKind.ARROW,
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
    name, compressed = bare_name(uri)
    found = BY_EXTENSION.get(name.rpartition(".")[2].lower())
    if compressed and (found in BINARY or (form is not DataFormat.AUTO and BY_FORMAT[form] in BINARY)):
        return None
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
        FileKind.JSONL: lambda: _json(file, name, columns, whole=False),
        FileKind.JSON: lambda: _json(file, name, columns, whole=True),
        FileKind.CSV: lambda: csv_rows(file, name, ",", columns),
        FileKind.TSV: lambda: csv_rows(file, name, "\t", columns),
        FileKind.PARQUET: lambda: _parquet(file, name, columns),
        FileKind.ARROW: lambda: _arrow(file, name, columns),
        FileKind.TEXT: lambda: _text(file, name, text),
    }
    return readers[kind]()


def _lines(file: Iterable[bytes], start: int = 1) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) of the lines that aren't blank."""
    for number, line in enumerate(file, start):
        bare = line.removeprefix(BOM) if number == 1 else line
        if bare.strip():
            yield number, bare


def _json(file: io.BufferedReader, name: str, columns: TaskColumns, *, whole: bool) -> Iterator[RawRow]:
    """An object on each line; or all of it at once: a list of objects, one object around such a list, or objects.

    `whole`: by its name it may hold a list, so what is wrong is said of the file.
    """
    lines = _lines(file)
    first = next(lines, None)
    if first is None:
        return
    second = next(lines, None)
    read = [first] if second is None else [first, second]
    if not _holds_lines(first[1], None if second is None else second[1], columns):
        rest = file.read()
        text = b"".join((*(line for _, line in read), rest))
        items = _items(text, name, columns)
        if items is not None:
            for number, item in enumerate(items, 1):
                good = isinstance(item, dict)
                yield RawRow(
                    f"{name} item {number}", item if good else BadRow(f"is no object but {type(item).__name__}")
                )
            return
        if whole and first[1].lstrip().startswith(b"["):
            raise UserError(Reason.DATASET_INVALID, f"{name} is not valid JSON{_fault_of(text)}; {NEEDED}")
        lines = _lines(io.BytesIO(rest), read[-1][0] + 1)
    for number, line in chain(read, lines):
        yield RawRow(f"{name} line {number}", line)


def _holds_lines(first: bytes, second: bytes | None, columns: TaskColumns) -> bool:
    """Whether a file that begins with these lines has a row on each of them."""
    try:
        value = json.loads(first)
    except json.JSONDecodeError as error:
        cut_short = error.pos >= len(error.doc.rstrip())
        return not cut_short or (second is not None and first.strip() not in {b"[", b"{"} and _is_object(second))
    except (ValueError, RecursionError):
        return True
    if isinstance(value, list):
        return second is not None
    return second is not None or not _lists_in(value, columns)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _lists_in(value: Any, columns: TaskColumns) -> list[str]:
    """Return the fields of an object that hold rows, where it is none itself."""
    if not isinstance(value, dict) or {*columns.all, *columns.other_forms} & set(value):
        return []
    return [
        name
        for name, items in value.items()
        if isinstance(items, list) and items and all(isinstance(item, dict) for item in items)
    ]


def _items(text: bytes, name: str, columns: TaskColumns) -> list[Any] | None:
    """Return the rows of a file that is read as a whole; None where it isn't JSON.

    Raises:
        UserError: it holds several lists of rows.
    """
    values: list[Any] = []
    try:
        rest, place = text.decode().strip(), 0
        while place < len(rest):
            value, place = json.JSONDecoder().raw_decode(rest, place)
            values.append(value)
            while place < len(rest) and rest[place].isspace():
                place += 1
    except (ValueError, RecursionError):
        return None
    if len(values) != 1:
        return values
    if isinstance(values[0], list):
        return list(values[0])
    found = _lists_in(values[0], columns)
    if len(found) > 1:
        message = f"{name} holds several lists of rows ({', '.join(found)}); save the one to read as a file of its own"
        raise UserError(Reason.DATASET_INVALID, message)
    return list(values[0][found[0]]) if found else values


def _fault_of(text: bytes) -> str:
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        return f" ({error})"
    return ""


def _parquet(file: io.BufferedReader, name: str, columns: TaskColumns) -> Iterator[RawRow]:
    from pyarrow import parquet

    with _arrow_errors(name, "Parquet"):
        table = parquet.ParquetFile(file, pre_buffer=True)
        wanted = _wanted(table.schema_arrow.names, columns)
        yield from _batches(table.iter_batches(PARQUET_ROWS, columns=wanted), name)


def _arrow(file: io.BufferedReader, name: str, columns: TaskColumns) -> Iterator[RawRow]:
    """The format of files, or that of streams, which `datasets` writes."""
    import pyarrow

    with _arrow_errors(name, "Arrow"):
        try:
            table = pyarrow.ipc.open_file(file)
            batches = (table.get_batch(number) for number in range(table.num_record_batches))
        except pyarrow.ArrowInvalid:
            file.seek(0)
            table = pyarrow.ipc.open_stream(file)
            batches = iter(table)
        wanted = _wanted(table.schema.names, columns)
        pieces = (
            (batch if wanted is None else batch.select(wanted)).slice(start, PARQUET_ROWS)
            for batch in batches
            for start in range(0, batch.num_rows, PARQUET_ROWS)
        )
        yield from _batches(pieces, name)


def _wanted(present: Sequence[str], columns: TaskColumns) -> list[str] | None:
    """Return the columns to read; None for all: where one is missing, the message lists what there is."""
    wanted = [field for field in columns.all if field in present]
    return wanted if set(columns.required) <= set(wanted) else None


def _batches(batches: Iterable[Any], name: str) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for row in plain_rows(batch):
            number += 1
            yield RawRow(f"{name} row {number}", row)


@contextmanager
def _arrow_errors(name: str, what: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        raise UserError(Reason.DATASET_INVALID, f"{name} can't be read as {what}: {error}") from error


def _text(file: io.BufferedReader, name: str, text: str) -> Iterator[RawRow]:
    for number, line in _lines(file):
        try:
            yield RawRow(f"{name} line {number}", {text: line.decode().rstrip("\r\n")})
        except UnicodeDecodeError as error:
            yield RawRow(f"{name} line {number}", BadRow(f"{NOT_UTF8} ({error})"))
