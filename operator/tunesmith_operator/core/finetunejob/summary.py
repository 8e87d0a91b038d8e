"""The one thing to say about a job that hasn't ended: a chain of named rules, the first that applies is reported.

`status` asks for it. Every rule has a row in tests/unit/core/test_core_summary_finetunejob.py that says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from tunesmith_api.keys import JobCondition, Reason
from tunesmith_api.reports import TrainerState
from tunesmith_api.v1alpha1 import Condition, FineTuneJob
from tunesmith_api.v1alpha1.jobstatus import JobPhase
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.finetunejob.children import ANNOTATION_RESTARTS_BEFORE
from tunesmith_operator.core.finetunejob.observed import Children, attempt_number, child_name, was_suspended
from tunesmith_operator.core.finetunejob.outcome import first_failure
from tunesmith_operator.core.finetunejob.usage import over_budget
from tunesmith_operator.core.kubernetes.objects import ConditionView
from tunesmith_operator.core.pods.crashes import Crash, first_crash
from tunesmith_operator.core.pods.startup import StartupProblem
from tunesmith_operator.core.reconcile.rules import first_answer
from tunesmith_operator.core.status.conditions import find
from tunesmith_operator.core.text import parse_time, rfc3339

__all__ = ["RULES", "Situation", "Summary", "summarize"]

_PHASES = {
    TrainerState.STARTING: JobPhase.STARTING,
    TrainerState.PREPARING: JobPhase.STARTING,
    TrainerState.TRAINING: JobPhase.TRAINING,
    TrainerState.EVALUATING: JobPhase.EVALUATING,
    TrainerState.SAVING: JobPhase.SAVING,
    TrainerState.FINISHED: JobPhase.SAVING,
    TrainerState.FAILED: JobPhase.STARTING,
}

_HOLDING_UP = frozenset({Reason.STORAGE_UNREACHABLE})
"""What a trainer that starts again may wait for."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What phase and summary condition say."""

    phase: JobPhase
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Situation:
    """What the rules look at. `restarts` is the count that the status is about to give."""

    job: FineTuneJob
    children: Children
    problem: StartupProblem | None
    restarts: int
    now: datetime
    config: Config

    @property
    def known(self) -> Condition | None:
        """The summary condition as it is."""
        return find(self.job.status.conditions, JobCondition.SUCCEEDED)

    @property
    def failing(self) -> ConditionView | None:
        """Why the Job is bound to fail, if it is."""
        return self.children.job.failing if self.children.job is not None else None

    @property
    def last_heartbeat(self) -> datetime | None:
        """The trainer's last heartbeat that the status has."""
        progress = self.job.status.progress
        return parse_time(progress.last_heartbeat_time) if progress is not None else None

    @property
    def crash(self) -> Crash | None:
        """What was lost, where a pod failed."""
        return first_crash(self.children.lost_pods, self.children.pods)

    @property
    def goes_on(self) -> str:
        """From where training goes on."""
        checkpoint = self.job.status.checkpoint
        return f"goes on from the checkpoint of step {checkpoint.step}" if checkpoint is not None else "starts again"

    @property
    def was_under_way(self) -> bool:
        """Whether this job has trained before, or been restarted."""
        progress, known = self.job.status.progress, self.known
        has_trained = progress is not None and progress.global_step > 0
        return has_trained or self.crash is not None or (known is not None and known.reason == Reason.RESTARTING)

    @property
    def is_resumed(self) -> bool:
        """Whether the workers start after a suspension and haven't trained since: they were stopped, not lost."""
        child, heartbeat = self.children.job, self.last_heartbeat
        if child is None or child.resumed_at is None:
            return child is not None and child.resuming
        return heartbeat is None or heartbeat <= child.resumed_at


def not_created(it: Situation) -> Summary | None:
    """There is no Job yet."""
    if it.children.job is not None:
        return None
    if it.job.status.attempts and not was_suspended(it.job.status):
        return _deleted(it)
    return Summary(JobPhase.PENDING, Reason.PENDING, "The workers are being created.")


def budget_exceeded(it: Situation) -> Summary | None:
    """The budget stops the workers as a suspension does; the job ends once they have ended."""
    if not over_budget(it.job, it.children, it.now):
        return None
    limit = it.job.spec.budget.max_gpu_seconds
    message = f"budget.maxGpuSeconds ({limit}) is used up: the workers are told to save a checkpoint, and are ended."
    return Summary(it.job.status.phase, Reason.BUDGET_EXCEEDED, message)


def waits_for_quota(it: Situation) -> Summary | None:
    """Kueue suspends what it hasn't admitted, or has preempted; that is nobody's `spec.suspend`."""
    problem = it.problem
    if problem is None or problem.reason is not Reason.QUOTA_PENDING:
        return None
    return Summary(JobPhase.PENDING, problem.reason, problem.message)


def suspended(it: Situation) -> Summary | None:
    """Pods that a suspension stops are no loss, so it comes before all that looks at pods."""
    child = it.children.job
    if not it.job.spec.suspend and (child is None or not child.suspended):
        return None
    return Summary(JobPhase.SUSPENDED, Reason.SUSPENDED, "Suspended: set spec.suspend to false to go on.")


def failing(it: Situation) -> Summary | None:
    """The Job controller stops all workers of a Job that is bound to fail; none of them is lost.

    Where a pod's exit code decided it, that pod explains it better: `verdict_pending` waits for the pod.
    """
    condition = it.failing
    if condition is None:
        return None
    by_exit_code = condition.reason == "PodFailurePolicy"
    if by_exit_code and it.known is not None and first_failure(it.children.pods) is None:
        return None
    late = condition.reason == "DeadlineExceeded"
    reason = Reason.DEADLINE_EXCEEDED if late else Reason.BACKOFF_LIMIT_EXCEEDED
    return Summary(it.job.status.phase, reason, f"The workers are being stopped: {condition.message}")


def cannot_start(it: Situation) -> Summary | None:
    """A pod that can't start says why, whatever the others do."""
    return Summary(JobPhase.PENDING, it.problem.reason, it.problem.message) if it.problem is not None else None


def succeeding(it: Situation) -> Summary | None:
    """Once worker 0 has succeeded, the success policy stops the other workers; none of them is lost."""
    child = it.children.job
    if child is None or not (child.complete or child.succeeding or it.children.worker_0_succeeded):
        return None
    return Summary(JobPhase.SAVING, Reason.TRAINING, "Worker 0 has finished; the other workers are being ended.")


def verdict_pending(it: Situation) -> Summary | None:
    """The Job controller's verdict on a failure is a moment away: nothing new is said in between."""
    sample = it.children.progress
    gave_up = sample is not None and sample.report.state is TrainerState.FAILED
    if it.failing is None and first_failure(it.children.pods) is None and not gave_up:
        return None
    return _unchanged(it)


def report_pending(it: Situation) -> Summary | None:
    """Worker 0 has reported before, and nothing has happened to it: its next report, or its end, is a moment away.

    So it is after a start of the operator, and when its container has stopped and the kubelet is yet to say how.
    """
    head, heartbeat = it.children.head, it.last_heartbeat
    if it.children.progress is not None or head is None or head.failed:
        return None
    if heartbeat is None or head.created is None or heartbeat < head.created:
        return None
    return _unchanged(it)


def held_up(it: Situation) -> Summary | None:
    """The trainer tries again and again, and says what it lacks: nothing was lost.

    While it tries, the cause stays: it would else come and go with each try.
    """
    sample = it.children.progress
    if sample is None or (sample.report.state is TrainerState.STARTING and not sample.report.reason):
        left = it.crash.pod.report if it.crash is not None else None
        given_up = left is not None and left.reason in _HOLDING_UP
        return Summary(JobPhase.STARTING, left.reason, left.message) if left is not None and given_up else None
    if sample.report.reason not in _HOLDING_UP:
        return None
    report, reason = sample.report, Reason(sample.report.reason)
    if report.state is TrainerState.STARTING:
        return Summary(JobPhase.STARTING, reason, report.message or "The trainer tries again.")
    tries_again = report.state is TrainerState.PREPARING and it.known is not None and it.known.reason == reason
    return _unchanged(it) if tries_again else None


def reported(it: Situation) -> Summary | None:
    """What the trainer itself says, once it is beyond its start."""
    sample = it.children.progress
    if sample is None or sample.report.state in (TrainerState.STARTING, TrainerState.FAILED):
        return None
    report = sample.report
    phase = _PHASES[report.state]
    reason = Reason.STARTING if phase is JobPhase.STARTING else Reason.TRAINING
    if reason is Reason.STARTING and report.restarts > 0 and it.was_under_way and not it.is_resumed:
        # it counts those of an earlier job, too, whose checkpoint this one began with
        reason = Reason.RESTARTING
    message = report.message or ("The model is training." if reason is Reason.TRAINING else "The trainer is starting.")
    if (it.now - sample.alive_at).total_seconds() > it.config.heartbeat_stale_seconds:
        message = (
            f"No sign of life from the trainer since {rfc3339(sample.alive_at)}. Its pods are still running: look at "
            "their logs; deleting the pod of worker 0 restarts training from the last checkpoint."
        )
    return Summary(phase, reason, message)


def job_deleted(it: Situation) -> Summary | None:
    """Somebody deletes the Job, or has: of the one in its place nothing has been heard yet."""
    child = it.children.job
    if child is None:
        return None
    replaces = ANNOTATION_RESTARTS_BEFORE in child.annotations and it.children.progress is None and it.crash is None
    heard = child.created is not None and it.last_heartbeat is not None and it.last_heartbeat > child.created
    return _deleted(it) if child.deleting or (replaces and not heard and not it.is_resumed) else None


def worker_lost(it: Situation) -> Summary | None:
    """Nobody reports, and a pod has failed, or training had got further before."""
    sample, crash = it.children.progress, it.crash
    starts_again = sample is not None and sample.report.restarts > 0
    if crash is None and (it.is_resumed or not (starts_again or it.was_under_way)):
        return None
    said = sample.report.message.rstrip(".") if sample is not None else ""
    cause = f" Last: {crash.message}" if crash is not None else f" Last: {said}." if said else ""
    return Summary(JobPhase.STARTING, Reason.RESTARTING, f"A worker was lost; training {it.goes_on}.{cause}")


def starting(it: Situation) -> Summary | None:
    """A container runs; Ray and the model take their time."""
    if not any(pod.started for pod in it.children.active_pods):
        return None
    return Summary(JobPhase.STARTING, Reason.STARTING, "The workers are starting Ray and loading the model.")


def _deleted(it: Situation) -> Summary:
    name = child_name(it.job, attempt_number(it.job))
    message = f"Job {name} was deleted and is created again; training {it.goes_on}. To pause it, set spec.suspend."
    return Summary(JobPhase.STARTING, Reason.JOB_DELETED, message)


def _unchanged(it: Situation) -> Summary | None:
    known = it.known
    return Summary(it.job.status.phase, Reason(known.reason), known.message) if known is not None else None


RULES: tuple[Callable[[Situation], Summary | None], ...] = (
    budget_exceeded,
    waits_for_quota,
    suspended,
    not_created,
    failing,
    cannot_start,
    succeeding,
    verdict_pending,
    report_pending,
    held_up,
    reported,
    job_deleted,
    worker_lost,
    starting,
)


def summarize(situation: Situation) -> Summary:
    """What the first rule says that applies; else the pods are waited for."""
    waiting = Summary(JobPhase.PENDING, Reason.PENDING, "Waiting for the workers' pods to start.")
    return first_answer(RULES, situation) or waiting
