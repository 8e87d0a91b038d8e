"""The raw rows of a data set on disk, by number: what encoding, augmentation and the report read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith_trainer.data.arrow_files import PartReader, PartWriter
from tunesmith_trainer.data.clean import DIGEST_BYTES, row_digest
from tunesmith_trainer.data.rows import BadRows, Located, to_json
from tunesmith_trainer.tasks.base import BadRow, Row

if TYPE_CHECKING:
    from tunesmith_trainer.data.clean import Digests

__all__ = ["RowTable", "write_rows"]

BATCH_ROWS = 1024
BATCH_BYTES = 16 << 20


def write_rows(folder: Path, name: str, rows: Iterable[Located], bad: BadRows) -> Digests:
    """Write rows to disk; return their digests, [rows, 2]. A row that can't be written is a bad row.

    Raises:
        UserError: a row is bad, and none may be left out.
    """
    import numpy as np
    import pyarrow

    digests = bytearray()
    with PartWriter(folder, name) as writer:
        for chunk in _chunks(rows, digests, bad):
            places, texts = zip(*chunk, strict=True)
            columns = {"where": pyarrow.array(places), "row": pyarrow.array(texts, pyarrow.large_string())}
            writer.write(pyarrow.record_batch(columns))
    return np.frombuffer(bytes(digests), np.uint64).reshape(-1, DIGEST_BYTES // 8)


def _chunks(rows: Iterable[Located], digests: bytearray, bad: BadRows) -> Iterator[list[tuple[str, str]]]:
    chunk: list[tuple[str, str]] = []
    size = 0
    for where, row in rows:
        try:
            digest, text = row_digest(row), to_json(row)
        except BadRow as error:
            bad.refuse(where, error)
            continue
        digests += digest
        chunk.append((where, text))
        size += len(text)
        if len(chunk) >= BATCH_ROWS or size >= BATCH_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class RowTable:
    """Rows by number. Opened when the first one is asked for: few runs need them after the data is encoded."""

    def __init__(self, folder: Path, name: str, fetch: Callable[[], None] = lambda: None) -> None:
        """`fetch` is called once before the table is opened; it may put the files there."""
        self._folder, self._name, self._fetch = folder, name, fetch
        self._parts: PartReader | None = None

    def _open(self) -> PartReader:
        if self._parts is None:
            self._fetch()
            self._parts = PartReader(self._folder, self._name)
        return self._parts

    def __len__(self) -> int:
        return len(self._open())

    def row(self, number: int) -> Row:
        """Return one row."""
        batch, place = self._open().find(number)
        row: dict[str, Any] = json.loads(batch.column("row")[place].as_py())
        return row

    def where(self, number: int) -> str:
        """Return where one row stands in the data."""
        batch, place = self._open().find(number)
        return str(batch.column("where")[place].as_py())
