"""A job that waits in a queue of Kueue's: whose `suspend` it is, what it waits for, and how long it may.

Kueue manages the child Job: it has the label of the queue, is created suspended, and from then on its `spec.suspend` is
Kueue's alone (docs/adr/0020-kueue-owns-suspend.md). `decide` asks here.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from tunesmith_api import keys
from tunesmith_api.v1alpha1 import FineTuneJob
from tunesmith_operator.core.finetunejob.observed import Children
from tunesmith_operator.core.kubernetes.workloads import JobView
from tunesmith_operator.core.pods.quota import quota_problem
from tunesmith_operator.core.pods.startup import Startup

__all__ = ["is_queued", "quota_startup", "waits_in_queue"]


def is_queued(job: FineTuneJob, child: JobView) -> bool:
    """Whether Kueue says when the Job's pods may be. Where there is a default queue, its webhook labels the Job."""
    return bool(_queue_of(job, child))


def _queue_of(job: FineTuneJob, child: JobView) -> str:
    return child.queue or job.metadata.labels.get(keys.LABEL_QUEUE, "")


def waits_in_queue(job: FineTuneJob, children: Children) -> bool:
    """Whether the Job may not have pods until Kueue admits it."""
    child = children.job
    if child is None or child.ending or child.deleting or job.spec.suspend:
        return False
    return child.suspended and is_queued(job, child)


def quota_startup(job: FineTuneJob, children: Children, now: datetime) -> Startup:
    """What the queued Job waits for, and for how long yet where `preRunningDeadlineSeconds` bounds it."""
    child, limit = children.job, job.spec.pre_running_deadline_seconds
    assert child is not None
    problem = quota_problem(child, _queue_of(job, child), children.quota.words if children.quota is not None else "")
    since = problem.since
    end = since + timedelta(seconds=limit) if since is not None and limit is not None else None
    if end is not None and end <= now:
        return Startup(problem, expired=problem)
    return Startup(problem, deadline=end)
