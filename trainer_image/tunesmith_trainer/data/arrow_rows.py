"""Rows of Arrow tables as plain data, meant as they were written. Called by `formats` and `hubset`.

Arrow has one type for all of a column. So what isn't the same in each row is stored as something else: structs are
padded with nulls, mixed values are JSON texts, and what looks like a date becomes one. Here it is taken back.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import Any

__all__ = ["plain_rows"]

OWN_STRUCTS = 2
"""Structs in structs in which a null is the row's own: a message, and a part or a tool call of it. In those below, a
tool's arguments above all, it is what another row has and this one hasn't."""

Reader = Callable[[Any], Any]


def plain_rows(table: Any) -> list[dict[str, Any]]:
    """Return the rows of a pyarrow.RecordBatch or Table: maps as objects, JSON decoded, times as ISO 8601 texts.

    Raises:
        ValueError: a column of JSON texts holds something else.
    """
    rows: list[dict[str, Any]] = table.to_pylist(maps_as_pydicts="lossy")
    for field in table.schema:
        read = _reader(field.type, 0)
        if read is not None:
            for row in rows:
                row[field.name] = read(row[field.name])
    return rows


def _reader(kind: Any, depth: int) -> Reader | None:
    """Return what makes plain data of a value of a type; None where it is that already."""
    import pyarrow
    from pyarrow import types

    if isinstance(kind, pyarrow.JsonType):
        return _unless_null(json.loads)
    if types.is_timestamp(kind):
        return _unless_null(_iso)
    if types.is_date(kind):
        return _unless_null(str)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _each(_reader(kind.value_type, depth))
    if types.is_map(kind):
        return _each_value(_reader(kind.item_type, depth + 1))
    if types.is_struct(kind):
        return _struct_reader(kind, depth + 1)
    return None


def _each(read: Reader | None) -> Reader | None:
    return read and _unless_null(lambda items: [read(item) for item in items])


def _each_value(read: Reader | None) -> Reader | None:
    return read and _unless_null(lambda items: {key: read(item) for key, item in items.items()})


def _struct_reader(kind: Any, depth: int) -> Reader | None:
    readers = {field.name: inner for field in kind if (inner := _reader(field.type, depth)) is not None}
    padded = depth > OWN_STRUCTS
    if not readers and not padded:
        return None

    def read(value: dict[str, Any]) -> dict[str, Any]:
        return {
            name: readers[name](item) if name in readers else item
            for name, item in value.items()
            if not (padded and item is None)
        }

    return _unless_null(read)


def _unless_null(read: Reader) -> Reader:
    return lambda value: None if value is None else read(value)


def _iso(value: datetime.datetime) -> str:
    """A day where there is no time of day: what readers of JSON take for a time was a text like this mostly."""
    text = value.isoformat()
    return text.removesuffix("T00:00:00")
