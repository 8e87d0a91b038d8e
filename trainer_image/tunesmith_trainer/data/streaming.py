"""Training data that is read, shuffled and encoded while training: for more than a disk holds.

Which rows a step sees is a pure function of (seed, step) here, too: rows come in the order of the files, pass through a
shuffle buffer whose draws are seeded by (seed, epoch), and are cut into global batches. Each rank reads all rows, which
is cheap, and parses and encodes its own only. Going to another step reads on, or from the start, without encoding.
"""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from tunesmith_api.artifacts import DataCursor
from tunesmith_api.keys import Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.dataset import Deduplication, OnBadRow
from tunesmith_api.v1alpha1.task import ClassWeights
from tunesmith_store.errors import UserError
from tunesmith_store.store import ObjectStore
from tunesmith_trainer.data.examples import Augmenter
from tunesmith_trainer.data.image_loader import ImageLoader
from tunesmith_trainer.data.order import LeftOut
from tunesmith_trainer.data.rows import BadRows, RawRow, RowChecker, columns_of
from tunesmith_trainer.data.sources import Source
from tunesmith_trainer.tasks.base import BadRow, Example, Task

__all__ = ["ShuffledRows", "StreamingOrder", "check_streamable"]

AHEAD = 2
"""Steps that are encoded before they are asked for."""
LOOKED_AT = 1000
"""Rows that are looked at before training starts."""


def check_streamable(plan: TrainingPlan, task: Task, source: Source, store: ObjectStore) -> None:
    """Check what would otherwise come out in the middle of training.

    Raises:
        UserError: there are no rows, or something is asked for that needs all of them at once.
    """
    if plan.dataset.deduplication is Deduplication.EXACT:
        message = (
            "spec.dataset.deduplication: Exact compares all rows, which streaming doesn't keep: remove one of the two"
        )
        raise UserError(Reason.INVALID_SPEC, message)
    if plan.dataset.augmentation is not None and plan.dataset.augmentation.back_translation is not None:
        message = (
            "spec.dataset.augmentation.backTranslation runs before training starts: it can't be had with streaming"
        )
        raise UserError(Reason.INVALID_SPEC, message)
    bad = BadRows(plan.dataset.on_bad_row)
    checker = RowChecker(task, columns_of(plan), ImageLoader(store), bad)
    first = next(checker.usable(islice(source.head(), LOOKED_AT)), None)
    if first is None:
        what = (
            f"none of its first {bad.count} rows can be used; the first: {bad.first}" if bad.count else "it has no rows"
        )
        raise UserError(Reason.DATASET_INVALID, f"{source.name}: {what}")
    if not task.has_classes:
        return
    if not plan.classification.labels:
        message = "spec.classification.labels: name the classes; with streaming they can't be collected before training"
        raise UserError(Reason.INVALID_SPEC, message)
    if plan.classification.class_weights is ClassWeights.BALANCED:
        message = "spec.classification.classWeights: Balanced counts the classes first, which streaming can't"
        raise UserError(Reason.INVALID_SPEC, message)


class ShuffledRows:
    """All rows of all epochs, one after the other. A row is given with its epoch and a number of its own."""

    def __init__(self, read: Callable[[], Iterator[RawRow]], name: str, seed: int, buffer_size: int) -> None:
        self._read, self._name, self._seed, self._size = read, name, seed, buffer_size
        self.rows_per_epoch: int | None = None
        """Known once the first epoch is over."""

    def start(self, skipped: int = 0) -> Iterator[tuple[int, int, RawRow]]:
        """Yield (epoch, number of the row in its file order, row), without the first `skipped` rows.

        Raises:
            UserError: the data can't be read, or there is none.
            Retryable: the store can't be reached.
        """
        epoch = 0
        while True:
            if self.rows_per_epoch and skipped >= self.rows_per_epoch:  # epochs don't depend on each other
                epoch += skipped // self.rows_per_epoch
                skipped %= self.rows_per_epoch
            given = 0
            for number, raw in self._epoch(epoch):
                given += 1
                if given > skipped:
                    yield epoch, number, raw
            if not given:
                raise UserError(Reason.DATASET_INVALID, f"{self._name}: it has no rows")
            self.rows_per_epoch = given
            skipped = max(0, skipped - given)
            epoch += 1

    def _epoch(self, epoch: int) -> Iterator[tuple[int, RawRow]]:
        """Yield the rows of one epoch: from a full buffer one is drawn, and the next row takes its place."""
        rng = random.Random(f"tunesmith-stream:{self._seed}:{epoch}")
        waiting: list[tuple[int, RawRow]] = []
        for numbered in enumerate(self._read()):
            if len(waiting) < self._size:
                waiting.append(numbered)
                continue
            drawn = rng.randrange(self._size)
            yield waiting[drawn]
            waiting[drawn] = numbered
        rng.shuffle(waiting)
        yield from waiting


class StreamingOrder:
    """Which examples a step sees, for data that is read while training. `order.TrainingOrder` describes it.

    `share` is asked by one thread. `globalBatchSize` counts rows: a row that gives several examples gives all of them.
    """

    steps_per_epoch: int | None = None

    def __init__(
        self,
        rows: ShuffledRows,
        encode: Callable[[int, int, RawRow], list[Example]],
        global_batch_size: int,
        on_bad_row: OnBadRow = OnBadRow.FAIL,
    ) -> None:
        """Take note of where rows come from; nothing is read yet.

        Args:
            rows: all rows of all epochs.
            encode: turns (epoch, number, row) into examples; none where there is nothing to learn in it. It raises
                BadRow where a row can't be used.
            global_batch_size: rows of a step over all ranks.
            on_bad_row: what to do about those.
        """
        self._rows, self._encode, self._size, self._on_bad_row = rows, encode, global_batch_size, on_bad_row
        self._reader: _Reader | None = None
        self._last: tuple[tuple[int, int, int], _Encoded] | None = None

    @property
    def left_out(self) -> LeftOut:
        """The rows that the last `share` left out, unless an earlier epoch has met them already."""
        return self._last[1].left_out if self._last else LeftOut()

    @classmethod
    def of(
        cls, plan: TrainingPlan, task: Task, source: Source, store: ObjectStore, augmenter: Augmenter | None
    ) -> StreamingOrder:
        """Return the order of a plan's training data."""
        training = plan.training
        rows = ShuffledRows(source.rows, source.name, training.seed, plan.dataset.shuffle_buffer_size)
        checker = RowChecker(task, columns_of(plan), ImageLoader(store), BadRows(plan.dataset.on_bad_row))

        def encode(epoch: int, number: int, raw: RawRow) -> list[Example]:
            row = checker.check(raw)
            examples = task.encode(row)
            changed = (
                [augmenter.example(row, part, number, epoch) for part in range(len(examples))] if augmenter else []
            )
            if changed:
                examples = [new or old for new, old in zip(changed, examples, strict=True)]
            return [replace(example, epoch=epoch) for example in examples if example.units]

        return cls(rows, encode, training.global_batch_size, plan.dataset.on_bad_row)

    def share(self, step: int, rank: int, world_size: int) -> list[Example]:
        """Return one rank's part of the global batch of step `step`, counted from 0.

        Raises:
            UserError: a row is bad, and none may be left out.
            Retryable: the store can't be reached.
        """
        key = (step, rank, world_size)
        if self._last is None or self._last[0] != key:
            if self._reader is None or self._reader.next != key:
                self.close()
                self._reader = _Reader(self, key)
            self._last = (key, self._reader.take())
        return list(self._last[1].examples)

    def cursor(self, step: int) -> DataCursor:
        """Return where in the data training stands once `step` steps are done."""
        seen, length = step * self._size, self._rows.rows_per_epoch
        epoch, rest = divmod(seen, length) if length else (0, seen)
        return DataCursor(epoch=epoch, step_in_epoch=rest // self._size, examples_seen=seen)

    def close(self) -> None:
        """End the thread that reads ahead."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def shares(self, step: int, rank: int, world_size: int) -> Iterator[_Encoded]:
        """Yield one rank's parts from a step on."""
        rows = self._rows.start(step * self._size)
        while True:
            own = [row for place, row in enumerate(islice(rows, self._size)) if place % world_size == rank]
            yield self._encoded(own)

    def _encoded(self, rows: Iterable[tuple[int, int, RawRow]]) -> _Encoded:
        examples: list[Example] = []
        bad, met_before = BadRows(self._on_bad_row), BadRows(self._on_bad_row)
        for epoch, number, raw in rows:
            try:
                examples += self._encode(epoch, number, raw)
            except BadRow as error:
                (met_before if epoch else bad).refuse(raw.where, error)
        return _Encoded(examples, LeftOut(bad.count, bad.first))


@dataclass(frozen=True)
class _Encoded:
    """One rank's part of a step."""

    examples: list[Example]
    left_out: LeftOut


class _Reader:
    """A thread that encodes a few steps ahead of training."""

    def __init__(self, order: StreamingOrder, key: tuple[int, int, int]) -> None:
        self.next = key
        self._queue: queue.Queue[_Encoded | Exception] = queue.Queue(AHEAD)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(order, *key), name="data", daemon=True)
        self._thread.start()

    def _run(self, order: StreamingOrder, step: int, rank: int, world_size: int) -> None:
        try:
            for encoded in order.shares(step, rank, world_size):
                if not self._put(encoded):
                    return
        except Exception as error:  # raised again where the step is asked for
            self._put(error)

    def _put(self, item: _Encoded | Exception) -> bool:
        while not self._ended.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def take(self) -> _Encoded:
        """Return the next step's part."""
        item = self._queue.get()
        if isinstance(item, Exception):
            raise item
        step, rank, world_size = self.next
        self.next = (step + 1, rank, world_size)
        return item

    def close(self) -> None:
        """End the thread; a read from the network that is under way is not waited for."""
        self._ended.set()
