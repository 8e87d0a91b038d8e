"""An API server in memory for component tests: server-side apply by key, uids, resource versions, and crashes on demand.

Only the operator's own writes go through it as through the real one; `tests/integration` uses the real one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from support import statusschema
from support.make import merged
from tunesmith_operator.adapters.errors import Gone, Invalid, Rejected
from tunesmith_operator.core.kinds import owner_key
from tunesmith_operator.core.kubernetes.manifest import Manifest
from tunesmith_operator.core.kubernetes.objects import ChildView
from tunesmith_operator.core.kubernetes.resources import Key, Resource

Name = tuple[str, str, str]


class Crash(BaseException):
    """The operator's process dies here."""


class FakeCluster:
    """Objects by (kind, namespace, name). `writes` lists every write that was carried out."""

    def __init__(self) -> None:
        self.objects: dict[Name, dict[str, Any]] = {}
        self.writes: list[str] = []
        self.events: list[tuple[str, str]] = []
        self.crash_after: int | None = None
        self.refuse: Callable[[str], str | None] = lambda write: None
        self.find_invalid: Callable[[str, Any], str | None] = statusschema.refusal
        self._version = 100

    # --- what the operator uses ---

    async def apply(self, manifest: Manifest, force: bool) -> dict[str, Any]:
        name = (manifest.resource.kind, manifest.namespace, manifest.name)
        self._check(f"apply {manifest.resource.kind} {manifest.name}")
        found = self.objects.get(name)
        if found is not None and not force:
            raise Rejected("an object of this name exists already and belongs to somebody else")
        if found is not None and manifest.resource.kind == "Job":
            raise AssertionError("a Job's template can't be applied twice")
        stored = self._store(
            name, {**manifest.body, **({"status": found["status"]} if found and "status" in found else {})}
        )
        self._done(f"apply {manifest.resource.kind} {manifest.name}")
        return stored

    async def create(self, resource: Resource, namespace: str, body: dict[str, Any]) -> None:
        name = (resource.kind, namespace, body["metadata"]["name"])
        self._check(f"create {resource.kind} {name[2]}")
        if name not in self.objects:
            self._store(name, body)
            self._done(f"create {resource.kind} {name[2]}")

    async def patch(self, resource: Resource, namespace: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        self._check(f"patch {resource.kind} {name}")
        stored = self._store((resource.kind, namespace, name), merged(self._get(resource.kind, namespace, name), body))
        self._done(f"patch {resource.kind} {name}")
        return stored

    async def delete(self, resource: Resource, namespace: str, name: str, uid: str) -> None:
        self._check(f"delete {resource.kind} {name}")
        found = self.objects.get((resource.kind, namespace, name))
        if found is not None and found["metadata"]["uid"] == uid:
            self.remove(resource.kind, namespace, name)
        self._done(f"delete {resource.kind} {name}")

    async def apply_status(
        self, resource: Resource, namespace: str, name: str, uid: str, status: Any
    ) -> dict[str, Any]:
        self._check(f"status {resource.kind} {name}")
        found = self._get(resource.kind, namespace, name)
        if found["metadata"]["uid"] != uid:
            raise Rejected("another object of this name")
        if (problem := self.find_invalid(resource.kind, status)) is not None:
            raise Invalid(problem)
        stored = self._store((resource.kind, namespace, name), {**found, "status": copy.deepcopy(status)})
        self._done(f"status {resource.kind} {name}")
        return stored

    async def record(self, resource: Resource, key: Key, uid: str, note: Any, now: Any) -> None:
        self.events.append((note.type, note.reason))

    # --- what the tests use ---

    def put(self, body: dict[str, Any]) -> dict[str, Any]:
        """Create or replace an object, as a user or a controller would."""
        meta = body["metadata"]
        return self._store((body["kind"], meta["namespace"], meta["name"]), body)

    def change(self, kind: str, name: str, changes: dict[str, Any], namespace: str = "ml") -> dict[str, Any]:
        """Merge changes into an object."""
        found = self._get(kind, namespace, name)
        changed = merged(found, changes)
        if "spec" in changes:
            changed["metadata"]["generation"] = found["metadata"].get("generation", 1) + 1
        return self._store((kind, namespace, name), changed)

    def get(self, kind: str, name: str, namespace: str = "ml") -> dict[str, Any] | None:
        """An object, or None."""
        return self.objects.get((kind, namespace, name))

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """All objects of a kind."""
        return [found for (other, _, _), found in self.objects.items() if other == kind]

    def remove(self, kind: str, namespace: str, name: str) -> None:
        """Delete an object and, as the garbage collector does, what it owns."""
        gone = self.objects.pop((kind, namespace, name), None)
        if gone is None:
            return
        for (other, space, child), found in list(self.objects.items()):
            owners = found["metadata"].get("ownerReferences", ())
            if any(owner["uid"] == gone["metadata"]["uid"] for owner in owners):
                self.remove(other, space, child)

    def _get(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
        found = self.objects.get((kind, namespace, name))
        if found is None:
            raise Gone(f"{kind} {name} not found")
        return found

    def _store(self, name: Name, body: dict[str, Any]) -> dict[str, Any]:
        self._version += 1
        stored = copy.deepcopy(body)
        before = self.objects.get(name)
        stored["metadata"]["uid"] = before["metadata"]["uid"] if before else f"uid-{self._version}"
        stored["metadata"]["resourceVersion"] = str(self._version)
        stored["metadata"].setdefault("generation", 1)
        stored["metadata"].setdefault("creationTimestamp", "2026-11-24T12:00:00Z")
        self.objects[name] = stored
        return copy.deepcopy(stored)

    def _check(self, write: str) -> None:
        refusal = self.refuse(write)
        if refusal is not None:
            raise Rejected(refusal)

    def _done(self, write: str) -> None:
        self.writes.append(write)
        if self.crash_after is not None and len(self.writes) >= self.crash_after:
            self.crash_after = None
            raise Crash(write)


class LiveIndex(Mapping[Key, Collection[Any]]):
    """What kopf's index would hold of one kind, read from the cluster at every look."""

    def __init__(self, cluster: FakeCluster, kind: str, view: type[ChildView] | None) -> None:
        self._cluster, self._kind, self._view = cluster, kind, view

    def _built(self) -> dict[Key, list[Any]]:
        built: dict[Key, list[Any]] = {}
        for raw in self._cluster.of_kind(self._kind):
            meta = raw["metadata"]
            if self._view is None:
                built.setdefault(Key(self._kind, meta["namespace"], meta["name"]), []).append(copy.deepcopy(raw))
            elif (key := owner_key(meta["namespace"], meta.get("labels") or {})) is not None:
                built.setdefault(key, []).append(self._view.of(raw))
        return built

    def __getitem__(self, key: Key) -> Collection[Any]:
        return self._built()[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._built())

    def __len__(self) -> int:
        return len(self._built())
