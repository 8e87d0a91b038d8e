"""A plan's data, ready to train on: from this pod's disk, from the cache in object storage, or prepared anew.

`assembly` calls `prepare` on every rank. The ranks of a pod share one folder: the first one fills it, the others wait.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from tunesmith_api.keys import Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.reports import DatasetFacts
from tunesmith_store.errors import FULL, Retryable, UserError
from tunesmith_store.files import locked
from tunesmith_store.store import ObjectStore
from tunesmith_trainer.data.augment import augmenter_of
from tunesmith_trainer.data.cache import MANIFEST, TokenCache, TokenManifest, token_digest
from tunesmith_trainer.data.examples import ExampleSet
from tunesmith_trainer.data.preprocessing import EVAL, EVAL_ROWS, TRAIN, TRAIN_ROWS, Preparation
from tunesmith_trainer.data.sources import open_sources
from tunesmith_trainer.data.statistics import DataStatistics
from tunesmith_trainer.data.streaming import StreamingOrder, check_streamable
from tunesmith_trainer.data.table import RowTable
from tunesmith_trainer.tasks.base import Task

__all__ = ["Prepared", "facts_of", "prepare"]

Log = Callable[..., None]
WAIT_SECONDS = 2.0
TOLD_SECONDS = 60.0
LONGEST_WAIT_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class Prepared:
    """The data of a run."""

    train: ExampleSet
    """Empty with streaming."""
    eval: ExampleSet | None
    facts: DatasetFacts
    statistics: DataStatistics
    stream: StreamingOrder | None = None
    """With streaming: where training examples come from."""


def prepare(
    plan: TrainingPlan,
    task: Task,
    store: ObjectStore,
    scratch: Path,
    *,
    writer: bool,
    log: Log,
    begun: Callable[[], None] = lambda: None,
) -> Prepared:
    """Have the plan's data ready. `task.load_processor` was called before; `task.prepare` is called in here.

    Args:
        plan: what to read, and how.
        task: checks and encodes rows.
        store: where the data and the cache are.
        scratch: this pod's disk; shared by the ranks that run on it.
        writer: whether this rank writes to the cache. One of a group does, the first of its pod to be here.
        log: takes lines for people.
        begun: called once the ranks of this pod wait for this one.

    Raises:
        UserError: the data can't be used; the message names file and line, or the field to change.
        Retryable: the store can't be reached.
    """
    train, held_out = open_sources(plan, store)
    streaming = plan.dataset.streaming
    if streaming:
        check_streamable(plan, task, train, store)
    digest = token_digest(plan, store, train, held_out)
    folder = scratch / "tokens" / digest[:16]
    cache = TokenCache(store, f"{plan.tokens_uri}/{digest}", log)
    augmenter = augmenter_of(plan, task)
    with locked(folder.with_name(folder.name + ".lock")), _room_in(folder):
        begun()
        manifest = _on_disk(folder) or _cached(plan, cache, folder, writer, log, with_rows=augmenter is not None)
        if manifest is None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            work = Preparation(plan, task, store, train, held_out, scratch, folder, log)
            manifest = work.run_held_out() if streaming else work.run()
            _share(plan, cache, folder, manifest, writer)
        else:
            task.prepare(manifest.summary)
        folder.mkdir(parents=True, exist_ok=True)  # there may be nothing in it: with streaming
        (folder / MANIFEST).write_text(manifest.to_json())
    _tell(plan, manifest.statistics, log)
    rows = RowTable(folder, TRAIN_ROWS, lambda: _fetch_rows(folder, cache, manifest))
    held_out_rows = RowTable(folder, EVAL_ROWS)
    return Prepared(
        train=ExampleSet(folder, TRAIN, rows, augmenter),
        eval=ExampleSet(folder, EVAL, held_out_rows) if plan.dataset.is_evaluated else None,
        facts=facts_of(manifest.statistics),
        statistics=manifest.statistics,
        stream=StreamingOrder.of(plan, task, train, store, augmenter) if streaming else None,
    )


@contextmanager
def _room_in(folder: Path) -> Iterator[None]:
    """Say what a full disk means; what is half written goes."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        shutil.rmtree(folder, ignore_errors=True)
        message = (
            f"no room on the pod's disk for the tokenized data ({error}); give the pod more ephemeral storage, or read "
            "the data while training with spec.dataset.streaming: true"
        )
        raise UserError(Reason.DISK_FULL, message) from error


def _on_disk(folder: Path) -> TokenManifest | None:
    """What an earlier process of this pod has prepared; its manifest was written last."""
    try:
        return TokenManifest.from_json((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _must_be_shared(plan: TrainingPlan) -> bool:
    """Whether all ranks need the very same files: a translation may come out otherwise on another machine."""
    augmentation = plan.dataset.augmentation
    return plan.world_size > 1 and augmentation is not None and augmentation.back_translation is not None


def _cached(
    plan: TrainingPlan, cache: TokenCache, folder: Path, writer: bool, log: Log, with_rows: bool
) -> TokenManifest | None:
    """Download what the cache has. Where all need the writer's files, the others wait for them."""
    waited = 0.0
    while True:
        # few runs look at training rows once these are encoded
        manifest = cache.fetch(folder, lambda name: with_rows or not name.startswith(TRAIN_ROWS))
        if manifest is not None or writer or not _must_be_shared(plan):
            return manifest
        if waited >= LONGEST_WAIT_SECONDS:
            raise Retryable("waited in vain for the first worker to paraphrase the training data")
        if waited % TOLD_SECONDS == 0:
            log("waiting for the first worker to paraphrase the training data")
        time.sleep(WAIT_SECONDS)
        waited += WAIT_SECONDS


def _share(plan: TrainingPlan, cache: TokenCache, folder: Path, manifest: TokenManifest, writer: bool) -> None:
    if writer and not cache.save(folder, manifest) and _must_be_shared(plan):
        raise Retryable(f"the paraphrased data can't be handed to the other workers by way of {plan.tokens_uri}")


def _fetch_rows(folder: Path, cache: TokenCache, manifest: TokenManifest) -> None:
    """Have the training rows on disk."""
    entries = [entry for entry in manifest.files if entry.path.startswith(TRAIN_ROWS)]

    def missing() -> bool:
        paths = [folder / entry.path for entry in entries]
        return any(
            not path.is_file() or path.stat().st_size != entry.size for path, entry in zip(paths, entries, strict=True)
        )

    with locked(folder.with_name(folder.name + ".lock")):
        if missing() and cache.fetch(folder, lambda name: name.startswith(TRAIN_ROWS)) is None:
            raise Retryable("the rows of the training data have vanished from the token cache")


def _tell(plan: TrainingPlan, statistics: DataStatistics, log: Log) -> None:
    longest = plan.training.max_length
    for name, found in ((TRAIN, statistics.train), (EVAL, statistics.eval)):
        if found is not None:
            log(found.described(name, longest))
            for note, count in found.notes.items():
                log(f"{name}: in {count:,} examples: {note}")
    for remark in statistics.remarks:
        log(f"warning: {remark}")
    if statistics.first_example:
        log(f"the first training example, what is learned in ⟦ ⟧: {statistics.marked_example}")
    if statistics.duplicates:
        why = "they repeat an earlier row or stand in the held-out data"
        log(f"{statistics.duplicates:,} training rows left out: {why}")
    if statistics.bad_rows:
        log(f"{statistics.bad_rows:,} bad rows left out; the first: {statistics.first_bad_row}")


def facts_of(statistics: DataStatistics) -> DatasetFacts:
    """Return what goes into the job's status."""
    return DatasetFacts(
        train_examples=statistics.train.examples if statistics.train else 0,
        eval_examples=statistics.eval.examples if statistics.eval else 0,
        bad_rows=statistics.bad_rows,
        first_bad_row=statistics.first_bad_row,
        duplicates=statistics.duplicates,
        truncated=statistics.train.truncated if statistics.train else 0,
        learned_tokens=statistics.train.learned_tokens if statistics.train else 0,
        learned_turns=statistics.train.learned_turns if statistics.train else 0,
        unlearned_turns=statistics.train.unlearned_turns if statistics.train else 0,
        first_example=statistics.marked_example,
    )
