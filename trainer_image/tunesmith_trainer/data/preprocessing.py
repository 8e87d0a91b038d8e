"""From a source of rows to encoded examples on disk: read, check, clean, split, paraphrase, encode, count.

Called by `splits.prepare` for the one process of a pod that does it, where the cache has nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tunesmith_api.keys import Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.dataset import Deduplication, OnBadRow
from tunesmith_store.errors import UserError
from tunesmith_store.store import ObjectStore
from tunesmith_trainer.data.cache import TokenManifest
from tunesmith_trainer.data.clean import select
from tunesmith_trainer.data.encoder import Encoded, encode
from tunesmith_trainer.data.examples import ExampleSet
from tunesmith_trainer.data.image_loader import ImageLoader
from tunesmith_trainer.data.paraphrase import BackTranslator, paraphrased
from tunesmith_trainer.data.rows import BadRows, Located, RowChecker, columns_of
from tunesmith_trainer.data.sources import Source
from tunesmith_trainer.data.statistics import DataStatistics, SetStatistics, bounded, set_statistics
from tunesmith_trainer.data.table import RowTable, write_rows
from tunesmith_trainer.tasks.base import BadRow, DataSummary, Example, Task
from tunesmith_trainer.tasks.classes import merged, spelled_as

if TYPE_CHECKING:
    from tunesmith_trainer.data.clean import Digests, Numbers

__all__ = ["EVAL", "EVAL_ROWS", "TRAIN", "TRAIN_ROWS", "Preparation"]

Log = Callable[..., None]
TRAIN, EVAL = "train", "eval"
TRAIN_ROWS, EVAL_ROWS = "rows-train", "rows-eval"
READ_ROWS = "rows-read"
"""Training rows as they were read, where those that are trained on are others."""
IMAGE_THREADS = 16
"""Files of images that are fetched at once."""
LOOKED_AT = 100
"""Rows of a stream among which one to show is looked for."""
TOLD_SECONDS = 15.0


class Progress:
    """Says now and then how far a long piece of work is."""

    def __init__(self, log: Log, what: str, total: int) -> None:
        self._log, self._what, self._total = log, what, total
        self._last = time.monotonic()

    def __call__(self, done: int) -> None:
        """Take note that so many are done."""
        now = time.monotonic()
        if now - self._last >= TOLD_SECONDS:
            self._last = now
            self._log(f"{self._what}: {done:,} of {self._total:,} rows")


@dataclass
class Preparation:
    """One run of it. `run` is the whole story."""

    plan: TrainingPlan
    task: Task
    store: ObjectStore
    train: Source
    held_out: Source | None
    scratch: Path
    folder: Path
    """Where the result goes; empty."""
    log: Log

    def __post_init__(self) -> None:
        self.bad = BadRows(self.plan.dataset.on_bad_row)

    def run_held_out(self) -> TokenManifest:
        """Prepare the held-out data only; with streaming the rest is read while training. Raises as `run`."""
        self.task.prepare(DataSummary())
        evaluated = None
        if self.held_out is not None:
            self._read(self.held_out, EVAL_ROWS)
            evaluated = self._encode_held_out()
        first = self._first_streamed()
        statistics = DataStatistics(
            eval=evaluated,
            bad_rows=self.bad.count,
            first_bad_row=self.bad.first,
            first_example=bounded(self.task.pieces_of(first)) if first else (),
            remarks=first.notes if first else (),
        )
        return TokenManifest.of(self.folder, DataSummary(), statistics)

    def run(self) -> TokenManifest:
        """Fill the folder; return what is in it. `task.prepare` is called on the way.

        Raises:
            UserError: a row is bad, or nothing is left to train or evaluate on.
            Retryable: the store can't be reached.
        """
        dataset = self.plan.dataset
        held_out = self._read(self.held_out, EVAL_ROWS) if self.held_out else None
        split = dataset.split_percent is not None
        back = dataset.augmentation.back_translation if dataset.augmentation else None
        name = READ_ROWS if split or back else TRAIN_ROWS
        digests = self._read(self.train, name)
        exact = dataset.deduplication is Deduplication.EXACT
        chosen = select(digests, held_out, dataset.split_percent, exact)
        numbers = chosen.train
        if split:
            self._check_split(len(chosen.train), len(chosen.held_out))
            self._copy(self._rows(name, chosen.held_out), EVAL_ROWS)
        if not len(numbers):
            message = (
                f"{self.train.name}: all {chosen.duplicates:,} rows stand in the held-out data too; give other rows"
            )
            raise UserError(Reason.DATASET_INVALID, message)
        if name == READ_ROWS:
            rows = self._rows(name, numbers)
            self._copy(self._paraphrased(rows, len(numbers)) if back else rows, TRAIN_ROWS)
            numbers = _all(len(numbers))
            for path in self.folder.glob(f"{READ_ROWS}-*"):
                path.unlink()
        summary = self._summary(numbers)
        labels = summary.labels
        self.task.prepare(summary)
        train = self._encode(TRAIN, TRAIN_ROWS, numbers, self.train.name, labels)
        evaluated = self._encode_held_out(labels) if dataset.is_evaluated else None
        statistics = DataStatistics(
            remarks=tuple(self.task.remarks(labels)),
            first_example=self._first_example(),
            train=train,
            eval=evaluated,
            bad_rows=self.bad.count,
            first_bad_row=self.bad.first,
            duplicates=chosen.duplicates,
        )
        return TokenManifest.of(self.folder, summary, statistics)

    # ---- rows

    def _read(self, source: Source, name: str) -> Digests:
        """Write the rows of a source to disk, those that can be used."""
        columns = columns_of(self.plan)
        checker = RowChecker(self.task, columns, ImageLoader(self.store), self.bad)
        # conversations may have images, too; few have, and these few wait for one file after the other
        threads = IMAGE_THREADS if set(columns.images) & set(columns.required) else 1
        before = self.bad.count
        digests = write_rows(self.folder, name, checker.usable(source.rows(), threads), self.bad)
        if not len(digests):
            bad = self.bad.count - before
            what = f"none of its {bad:,} rows can be used; the first: {self.bad.first}" if bad else "it has no rows"
            raise UserError(Reason.DATASET_INVALID, f"{source.name}: {what}")
        return digests

    def _rows(self, name: str, numbers: Numbers) -> Iterator[Located]:
        table = RowTable(self.folder, name)
        return (Located(table.where(int(number)), table.row(int(number))) for number in numbers)

    def _copy(self, rows: Iterable[Located], name: str) -> None:
        write_rows(self.folder, name, rows, self.bad)

    def _check_split(self, train: int, held_out: int) -> None:
        if train and held_out:
            return
        side = "held out" if train else "left to train on"
        message = (
            f"spec.dataset.splitPercent: of the {train + held_out} rows in {self.train.name} none is {side}; "
            "change it, or name held-out data in spec.dataset.eval"
        )
        raise UserError(Reason.DATASET_INVALID, message)

    def _paraphrased(self, rows: Iterable[Located], total: int) -> Iterator[Located]:
        assert self.plan.dataset.augmentation is not None
        settings = self.plan.dataset.augmentation.back_translation
        assert settings is not None
        translator = BackTranslator.fetch(self.plan, self.store, self.scratch)
        told = Progress(self.log, "translating there and back", total)
        yield from paraphrased(rows, self.task, translator, settings.probability, self.plan.training.seed, told)
        translator.close()

    def _summary(self, numbers: Numbers) -> DataSummary:
        """Say what the training rows that are left hold."""
        width = self._vector_width(numbers)
        self.task.expect_vectors(width)
        return DataSummary(merged(self._labels(TRAIN_ROWS, numbers)), width)

    def _vector_width(self, numbers: Numbers) -> int:
        """Find a row that is sure to mark every class with 0 or 1: then all do."""
        table = RowTable(self.folder, TRAIN_ROWS)
        for number in numbers if self.task.has_classes else ():
            found = self.task.vector_width(table.row(int(number)))
            if found != 0:
                return found or 0
        return 0

    def _labels(self, name: str, numbers: Numbers) -> Mapping[str, int]:
        counts: Counter[str] = Counter()
        table = RowTable(self.folder, name)
        for number in numbers if self.task.has_classes else ():
            with suppress(BadRow):  # known to be one by the other rows only: encoding refuses it
                counts.update(self.task.labels_of(table.row(int(number))))
        return dict(sorted(counts.items()))

    # ---- examples

    def _encode(self, name: str, rows: str, numbers: Numbers, source: str, labels: Mapping[str, int]) -> SetStatistics:
        told = Progress(self.log, f"{name}: tokenizing", len(numbers))
        done = encode(self.task, self.folder, name, rows, numbers, self.bad, self.plan.cpus_per_worker, told)
        if not done.examples:
            self._refuse(source, len(numbers))
        return self._counted(done, source, len(numbers), labels)

    def _first_streamed(self) -> Example | None:
        """Encode the first training row that can be: of the others nothing is known before they are trained on."""
        left_out = BadRows(OnBadRow.SKIP)  # they are counted when they are met in training
        checker = RowChecker(self.task, columns_of(self.plan), ImageLoader(self.store), left_out)
        for _, row in checker.usable(islice(self.train.head(), LOOKED_AT)):
            with suppress(BadRow):
                for example in self.task.encode(row):
                    if example.units:
                        return example
        return None

    def _first_example(self) -> tuple[tuple[str, bool], ...]:
        examples = ExampleSet(self.folder, TRAIN, RowTable(self.folder, TRAIN_ROWS))
        return bounded(self.task.pieces_of(examples.get(0)))

    def _encode_held_out(self, trained: Mapping[str, int] = MappingProxyType({})) -> SetStatistics:
        table = RowTable(self.folder, EVAL_ROWS)
        numbers = _all(len(table))
        source = self.held_out.name if self.held_out else f"{self.train.name} (splitPercent)"
        labels = spelled_as(self._labels(EVAL_ROWS, numbers), trained)
        return self._encode(EVAL, EVAL_ROWS, numbers, source, labels)

    def _counted(self, done: Encoded, source: str, rows: int, labels: Mapping[str, int]) -> SetStatistics:
        return set_statistics(
            source,
            rows - done.bad,
            done.lengths,
            done.truncated,
            done.skipped,
            labels,
            learned_tokens=round(done.units) if self.task.learns_tokens else 0,
            largest_token=done.largest_token,
            longest=done.longest,
            learned_turns=done.turns,
            unlearned_turns=done.unlearned_turns,
            notes=done.notes,
        )

    def _refuse(self, source: str, rows: int) -> None:
        message = (
            f"{source}: in none of its {rows:,} rows does anything to learn fit into spec.training.maxLength "
            f"{self.plan.training.max_length} tokens; raise it"
        )
        raise UserError(Reason.DATASET_INVALID, message)


def _all(count: int) -> Any:
    import numpy as np

    return np.arange(count)
