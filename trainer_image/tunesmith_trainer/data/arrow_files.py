"""Tables larger than memory: Arrow files of a folder, written batch by batch, read by row number from mapped memory.

Raw rows (`table`) and encoded examples (`examples`) are kept like this. A table is cut into several files, so that they
can be copied side by side, and so that a column may appear or grow wider in mid-table.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["PartReader", "PartWriter"]

PART_BYTES = 256 << 20
"""A file that has grown to this is followed by another."""
CACHED_BATCHES = 512
"""Batches whose description is kept; their content stays in mapped memory, which is not the process's own."""


class PartWriter:
    """Writes `<name>-00000.arrow`, `<name>-00001.arrow`, … Use it in a `with` block."""

    def __init__(self, folder: Path, name: str, part_bytes: int = PART_BYTES) -> None:
        self._folder, self._name, self._part_bytes = folder, name, part_bytes
        self._number = 0
        self._file: Any = None
        self._writer: Any = None
        self.schema: Any = None
        """Schema of the last batch, as it was written."""

    def write(self, batch: Any) -> None:
        """Append a pyarrow.RecordBatch."""
        import pyarrow

        if self._must_turn_over(batch):
            self.close()
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{self._name}-{self._number:05d}.arrow"
            self._file = pyarrow.OSFile(str(path), "wb")
            self._writer = pyarrow.ipc.new_file(self._file, batch.schema)
            self.schema = batch.schema
            self._number += 1
        self._writer.write_batch(batch)

    def _must_turn_over(self, batch: Any) -> bool:
        if self._writer is None or self._file.tell() >= self._part_bytes:
            return True
        return not batch.schema.equals(self.schema, check_metadata=True)

    def close(self) -> None:
        """Finish the file that is being written."""
        if self._writer is not None:
            self._writer.close()
            self._file.close()
            self._writer = self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PartReader:
    """Reads what a PartWriter has written. Safe to share between threads."""

    def __init__(self, folder: Path, name: str) -> None:
        import pyarrow

        paths = sorted(folder.glob(f"{name}-*.arrow"))
        self._files = [pyarrow.ipc.open_file(pyarrow.memory_map(str(path))) for path in paths]
        self._places = [
            (file, number) for file, reader in enumerate(self._files) for number in range(reader.num_record_batches)
        ]
        self._starts: list[int] = []
        total = 0
        self._cached = lru_cache(CACHED_BATCHES)(self._load)
        for number in range(len(self._places)):
            self._starts.append(total)
            total += self._load(number).num_rows
        self._rows = total

    def __len__(self) -> int:
        return self._rows

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return len(self._places)

    def batch(self, number: int) -> Any:
        """Return one pyarrow.RecordBatch, in mapped memory."""
        return self._cached(number)

    def find(self, index: int) -> tuple[Any, int]:
        """Return the batch that a row is in, and its place there.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= index < self._rows:
            raise IndexError(f"row {index} of {self._rows}")
        number = bisect_right(self._starts, index) - 1
        return self._cached(number), index - self._starts[number]

    def column(self, name: str) -> Any:
        """Return a column of numbers or truth values, all rows of it, as one numpy array."""
        import numpy as np

        pieces = [self.batch(number).column(name).to_numpy(zero_copy_only=False) for number in range(self.batches)]
        return np.concatenate(pieces) if pieces else np.zeros(0)

    def _load(self, number: int) -> Any:
        file, batch = self._places[number]
        return self._files[file].get_batch(batch)
