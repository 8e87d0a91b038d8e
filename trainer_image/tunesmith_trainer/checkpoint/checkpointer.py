"""The checkpoints of one run as its loop sees them: save, commit, wait, restore, the same on all ranks.

How a save goes: in the step, every rank takes a snapshot of its own part (`save`) and uploads it in the background.
With each following step's all-reduce the loop sums up what the ranks say (`ready`) and passes the sum to `note_ready`;
once all parts are up, rank 0 writes the manifest, in the background too. So no step waits for another rank's upload,
and there is no collective but the one that is there anyway. One save is in flight at most: one that falls due meanwhile
is put off, not waited for.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from tunesmith_api.artifacts import CheckpointManifest, DataCursor, FileEntry
from tunesmith_api.reports import CheckpointRef
from tunesmith_store.errors import Failure, Retryable
from tunesmith_store.files import entry_of_bytes
from tunesmith_store.store import ObjectStore
from tunesmith_trainer.checkpoint.capacity import DiskFull, DiskUsage
from tunesmith_trainer.checkpoint.restore import Damaged, Fetched, Source, fetch
from tunesmith_trainer.checkpoint.shards import PartIndex, part_name
from tunesmith_trainer.checkpoint.snapshot import Snapshot, Snapshots
from tunesmith_trainer.checkpoint.state import RunState
from tunesmith_trainer.checkpoint.storage import CheckpointStorage, best_of
from tunesmith_trainer.distributed.collectives import Group

__all__ = ["Checkpointer"]

T = TypeVar("T")

FAILED = -(2.0**40)
"""What a rank says whose part failed: whatever the others say, the sum is negative."""

TRANSFERS = 3
"""Files that one rank sends or hashes at the same time."""
MOST_FETCHES = 16
"""Files that one rank fetches at the same time, a connection each; fewer where there are fewer cores."""


@dataclass(frozen=True)
class _Due:
    """What rank 0 needs to commit the save in flight."""

    step: int
    cursor: DataCursor
    metric: float | None


@dataclass
class Checkpointer:
    """The checkpoints of one run, below one URI. All ranks call all methods, in the same order."""

    store: ObjectStore
    uri: str
    folder: Path
    """In scratch. The ranks of a pod are given the same one: they share what they fetch."""
    group: Group
    run_digest: str
    keep_last: int
    describe: Mapping[str, Any]
    """The manifest's fields that don't change during a run: max_steps, seed, attempt."""
    keep_best: bool = False
    """Keep the checkpoint with the best metric besides the last ones."""
    higher_is_better: bool = False
    """Whether a higher metric is a better one."""
    ranks_per_pod: int = 1
    """How many ranks write to the disk of `folder`."""
    saved: Callable[[CheckpointRef], None] = lambda reference: None
    """Told on rank 0, from a background thread, of each checkpoint that exists from now on."""
    log: Callable[[str], None] = print
    disk_usage: DiskUsage = shutil.disk_usage
    newest: CheckpointRef | None = None
    """The newest complete checkpoint that this rank knows of; after `wait` and `restore` the same on all ranks."""
    owed: bool = False
    """A save was put off since the one before is still in flight: call `save` again after the next step."""
    stall_seconds: float = 0.0
    """Seconds that steps have waited in `save` so far. What the end of a run takes is not in it."""
    _jobs: list[Future[None]] = field(default_factory=list)
    _part: Future[None] | None = None
    _error: Exception | None = None
    _due: _Due | None = None
    """Not None while a save is in flight, which all ranks agree on."""
    _warned_missing: bool = False

    def __post_init__(self) -> None:
        group = self.group
        self._storage = CheckpointStorage(self.store, self.uri, self.run_digest, self.log)
        # one job after the other: a manifest is written before the next part goes up
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._transfers = ThreadPoolExecutor(TRANSFERS, thread_name_prefix="checkpoint-file")
        fetches = min(MOST_FETCHES, max(2, len(os.sched_getaffinity(0))))
        self._fetches = ThreadPoolExecutor(fetches, thread_name_prefix="checkpoint-fetch")
        own = self.folder / f"rank-{group.rank:05d}"
        self._snapshots = Snapshots(group.rank, group.world_size, own, self.disk_usage, self.ranks_per_pod)

    # ---- saving

    @property
    def ready(self) -> float:
        """What this rank says of the save in flight: 1 where its part is up (or there is none), 0 where it isn't yet.

        A failure is very negative, so that the sum over ranks tells all of them.
        """
        busy = self._part is not None and not self._part.done()
        self._sweep()
        return FAILED if self._error else 0.0 if busy else 1.0

    def note_ready(self, total: float) -> None:
        """Take note of the sum of `ready` over all ranks; call it before the next `save`. It doesn't wait.

        Raises:
            Failure: a save failed on some rank; all ranks raise the same.
        """
        if total < 0:
            self._raise_together()
        if self._due is not None and total >= self.group.world_size:
            due, self._due, self._part = self._due, None, None
            if self.group.rank == 0:
                self._jobs.append(self._pool.submit(self._commit, due))

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: RunState,
        cursor: DataCursor,
        metric: float | None = None,
        *,
        defer: bool = True,
        must: bool = False,
    ) -> bool:
        """Take a snapshot and upload it in the background.

        Args:
            model: the bare model (sharded or not), whose trained parameters are saved.
            optimizer: its optimizer.
            state: of the run, at this step.
            cursor: where in the data the next step begins.
            metric: the held-out metric of this very state, where it was evaluated; it decides which is best.
            defer: put this save off while the one before is in flight. Without it the step waits: for a state that
                will not come again, as that of the best evaluation.
            must: wait as without `defer`, and fail if there is no room on the disk instead of going on without; `wait`
                raises then. For the last save of a run.

        Returns:
            False where the save is put off (`owed`): the same on all ranks.

        Raises:
            Failure: what the save in flight failed with, where it is waited for.
        """
        began = time.monotonic()
        if must or not defer:
            self.wait()
        if self._due is not None:
            self.owed = True
            return False
        if must:  # there is no step any more that could wait
            began = time.monotonic()
        self.owed = False
        finite = metric if metric is not None and math.isfinite(metric) else None
        self._due = _Due(state.step, cursor, finite)
        try:
            snapshot = self._snapshots.take(model, optimizer, state)
            self._start(self._upload, snapshot, must)
        except DiskFull as full:
            if must:
                self._error = full.refused(f"save the checkpoint of step {state.step}")
            else:
                self._start(self._say_missing, state.step, full)
        except Exception as error:  # raised by `note_ready`, on all ranks
            self._error = error
        self.stall_seconds += time.monotonic() - began
        return True

    def wait(self) -> CheckpointRef | None:
        """Wait until nothing is in flight on any rank; return the newest complete checkpoint.

        Raises:
            Failure: a save failed on some rank; all ranks raise the same.
        """
        if self._part is not None:
            self._part.exception()
        self.note_ready(sum(self.group.exchange(self.ready)))
        for job in self._jobs:
            job.exception()
        self._sweep()
        self._raise_together()
        self.newest = self.group.broadcast(self.newest)
        return self.newest

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        self._part = self._pool.submit(work, *arguments)
        self._jobs.append(self._part)

    def _upload(self, snapshot: Snapshot, last: bool) -> None:
        # before this rank's files are replaced, and so before any manifest of them can be written
        self._storage.clear(snapshot.step)
        uri = self._storage.folder(snapshot.step)
        try:
            self._snapshots.upload(snapshot, self.store, uri, self._transfers)
        except DiskFull as full:
            self._say_missing(snapshot.step, full)
        if last:
            self._snapshots.release()

    def _say_missing(self, step: int, full: DiskFull) -> None:
        self._storage.clear(step)
        self._snapshots.say_missing(full, self.store, self._storage.folder(step))

    def _commit(self, due: _Due) -> None:
        """Write the manifest, now that all parts are up, and delete old checkpoints. Rank 0 only."""
        uri = self._storage.folder(due.step)
        names = [part_name(rank) for rank in range(self.group.world_size)]
        texts = dict(
            zip(names, self._transfers.map(lambda name: self.store.get_bytes(f"{uri}/{name}"), names), strict=True)
        )
        parts = [PartIndex.from_json(text) for text in texts.values()]
        if missing := next((part for part in parts if part.missing), None):
            if not self._warned_missing:
                self._warned_missing = True
                self.log(
                    f"warning: no checkpoint of step {due.step}: no room on the disk of "
                    f"{self.group.name_of(missing.rank)}: {missing.missing}; training goes on, and saves again once "
                    "there is room"
                )
            return
        files: list[FileEntry] = [entry_of_bytes(name, text) for name, text in texts.items()]
        files += [entry for part in parts for entry in part.files]
        manifest = CheckpointManifest(
            step=due.step,
            plan_digest=self.run_digest,
            cursor=due.cursor,
            world_size=self.group.world_size,
            created_time=datetime.now(UTC).isoformat(timespec="seconds"),
            metric=due.metric,
            files=tuple(sorted(files, key=lambda entry: entry.path)),
            **self.describe,
        )
        self.newest = CheckpointRef(step=due.step, uri=self._storage.commit(manifest))
        self.saved(self.newest)
        self._storage.retain(due.step, self.keep_last, self.keep_best, self.higher_is_better)

    # ---- failing together

    def _sweep(self) -> None:
        """Drop the background jobs that have ended, and keep the first error."""
        for job in [job for job in self._jobs if job.done()]:
            self._jobs.remove(job)
            error = job.exception()
            if error is not None and self._error is None:
                self._error = error if isinstance(error, Exception) else RuntimeError(repr(error))

    def _raise_together(self, own: Exception | None = None) -> None:
        """Raise the first rank's error on all ranks, if any rank has one."""
        error = own or self._error
        self._error = None
        for found in self.group.exchange(_as_failure(error) if error else None):
            if found is not None:
                self._due, self._part = None, None
                raise found from error

    def _try_on_first(self, make: Callable[[], T]) -> T:
        """Return on all ranks what rank 0 makes, or raise there what it raises."""

        def work() -> tuple[list[T], Failure | None]:
            try:
                return [make()], None
            except Exception as error:
                return [], _as_failure(error)

        values, failure = self.group.on_first(work)
        if failure is not None:
            raise failure
        return values[0]

    # ---- restoring

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, before: int | None = None) -> RunState | None:
        """Go back to the newest complete checkpoint of this run; one that is damaged is passed over.

        Args:
            model: the bare model, sharded as it will be trained.
            optimizer: its optimizer, new or used.
            before: only a checkpoint of an earlier step will do; those from that step on stop existing. The run goes
                back since it went wrong there.

        Returns:
            The run's state, or None where there is no checkpoint: model and optimizer are as they were.

        Raises:
            Failure: the store can't be read, there is no room on a disk, or the checkpoint is another model's; all
                ranks raise the same.
        """
        self.wait()
        found = self._restore_first(lambda: self._storage.manifests(before), model, optimizer)
        if found is None:
            return None
        step, state = found
        self.newest = CheckpointRef(step=step, uri=self._storage.folder(step))
        if before is not None:
            self._try_on_first(lambda: self._storage.withdraw(before))
        return state

    def restore_best(self, model: nn.Module) -> RunState | None:
        """Put the weights of the checkpoint with the best metric into the bare model; its optimizer is not touched.

        Returns:
            The run's state at that step, or None where no checkpoint has a metric; the model is as it was.

        Raises:
            Failure: as `restore`.
        """
        self.wait()

        def best() -> list[CheckpointManifest]:
            found = best_of(self._storage.manifests(), self.higher_is_better)
            return [found] if found else []

        found = self._restore_first(best, model, None)
        return found[1] if found else None

    def _restore_first(
        self,
        candidates: Callable[[], list[CheckpointManifest]],
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
    ) -> tuple[int, RunState] | None:
        """Load the first of rank 0's candidates that every rank can read."""
        self._snapshots.release()  # the room is needed for what is fetched
        texts = self._try_on_first(lambda: [manifest.to_json() for manifest in candidates()])
        for manifest in map(CheckpointManifest.from_json, texts):
            state = self._restore(manifest, model, optimizer)
            if state is not None:
                return manifest.step, state
        return None

    def _restore(
        self, manifest: CheckpointManifest, model: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> RunState | None:
        """Load one checkpoint; None on all ranks, with nothing changed, where it is damaged."""
        group = self.group
        folder = self.folder / f"load-{manifest.step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        source = Source(self.store, self._storage.folder(manifest.step), manifest, folder, self._fetches)
        fetched: Fetched | None = None
        damage, error = "", None
        try:
            fetched = fetch(source, model, optimizer, first=group.rank / group.world_size, disk_usage=self.disk_usage)
        except Damaged as caught:
            damage = str(caught)
        except Exception as caught:
            error = caught
        self._raise_together(error)
        damage = next(filter(None, group.exchange(damage)), "")
        try:
            if damage or fetched is None:
                self.log(f"warning: checkpoint {source.uri} is damaged ({damage}); trying the one before")
                return None
            state = fetched.load(model, optimizer)
        except Exception as caught:
            error = caught
        finally:
            group.exchange(None)  # ranks of this pod may still be reading
            # freeing gigabytes takes a while, and the next step needn't wait; the next restore does, see `wait`
            deletion = self._transfers.submit(shutil.rmtree, folder, True)
            self._jobs.append(deletion)
            if damage:  # the room is needed for the one before
                deletion.exception()
        self._raise_together(error)
        return state


def _as_failure(error: Exception) -> Failure:
    return error if isinstance(error, Failure) else Retryable(f"checkpoint: {error!r}")
