"""Everything known about one FineTuneJob at one moment. The engine's store builds it without asking the API server."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith_api import keys
from tunesmith_api.v1alpha1 import FineTuneJob
from tunesmith_operator.core.crashes import ended_at
from tunesmith_operator.core.manifest import Owner
from tunesmith_operator.core.resources import FINETUNEJOB
from tunesmith_operator.core.views import (
    ChildView,
    ConfigMapView,
    JobView,
    PodView,
    ProgressSample,
    RejectionView,
    ServiceView,
)

__all__ = ["Family", "Observed", "attempt_number", "child_name", "family", "owner_of", "service_name"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """The custom resource, all objects that carry its label, and the last progress report."""

    job: FineTuneJob
    services: tuple[ServiceView, ...] = ()
    config_maps: tuple[ConfigMapView, ...] = ()
    network_policies: tuple[ChildView, ...] = ()
    jobs: tuple[JobView, ...] = ()
    pods: tuple[PodView, ...] = ()
    rejections: tuple[RejectionView, ...] = ()
    progress: ProgressSample | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The children of the current attempt, told apart from what a deleted predecessor of the same name left behind."""

    service: ServiceView | None
    config_map: ConfigMapView | None
    network_policy: ChildView | None
    job: JobView | None
    pods: tuple[PodView, ...]
    leftovers: tuple[ChildView, ...]
    rejections: tuple[RejectionView, ...]
    progress: ProgressSample | None

    @property
    def head(self) -> PodView | None:
        """The living pod of worker 0."""
        return next((pod for pod in self.living if pod.index == 0), None)

    @property
    def living(self) -> tuple[PodView, ...]:
        """Pods that have neither ended nor been told to."""
        return tuple(pod for pod in self.pods if not pod.finished and not pod.deleting)

    @property
    def lost(self) -> tuple[PodView, ...]:
        """Pods that failed of themselves since the Job was last resumed."""
        resumed = self.job.resumed_at if self.job is not None else None
        since = resumed.timestamp() if resumed is not None else 0.0
        return tuple(
            pod
            for pod in self.pods
            if pod.failed and not self.cleaned_up(pod) and (not since or ended_at(pod) >= since)
        )

    def cleaned_up(self, pod: PodView) -> bool:
        """Whether the Job controller took the pod away for a suspension: nothing was lost with it."""
        job = self.job
        if job is None or not pod.deleting:
            return False
        if job.suspended or job.resuming:
            return True
        return job.resumed_at is not None and pod.created is not None and pod.created < job.resumed_at


def attempt_number(job: FineTuneJob) -> int:
    """The attempt under way; the first where there was none."""
    return job.status.attempts[-1].number if job.status.attempts else 1


def child_name(job: FineTuneJob, attempt: int) -> str:
    """Name of an attempt's Job and ConfigMap."""
    return f"{job.metadata.name}-{attempt}"


def service_name(job: FineTuneJob) -> str:
    """Name of the Service and the NetworkPolicy: not the job's own, which belongs to a ModelDeployment of that name."""
    return f"{job.metadata.name}-workers"


def owner_of(job: FineTuneJob) -> Owner:
    """The FineTuneJob as the owner of its children."""
    meta = job.metadata
    return Owner(FINETUNEJOB, meta.namespace, meta.name, meta.uid, keys.LABEL_FINETUNEJOB)


def family(observed: Observed) -> Family:
    """Sort the observed children."""
    meta = observed.job.metadata
    name = child_name(observed.job, attempt_number(observed.job))
    jobs = {job.uid: job for job in observed.jobs if job.owner_uid == meta.uid}
    current = next((job for job in jobs.values() if job.name == name), None)
    mine = tuple(pod for pod in observed.pods if current is not None and pod.owner_uid == current.uid)
    head = next((pod for pod in mine if pod.index == 0 and not pod.finished and not pod.deleting), None)
    sample = observed.progress
    children: tuple[ChildView, ...] = (
        *observed.services,
        *observed.config_maps,
        *observed.network_policies,
        *observed.jobs,
    )
    orphans = tuple(pod for pod in observed.pods if pod.owner_uid not in jobs and not pod.finished)
    return Family(
        service=next(
            (it for it in observed.services if it.owner_uid == meta.uid and it.name == service_name(observed.job)), None
        ),
        config_map=next((it for it in observed.config_maps if it.owner_uid == meta.uid and it.name == name), None),
        network_policy=next((it for it in observed.network_policies if it.owner_uid == meta.uid), None),
        job=current,
        pods=tuple(sorted(mine, key=lambda pod: (pod.index, pod.name))),
        leftovers=tuple(child for child in children if child.owner_uid != meta.uid) + orphans,
        rejections=tuple(it for it in observed.rejections if current is not None and it.job_uid == current.uid),
        progress=sample if sample is not None and head is not None and sample.pod_uid == head.uid else None,
    )
