"""What is known, by owner: snapshots for `decide`, built from the watches' indexes without asking the API server."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from tunesmith_operator.core.kinds import kind_of
from tunesmith_operator.core.kubernetes.manifest import JSON
from tunesmith_operator.core.kubernetes.objects import ChildView, ConfigMapView, RejectionView, ServiceView
from tunesmith_operator.core.kubernetes.resources import (
    CONFIG_MAP,
    DEPLOYMENT,
    JOB,
    NETWORK_POLICY,
    POD,
    SERVICE,
    Key,
    Resource,
)
from tunesmith_operator.core.kubernetes.workloads import DeploymentView, JobView
from tunesmith_operator.core.pods.view import PodView
from tunesmith_operator.core.reconcile.kind import Kind
from tunesmith_operator.core.reconcile.observed import ObservedObjects, owned_by
from tunesmith_operator.core.reconcile.progress import ProgressSample
from tunesmith_operator.core.reconcile.unreadable import Unreadable, read
from tunesmith_operator.engine.recent import RecentWrites

__all__ = ["VIEWS", "Indexes", "Store"]

V = TypeVar("V", bound=ChildView)
ByOwner = Mapping[Key, Collection[V]]

VIEWS: Mapping[Resource, type[ChildView]] = {
    SERVICE: ServiceView,
    CONFIG_MAP: ConfigMapView,
    NETWORK_POLICY: ChildView,
    JOB: JobView,
    DEPLOYMENT: DeploymentView,
    POD: PodView,
}
"""Objects that the operator watches for its custom resources, of whatever kind, and how they are read."""


@dataclass(frozen=True, kw_only=True)
class Indexes:
    """Live views of what the watches have delivered."""

    custom: Mapping[Resource, Mapping[Key, Collection[JSON]]] = field(default_factory=dict)
    services: ByOwner[ServiceView] = field(default_factory=dict)
    config_maps: ByOwner[ConfigMapView] = field(default_factory=dict)
    network_policies: ByOwner[ChildView] = field(default_factory=dict)
    jobs: ByOwner[JobView] = field(default_factory=dict)
    deployments: ByOwner[DeploymentView] = field(default_factory=dict)
    pods: ByOwner[PodView] = field(default_factory=dict)
    rejections: Mapping[str, Collection[RejectionView]] = field(default_factory=dict)


class Store:
    """Snapshots by key."""

    def __init__(
        self, indexes: Indexes, recent: RecentWrites, progress: Callable[[Key], ProgressSample | None]
    ) -> None:
        self._indexes, self._progress = indexes, progress
        self.recent = recent
        self._statuses: dict[Key, JSON] = {}

    def custom_resource(self, key: Key) -> Any:
        """The custom resource in its kind's model, or `Unreadable`; None where there is none."""
        kind = kind_of(key)
        raw = self._newest(kind, key)
        found = read(kind, raw) if raw is not None else None
        if isinstance(found, Unreadable):
            return replace(found, has_jobs=bool(owned_by(found.meta.uid, self._objects(key).jobs)))
        return found

    def observe(self, key: Key, resource: Any) -> Any:
        """All that its kind needs to know to decide about the custom resource."""
        return kind_of(key).observe(resource, self._objects(key), self._readable)

    def wrote_status(self, key: Key, raw: JSON) -> None:
        """Remember the custom resource as the API server returned it."""
        self._statuses[key] = raw

    def forget(self, key: Key) -> None:
        """The custom resource is gone."""
        self._statuses.pop(key, None)
        self.recent.forget(key)

    def _readable(self, key: Key) -> Any:
        found = self.custom_resource(key)
        return None if isinstance(found, Unreadable) else found

    def _objects(self, key: Key) -> ObservedObjects:
        indexes = self._indexes
        jobs = self._children(key, JOB, indexes.jobs)
        return ObservedObjects(
            services=self._children(key, SERVICE, indexes.services),
            config_maps=self._children(key, CONFIG_MAP, indexes.config_maps),
            network_policies=self._children(key, NETWORK_POLICY, indexes.network_policies),
            jobs=jobs,
            deployments=self._children(key, DEPLOYMENT, indexes.deployments),
            pods=tuple(indexes.pods.get(key, ())),
            rejections=tuple(it for job in jobs for it in indexes.rejections.get(job.uid, ())),
            progress=self._progress(key),
        )

    def _children(self, key: Key, resource: Resource, index: ByOwner[V]) -> tuple[V, ...]:
        return self.recent.merge(key, resource, index.get(key, ()))

    def _newest(self, kind: Kind[Any, Any], key: Key) -> JSON | None:
        found = list(self._indexes.custom.get(kind.resource, {}).get(key, ()))
        if not found:
            return None
        # one that was deleted and created again can be indexed beside its successor for a moment
        newest = max(found, key=_version)
        written = self._statuses.get(key)
        same = written is not None and written["metadata"].get("uid") == newest["metadata"].get("uid")
        if written is not None and same and _version(written) > _version(newest):
            return written
        self._statuses.pop(key, None)
        return newest


def _version(raw: JSON) -> int:
    return int(raw["metadata"].get("resourceVersion") or 0)
