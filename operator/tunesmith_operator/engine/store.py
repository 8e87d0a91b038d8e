"""What is known, by owner: snapshots for `decide`, built from what the informers deliver and what was just written.

The answer to a write counts as observed, so a reconcile that runs before the watch has caught up doesn't see a child
missing that it has just created.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from tunesmith_operator.core.kinds import KINDS, kind_of, owner_key
from tunesmith_operator.core.kubernetes.drift import correction, fingerprint, was_written
from tunesmith_operator.core.kubernetes.manifest import JSON, Manifest
from tunesmith_operator.core.kubernetes.objects import ChildView, ConfigMapView, RejectionView, ServiceView, SpecView
from tunesmith_operator.core.kubernetes.resources import (
    CONFIG_MAP,
    DEPLOYMENT,
    DISRUPTION_BUDGET,
    EVENT,
    JOB,
    NETWORK_POLICY,
    POD,
    SERVICE,
    Key,
    Resource,
)
from tunesmith_operator.core.kubernetes.workloads import DeploymentView, JobView
from tunesmith_operator.core.pods.view import PodView
from tunesmith_operator.core.reconcile.observed import ObservedObjects, owned_by
from tunesmith_operator.core.reconcile.progress import ProgressSample, QuotaSample, Sample, ServersSample
from tunesmith_operator.core.reconcile.unreadable import Unreadable, read
from tunesmith_operator.engine.cache import Cache, Entry, Name

__all__ = ["VIEWS", "WATCHED", "Store"]

V = TypeVar("V", bound=ChildView)
Raw = Mapping[str, Any]

VIEWS: Mapping[Resource, type[ChildView]] = {
    SERVICE: ServiceView,
    CONFIG_MAP: ConfigMapView,
    NETWORK_POLICY: SpecView,
    DISRUPTION_BUDGET: SpecView,
    JOB: JobView,
    DEPLOYMENT: DeploymentView,
    POD: PodView,
}
"""Objects that the operator watches for its custom resources, of whatever kind, and how they are read."""

WATCHED: tuple[Resource, ...] = (*(kind.resource for kind in KINDS), *VIEWS, EVENT)
_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


@dataclass(frozen=True, slots=True)
class StoredResource:
    """A custom resource as JSON, which takes a tenth of the memory of the model, and what its spec refers to."""

    body: bytes
    references: tuple[Key, ...]


class Store:
    """Snapshots by key. `wake` is called with the key of every custom resource that a change concerns."""

    def __init__(
        self,
        progress: Callable[[Key], Sample | None],
        wake: Callable[[Key], None],
        scopes: Iterable[str | None] = (None,),
    ) -> None:
        self._progress, self._wake_key = progress, wake
        self._custom: dict[Resource, Cache[StoredResource]] = {kind.resource: Cache() for kind in KINDS}
        self._views: dict[Resource, Cache[ChildView]] = {resource: Cache() for resource in VIEWS}
        self._rejections: Cache[RejectionView] = Cache()
        self._referring: dict[Key, set[Key]] = {}
        self._job_owners: dict[str, Key] = {}
        self._answers: dict[Key, dict[str, str]] = {}
        self._unlisted = {scope: set(WATCHED) for scope in scopes}
        self._deferred: set[Key] = set()

    # --- what the informers deliver ---

    def received(self, resource: Resource, raw: Raw) -> Name:
        """An object, new or changed or as known; returns its name."""
        meta = raw["metadata"]
        name = Name(meta.get("namespace", ""), meta["name"])
        uid, version = meta.get("uid", ""), _version(raw)
        if resource in self._custom:
            self._received_custom(resource, name, uid, version, raw)
        elif resource == EVENT:
            self._received_rejection(name, uid, version, raw)
        else:
            self._received_child(resource, name, uid, version, raw)
        return name

    def removed(self, resource: Resource, raw: Raw) -> None:
        """An object that is no more."""
        meta = raw["metadata"]
        name = Name(meta.get("namespace", ""), meta["name"])
        entry = self._cache(resource).drop(name, meta.get("uid", ""), _version(raw))
        if entry is not None:
            self._left(resource, entry)

    def listed(self, resource: Resource, namespace: str | None, seen: set[Name], version: int) -> None:
        """These are all there are; what else is known is gone, unless it was written after that version."""
        cache = self._cache(resource)
        for entry in cache.prune(cache.names(namespace) - seen, version):
            self._left(resource, entry)
        self._unlisted[namespace].discard(resource)
        if not self._unlisted[namespace]:
            ready = {key for key in self._deferred if self.ready(key.namespace)}
            self._deferred -= ready
            for key in ready:
                self._wake_key(key)

    def lost(self, resource: Resource, namespace: str | None) -> None:
        """What is known may be old, until the next list: nothing is decided there meanwhile.

        Kinds come back one by one. Were children known to be gone before their owner is, they would be made again.
        """
        self._unlisted[namespace].add(resource)

    def lost_watches(self) -> int:
        """How many watches are lost or haven't listed yet."""
        return sum(len(missing) for missing in self._unlisted.values())

    # --- what the operator wrote ---

    def wrote(self, resource: Resource, raw: Raw) -> None:
        """An object as the API server returned it."""
        if resource in self._custom or resource in self._views:
            self.received(resource, raw)

    def deleted(self, resource: Resource, namespace: str, name: str, uid: str) -> None:
        """The API server has accepted to delete that object; one that lingers comes back with its next event."""
        known = self._cache(resource).get(Name(namespace, name))
        if known is not None and known.uid == uid:
            self._cache(resource).drop(Name(namespace, name), uid, known.version)
            self._left(resource, known)

    def answered(self, key: Key, manifest: Manifest, written: JSON, child: ChildView) -> None:
        """Remember what became of the operator's own write of a child: where it isn't what was written, it stays so."""
        answers = self._answers.setdefault(key, {})
        difference = correction(manifest, child)
        if difference and was_written(difference, written):
            answers[str(manifest)] = fingerprint(manifest, child)
        else:
            answers.pop(str(manifest), None)

    # --- snapshots ---

    def defer(self, key: Key) -> None:
        """Wake that key once its namespace is ready."""
        self._deferred.add(key)

    def ready(self, namespace: str) -> bool:
        """Whether all that is known of that namespace is true to the API server: else, nothing is decided."""
        return any(not missing for scope, missing in self._unlisted.items() if scope in (None, namespace))

    def custom_resource(self, key: Key) -> Any:
        """The custom resource in its kind's model, or `Unreadable`; None where there is none."""
        kind = kind_of(key)
        entry = self._custom[kind.resource].get(Name(key.namespace, key.name))
        if entry is None:
            return None
        found = read(kind, json.loads(entry.value.body))
        if isinstance(found, Unreadable):
            return replace(found, has_jobs=bool(owned_by(found.meta.uid, self._children(JOB, JobView, key))))
        return found

    def resource_version(self, key: Key) -> str:
        """Of the custom resource, as it is known."""
        entry = self._custom[kind_of(key).resource].get(Name(key.namespace, key.name))
        return str(entry.version) if entry is not None else ""

    def observe(self, key: Key, resource: Any) -> Any:
        """All that its kind needs to know to decide about the custom resource."""
        return kind_of(key).observe(resource, self._objects(key), self._readable)

    def _readable(self, key: Key) -> Any:
        found = self.custom_resource(key)
        return None if isinstance(found, Unreadable) else found

    def _objects(self, key: Key) -> ObservedObjects:
        jobs = self._children(JOB, JobView, key)
        sample = self._progress(key)
        return ObservedObjects(
            services=self._children(SERVICE, ServiceView, key),
            config_maps=self._children(CONFIG_MAP, ConfigMapView, key),
            network_policies=self._children(NETWORK_POLICY, SpecView, key),
            disruption_budgets=self._children(DISRUPTION_BUDGET, SpecView, key),
            jobs=jobs,
            deployments=self._children(DEPLOYMENT, DeploymentView, key),
            pods=self._children(POD, PodView, key),
            rejections=tuple(it for job in jobs for it in self._rejections.of(job.uid)),
            progress=sample if isinstance(sample, ProgressSample) else None,
            servers=sample if isinstance(sample, ServersSample) else None,
            quota=sample if isinstance(sample, QuotaSample) else None,
            answers=self._answers.get(key, {}),
        )

    def _children(self, resource: Resource, view: type[V], key: Key) -> tuple[V, ...]:
        return cast(tuple[V, ...], self._views[resource].of(key))

    # --- keeping ---

    def _cache(self, resource: Resource) -> Cache[Any]:
        if resource in self._custom:
            return self._custom[resource]
        return self._rejections if resource == EVENT else self._views[resource]

    def _received_custom(self, resource: Resource, name: Name, uid: str, version: int, raw: Raw) -> None:
        kind = next(kind for kind in KINDS if kind.resource == resource)
        key = kind.key(*name)
        references = tuple(kind.references(name.namespace, raw.get("spec") or {}))
        taken, before = self._custom[resource].put(
            name, Entry(uid, version, key, StoredResource(_compact(raw), references))
        )
        if taken:
            self._refer(key, before.value.references if before is not None else (), references)
            self._wake_with_referring(key)

    def _received_child(self, resource: Resource, name: Name, uid: str, version: int, raw: Raw) -> None:
        owner = owner_key(name.namespace, raw["metadata"].get("labels") or {})
        view = VIEWS[resource].of(raw)
        taken, before = self._views[resource].put(name, Entry(uid, version, owner, view))
        if not taken:
            return
        if resource == JOB and owner is not None:
            self._job_owners[uid] = owner
        if before is not None and before.group == owner and replace(view, version=before.version) == before.value:
            return  # nothing that a decision looks at has changed
        self._wake(owner)
        if before is not None and before.group != owner:
            self._wake(before.group)

    def _received_rejection(self, name: Name, uid: str, version: int, raw: Raw) -> None:
        view = RejectionView.of(raw)
        if self._rejections.put(name, Entry(uid, version, view.job_uid, view))[0]:
            self._wake(self._job_owners.get(view.job_uid))

    def _left(self, resource: Resource, entry: Entry[Any]) -> None:
        """The object has just been dropped: wake whom it concerns."""
        if resource in self._custom:
            key = cast(Key, entry.group)
            self._answers.pop(key, None)
            self._refer(key, entry.value.references, ())
            self._wake_with_referring(key)
        elif resource != EVENT:  # an Event's end changes nothing
            self._job_owners.pop(entry.uid, None)
            self._wake(entry.group)

    def _refer(self, key: Key, before: tuple[Key, ...], after: tuple[Key, ...]) -> None:
        for target in before:
            referring = self._referring.get(target, set())
            referring.discard(key)
            if not referring:
                self._referring.pop(target, None)
        for target in after:
            self._referring.setdefault(target, set()).add(key)

    def _wake_with_referring(self, key: Key) -> None:
        self._wake(key)
        for referring in self._referring.get(key, ()):
            self._wake(referring)

    def _wake(self, key: Hashable | None) -> None:
        if not isinstance(key, Key):
            return
        if self.ready(key.namespace):
            self._wake_key(key)
        else:
            self.defer(key)


def _version(raw: Raw) -> int:
    return int(raw["metadata"].get("resourceVersion") or 0)


def _compact(raw: Raw) -> bytes:
    """The custom resource without what only others read: who owns which field, and what was last applied."""
    meta = {name: value for name, value in raw["metadata"].items() if name != "managedFields"}
    if _APPLIED in (meta.get("annotations") or {}):
        meta["annotations"] = {name: value for name, value in meta["annotations"].items() if name != _APPLIED}
    return json.dumps({**raw, "metadata": meta}, ensure_ascii=False, separators=(",", ":")).encode()
