"""Held-out chat rows, read and drawn. Called by `compare`; `answers` gets them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from typing import Any, TypeVar

from tunesmith_api.keys import Reason
from tunesmith_api.model import Contract
from tunesmith_api.plan import CalibrationPlan, EvaluationPlan
from tunesmith_store.errors import UserError
from tunesmith_store.store import NotFound, ObjectInfo, ObjectStore

__all__ = ["Message", "Row", "draw", "files_of_rows", "read_rows"]

MOST_BYTES = 256 << 20
"""Of all rows together: they are held in memory, and some hundred of them are asked."""
SUFFIXES = (".jsonl", ".json")

T = TypeVar("T")


class Message(Contract):
    """One turn of a conversation."""

    role: str
    content: str


class Row(Contract):
    """What is asked, a conversation up to the answer or a text to classify, and the answer that it should get."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    text_pair: str | None = None
    reference: str

    @property
    def question(self) -> str:
        """What is asked, for people."""
        if self.text is not None:
            return self.text if self.text_pair is None else f"{self.text}\n{self.text_pair}"
        return self.messages[-1].content


def read_rows(store: ObjectStore, plan: EvaluationPlan) -> tuple[list[Row], str]:
    """Return all rows of the plan and their sha256; none where it has no data.

    Raises:
        UserError: there are none, or one of them is no chat row.
    """
    rows: list[Row] = []
    digest = hashlib.sha256()
    for name, data in _files(store, plan):
        digest.update(data)
        for number, line in enumerate(data.splitlines(), start=1):
            if line.strip():
                rows.append(_row(line, plan, f"{name} line {number}"))
    if not rows and (plan.uri or plan.inline):
        raise UserError(Reason.DATASET_INVALID, f"{plan.uri or 'the evaluation set'} has no rows: give held-out rows")
    return rows, digest.hexdigest()


def draw(rows: list[T], plan: EvaluationPlan | CalibrationPlan) -> list[T]:
    """Return the plan's number of rows, always the same ones, in their order."""
    if len(rows) <= plan.max_examples:
        return rows
    chosen = random.Random(plan.seed).sample(range(len(rows)), plan.max_examples)
    return [rows[index] for index in sorted(chosen)]


def files_of_rows(store: ObjectStore, uri: str) -> list[ObjectInfo]:
    """Return the file, or those of the folder that hold rows; none where there is neither."""
    try:
        return [store.head(uri)]
    except NotFound:
        return [info for info in store.list(uri) if info.size and info.uri.endswith(SUFFIXES)]


def _files(store: ObjectStore, plan: EvaluationPlan) -> Iterator[tuple[str, bytes]]:
    if plan.inline:
        yield "dataset.eval.inline", plan.inline.encode()
    if not plan.uri:
        return
    uri = plan.uri.rstrip("/")
    found = files_of_rows(store, uri)
    if not found:
        message = f"there is no evaluation set at {uri}: name a .jsonl file, or a folder of them, in evaluation.dataset"
        raise UserError(Reason.DATASET_NOT_FOUND, message)
    if sum(info.size for info in found) > MOST_BYTES:
        message = f"{uri} has more than {MOST_BYTES >> 20} MiB: evaluate on fewer rows, some hundred are enough"
        raise UserError(Reason.DATASET_INVALID, message)
    for info in found:
        yield info.uri, store.get_bytes(info.uri)


def _row(line: bytes, plan: EvaluationPlan, where: str) -> Row:
    field, label = plan.messages_field, plan.label_field or "label"
    try:
        row = json.loads(line)
        if field not in row and label in row:
            return _classified(row, plan, where)
        messages = [_message(it) for it in row[field]]
    except (ValueError, KeyError, TypeError) as error:
        message = f"{where} is no chat row of text ({error!r}): it needs {field}: [{{role, content}}, …]"
        raise UserError(Reason.DATASET_INVALID, message) from error
    if len(messages) < 2 or messages[-1].role != "assistant" or not messages[-1].content.strip():
        message = f"{where}: {field} must end with an assistant's answer, which the models' answers are compared with"
        raise UserError(Reason.DATASET_INVALID, message)
    return Row(messages=tuple(messages[:-1]), reference=messages[-1].content)


def _classified(row: dict[str, Any], plan: EvaluationPlan, where: str) -> Row:
    text, label = row.get(plan.text_field or "text"), row.get(plan.label_field or "label")
    pair = row.get(plan.text_pair_field or "text_pair")
    one_label = isinstance(label, str | int) and not isinstance(label, bool)
    if not isinstance(text, str) or not text or not one_label or not isinstance(pair, str | None):
        message = (
            f"{where} is no text with one class: it needs {plan.text_field or 'text'}: a text and "
            f"{plan.label_field or 'label'}: a name or a number; several classes, and numbers to predict, can't be "
            "compared yet"
        )
        raise UserError(Reason.DATASET_INVALID, message)
    return Row(text=text, text_pair=pair, reference=str(label))


def _message(raw: dict[str, Any]) -> Message:
    content = raw["content"]
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise ValueError("only parts of text can be evaluated")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) or not isinstance(raw["role"], str):
        raise TypeError("role and content must be texts")
    return Message(role=raw["role"], content=content)
