"""What the fields of a row hold: texts, classes; refused in words that name the field. No torch.

Called by the tasks' `check_row`, and through it by the driver's preflight.
"""

from __future__ import annotations

from typing import Any

from tunesmith_trainer.tasks.base import BadRow, Row

__all__ = ["field_of", "shorten", "text_field"]

SHOWN = 60


def shorten(text: str) -> str:
    """Cut a text to what a message shows of it."""
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def field_of(row: Row, column: str, setting: str) -> Any:
    """Return a field of a row, whatever it holds.

    Raises:
        BadRow: it is missing or null.
    """
    if column not in row:
        names = ", ".join(sorted(map(str, row))) or "none"
        raise BadRow(f"has no field {column!r} (its fields: {names}); set spec.dataset.columns.{setting}")
    if row[column] is None:
        raise BadRow(f"field {column!r} is empty")
    return row[column]


def text_field(row: Row, column: str, setting: str) -> str:
    """Return a text field of a row that isn't blank.

    Raises:
        BadRow: it is missing, no text, or blank.
    """
    if column not in row:
        names = ", ".join(sorted(map(str, row))) or "none"
        raise BadRow(f"has no field {column!r} (its fields: {names}); set spec.dataset.columns.{setting}")
    text = row[column]
    if not isinstance(text, str):
        raise BadRow(f"field {column!r} is not a text but {type(text).__name__}")
    if not text.strip():
        raise BadRow(f"field {column!r} is empty")
    return text
