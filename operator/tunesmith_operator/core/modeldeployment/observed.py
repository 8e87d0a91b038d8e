"""Everything known about one ModelDeployment at one moment. The engine's store builds it."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith_api import keys
from tunesmith_api.v1alpha1 import ModelDeployment
from tunesmith_operator.core.manifest import Owner
from tunesmith_operator.core.resources import MODELDEPLOYMENT
from tunesmith_operator.core.source import Source
from tunesmith_operator.core.views import (
    ChildView,
    ConfigMapView,
    DeploymentView,
    JobView,
    PodView,
    RejectionView,
    ServiceView,
)

__all__ = ["Family", "Observed", "family", "owner_of", "revision_label", "revision_name"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """The custom resource, its source, and all objects that carry its label."""

    deployment: ModelDeployment
    source: Source
    services: tuple[ServiceView, ...] = ()
    config_maps: tuple[ConfigMapView, ...] = ()
    network_policies: tuple[ChildView, ...] = ()
    jobs: tuple[JobView, ...] = ()
    deployments: tuple[DeploymentView, ...] = ()
    pods: tuple[PodView, ...] = ()
    rejections: tuple[RejectionView, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The children that are really this object's, by revision label where they belong to one."""

    service: ServiceView | None
    network_policy: ChildView | None
    config_maps: dict[str, ConfigMapView]
    jobs: dict[str, JobView]
    deployments: dict[str, DeploymentView]
    pods: tuple[PodView, ...]
    rejections: tuple[RejectionView, ...]
    leftovers: tuple[ChildView, ...]

    def quantize_pods(self, label: str) -> tuple[PodView, ...]:
        """Pods of a revision's quantize Job."""
        job = self.jobs.get(label)
        return tuple(pod for pod in self.pods if job is not None and pod.owner_uid == job.uid)

    def server_pods(self, label: str) -> tuple[PodView, ...]:
        """Pods of a revision's Deployment."""
        return tuple(
            pod
            for pod in self.pods
            if pod.labels.get(keys.LABEL_REVISION) == label
            and pod.labels.get(keys.LABEL_COMPONENT) == keys.COMPONENT_SERVER
        )


def revision_label(number: int) -> str:
    """Value of the revision label, and suffix of names: r2."""
    return f"r{number}"


def revision_name(deployment: ModelDeployment, number: int) -> str:
    """Name of a revision and of its Deployment."""
    return f"{deployment.metadata.name}-{revision_label(number)}"


def owner_of(deployment: ModelDeployment) -> Owner:
    """The ModelDeployment as the owner of its children."""
    meta = deployment.metadata
    return Owner(MODELDEPLOYMENT, meta.namespace, meta.name, meta.uid, keys.LABEL_MODELDEPLOYMENT)


def family(observed: Observed) -> Family:
    """Sort the observed children."""
    uid = observed.deployment.metadata.uid
    every: tuple[ChildView, ...] = (
        *observed.services,
        *observed.network_policies,
        *observed.config_maps,
        *observed.jobs,
        *observed.deployments,
    )
    jobs = {it.labels.get(keys.LABEL_REVISION, ""): it for it in observed.jobs if it.owner_uid == uid}
    job_uids = {job.uid for job in jobs.values()}
    return Family(
        service=next((it for it in observed.services if it.owner_uid == uid), None),
        network_policy=next((it for it in observed.network_policies if it.owner_uid == uid), None),
        config_maps={it.labels.get(keys.LABEL_REVISION, ""): it for it in observed.config_maps if it.owner_uid == uid},
        jobs=jobs,
        deployments={it.labels.get(keys.LABEL_REVISION, ""): it for it in observed.deployments if it.owner_uid == uid},
        pods=observed.pods,
        rejections=tuple(it for it in observed.rejections if it.job_uid in job_uids),
        leftovers=tuple(it for it in every if it.owner_uid != uid),
    )
