"""Everything known about one FineTuneJob at one moment, and which of the objects are its children."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tunesmith_api import keys
from tunesmith_api.v1alpha1 import FineTuneJob, FineTuneJobStatus
from tunesmith_operator.core.kubernetes.manifest import Owner
from tunesmith_operator.core.kubernetes.objects import ChildView, ConfigMapView, RejectionView, ServiceView, SpecView
from tunesmith_operator.core.kubernetes.resources import FINETUNEJOB
from tunesmith_operator.core.kubernetes.workloads import JobView
from tunesmith_operator.core.pods.crashes import ended_at
from tunesmith_operator.core.pods.view import PodView
from tunesmith_operator.core.reconcile.kind import Lookup
from tunesmith_operator.core.reconcile.observed import ObservedObjects, owned_by
from tunesmith_operator.core.reconcile.progress import ProgressSample, QuotaSample
from tunesmith_operator.core.text import parse_time

__all__ = [
    "Children",
    "Observed",
    "attempt_number",
    "child_name",
    "children_of",
    "observe",
    "owner_of",
    "service_name",
    "was_suspended",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """The custom resource and its objects."""

    job: FineTuneJob
    objects: ObservedObjects


def observe(job: FineTuneJob, objects: ObservedObjects, lookup: Lookup) -> Observed:
    """A FineTuneJob needs to know of no other custom resource."""
    return Observed(job=job, objects=objects)


@dataclass(frozen=True, slots=True, kw_only=True)
class Children:
    """The children of the current attempt; `orphans` are those of a deleted job of the same name."""

    service: ServiceView | None
    config_map: ConfigMapView | None
    network_policy: SpecView | None
    job: JobView | None
    pods: tuple[PodView, ...]
    orphans: tuple[ChildView, ...]
    rejections: tuple[RejectionView, ...]
    progress: ProgressSample | None
    answers: Mapping[str, str] = field(default_factory=dict)
    quota: QuotaSample | None = None
    leaving: tuple[PodView, ...] = ()
    """Pods of Jobs of this object that are gone: they save a checkpoint, and hold what they have until they end."""

    @property
    def head(self) -> PodView | None:
        """The running pod of worker 0."""
        return next((pod for pod in self.active_pods if pod.index == 0), None)

    @property
    def active_pods(self) -> tuple[PodView, ...]:
        """Pods that have neither ended nor been deleted."""
        return tuple(pod for pod in self.pods if not pod.finished and not pod.deleting)

    @property
    def lost_pods(self) -> tuple[PodView, ...]:
        """Pods that failed of themselves since the Job was last resumed."""
        resumed = self.job.resumed_at if self.job is not None else None
        failed = [pod for pod in self.pods if pod.failed and not self.is_cleaned_up(pod)]
        return tuple(pod for pod in failed if resumed is None or ended_at(pod) >= resumed.timestamp())

    @property
    def stopped(self) -> bool:
        """All pods have ended, those of Jobs that are gone, too."""
        return all(pod.finished for pod in (*self.pods, *self.leaving))

    @property
    def worker_0_succeeded(self) -> bool:
        """Whether the pod whose success is the Job's has ended well."""
        return any(pod.index == 0 and pod.succeeded for pod in self.pods)

    def is_cleaned_up(self, pod: PodView) -> bool:
        """Whether the Job controller deleted the pod for a suspension: nothing was lost with it."""
        job = self.job
        if job is None or not pod.deleting:
            return False
        if job.suspended or job.resuming:
            return True
        return job.resumed_at is not None and pod.created is not None and pod.created < job.resumed_at


def attempt_number(job: FineTuneJob) -> int:
    """The attempt under way; the first where there was none."""
    return job.status.attempts[-1].number if job.status.attempts else 1


def was_suspended(status: FineTuneJobStatus) -> bool:
    """Whether the last attempt was stopped by `spec.suspend`, or by the budget: it is gone on with, and wasn't lost."""
    return bool(status.attempts) and status.attempts[-1].outcome == "Suspended"


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


def children_of(observed: Observed) -> Children:
    """Sort the objects into children and orphans."""
    objects, uid = observed.objects, observed.job.metadata.uid
    name = child_name(observed.job, attempt_number(observed.job))
    jobs = owned_by(uid, objects.jobs)
    job_uids = {job.uid for job in jobs}
    current = next((job for job in jobs if job.name == name), None)
    current_uid = current.uid if current is not None else None
    pods = tuple(pod for pod in objects.pods if current_uid is not None and pod.owner_uid == current_uid)
    head = next((pod for pod in pods if pod.index == 0 and not pod.finished and not pod.deleting), None)
    sample = objects.progress
    is_of_head = sample is not None and head is not None and sample.pod_uid == head.uid
    strangers = tuple(pod for pod in objects.pods if pod.owner_uid not in job_uids)
    orphaned_pods = tuple(pod for pod in strangers if not pod.finished)
    begun, quota = parse_time(observed.job.metadata.creation_timestamp), objects.quota
    services = [it for it in owned_by(uid, objects.services) if it.name == service_name(observed.job)]
    config_maps = [it for it in owned_by(uid, objects.config_maps) if it.name == name]
    return Children(
        service=next(iter(services), None),
        config_map=next(iter(config_maps), None),
        network_policy=next(iter(owned_by(uid, objects.network_policies)), None),
        job=current,
        pods=tuple(sorted(pods, key=lambda pod: (pod.index, pod.name))),
        orphans=objects.orphans(uid) + orphaned_pods,
        rejections=tuple(it for it in objects.rejections if current_uid is not None and it.job_uid == current_uid),
        progress=sample if is_of_head else None,
        answers=objects.answers,
        quota=quota if quota is not None and quota.job_uid == current_uid else None,
        # the label has the object's name alone: older pods are those of a namesake
        leaving=tuple(
            pod for pod in strangers if begun is not None and pod.created is not None and pod.created >= begun
        ),
    )
