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
from tunesmith_operator.adapters.errors import AlreadyExists, ClusterError, Gone, Rejected, Transient
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
    with_apply_failure,
)
from tunesmith_operator.engine.contest import Contests
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
class Case:
    """One custom resource and what is to be done about it."""

    kind: Kind[Any, Any]
    meta: ObjectMeta
    version: str
    before: Status
    decision: Decision


class Controller:
    """Works through the queue with a few workers."""

    def __init__(
        self,
        *,
        store: Store,
        cluster: Cluster,
        recorder: Recorder,
        queue: WorkQueue[Key],
        poller: Poller,
        metrics: Metrics,
        config: Config,
        now: Callable[[], datetime],
        new_token: Callable[[], str] = lambda: secrets.token_hex(32),
    ) -> None:
        self._store, self._cluster, self._recorder = store, cluster, recorder
        self._queue, self._poller, self._metrics = queue, poller, metrics
        self._config, self._now, self._new_token = config, now, new_token
        self._wrote_at: dict[Key, datetime] = {}
        self._contests = Contests()
        self._first_at: dict[Key, datetime] = {}
        self._tasks: list[asyncio.Task[None]] = []

    # --- life ---

    def start(self) -> None:
        """Start the workers and the poller."""
        workers = [self._work() for _ in range(self._config.workers)]
        self._tasks = [asyncio.create_task(work, name="tunesmith worker") for work in (*workers, self._poller.run())]

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
            except Exception:
                delay = self._queue.backoff(key)
                log.exception("a bug: reconcile failed; again in %.0f s", delay, extra=extra)
                result = "bug"
            else:
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
        case = self._case(key, now)
        if case is None:
            self._poller.follow(key, None)
            self._wrote_at.pop(key, None)
            self._contests.forget(key)
            self._first_at.pop(key, None)
            return "absent"
        decision = case.decision
        failure = await self._act(key, case, now)
        status = decision.status
        if status is not None and failure is not None:
            status = with_apply_failure(
                case.before, status, decision.starts, case.kind.summary, str(failure), now, case.meta.generation
            )
        if status is not None and not isinstance(failure, Gone):
            await self._report(key, case, status, decision.events if failure is None else (), now)
        if failure is not None:
            raise failure
        self._poller.follow(key, decision.poll)
        if decision.requeue_after is not None:
            self._queue.add_after(key, decision.requeue_after)
        return "acted" if decision.actions else "settled"

    def _case(self, key: Key, now: datetime) -> Case | None:
        kind, found = kind_of(key), self._store.custom_resource(key)
        if found is None:
            return None
        version = self._store.version(key)
        if isinstance(found, Unreadable):
            return Case(kind, found.meta, version, found.status, decide_unreadable(kind, found, now))
        observed = self._store.observe(key, found)
        return Case(kind, found.metadata, version, found.status, kind.decide(observed, now, self._config))

    async def _act(self, key: Key, case: Case, now: datetime) -> ClusterError | None:
        """Carry the actions out in order; return what stopped them or one of them, with the name of the object."""
        try:
            await self._confirm_owner(key, case)
        except ClusterError as error:
            return error
        contested: ClusterError | None = None
        for action in case.decision.actions:
            wanted = action.manifest if isinstance(action, Patch) else None
            if wanted is not None and (wait := self._contests.wait(key, wanted, now)) > 0:
                contested = Transient(f"{wanted}: {CONTESTED}", wait)
                continue
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

    async def _report(self, key: Key, case: Case, status: Status, events: tuple[EventNote, ...], now: datetime) -> None:
        """Write the status if people would see a difference; running numbers no oftener than they are polled."""
        if not differs(case.before, status):
            return
        if not is_urgent(case.before, status):
            wrote, pause = self._wrote_at.get(key), self._config.poll_interval_seconds * 0.8
            if wrote is None:
                wrote, pause = self._first_at.setdefault(key, now), FIRST_STATUS_SECONDS
            wait = pause - (now - wrote).total_seconds()
            if 0 < wait <= pause:  # the clock may have been set back
                self._queue.add_after(key, wait)
                return
        meta = case.meta
        raw = await self._cluster.apply_status(
            case.kind.resource, key.namespace, key.name, meta.uid, case.version, status_document(status)
        )
        self._store.wrote(case.kind.resource, raw)
        self._wrote_at[key] = now
        self._first_at.pop(key, None)
        for note in events:
            await self._record(key, case, note, now)

    async def _record(self, key: Key, case: Case, note: EventNote, now: datetime) -> None:
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
