"""An API server in memory for component tests: uids, resource versions, preconditions, and crashes on demand.

Only the operator's own writes go through it as through the real one; `tests/integration` uses the real one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from support import statusschema
from support.make import merged
from tunesmith_operator.adapters.errors import AlreadyExists, Gone, Invalid, Rejected, Transient
from tunesmith_operator.core.kinds import KINDS
from tunesmith_operator.core.kubernetes.resources import Key, Resource
from tunesmith_operator.core.kubernetes.workloads import JOB_FIELDS
from tunesmith_operator.core.status.transitions import EventNote

Name = tuple[str, str, str]
NEW_STATUS = {kind.resource.kind: kind.model.model_json_schema()["properties"]["status"]["default"] for kind in KINDS}
"""What the CRDs make of an object without a status."""


class Crash(BaseException):
    """The operator's process dies here."""


class FakeCluster:
    """Objects by (kind, namespace, name). `writes` lists every write that was carried out."""

    def __init__(self) -> None:
        self.objects: dict[Name, dict[str, Any]] = {}
        self.writes: list[str] = []
        self.events: list[tuple[str, str]] = []
        self.notes: list[EventNote] = []
        self.crash_after: int | None = None
        self.cascade = True
        self.refuse: Callable[[str], str | None] = lambda write: None
        self.on_change: Callable[[str, dict[str, Any]], None] = lambda type_, raw: None
        self.admit: Callable[[str, dict[str, Any]], dict[str, Any]] = lambda kind, body: body
        self.find_invalid: Callable[[str, Any], str | None] = statusschema.refusal
        self._version = 100

    @property
    def version(self) -> int:
        """Version of the newest change."""
        return self._version

    # --- what the operator uses ---

    async def create(self, resource: Resource, namespace: str, body: dict[str, Any]) -> dict[str, Any]:
        name = (resource.kind, namespace, body["metadata"]["name"])
        self._check(f"create {resource.kind} {name[2]}")
        if name in self.objects:
            raise AlreadyExists(f'{resource.plural} "{name[2]}" already exists')
        stored = self._store(name, self.admit(resource.kind, copy.deepcopy(body)))
        self._done(f"create {resource.kind} {name[2]}")
        return stored

    async def find(self, resource: Resource, namespace: str, name: str) -> dict[str, Any] | None:
        return copy.deepcopy(self.objects.get((resource.kind, namespace, name)))

    async def patch(
        self, resource: Resource, namespace: str, name: str, uid: str, body: dict[str, Any]
    ) -> dict[str, Any]:
        self._check(f"patch {resource.kind} {name}")
        found = self._get(resource.kind, namespace, name)
        if found["metadata"]["uid"] != uid:
            raise Gone("another object has its name")
        changed = self.admit(resource.kind, merged(found, body))
        if resource.kind == "Job":
            kept = {
                field: {**raw["spec"], **dict.fromkeys(JOB_FIELDS)} for field, raw in {"a": found, "b": changed}.items()
            }
            assert kept["a"] == kept["b"], "the rest of a Job can't be changed"
        if changed.get("spec") != found.get("spec"):
            changed["metadata"]["generation"] = found["metadata"]["generation"] + 1
        stored = self._store((resource.kind, namespace, name), changed)
        self._done(f"patch {resource.kind} {name}")
        return stored

    async def delete(self, resource: Resource, namespace: str, name: str, uid: str) -> None:
        self._check(f"delete {resource.kind} {name}")
        found = self.objects.get((resource.kind, namespace, name))
        if found is not None and found["metadata"]["uid"] == uid:
            self.remove(resource.kind, namespace, name, self.cascade)
        self._done(f"delete {resource.kind} {name}")

    async def apply_status(
        self, resource: Resource, namespace: str, name: str, uid: str, version: str, status: Any
    ) -> dict[str, Any]:
        self._check(f"status {resource.kind} {name}")
        found = self._get(resource.kind, namespace, name)
        if found["metadata"]["uid"] != uid:
            raise Gone("another object has its name")
        if found["metadata"]["resourceVersion"] != version:
            raise Transient("the object has been modified")
        if (problem := self.find_invalid(resource.kind, status)) is not None:
            raise Invalid(problem)
        stored = self._store((resource.kind, namespace, name), {**found, "status": copy.deepcopy(status)})
        self._done(f"status {resource.kind} {name}")
        return stored

    async def record(self, resource: Resource, key: Key, uid: str, note: EventNote, now: Any) -> None:
        self.events.append((note.type, note.reason))
        self.notes.append(note)

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

    def remove(self, kind: str, namespace: str, name: str, cascade: bool = True) -> None:
        """Delete an object and, as the garbage collector does, what it owns (later, where `cascade` is false)."""
        gone = self.objects.pop((kind, namespace, name), None)
        if gone is None:
            return
        self._version += 1
        gone["metadata"]["resourceVersion"] = str(self._version)
        self.on_change("DELETED", copy.deepcopy(gone))
        if not cascade:
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
        if name[0] in NEW_STATUS:
            stored.setdefault("status", copy.deepcopy(NEW_STATUS[name[0]]))
        stored["metadata"].setdefault("creationTimestamp", "2026-11-24T12:00:00Z")
        self.objects[name] = stored
        self.on_change("MODIFIED" if before else "ADDED", copy.deepcopy(stored))
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
