"""Rows as they are read: where each one stands, and what it holds. `sources` finds the files, `formats` cuts them.

Reading a row and parsing it are two steps, so that a reader may pass over rows that others need: with streaming each
rank reads all of them and parses its own. What can't be used is an error that names file and line, or is left out and
counted, as `spec.dataset.onBadRow` says: silently training on less than the user gave would be worse.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from tunesmith_api.keys import Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.dataset import OnBadRow
from tunesmith_api.v1alpha1.task import ProblemType
from tunesmith_api.v1alpha1.task import Task as TaskName
from tunesmith_store.errors import UserError
from tunesmith_trainer.data.image_loader import ImageLoader
from tunesmith_trainer.tasks.base import BadRow, Row, Task
from tunesmith_trainer.tasks.conversations import OTHER_FIELDS

__all__ = [
    "NOT_UTF8",
    "BadRows",
    "Located",
    "RawRow",
    "RowChecker",
    "TaskColumns",
    "columns_of",
    "parse",
    "plain",
    "to_json",
]

T = TypeVar("T")
U = TypeVar("U")

NOT_UTF8 = (
    "is not valid UTF-8; if its file is written in Latin-1 or Windows-1252, set encoding: Latin1 beside its uri in "
    "spec.dataset, else save it as UTF-8"
)
SHOWN = 60
SHOWN_IN_STATUS = 300


class RawRow(NamedTuple):
    """A row that isn't parsed yet."""

    where: str
    """How messages call it: "s3://b/train.jsonl line 7"."""
    content: bytes | Mapping[str, Any] | BadRow
    """A JSON text, the fields, or what already is wrong with it."""
    folder: str = ""
    """URI of the folder that its file is in: paths of images start there."""


class Located(NamedTuple):
    """A checked row, of the task's columns only."""

    where: str
    row: Row


def shorten(text: str, longest: int = SHOWN) -> str:
    """Cut a text to what a message shows of it."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def parse(raw: RawRow) -> dict[str, Any]:
    """Return the fields of a row.

    Raises:
        BadRow: it has none.
    """
    if isinstance(raw.content, BadRow):
        raise raw.content
    if not isinstance(raw.content, bytes):
        return dict(raw.content)
    try:
        row = json.loads(raw.content)
    except (ValueError, RecursionError) as error:
        shown = shorten(raw.content.decode(errors="replace").strip())
        more = f"; it {NOT_UTF8}" if isinstance(error, UnicodeDecodeError) else ""
        raise BadRow(f"is not valid JSON ({error}): {shown}{more}") from error
    if not isinstance(row, dict):
        raise BadRow(f"is not a JSON object but {type(row).__name__}")
    return row


def to_json(row: Row) -> str:
    """Return a row as JSON text: what Parquet holds and JSON lacks becomes text (binary data in base64) or a number."""
    return json.dumps(row, ensure_ascii=False, separators=(",", ":"), default=plain)


def plain(value: Any) -> Any:
    """Return what stands for a value in JSON (`default` of json.dumps). Raises BadRow: nothing does."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta):
        return str(value)
    if isinstance(value, decimal.Decimal):
        return float(value)
    raise BadRow(f"holds a value of type {type(value).__name__}, which is no text, number or list")


@dataclass(frozen=True)
class TaskColumns:
    """Which fields of a row a task reads. All else in a row is left behind."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    """Those that hold an image or a list of images."""
    lists: tuple[str, ...] = ()
    """Those that may hold a list: in a CSV file it is written as JSON."""
    numbers: tuple[str, ...] = ()
    """Those that hold a number: in a CSV file it is text."""
    other_forms: tuple[str, ...] = ()
    """Fields of rows in another form, which the task makes the required ones of."""

    @property
    def all(self) -> tuple[str, ...]:
        """Required and optional ones."""
        return self.required + self.optional


def columns_of(plan: TrainingPlan) -> TaskColumns:
    """Return the columns that the plan's task reads, by the names of `spec.dataset.columns`."""
    names = plan.dataset.columns
    match plan.task:
        case TaskName.CHAT_SFT:
            return TaskColumns(
                (names.messages,),
                (names.images, names.tools, names.chat_template_kwargs),
                images=(names.images,),
                lists=(names.messages, names.images, names.tools),
                other_forms=OTHER_FIELDS,
            )
        case TaskName.CAUSAL_LM | TaskName.MASKED_LM:
            return TaskColumns((names.text,))
        case TaskName.SEQUENCE_CLASSIFICATION:
            pair = (names.text_pair,) if names.text_pair else ()
            kind, label = plan.classification.problem_type, (names.label,)
            return TaskColumns(
                (names.text, *pair, names.label),
                lists=label if kind is ProblemType.MULTI_LABEL else (),
                numbers=label if kind is ProblemType.REGRESSION else (),
            )
        case TaskName.TOKEN_CLASSIFICATION:
            both = (names.tokens, names.tags)
            return TaskColumns(both, lists=both)
        case TaskName.SEQ2SEQ:
            return TaskColumns((names.source, names.target))
        case TaskName.DPO | TaskName.REWARD:
            answers = (names.chosen, names.rejected)
            return TaskColumns(answers, (names.prompt,), lists=(*answers, names.prompt))
        case TaskName.IMAGE_CLASSIFICATION:
            return TaskColumns((names.image, names.label), images=(names.image,))


class BadRows:
    """Takes the rows that can't be used, as `spec.dataset.onBadRow` says."""

    def __init__(self, policy: OnBadRow) -> None:
        self.policy = policy
        self.count = 0
        self.first = ""
        """The first one: where it stands and what is wrong with it."""

    def refuse(self, where: str, error: BadRow) -> None:
        """Count a bad row.

        Raises:
            UserError: none may be left out.
        """
        message = f"{where} {error}"
        if self.policy is OnBadRow.FAIL:
            remedy = "correct it, or leave such rows out with spec.dataset.onBadRow: Skip"
            raise UserError(Reason.DATASET_INVALID, f"{message}; {remedy}") from error
        self.count += 1
        self.first = self.first or shorten(message, SHOWN_IN_STATUS)

    def add(self, later: BadRows) -> None:
        """Take over what another one has counted, of rows that come after these."""
        self.count += later.count
        self.first = self.first or later.first


class RowChecker:
    """Parses and checks rows by what the task needs."""

    def __init__(self, task: Task, columns: TaskColumns, images: ImageLoader, bad: BadRows) -> None:
        self._task, self._columns, self._images, self.bad = task, columns, images, bad

    def check(self, raw: RawRow) -> Row:
        """Return the row, of the task's columns only; images are there as base64 text.

        Raises:
            BadRow: it can't be used.
        """
        row = parse(raw)
        for name in self._columns.images:
            if name in row:
                row[name] = self._images.load(row[name], raw.folder)
        found = self._task.normalized(row)
        return {name: found[name] for name in self._columns.all if name in found}

    def usable(self, raws: Iterable[RawRow], threads: int = 1) -> Iterator[Located]:
        """Yield the rows that can be used, in order.

        Args:
            raws: rows as they were read.
            threads: how many check rows at once; worth it where images are fetched one by one.

        Raises:
            UserError: one can't, and none may be left out.
        """
        tried = map(self._try, raws) if threads == 1 else _side_by_side(self._try, raws, threads)
        for where, row in tried:
            if isinstance(row, BadRow):
                self.bad.refuse(where, row)
            else:
                yield Located(where, row)

    def _try(self, raw: RawRow) -> tuple[str, Row | BadRow]:
        try:
            return raw.where, self.check(raw)
        except BadRow as error:
            return raw.where, error


def _side_by_side(work: Callable[[T], U], items: Iterable[T], threads: int) -> Iterator[U]:
    """Do the same work on all items in several threads, a few items ahead of who takes the results, in order."""
    with ThreadPoolExecutor(threads, thread_name_prefix="rows") as pool:
        waiting: deque[Future[U]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
