"""GPU-seconds: what a job's pods have used, and what happens when that is as much as `spec.budget` allows.

Each pod counts from the moment it has its node until its container has ended, in whole seconds, by the times that
Kubernetes has recorded. The status says how many there are and until when they count; from there on the pods that are
seen are added. So the count is the same however often it is looked at, and an operator that starts anew counts on. The
end of a pod that is being deleted is written at once (`is_last_look`); of one that was gone before an operator saw its
end, what came after the last write isn't known and isn't counted.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TypeVar

from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1 import FineTuneJob
from tunesmith_operator.core.finetunejob.observed import Children
from tunesmith_operator.core.finetunejob.outcome import Verdict
from tunesmith_operator.core.pods.view import PodView
from tunesmith_operator.core.status.resource import Status
from tunesmith_operator.core.text import parse_time, rfc3339

__all__ = ["budget_end", "budget_verdict", "counted", "gpu_seconds", "is_last_look", "over_budget"]

S = TypeVar("S", bound=Status)


def gpu_seconds(job: FineTuneJob, children: Children, now: datetime) -> int | None:
    """What has been used until now; None for a job without GPUs."""
    gpus = job.spec.workers.gpus_per_worker
    if not gpus:
        return None
    since = parse_time(job.status.gpu_seconds_time)
    new = sum(_seconds(pod, since, now) for pod in (*children.pods, *children.leaving))
    return (job.status.gpu_seconds or 0) + gpus * new


def counted(status: S, job: FineTuneJob, children: Children, now: datetime) -> S:
    """The status with what has been used until now."""
    used, since = gpu_seconds(job, children, now), parse_time(job.status.gpu_seconds_time)
    if used is None:
        return status
    until = now if since is None else max(since, now)  # the clock may have been set back
    return status.model_copy(update={"gpu_seconds": used, "gpu_seconds_time": rfc3339(until)})


def is_last_look(job: FineTuneJob, children: Children, now: datetime) -> bool:
    """Whether a pod that is being deleted has ended with seconds that the status doesn't have: soon it is gone."""
    since = parse_time(job.status.gpu_seconds_time)
    ended = (pod for pod in (*children.pods, *children.leaving) if pod.deleting and not _is_busy(pod))
    return job.spec.workers.gpus_per_worker > 0 and any(_seconds(pod, since, now) > 0 for pod in ended)


def over_budget(job: FineTuneJob, children: Children, now: datetime) -> bool:
    """Whether the job has used what it may. One that is ending anyway is let end."""
    limit, child = job.spec.budget.max_gpu_seconds, children.job
    if limit is None or children.worker_0_succeeded or (child is not None and child.ending):
        return False
    used = gpu_seconds(job, children, now)
    return used is not None and used >= limit


def budget_end(job: FineTuneJob, children: Children, now: datetime) -> datetime | None:
    """When the budget will be used up by the pods that run now."""
    limit, used = job.spec.budget.max_gpu_seconds, gpu_seconds(job, children, now)
    busy = sum(_is_busy(pod) for pod in (*children.pods, *children.leaving))
    if limit is None or used is None or not busy or used >= limit:
        return None
    rate = busy * job.spec.workers.gpus_per_worker
    return now + timedelta(seconds=-((used - limit) // rate))


def budget_verdict(job: FineTuneJob, children: Children, now: datetime) -> Verdict:
    """The end of a job whose workers have ended, as the budget was used up."""
    message = (
        f"stopped after {gpu_seconds(job, children, now)} GPU-seconds (budget.maxGpuSeconds: "
        f"{job.spec.budget.max_gpu_seconds}); the workers were told to save a checkpoint first. To go on, create a "
        "FineTuneJob with the same checkpoint.uri and a budget of its own: it resumes from the last checkpoint."
    )
    reports = (pod.report for pod in (*children.pods, *children.leaving) if pod.index == 0)
    return Verdict(False, Reason.BUDGET_EXCEEDED, message, next((it for it in reports if it is not None), None))


def _is_busy(pod: PodView) -> bool:
    return pod.scheduled_at is not None and not (pod.finished or pod.failed or pod.succeeded)


def _seconds(pod: PodView, since: datetime | None, now: datetime) -> int:
    """Whole seconds of the pod that haven't been counted yet."""
    if pod.scheduled_at is None:
        return 0
    begin = pod.scheduled_at if since is None else max(pod.scheduled_at, since)
    ended = pod.container.ended_at if pod.container is not None and not _is_busy(pod) else None
    end = now if _is_busy(pod) else min(ended or begin, now)
    return max(0, int(end.timestamp()) - int(begin.timestamp()))
