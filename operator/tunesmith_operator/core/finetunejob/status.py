"""Observed → status: the only place that says what a FineTuneJob's status is. `summary` says what it sums up to."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from tunesmith_api.keys import JobCondition, Reason
from tunesmith_api.reports import DatasetFacts, ProgressReport, TerminationReport
from tunesmith_api.v1alpha1 import FineTuneJob, FineTuneJobSpec, FineTuneJobStatus, ObjectMeta
from tunesmith_api.v1alpha1.jobstatus import (
    Attempt,
    CheckpointStatus,
    DatasetStatus,
    JobDisplay,
    JobPhase,
    ModelStatus,
    Progress,
    WorkerCounts,
)
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.finetunejob.observed import Children, attempt_number, child_name
from tunesmith_operator.core.finetunejob.outcome import Verdict
from tunesmith_operator.core.finetunejob.summary import Situation, Summary, summarize
from tunesmith_operator.core.pods.startup import StartupProblem
from tunesmith_operator.core.reconcile.rules import Violation
from tunesmith_operator.core.status.conditions import (
    FALSE,
    TRUE,
    UNKNOWN,
    Finding,
    accepted,
    children_applied,
    find,
    refused,
    with_findings,
)
from tunesmith_operator.core.text import duration, loss, number, rfc3339, shortened

__all__ = [
    "ended_status",
    "has_ended",
    "refused_status",
    "running_status",
    "seen_after_end",
    "startup_verdict",
    "unreadable_status",
    "waiting_status",
]

MAX_ROW_LENGTH = 500


def has_ended(status: FineTuneJobStatus) -> bool:
    """Whether the job is over for good. One that was refused before its start isn't: a corrected spec starts it."""
    summary, spec = (find(status.conditions, type_) for type_ in (JobCondition.SUCCEEDED, JobCondition.ACCEPTED))
    decided = summary is not None and summary.status != UNKNOWN
    return status.completion_time is not None or (decided and (spec is None or spec.status != FALSE))


def seen_after_end(status: FineTuneJobStatus, generation: int) -> FineTuneJobStatus:
    """The status of a job that has ended, and an edit since: it is taken note of and changes nothing.

    `kubectl wait` and the like count a condition of an older generation as not there.
    """
    known = [it.model_copy(update={"observed_generation": generation}) for it in status.conditions]
    return status.model_copy(update={"observed_generation": generation, "conditions": known})


def refused_status(
    meta: ObjectMeta, before: FineTuneJobStatus, violation: Violation, now: datetime
) -> FineTuneJobStatus:
    """The spec breaks a policy, or can't be read, and nothing has been started: it doesn't succeed as it stands."""
    findings = (
        refused(violation.reason, violation.message),
        Finding(JobCondition.SUCCEEDED, FALSE, violation.reason, violation.message),
    )
    generation = meta.generation
    return with_findings(before, findings, now, generation, observed_generation=generation, phase=JobPhase.FAILED)


def unreadable_status(
    meta: ObjectMeta, before: FineTuneJobStatus, message: str, has_jobs: bool, now: datetime
) -> FineTuneJobStatus:
    """The spec can't be read. What has ended stays ended; what has started may still succeed."""
    if has_ended(before):
        return seen_after_end(before, meta.generation)
    violation = Violation(message)
    if before.start_time is None and not has_jobs:
        return refused_status(meta, before, violation, now)
    findings = (
        refused(violation.reason, message),
        Finding(JobCondition.SUCCEEDED, UNKNOWN, violation.reason, message),
    )
    return with_findings(before, findings, now, meta.generation)


def waiting_status(job: FineTuneJob, reason: Reason, message: str, now: datetime) -> FineTuneJobStatus:
    """Nothing is started for now: suspended before the start, or orphans of a previous job are still being deleted."""
    desired = job.spec.workers.replicas
    findings = (
        accepted(),
        Finding(JobCondition.WORKERS_READY, FALSE, reason, message),
        Finding(JobCondition.SUCCEEDED, UNKNOWN, reason, message),
    )
    return with_findings(
        job.status,
        findings,
        now,
        job.metadata.generation,
        phase=JobPhase.SUSPENDED if reason is Reason.SUSPENDED else JobPhase.PENDING,
        workers=WorkerCounts(desired=desired, ready=0),
        display=job.status.display.model_copy(update={"workers": f"0/{desired}", "eta": ""}),
    )


def running_status(
    job: FineTuneJob,
    children: Children,
    problem: StartupProblem | None,
    restarts_before: int,
    now: datetime,
    config: Config,
) -> FineTuneJobStatus:
    """The children are in place and the Job is under way (or about to be created, where `children.job` is None)."""
    before = job.status
    desired = job.spec.workers.replicas
    ready = len({pod.index for pod in children.active_pods if pod.ready})
    report = children.progress.report if children.progress is not None else None
    restarts = max(before.restarts, _restarts(children, restarts_before))
    summary = summarize(Situation(job, children, problem, restarts, now, config))
    suspended = summary.reason in (Reason.SUSPENDED, Reason.BUDGET_EXCEEDED)
    checkpoint = _checkpoint(before, report.checkpoint if report is not None else None)
    progress = _progress(before.progress, report, ready == desired, now)
    started = children.job.start_time if children.job is not None and children.job.start_time is not None else now
    start_time = before.start_time or rfc3339(started)
    attempt = Attempt(
        number=attempt_number(job),
        job_name=child_name(job, attempt_number(job)),
        outcome="Suspended" if suspended else "Running",
        start_time=before.attempts[-1].start_time if before.attempts else start_time,
    )
    findings = (
        accepted(),
        children_applied(),
        _workers_ready(ready, desired, summary),
        _checkpoint_available(checkpoint),
        Finding(JobCondition.SUCCEEDED, UNKNOWN, summary.reason, summary.message),
    )
    return with_findings(
        before,
        findings,
        now,
        job.metadata.generation,
        observed_generation=job.metadata.generation,
        phase=summary.phase,
        progress=progress,
        display=_display(progress, ready, desired, running=not suspended),
        workers=WorkerCounts(desired=desired, ready=ready),
        restarts=restarts,
        attempts=[*before.attempts[:-1], attempt],
        dataset=_dataset(before, report.dataset if report is not None else None),
        checkpoint=checkpoint,
        start_time=start_time,
    )


def ended_status(
    job: FineTuneJob, children: Children, verdict: Verdict, restarts_before: int, now: datetime
) -> FineTuneJobStatus:
    """The job is over; this status is never changed again."""
    before, report = job.status, verdict.report
    checkpoint = _checkpoint(before, report.checkpoint if report is not None else None)
    progress = _final_progress(before.progress, report, verdict.succeeded)
    ended = rfc3339(verdict.ended_at or now)
    attempt = Attempt(
        number=attempt_number(job),
        job_name=child_name(job, attempt_number(job)),
        outcome="Succeeded" if verdict.succeeded else "Failed",
        reason=verdict.reason.value,
        end_step=progress.global_step if progress is not None else None,
        start_time=before.attempts[-1].start_time if before.attempts else before.start_time,
        completion_time=ended,
    )
    findings = (
        accepted(),
        Finding(JobCondition.WORKERS_READY, FALSE, verdict.reason, "The job has ended; its workers are stopped."),
        _checkpoint_available(checkpoint),
        Finding(JobCondition.SUCCEEDED, TRUE if verdict.succeeded else FALSE, verdict.reason, verdict.message),
    )
    desired = job.spec.workers.replicas
    return with_findings(
        before,
        findings,
        now,
        job.metadata.generation,
        # a job may have ended before its first status: nothing of it is yet to be carried out
        observed_generation=job.metadata.generation,
        phase=JobPhase.SUCCEEDED if verdict.succeeded else JobPhase.FAILED,
        progress=progress,
        display=_display(progress, 0, desired, running=False),
        workers=WorkerCounts(desired=desired, ready=0),
        restarts=max(before.restarts, _restarts(children, restarts_before)),
        attempts=[*before.attempts[:-1], attempt],
        dataset=_dataset(before, report.dataset if report is not None else None),
        checkpoint=checkpoint,
        model=_model(job, verdict),
        metrics=_metrics(before, report),
        start_time=before.start_time or (rfc3339(children.job.start_time or now) if children.job else None),
        completion_time=ended,
    )


def startup_verdict(problem: StartupProblem, spec: FineTuneJobSpec) -> Verdict:
    """The verdict on a job whose pods could not start in time."""
    field, limit = "failurePolicy.startupTimeoutSeconds", spec.failure_policy.startup_timeout_seconds
    if problem.waits_for_room:
        field, limit = "preRunningDeadlineSeconds", spec.pre_running_deadline_seconds or 0
    message = f"stopped after {duration(limit)} ({field}): {problem.message}"
    return Verdict(False, problem.reason, message)


def _restarts(children: Children, before: int) -> int:
    """Losses after which training was resumed.

    The trainer counts them and keeps the count in its checkpoints; before the first checkpoint, the pods that replaced
    a failed one of worker 0 are counted. So the larger number is right.
    """
    heads = [pod for pod in children.pods if pod.index == 0 and not children.is_cleaned_up(pod)]
    reported = [pod.report.restarts for pod in heads if pod.report is not None]
    reported += [children.progress.report.restarts] if children.progress is not None else []
    return max(before + max(0, len(heads) - 1), *reported, 0)


def _workers_ready(ready: int, desired: int, summary: Summary) -> Finding:
    if ready >= desired:
        return Finding(JobCondition.WORKERS_READY, TRUE, Reason.WORKERS_READY, f"All {desired} workers are ready.")
    under_way = summary.reason in (Reason.STARTING, Reason.TRAINING, Reason.RESTARTING)
    reason = Reason.WORKERS_MISSING if under_way else summary.reason
    return Finding(JobCondition.WORKERS_READY, FALSE, reason, f"{ready} of {desired} workers are ready.")


def _checkpoint(before: FineTuneJobStatus, seen: object) -> CheckpointStatus | None:
    if seen is None:
        return before.checkpoint
    return CheckpointStatus.model_validate(seen, from_attributes=True)


def _dataset(before: FineTuneJobStatus, seen: DatasetFacts | None) -> DatasetStatus | None:
    if seen is None:
        return before.dataset
    # a row can be long, and a custom resource is to stay small
    facts = DatasetStatus.model_validate(seen, from_attributes=True)
    texts = {"first_bad_row": facts.first_bad_row, "first_example": facts.first_example}
    return facts.model_copy(update={name: shortened(text, MAX_ROW_LENGTH) for name, text in texts.items()})


def _checkpoint_available(checkpoint: CheckpointStatus | None) -> Finding:
    if checkpoint is None:
        message = "No checkpoint has been saved yet: a restart begins at the first step."
        return Finding(JobCondition.CHECKPOINT_AVAILABLE, FALSE, Reason.NO_CHECKPOINT, message)
    message = f"Step {checkpoint.step} is saved in {checkpoint.uri}."
    return Finding(JobCondition.CHECKPOINT_AVAILABLE, TRUE, Reason.CHECKPOINT_SAVED, message)


def _text(value: float | None, digits: int = 4) -> str | None:
    return number(value, digits) if value is not None else None


def _percent(step: int, steps: int) -> int:
    return min(100, 100 * step // steps) if steps > 0 else 0


def _progress(
    before: Progress | None, report: ProgressReport | None, all_ready: bool, now: datetime
) -> Progress | None:
    if report is None and all_ready:
        # an operator that has just started hasn't heard it yet: taking the ETA back would cost every job two writes
        return before
    if report is None or report.max_steps == 0:
        # a restarting trainer doesn't know its step yet: what was reached still holds
        return before.model_copy(update={"eta_seconds": None}) if before is not None else None
    # by the pod's clock, which may be ahead of ours
    alive = min(datetime.fromtimestamp(report.heartbeat_unix, UTC), now) if report.heartbeat_unix > 0 else None
    return Progress(
        global_step=report.global_step,
        max_steps=report.max_steps,
        percent=_percent(report.global_step, report.max_steps),
        epoch=f"{report.epoch:.2f}",
        loss=_text(report.loss),
        eval_loss=_text(report.eval_loss),
        learning_rate=_text(report.learning_rate),
        grad_norm=_text(report.grad_norm),
        tokens_per_second=_text(report.tokens_per_second),
        eta_seconds=report.eta_seconds,
        last_heartbeat_time=rfc3339(alive) if alive is not None else None,
    )


def _final_progress(before: Progress | None, report: TerminationReport | None, succeeded: bool) -> Progress | None:
    if report is None or report.max_steps == 0:
        return before.model_copy(update={"eta_seconds": None}) if before is not None else None
    update: dict[str, object] = {
        "global_step": report.global_step,
        "max_steps": report.max_steps,
        "percent": _percent(report.global_step, report.max_steps),
        "eta_seconds": None,
    }
    for field, name in (("loss", "trainLoss"), ("eval_loss", "evalLoss")):
        if succeeded and name in report.metrics:
            update[field] = number(report.metrics[name], 4)
    return (before or Progress()).model_copy(update=update)


def _display(progress: Progress | None, ready: int, desired: int, running: bool) -> JobDisplay:
    workers = f"{ready}/{desired}"
    if progress is None:
        return JobDisplay(workers=workers)
    eta = progress.eta_seconds
    return JobDisplay(
        progress=f"{progress.percent}%",
        step=f"{progress.global_step}/{progress.max_steps}",
        loss=loss(float(progress.loss)) if progress.loss is not None else "",
        eta=duration(eta) if eta is not None and running else "",
        workers=workers,
    )


def _model(job: FineTuneJob, verdict: Verdict) -> ModelStatus | None:
    if not verdict.succeeded:
        return job.status.model
    model = verdict.report.model if verdict.report is not None else None
    if model is None:
        return ModelStatus(uri=job.spec.output.uri.rstrip("/"), digest="")
    return ModelStatus(
        uri=model.uri,
        digest=model.digest,
        size_bytes=model.size_bytes,
        rehearsed=model.rehearsed,
        reads_images=model.reads_images,
    )


def _metrics(before: FineTuneJobStatus, report: TerminationReport | None) -> dict[str, str]:
    if report is None or not report.metrics:
        return before.metrics
    names: Sequence[str] = sorted(report.metrics)[:64]
    return {name: number(report.metrics[name]) for name in names}
