"""Calibration rows, read and drawn. Called by `builder`; `importance` gets them.

Rows that can't be used (other fields, images) are left out, as training leaves them out or has refused them already.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tunesmith_api.keys import Reason
from tunesmith_api.model import digest_of
from tunesmith_api.plan import CalibrationPlan, EvaluationPlan
from tunesmith_server.evaluation.rows import draw, files_of_rows, read_rows
from tunesmith_store.errors import UserError
from tunesmith_store.store import ObjectStore

__all__ = ["Content", "Texts", "held_out", "read_texts"]

MOST_BYTES = 256 << 20
"""Of all rows together: they are held in memory, and some hundred are used. What comes after that is not drawn from."""

Content = str | tuple[tuple[str, str], ...]
"""A text, or a conversation: role and content of each message."""


@dataclass(frozen=True)
class Texts:
    """The rows that were drawn."""

    rows: tuple[Content, ...]

    @property
    def digest(self) -> str:
        """Sha256 of the rows."""
        return digest_of(self.rows)


def read_texts(store: ObjectStore, plan: CalibrationPlan, without: frozenset[Content] = frozenset()) -> Texts:
    """Return the rows that the plan draws, always the same ones of the same data, in their order.

    Raises:
        UserError: there are none that can be used.
    """
    found: list[Content] = []
    for data in _files(store, plan):
        for line in data.splitlines():
            content = _content(line, plan)
            if content is not None and content not in without:
                found.append(content)
    if not found:
        where = plan.uri or "dataset.train.inline"
        message = (
            f"quantization.calibration: {where} has no rows of text beside those that are evaluated: it needs JSON "
            f"Lines with {plan.messages_field}: [{{role, content}}, …] or {plan.text_field}: a text"
        )
        raise UserError(Reason.DATASET_INVALID, message)
    return Texts(tuple(draw(found, plan)))


def held_out(store: ObjectStore, plan: EvaluationPlan | None) -> frozenset[Content]:
    """Return the rows that the models are compared by: rounding by them would flatter the quantized one.

    Raises:
        UserError: they can't be read.
    """
    if plan is None:
        return frozenset()
    rows, _ = read_rows(store, plan)
    return frozenset(
        (*((message.role, message.content) for message in row.messages), ("assistant", row.reference)) for row in rows
    )


def _files(store: ObjectStore, plan: CalibrationPlan) -> Iterator[bytes]:
    if plan.inline:
        yield plan.inline.encode()
    if not plan.uri:
        return
    uri, room = plan.uri.rstrip("/"), MOST_BYTES
    found = files_of_rows(store, uri)
    if not found:
        message = f"there are no calibration rows at {uri}: name a .jsonl file, or a folder of them"
        raise UserError(Reason.DATASET_NOT_FOUND, message)
    for info in found:
        if room > 0:
            data = store.get_range(info.uri, 0, room)
            room -= len(data)
            # a row that was cut off in the middle is no JSON, and left out as such
            yield data


def _content(line: bytes, plan: CalibrationPlan) -> Content | None:
    try:
        row = json.loads(line)
        if plan.messages_field in row:
            messages = tuple((_text(it["role"]), _text(it["content"])) for it in row[plan.messages_field])
            return messages or None
        return _text(row[plan.text_field]) or None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _text(value: Any) -> str:
    if isinstance(value, list) and all(part["type"] == "text" for part in value):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise TypeError("no text")
    return value
