"""Encoded examples on disk, in random access from mapped memory: sets may be larger than memory.

`prepare` writes them, `order` and `evaluate` read them. A feature is a column: whole numbers (32 bits where they fit),
floats, texts, nested lists of these, or numpy arrays, which come back as numpy arrays of the same type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tunesmith_trainer.data.arrow_files import PartReader, PartWriter
from tunesmith_trainer.data.table import RowTable
from tunesmith_trainer.tasks.base import Example, Row

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Augmenter", "ExampleSet", "ExampleWriter"]

BATCH_EXAMPLES = 1024
BATCH_BYTES = 16 << 20
TOKEN_BYTES = 12
"""Roughly what a token takes in a batch: ids and labels of 4 bytes each, and something more."""
FEATURE = "f."
DTYPE = b"dtype"
"""Field metadata of a column of numpy arrays: their type. Each cell is its shape, then its bytes."""


class Augmenter(Protocol):
    """Makes another example of a row in each epoch; `augment.RowAugmenter`."""

    def example(self, row: Row, part: int, number: int, epoch: int) -> Example | None:
        """Return example `part` of row `number` as it is in this epoch; None where nothing is changed."""


class ExampleWriter:
    """Writes examples to disk. Use it in a `with` block."""

    def __init__(self, folder: Path, name: str) -> None:
        self._parts = PartWriter(folder, name)
        self._schema: Any = None
        self._waiting: list[tuple[Example, int, int]] = []
        self._bytes = 0

    def add(self, example: Example, row: int, part: int) -> None:
        """Append an example: number `part` of those that row number `row` gave."""
        self._waiting.append((example, row, part))
        arrays = sum(getattr(value, "nbytes", 0) for value in example.features.values())
        self._bytes += TOKEN_BYTES * example.length + arrays
        if len(self._waiting) >= BATCH_EXAMPLES or self._bytes >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow

        if not self._waiting:
            return
        examples = [example for example, _, _ in self._waiting]
        columns = {
            "length": pyarrow.array([example.length for example in examples], pyarrow.int32()),
            "units": pyarrow.array([example.units for example in examples], pyarrow.float64()),
            "truncated": pyarrow.array([example.truncated for example in examples], pyarrow.bool_()),
            "row": pyarrow.array([row for _, row, _ in self._waiting], pyarrow.int64()),
            "part": pyarrow.array([part for _, _, part in self._waiting], pyarrow.int32()),
        }
        fields = [pyarrow.field(name, column.type) for name, column in columns.items()]
        for name in sorted({name for example in examples for name in example.features}):
            field, column = _column(FEATURE + name, [example.features.get(name) for example in examples])
            fields.append(field)
            columns[field.name] = column
        self._write(pyarrow.schema(fields), columns)
        self._waiting.clear()
        self._bytes = 0

    def _write(self, schema: Any, columns: Mapping[str, Any]) -> None:
        """A column that is new, or wider than before, changes the schema from here on; nothing ever narrows it."""
        import pyarrow

        schema = schema if self._schema is None else _united(self._schema, schema)
        self._schema = schema
        rows = len(columns["length"])
        arrays = [
            columns[field.name].cast(field.type) if field.name in columns else pyarrow.nulls(rows, field.type)
            for field in schema
        ]
        self._parts.write(pyarrow.RecordBatch.from_arrays(arrays, schema=schema))

    def __enter__(self) -> ExampleWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._flush()
        self._parts.close()


def _united(old: Any, new: Any) -> Any:
    """Return the schema that holds both, fields in the old one's order; the new type of a numpy column wins."""
    import pyarrow

    united = pyarrow.unify_schemas([old, new], promote_options="permissive")
    fields = [
        field.with_metadata(new.field(field.name).metadata) if field.name in new.names else field for field in united
    ]
    return pyarrow.schema(fields)


def _column(name: str, values: Sequence[Any]) -> tuple[Any, Any]:
    """Return (pyarrow.Field, pyarrow.Array) of one feature."""
    import numpy as np
    import pyarrow

    kinds = {value.dtype.str for value in values if isinstance(value, np.ndarray)}
    if kinds:
        if len(kinds) > 1:
            raise TypeError(f"feature {name.removeprefix(FEATURE)}: arrays of several types {sorted(kinds)} in one set")
        cells = [None if value is None else _packed(value) for value in values]
        field = pyarrow.field(name, pyarrow.large_binary(), metadata={DTYPE: kinds.pop().encode()})
        return field, pyarrow.array(cells, field.type)
    array = pyarrow.array(values)
    with suppress(pyarrow.ArrowInvalid):  # numbers that need 64 bits
        array = array.cast(_narrow(array.type))
    return pyarrow.field(name, array.type), array


def _narrow(kind: Any) -> Any:
    """Return a type with whole numbers of 32 bits. What empty lists are of is left open."""
    import pyarrow
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        return pyarrow.list_(_narrow(kind.value_type))
    return pyarrow.int32() if types.is_integer(kind) or types.is_boolean(kind) else kind


def _packed(array: npt.NDArray[Any]) -> bytes:
    import numpy as np

    shape = np.asarray([array.ndim, *array.shape], np.int64)
    return shape.tobytes() + np.ascontiguousarray(array).tobytes()


def _unpacked(cell: Any, dtype: str) -> npt.NDArray[Any]:
    import numpy as np

    data = cell.as_buffer()
    dimensions = int(np.frombuffer(data, np.int64, 1)[0])
    shape = np.frombuffer(data, np.int64, dimensions, 8)
    return np.frombuffer(data, np.dtype(dtype), -1, 8 * (dimensions + 1)).reshape(shape).copy()


class ExampleSet:
    """Encoded examples by number. Safe to share between threads."""

    def __init__(self, folder: Path, name: str, rows: RowTable, augmenter: Augmenter | None = None) -> None:
        """Map a set into memory.

        Args:
            folder: where it is.
            name: `train` or `eval`.
            rows: the rows that it was made of.
            augmenter: what changes them in each epoch.
        """
        import numpy as np

        self._parts = PartReader(folder, name)
        self._rows, self._augmenter = rows, augmenter
        self.lengths: npt.NDArray[np.int32] = self._parts.column("length").astype(np.int32)
        """Tokens that each example costs, before augmentation."""

    def __len__(self) -> int:
        return len(self._parts)

    def get(self, index: int, epoch: int = 0) -> Example:
        """Return an example, as augmentation makes it in this epoch.

        Raises:
            IndexError: there is no such example.
        """
        batch, place = self._parts.find(index)
        if self._augmenter is not None:
            number, part = batch.column("row")[place].as_py(), batch.column("part")[place].as_py()
            changed = self._augmenter.example(self._rows.row(number), part, number, epoch)
            if changed is not None:
                return changed
        return Example(
            features=_features(batch, place),
            length=batch.column("length")[place].as_py(),
            units=batch.column("units")[place].as_py(),
            truncated=batch.column("truncated")[place].as_py(),
        )

    def row(self, index: int) -> Row:
        """Return the row that an example was made of; a row may have given several."""
        batch, place = self._parts.find(index)
        return self._rows.row(batch.column("row")[place].as_py())

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return `length`, `units`, `truncated` or `row` of all examples."""
        return self._parts.column(name)


def _features(batch: Any, place: int) -> dict[str, Any]:
    features: dict[str, Any] = {}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        if not field.name.startswith(FEATURE):
            continue
        cell = column[place]
        if cell.is_valid:
            dtype = (field.metadata or {}).get(DTYPE)
            features[field.name.removeprefix(FEATURE)] = _unpacked(cell, dtype.decode()) if dtype else cell.as_py()
    return features
