"""What is said of a Job that waits in a queue of Kueue's, whichever object it belongs to."""

from __future__ import annotations

from tunesmith_api.keys import Reason
from tunesmith_operator.core.kubernetes.workloads import JobView
from tunesmith_operator.core.pods.startup import StartupProblem

__all__ = ["quota_problem"]


def quota_problem(job: JobView, queue: str, words: str = "") -> StartupProblem:
    """It has no pods until Kueue admits it; `words` are Kueue's own, where it has been asked."""
    cause = (
        f"Kueue says: {words.rstrip('.')}."
        if words
        else f"kubectl get localqueues,workloads -n {job.namespace} shows whether Kueue is installed and has that "
        "queue, and what is missing."
    )
    text = f"Job {job.name} waits in queue {queue} for quota. {cause} It starts by itself once there is room."
    # one that Kueue has just preempted waits since the Job controller says so, not since it was made
    since = job.created if job.resumed_at is None else None
    return StartupProblem(Reason.QUOTA_PENDING, text, job.suspended_at or since, waits_for_room=True)
