"""The loop: take a key, observe, decide, act, report. One place acts, one place writes status."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1 import ObjectMeta
from tunesmith_operator.adapters.errors import AlreadyExists, ClusterError, Gone, Invalid, Rejected, Transient
from tunesmith_operator.adapters.metrics import Metrics
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.kinds import kind_of
from tunesmith_operator.core.kubernetes.drift import correction
from tunesmith_operator.core.kubernetes.manifest import JSON, Manifest, foreign_owner
from tunesmith_operator.core.kubernetes.resources import Key, Resource
from tunesmith_operator.core.reconcile.decision import Action, Create, Decision, Delete, Patch
from tunesmith_operator.core.reconcile.kind import Kind
from tunesmith_operator.core.reconcile.unreadable import Unreadable, decide_unreadable
from tunesmith_operator.core.status.resource import Status
from tunesmith_operator.core.status.transitions import (
    EventNote,
    differs,
    is_urgent,
    status_document,
    verdict_only,
    with_apply_failure,
)
from tunesmith_operator.engine.contest import Contests
from tunesmith_operator.engine.pacing import RequestPace
from tunesmith_operator.engine.poller import Poller
from tunesmith_operator.engine.store import VIEWS, Store
from tunesmith_operator.engine.workqueue import WorkQueue

__all__ = ["Cluster", "Controller", "Recorder", "Stuck"]

log = logging.getLogger(__name__)
MAX_WORK_SECONDS = 120.0
CONTESTED = (
    "somebody else changes it back each time, so it is put right at growing intervals. Another controller or policy "
    "writes the same fields: kubectl get -o yaml --show-managed-fields says which"
)
FIRST_STATUS_SECONDS = 5.0
"""How long the first status waits for more to say where all is well: the API server says Pending meanwhile."""


class Cluster(Protocol):
    """What the controller needs of a cluster; `adapters.kube` provides it."""

    async def create(self, resource: Resource, namespace: str, body: JSON) -> JSON:
        """Create unless it exists."""

    async def find(self, resource: Resource, namespace: str, name: str) -> JSON | None:
        """The object of that name, if there is one."""

    async def patch(self, resource: Resource, namespace: str, name: str, uid: str, body: JSON) -> JSON:
        """Merge patch of that very object."""

    async def delete(self, resource: Resource, namespace: str, name: str, uid: str) -> None:
        """Delete that very object."""

    async def apply_status(
        self, resource: Resource, namespace: str, name: str, uid: str, version: str, status: JSON
    ) -> JSON:
        """Write the status subresource of that very object, unless it has changed since that version."""


class Recorder(Protocol):
    """What the controller needs to post events; `adapters.events` provides it."""

    async def record(self, resource: Resource, key: Key, uid: str, note: EventNote, now: datetime) -> None:
        """Post one event."""


class Stuck(Exception):
    """The controller no longer does its work; the process should be restarted."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong with a key, and with which version (uid, generation) of it.

    It isn't tried again before its backoff allows, whatever else happens to the key; a new version is another matter.
    """

    error: Exception
    version: tuple[str, int] | None = None
    """None stands for any."""
    whole: bool = True
    """Nothing can be done for the key, not even its status written; else only its children can't be."""


@dataclass(frozen=True, slots=True)
class Case:
    """One custom resource and what is to be done about it."""

    kind: Kind[Any, Any]
    meta: ObjectMeta
    resource_version: str
    before: Status
    decision: Decision

    @property
    def version(self) -> tuple[str, int]:
        """What the user has written."""
        return self.meta.uid, self.meta.generation


class Controller:
    """Works through the queue with a few workers."""

    def __init__(
        self,
        *,
        store: Store,
        cluster: Cluster,
        recorder: Recorder,
        queue: WorkQueue[Key],
        pace: RequestPace,
        poller: Poller,
        metrics: Metrics,
        config: Config,
        now: Callable[[], datetime],
        new_token: Callable[[], str] = lambda: secrets.token_hex(32),
    ) -> None:
        self._store, self._cluster, self._recorder = store, cluster, recorder
        self._queue, self._pace, self._poller, self._metrics = queue, pace, poller, metrics
        self._config, self._now, self._new_token = config, now, new_token
        self._wrote_at: dict[Key, datetime] = {}
        self._contests = Contests()
        self._first_at: dict[Key, datetime] = {}
        self._failures: dict[Key, Failure] = {}
        self._tasks: list[asyncio.Task[None]] = []

    # --- life ---

    def start(self) -> None:
        """Start the workers and the poller."""
        workers = [self._work() for _ in range(self._config.workers)]
        self._tasks = [
            asyncio.create_task(work, name="tunesmith worker") for work in (*workers, self._poller.run(self.heard))
        ]

    async def stop(self) -> None:
        """Let the reconciles under way end within ten seconds, then cancel everything."""
        for _ in range(100):
            if self._queue.longest_work() == 0.0:
                break
            await asyncio.sleep(0.1)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def check(self) -> None:
        """Prove that the controller is at work.

        Raises:
            Stuck: a worker has died, or one reconcile has taken far too long.
        """
        if not self._tasks or any(task.done() for task in self._tasks):
            raise Stuck("a worker has ended")
        if self._queue.longest_work() > MAX_WORK_SECONDS:
            raise Stuck(f"a reconcile has been running for {self._queue.longest_work():.0f} s")

    async def _work(self) -> None:
        while True:
            key = await self._queue.get()
            try:
                await self.process(key)
            finally:
                self._queue.done(key)
            # where nothing had to be written nothing was waited for: others come in between here
            await asyncio.sleep(0)

    def heard(self, key: Key, moved: bool) -> None:
        """A job's progress has changed, perhaps in more than numbers: look at it as soon as that can be written."""
        if moved:
            self._queue.add(key, urgent=False)
        elif not self._queue.waits(key):
            self._queue.add_after(key, self._progress_wait(key, self._now()), urgent=False)

    async def process(self, key: Key) -> None:
        """Reconcile one key; a failure is logged and tried again later, never raised."""
        extra = {"key": str(key)}
        with self._metrics.seconds.labels(key.kind).time():
            try:
                result = await self.reconcile(key)
            except Gone as error:
                # it is being deleted together with its namespace or its owner: the watch will say so
                log.info("gone: %s", error, extra=extra)
                result = "gone"
            except ClusterError as error:
                patience = error.retry_after if isinstance(error, Transient) else None
                delay = self._queue.backoff(key, patience or 0.0)
                log.warning("%s; again in %.0f s", error, delay, extra=extra)
                result = "refused" if isinstance(error, Rejected) else "error"
            except Exception as error:
                self._failures[key] = Failure(error)
                delay = self._queue.backoff(key)
                log.exception("a bug: reconcile failed; again in %.0f s", delay, extra=extra)
                result = "bug"
            else:
                if result == "held":
                    self._queue.return_held(key)
                else:
                    self._failures.pop(key, None)
                    self._queue.forget(key)
        self._metrics.reconciles.labels(key.kind, result).inc()

    # --- one reconcile ---

    async def reconcile(self, key: Key) -> str:
        """Observe, decide, act, report.

        Raises:
            ClusterError: something could not be written. The status says so already, where it could be.
        """
        if not self._store.ready(key.namespace):
            self._store.defer(key)
            return "early"
        now = self._now()
        known = self._failures.get(key) if self._queue.holds(key) else None
        if known is not None and known.version is None:
            return "held"
        case = self._case(key, now)
        if case is None:
            self._poller.follow(key, None)
            self._queue.drop(key)
            self._wrote_at.pop(key, None)
            self._contests.forget(key)
            self._first_at.pop(key, None)
            return "absent"
        if known is not None and known.version != case.version:
            known = None
        if known is not None and known.whole:
            return "held"
        decision = case.decision
        failure = await self._act(key, case, known, now)
        self._poller.follow(key, decision.poll)
        if decision.requeue_after is not None:
            self._queue.add_after(key, decision.requeue_after)
        await self._report(key, case, failure, now)
        if failure is None:
            return "acted" if decision.actions else "settled"
        if known is not None:
            return "held"
        self._failures[key] = Failure(failure, case.version, whole=False)
        raise failure

    def _case(self, key: Key, now: datetime) -> Case | None:
        kind, found = kind_of(key), self._store.custom_resource(key)
        if found is None:
            return None
        seen = self._store.resource_version(key)
        if isinstance(found, Unreadable):
            return Case(kind, found.meta, seen, found.status, decide_unreadable(kind, found, now))
        observed = self._store.observe(key, found)
        return Case(kind, found.metadata, seen, found.status, kind.decide(observed, now, self._config))

    async def _act(self, key: Key, case: Case, known: Failure | None, now: datetime) -> Exception | None:
        """Carry the actions out in order; return what stopped them or one of them, with the name of the object."""
        actions = case.decision.actions
        if actions and known is not None:
            return known.error
        try:
            await self._confirm_owner(key, case)
        except ClusterError as error:
            return error
        contested: ClusterError | None = None
        for action in actions:
            wanted = action.manifest if isinstance(action, Patch) else None
            if wanted is not None and (wait := self._contests.wait(key, wanted, now)) > 0:
                contested = Transient(f"{wanted}: {CONTESTED}", wait)
                continue
            await self._pace.turn()
            try:
                await self._do(key, action)
            except ClusterError as error:
                error.args = (f"{_name(action)}: {error}",)
                return error
            if wanted is not None:
                self._contests.corrected(key, wanted, now)
            if isinstance(action, Patch) and action.undone:
                await self._record(key, case, EventNote("Warning", Reason.REPAIRED, action.undone), now)
        return contested

    async def _confirm_owner(self, key: Key, case: Case) -> None:
        """Ask whether the owner is still there, before anything that it had before is made again.

        Watches of different kinds don't keep step: children can be known to be gone before their owner is.

        Raises:
            Gone: it isn't.
        """
        again = case.before.observed_generation > 0
        if not again or not any(isinstance(action, Create) for action in case.decision.actions):
            return
        await self._pace.turn()
        found = await self._cluster.find(case.kind.resource, key.namespace, key.name)
        if found is None or found["metadata"].get("uid") != case.meta.uid:
            self._store.deleted(case.kind.resource, key.namespace, key.name, case.meta.uid)
            raise Gone(f"{key} is gone")

    async def _do(self, key: Key, action: Action) -> None:
        match action:
            case Create(manifest, random_key, where_new) if random_key:
                body: dict[str, Any] = manifest.body | {"stringData": {random_key: self._new_token()}}
                with contextlib.suppress(AlreadyExists):
                    await self._cluster.create(manifest.resource, manifest.namespace, body)
                    if where_new is not None:
                        await self._do(key, where_new)
            case Create(manifest):
                self._remember(key, manifest.resource, await self._made(manifest), manifest, manifest.body)
            case Patch(resource, namespace, name, uid, body, wanted):
                try:
                    raw = await self._cluster.patch(resource, namespace, name, uid, body)
                except Gone as error:
                    self._store.deleted(resource, namespace, name, uid)
                    raise Transient(f"it is gone: {error}") from error
                self._remember(key, resource, raw, wanted, body)
            case Delete(resource, namespace, name, uid):
                await self._cluster.delete(resource, namespace, name, uid)
                self._store.deleted(resource, namespace, name, uid)

    async def _made(self, manifest: Manifest) -> JSON:
        """Create a child. What has its name already is left alone, but for one that is this owner's and went unseen."""
        resource, namespace, name = manifest.resource, manifest.namespace, manifest.name
        try:
            return await self._cluster.create(resource, namespace, manifest.body)
        except AlreadyExists as error:
            found = await self._cluster.find(resource, namespace, name)
            if found is None or found["metadata"].get("deletionTimestamp"):
                raise Transient("one of this name is being deleted") from error
            if (foreign := foreign_owner(manifest, found)) is not None:
                raise Rejected(foreign) from error
            # a create that took effect though its answer was lost, or somebody took our labels away
            body = correction(manifest, VIEWS[resource].of(found))
            labels = {"metadata": {"labels": manifest.body["metadata"]["labels"]}}
            return await self._cluster.patch(resource, namespace, name, found["metadata"]["uid"], labels | body)

    def _remember(self, key: Key, resource: Resource, raw: JSON, manifest: Manifest | None, written: JSON) -> None:
        self._store.wrote(resource, raw)
        if manifest is not None:
            self._store.answered(key, manifest, written, VIEWS[resource].of(raw))

    async def _report(self, key: Key, case: Case, failure: Exception | None, now: datetime) -> None:
        """Write the status if people would see a difference; numbers when it is their turn."""
        decision, status = case.decision, case.decision.status
        if status is None or isinstance(failure, Gone):
            return
        if failure is not None:
            status = with_apply_failure(
                case.before, status, decision.starts, case.kind.summary, str(failure), now, case.meta.generation
            )
        fleeting = decision.fleeting and status != case.before
        if not fleeting and not differs(case.before, status):
            return
        urgent = fleeting or is_urgent(case.before, status)
        if not urgent and (wait := self._put_off(key, now)) > 0:
            self._queue.add_after(key, wait, urgent=False)
            return
        if urgent:
            await self._pace.turn()
        try:
            await self._write(key, case, status, now)
        except ClusterError as error:
            self._failures[key] = Failure(error, case.version)
            raise
        finally:
            if not urgent:
                self._pace.answered()
        if urgent and (seconds := self._queue.since(key)) is not None:
            self._metrics.status_seconds.labels(key.kind).observe(seconds)
        for note in decision.events if failure is None else ():
            await self._record(key, case, note, now)

    def _progress_wait(self, key: Key, now: datetime) -> float:
        """Seconds until the job's numbers may be written again."""
        wrote = self._wrote_at.get(key)
        if wrote is None or wrote > now:  # never, or the clock was set back
            return 0.0
        return max(0.0, self._pace.progress_seconds(len(self._poller)) - (now - wrote).total_seconds())

    def _put_off(self, key: Key, now: datetime) -> float:
        """Take what a write of numbers needs, or return in how many seconds to ask again."""
        wait = self._progress_wait(key, now)
        if key not in self._wrote_at:
            first = self._first_at.setdefault(key, now)
            wait = min(FIRST_STATUS_SECONDS, FIRST_STATUS_SECONDS - (now - first).total_seconds())
        if wait > 0:
            return wait
        # a tenth of the interval: however many jobs wait, they ask at most ten times as often as can be written
        return 0.0 if self._pace.spare() else self._pace.progress_seconds(len(self._poller)) / 10

    async def _write(self, key: Key, case: Case, status: Status, now: datetime) -> None:
        """Write the status. Where its numbers make the API server refuse it, the verdict is written without them.

        Raises:
            ClusterError: it could not be written as it is.
        """
        try:
            await self._apply_status(key, case, status, now)
        except Invalid as error:
            self._metrics.refused_statuses.labels(key.kind).inc()
            log.error(
                "the API server finds the status invalid (%s): writing its conditions and phase alone",
                error,
                extra={"key": str(key)},
            )
            verdict = verdict_only(case.before, status)
            if differs(case.before, verdict):
                await self._pace.turn()
                await self._apply_status(key, case, verdict, now)
            raise

    async def _apply_status(self, key: Key, case: Case, status: Status, now: datetime) -> None:
        raw = await self._cluster.apply_status(
            case.kind.resource, key.namespace, key.name, case.meta.uid, case.resource_version, status_document(status)
        )
        self._store.wrote(case.kind.resource, raw)
        self._wrote_at[key] = now
        self._first_at.pop(key, None)

    async def _record(self, key: Key, case: Case, note: EventNote, now: datetime) -> None:
        await self._pace.turn()
        try:
            await self._recorder.record(case.kind.resource, key, case.meta.uid, note, now)
        except Gone:
            log.debug("no event for what is being deleted", extra={"key": str(key)})
        except ClusterError as error:
            log.warning("event not recorded: %s", error, extra={"key": str(key)})


def _name(action: Action) -> str:
    match action:
        case Create(manifest):
            return str(manifest)
        case Patch(resource, _, name) | Delete(resource, _, name):
            return f"{resource.kind} {name}"
