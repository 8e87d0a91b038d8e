"""The operator's way to the API server in a simulation: takes time, fails by plan, and keeps a journal of what it did.

The journal notes whatever must never happen: two Jobs at work for one owner, a second content under one name, a child
for what is long gone, a status that loses what it knew.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from support.fakecluster import FakeCluster
from tunesmith_api import keys
from tunesmith_operator.adapters.errors import AlreadyExists, ClusterError, Gone
from tunesmith_operator.core.kubernetes.resources import Key, Resource
from tunesmith_operator.core.status.transitions import EventNote

JSON = dict[str, Any]
A = TypeVar("A")


class Request(NamedTuple):
    """One request of the operator."""

    verb: str
    kind: str
    name: str
    at: float


class Fault(NamedTuple):
    """What the operator hears instead of the answer; `late` where the write took effect all the same."""

    error: ClusterError
    late: bool = False


@dataclass
class Journal:
    """What was written, over all lives of the operator."""

    writes: list[Request] = field(default_factory=list)
    refused_by_uid: int = 0
    violations: list[str] = field(default_factory=list)
    deleted_at: dict[str, float] = field(default_factory=dict)
    ghost_patience: float = 2.0
    """How long after an owner's end a child may still be made: the news has to come round."""
    hashes: dict[tuple[str, str, str], tuple[str, str]] = field(default_factory=dict)


class Client:
    """One life of the operator: after `crash` no request of it has any effect, and none is answered."""

    def __init__(
        self,
        cluster: FakeCluster,
        journal: Journal,
        chance: random.Random,
        fault: Callable[[Request], Fault | None],
        crashes: Callable[[], bool],
    ) -> None:
        self._cluster, self._journal, self._chance = cluster, journal, chance
        self._fault, self._crashes = fault, crashes
        self.dead = asyncio.Event()

    # --- what the operator uses ---

    async def create(self, resource: Resource, namespace: str, body: JSON) -> JSON:
        """Create unless it exists."""

        async def create() -> JSON:
            self._look_at_child(resource, namespace, body)
            stored = await self._cluster.create(resource, namespace, body)
            self._look_at_jobs(resource, body)
            return stored

        return await self._send("create", resource, body["metadata"]["name"], create)

    async def find(self, resource: Resource, namespace: str, name: str) -> JSON | None:
        """The object of that name."""
        return await self._send("find", resource, name, lambda: self._cluster.find(resource, namespace, name))

    async def patch(self, resource: Resource, namespace: str, name: str, uid: str, body: JSON) -> JSON:
        """Merge patch of that very object."""
        return await self._send(
            "patch", resource, name, lambda: self._cluster.patch(resource, namespace, name, uid, body)
        )

    async def delete(self, resource: Resource, namespace: str, name: str, uid: str) -> None:
        """Delete that very object."""
        await self._send("delete", resource, name, lambda: self._cluster.delete(resource, namespace, name, uid))

    async def apply_status(self, resource: Resource, namespace: str, name: str, uid: str, status: JSON) -> JSON:
        """Write the status subresource."""

        async def apply() -> JSON:
            before = (self._cluster.get(resource.kind, name, namespace) or {}).get("status", {})
            stored = await self._cluster.apply_status(resource, namespace, name, uid, status)
            self._journal.violations += [f"{name}: {lost}" for lost in losses(before, status)]
            return stored

        return await self._send("status", resource, name, apply)

    async def record(self, resource: Resource, key: Key, uid: str, note: EventNote, now: Any) -> None:
        """Post one event."""
        await self._send("event", resource, key.name, lambda: self._cluster.record(resource, key, uid, note, now))

    # --- the way there and back ---

    async def _send(self, verb: str, resource: Resource, name: str, call: Callable[[], Awaitable[A]]) -> A:
        await self._travel()
        request = Request(verb, resource.kind, name, asyncio.get_running_loop().time())
        fault = self._fault(request)
        if fault is not None and not fault.late:
            await self._travel()
            raise fault.error
        try:
            answer = await call()
        except Gone:
            self._journal.refused_by_uid += 1
            await self._travel()
            raise
        except ClusterError:
            await self._travel()
            raise
        if verb != "find":
            self._journal.writes.append(request)
            if self._crashes():
                self.dead.set()
        await self._travel()
        if fault is not None:
            raise fault.error
        return answer

    async def _travel(self) -> None:
        if self.dead.is_set():
            await asyncio.get_running_loop().create_future()
        await asyncio.sleep(self._chance.uniform(0.002, 0.02))
        if self.dead.is_set():
            await asyncio.get_running_loop().create_future()

    # --- what must never happen ---

    def _look_at_child(self, resource: Resource, namespace: str, body: JSON) -> None:
        meta, now = body["metadata"], asyncio.get_running_loop().time()
        owner = meta["ownerReferences"][0]["uid"]
        gone_at = self._journal.deleted_at.get(owner)
        if gone_at is not None and now - gone_at > self._journal.ghost_patience:
            self._journal.violations.append(f"a {resource.kind} {meta['name']} is made {now - gone_at:.0f} s too late")
        found = self._cluster.get(resource.kind, meta["name"], namespace)
        digest = meta.get("annotations", {}).get(keys.ANNOTATION_SPEC_HASH, "")
        name = (resource.kind, meta["name"], owner)
        known = self._journal.hashes.get(name)
        if found is not None and known is not None and known[0] == found["metadata"]["uid"] and known[1] != digest:
            self._journal.violations.append(f"{resource.kind} {meta['name']} is made again with another content")
        if found is not None:
            raise AlreadyExists(f'{resource.plural} "{meta["name"]}" already exists')
        self._journal.hashes[name] = (f"uid-{self._cluster.version + 1}", digest)

    def _look_at_jobs(self, resource: Resource, body: JSON) -> None:
        owner = body["metadata"]["ownerReferences"][0]
        if resource.kind != "Job" or owner["kind"] != keys.FINETUNEJOB_KIND:
            return
        at_work = [
            job["metadata"]["name"]
            for job in self._cluster.of_kind("Job")
            if job["metadata"]["ownerReferences"][0]["uid"] == owner["uid"]
            and not any(it["type"] in ("Complete", "Failed") for it in job.get("status", {}).get("conditions", ()))
        ]
        if len(at_work) > 1:
            self._journal.violations.append(f"two Jobs at work for one owner: {at_work}")


def losses(before: JSON, after: JSON) -> list[str]:
    """What a status knew and its successor doesn't."""
    known = ("startTime", "completionTime", "currentRevision", "model", "attempts", "revisions")
    found = [f"{name} is lost" for name in known if before.get(name) and not after.get(name)]
    found += [
        f"{name} went from {before[name]} back to {after.get(name)}"
        for name in ("observedGeneration", "restarts")
        if name in before and after.get(name, 0) < before[name]
    ]
    if before.get("completionTime") and before.get("phase") != after.get("phase"):
        found.append(f"after the end, phase went from {before['phase']} to {after['phase']}")
    return found
