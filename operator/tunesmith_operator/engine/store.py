"""What is known, by owner: snapshots for `decide`, built from the watches' indexes without asking the API server."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError

from tunesmith_api import keys
from tunesmith_api.keys import DeploymentCondition, JobCondition
from tunesmith_api.v1alpha1 import (
    FineTuneJob,
    FineTuneJobStatus,
    ModelDeployment,
    ModelDeploymentStatus,
    ObjectMeta,
    Storage,
)
from tunesmith_operator.core.finetunejob.observed import Observed as ObservedJob
from tunesmith_operator.core.manifest import JSON
from tunesmith_operator.core.modeldeployment.observed import Observed as ObservedDeployment
from tunesmith_operator.core.resources import (
    CONFIG_MAP,
    DEPLOYMENT,
    JOB,
    NETWORK_POLICY,
    SERVICE,
    Key,
    Resource,
)
from tunesmith_operator.core.source import Source, SourceModel, of_finetunejob
from tunesmith_operator.core.unreadable import Unreadable, describe
from tunesmith_operator.core.views import (
    ChildView,
    ConfigMapView,
    DeploymentView,
    JobView,
    PodView,
    ProgressSample,
    RejectionView,
    ServiceView,
)
from tunesmith_operator.engine.recent import RecentWrites

__all__ = ["VIEWS", "Indexes", "Store", "owner_key"]

V = TypeVar("V", bound=ChildView)
ByOwner = Mapping[Key, Collection[V]]

VIEWS: Mapping[Resource, type[ChildView]] = {
    SERVICE: ServiceView,
    CONFIG_MAP: ConfigMapView,
    NETWORK_POLICY: ChildView,
    JOB: JobView,
    DEPLOYMENT: DeploymentView,
}


def owner_key(namespace: str, labels: Mapping[str, str]) -> Key | None:
    """The custom resource that an object with these labels belongs to."""
    for label, kind in (
        (keys.LABEL_FINETUNEJOB, keys.FINETUNEJOB_KIND),
        (keys.LABEL_MODELDEPLOYMENT, keys.MODELDEPLOYMENT_KIND),
    ):
        if label in labels:
            return Key(kind, namespace, labels[label])
    return None


@dataclass(frozen=True, kw_only=True)
class Indexes:
    """Live views of what the watches have delivered."""

    finetunejobs: Mapping[Key, Collection[JSON]] = field(default_factory=dict)
    modeldeployments: Mapping[Key, Collection[JSON]] = field(default_factory=dict)
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

    def finetunejob(self, key: Key) -> ObservedJob | Unreadable | None:
        """Everything about a FineTuneJob; None where there is none."""
        raw = self._custom(self._indexes.finetunejobs, key)
        if raw is None:
            return None
        try:
            job = FineTuneJob.model_validate(raw)
        except ValidationError as error:
            return _unreadable(raw, error, FineTuneJobStatus, JobCondition.SUCCEEDED)
        jobs = self.recent.merge(key, JOB, self._indexes.jobs.get(key, ()))
        return ObservedJob(
            job=job,
            services=self.recent.merge(key, SERVICE, self._indexes.services.get(key, ())),
            config_maps=self.recent.merge(key, CONFIG_MAP, self._indexes.config_maps.get(key, ())),
            network_policies=self.recent.merge(key, NETWORK_POLICY, self._indexes.network_policies.get(key, ())),
            jobs=jobs,
            pods=tuple(self._indexes.pods.get(key, ())),
            rejections=self._rejections(jobs),
            progress=self._progress(key),
        )

    def modeldeployment(self, key: Key) -> ObservedDeployment | Unreadable | None:
        """Everything about a ModelDeployment; None where there is none."""
        raw = self._custom(self._indexes.modeldeployments, key)
        if raw is None:
            return None
        try:
            deployment = ModelDeployment.model_validate(raw)
        except ValidationError as error:
            return _unreadable(raw, error, ModelDeploymentStatus, DeploymentCondition.READY)
        jobs = self.recent.merge(key, JOB, self._indexes.jobs.get(key, ()))
        return ObservedDeployment(
            deployment=deployment,
            source=self._source(deployment),
            services=self.recent.merge(key, SERVICE, self._indexes.services.get(key, ())),
            config_maps=self.recent.merge(key, CONFIG_MAP, self._indexes.config_maps.get(key, ())),
            network_policies=self.recent.merge(key, NETWORK_POLICY, self._indexes.network_policies.get(key, ())),
            jobs=jobs,
            deployments=self.recent.merge(key, DEPLOYMENT, self._indexes.deployments.get(key, ())),
            pods=tuple(self._indexes.pods.get(key, ())),
            rejections=self._rejections(jobs),
        )

    def wrote_status(self, key: Key, raw: JSON) -> None:
        """Remember the custom resource as the API server returned it."""
        self._statuses[key] = raw

    def forget(self, key: Key) -> None:
        """The custom resource is gone."""
        self._statuses.pop(key, None)
        self.recent.forget(key)

    def _custom(self, index: Mapping[Key, Collection[JSON]], key: Key) -> JSON | None:
        found = list(index.get(key, ()))
        if not found:
            return None
        # a namesake that was deleted and made again can be indexed beside its successor for a moment
        newest = max(found, key=_version)
        written = self._statuses.get(key)
        same = written is not None and written["metadata"].get("uid") == newest["metadata"].get("uid")
        if written is not None and same and _version(written) > _version(newest):
            return written
        self._statuses.pop(key, None)
        return newest

    def _source(self, deployment: ModelDeployment) -> Source:
        source, namespace = deployment.spec.source, deployment.metadata.namespace
        if source.fine_tune_job_ref is None:
            return SourceModel(source.uri or "", "", deployment.spec.storage or Storage())
        name = source.fine_tune_job_ref.name
        observed = self.finetunejob(Key(keys.FINETUNEJOB_KIND, namespace, name))
        job = observed.job if isinstance(observed, ObservedJob) else None
        return of_finetunejob(name, namespace, job, deployment.spec.storage)

    def _rejections(self, jobs: tuple[JobView, ...]) -> tuple[RejectionView, ...]:
        return tuple(it for job in jobs for it in self._indexes.rejections.get(job.uid, ()))


def _version(raw: JSON) -> int:
    return int(raw["metadata"].get("resourceVersion") or 0)


def _unreadable(raw: JSON, error: ValidationError, status: type[Any], summary: str) -> Unreadable:
    try:
        known = status.model_validate(raw.get("status") or {})
    except ValidationError:
        known = status()
    return Unreadable(ObjectMeta.model_validate(raw["metadata"]), known, summary, describe(error))
