"""Observed → status: the only place that says what a FineTuneJob's status is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from tunesmith_api.keys import JobCondition, Reason
from tunesmith_api.reports import DatasetFacts, ProgressReport, TerminationReport, TrainerState
from tunesmith_api.v1alpha1 import FineTuneJob, FineTuneJobStatus
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
from tunesmith_operator.core.conditions import FALSE, TRUE, UNKNOWN, Finding, find, merge
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.crashes import crash_message, last_crash
from tunesmith_operator.core.finetunejob.observed import Family, attempt_number, child_name
from tunesmith_operator.core.finetunejob.outcome import Verdict, culprit
from tunesmith_operator.core.text import duration, loss, number, parse_time, rfc3339, shortened
from tunesmith_operator.core.troubles import Trouble
from tunesmith_operator.core.views import JobView

__all__ = ["ended_status", "refused_status", "running_status", "stopped", "waiting_status"]

MAX_ROW_LENGTH = 500
_PHASES = {
    TrainerState.STARTING: JobPhase.STARTING,
    TrainerState.PREPARING: JobPhase.STARTING,
    TrainerState.TRAINING: JobPhase.TRAINING,
    TrainerState.EVALUATING: JobPhase.EVALUATING,
    TrainerState.SAVING: JobPhase.SAVING,
    TrainerState.FINISHED: JobPhase.SAVING,
    TrainerState.FAILED: JobPhase.STARTING,
}


@dataclass(frozen=True, slots=True)
class Standing:
    """The one thing to say about a job that isn't over."""

    phase: JobPhase
    reason: Reason
    message: str


def _accepted() -> Finding:
    return Finding(JobCondition.ACCEPTED, TRUE, Reason.VALID, "The spec is valid.")


def _applied() -> Finding:
    return Finding(JobCondition.CHILDREN_APPLIED, TRUE, Reason.APPLIED, "All child objects are as they should be.")


def refused_status(job: FineTuneJob, message: str, now: datetime) -> FineTuneJobStatus:
    """The spec breaks a policy and nothing has been started."""
    findings = (
        Finding(JobCondition.ACCEPTED, FALSE, Reason.INVALID_SPEC, message),
        Finding(JobCondition.SUCCEEDED, UNKNOWN, Reason.INVALID_SPEC, message),
    )
    conditions = merge(job.status.conditions, findings, now, job.metadata.generation)
    return job.status.model_copy(update={"phase": JobPhase.FAILED, "conditions": conditions})


def waiting_status(job: FineTuneJob, reason: Reason, message: str, now: datetime) -> FineTuneJobStatus:
    """Nothing is started for now: suspended before the start, or a predecessor of the same name is still going away."""
    phase = JobPhase.SUSPENDED if reason is Reason.SUSPENDED else JobPhase.PENDING
    desired = job.spec.workers.replicas
    findings = (
        _accepted(),
        Finding(JobCondition.WORKERS_READY, FALSE, reason, message),
        Finding(JobCondition.SUCCEEDED, UNKNOWN, reason, message),
    )
    return job.status.model_copy(
        update={
            "phase": phase,
            "conditions": merge(job.status.conditions, findings, now, job.metadata.generation),
            "workers": WorkerCounts(desired=desired, ready=0),
            "display": job.status.display.model_copy(update={"workers": f"0/{desired}", "eta": ""}),
        }
    )


def running_status(
    job: FineTuneJob, family: Family, trouble: Trouble | None, restarts_before: int, now: datetime, config: Config
) -> FineTuneJobStatus:
    """The children are in place and the Job is under way (or about to be created, where `family.job` is None)."""
    before = job.status
    desired = job.spec.workers.replicas
    ready = len({pod.index for pod in family.living if pod.ready})
    report = family.progress.report if family.progress is not None else None
    restarts = max(before.restarts, _restarts(family, restarts_before))
    standing = _standing(job, family, trouble, restarts, now, config)
    suspended = standing.reason is Reason.SUSPENDED
    checkpoint = _checkpoint(before, report.checkpoint if report is not None else None)
    progress = _progress(before.progress, report)
    started = family.job.start_time if family.job is not None and family.job.start_time is not None else now
    start_time = before.start_time or rfc3339(started)
    attempt = Attempt(
        number=attempt_number(job),
        job_name=child_name(job, attempt_number(job)),
        outcome="Suspended" if suspended else "Running",
        start_time=before.attempts[-1].start_time if before.attempts else start_time,
    )
    findings = (
        _accepted(),
        _applied(),
        _workers_ready(ready, desired, standing),
        _checkpoint_available(checkpoint),
        Finding(JobCondition.SUCCEEDED, UNKNOWN, standing.reason, standing.message),
    )
    return before.model_copy(
        update={
            "observed_generation": job.metadata.generation,
            "phase": standing.phase,
            "conditions": merge(before.conditions, findings, now, job.metadata.generation),
            "progress": progress,
            "display": _display(progress, ready, desired, running=not suspended),
            "workers": WorkerCounts(desired=desired, ready=ready),
            "restarts": restarts,
            "attempts": [*before.attempts[:-1], attempt],
            "dataset": _dataset(before, report.dataset if report is not None else None),
            "checkpoint": checkpoint,
            "start_time": start_time,
        }
    )


def ended_status(
    job: FineTuneJob, family: Family, verdict: Verdict, restarts_before: int, now: datetime
) -> FineTuneJobStatus:
    """The job is over; this status is never changed again."""
    before, report = job.status, verdict.report
    checkpoint = _checkpoint(before, report.checkpoint if report is not None else None)
    progress = _final_progress(before.progress, report, verdict.succeeded)
    ended = rfc3339(verdict.ended_at or now)
    number_ = attempt_number(job)
    attempt = Attempt(
        number=number_,
        job_name=child_name(job, number_),
        outcome="Succeeded" if verdict.succeeded else "Failed",
        reason=verdict.reason.value,
        end_step=progress.global_step if progress is not None else None,
        start_time=before.attempts[-1].start_time if before.attempts else before.start_time,
        completion_time=ended,
    )
    findings = (
        _accepted(),
        Finding(JobCondition.WORKERS_READY, FALSE, verdict.reason, "The job has ended; its workers are stopped."),
        _checkpoint_available(checkpoint),
        Finding(JobCondition.SUCCEEDED, TRUE if verdict.succeeded else FALSE, verdict.reason, verdict.message),
    )
    restarts = max(before.restarts, _restarts(family, restarts_before))
    desired = job.spec.workers.replicas
    return before.model_copy(
        update={
            "phase": JobPhase.SUCCEEDED if verdict.succeeded else JobPhase.FAILED,
            "conditions": merge(before.conditions, findings, now, job.metadata.generation),
            "progress": progress,
            "display": _display(progress, 0, desired, running=False),
            "workers": WorkerCounts(desired=desired, ready=0),
            "restarts": restarts,
            "attempts": [*before.attempts[:-1], attempt],
            "dataset": _dataset(before, report.dataset if report is not None else None),
            "checkpoint": checkpoint,
            "model": _model(job, verdict),
            "metrics": _metrics(before, report),
            "start_time": before.start_time or (rfc3339(family.job.start_time or now) if family.job else None),
            "completion_time": ended,
        }
    )


def stopped(trouble: Trouble, patience: float) -> Verdict:
    """The verdict on a job whose pods could not start in time."""
    message = f"stopped after {duration(patience)} (failurePolicy.startupTimeoutSeconds): {trouble.message}"
    return Verdict(False, trouble.reason, message)


def _standing(
    job: FineTuneJob, family: Family, trouble: Trouble | None, restarts: int, now: datetime, config: Config
) -> Standing:
    child = family.job
    if child is None:
        return Standing(JobPhase.PENDING, Reason.PENDING, "The workers are being created.")
    if child.suspended or job.spec.suspend:
        return Standing(JobPhase.SUSPENDED, Reason.SUSPENDED, "Suspended: set spec.suspend to false to go on.")
    known = find(job.status.conditions, JobCondition.SUCCEEDED)
    guilty = culprit(family.pods)
    if child.failing is not None and (
        child.failing.reason != "PodFailurePolicy" or guilty is not None or known is None
    ):
        late = child.failing.reason == "DeadlineExceeded"
        reason = Reason.DEADLINE_EXCEEDED if late else Reason.BACKOFF_LIMIT_EXCEEDED
        return Standing(job.status.phase, reason, f"The workers are being stopped: {child.failing.message}")
    if trouble is not None:
        return Standing(JobPhase.PENDING, trouble.reason, trouble.message)
    if child.complete or child.succeeding or any(pod.index == 0 and pod.succeeded for pod in family.pods):
        return Standing(JobPhase.SAVING, Reason.TRAINING, "Worker 0 has finished; the other workers are being ended.")
    sample = family.progress
    if known is not None and (guilty is not None or child.failing is not None or _is_to_be_heard_of(job, family)):
        # the verdict or the next report is a moment away: say nothing in between
        return Standing(job.status.phase, Reason(known.reason), known.message)
    resumed = _is_resumed(job, child)
    if sample is not None and sample.report.state not in (TrainerState.STARTING, TrainerState.FAILED):
        return _reported(sample.report, sample.alive_at, now, config, resumed)
    crashed = last_crash(family.lost)
    trained = job.status.progress is not None and job.status.progress.global_step > 0
    if crashed is not None or (not resumed and (restarts > 0 or trained)):
        resume = job.status.checkpoint
        tail = f"goes on from the checkpoint of step {resume.step}" if resume is not None else "starts again"
        cause = f" Last: {crash_message(crashed)}" if crashed is not None else ""
        return Standing(JobPhase.STARTING, Reason.RESTARTING, f"A worker was lost; training {tail}.{cause}")
    if any(pod.started for pod in family.living):
        return Standing(JobPhase.STARTING, Reason.STARTING, "The workers are starting Ray and loading the model.")
    return Standing(JobPhase.PENDING, Reason.PENDING, "Waiting for the workers' pods to start.")


def _heard_at(job: FineTuneJob) -> datetime | None:
    """The last heartbeat that the status knows of."""
    return parse_time(job.status.progress.last_heartbeat_time) if job.status.progress is not None else None


def _is_to_be_heard_of(job: FineTuneJob, family: Family) -> bool:
    """Whether worker 0 is the one that reported before, and only its next report isn't here.

    So it is after a start of the operator, and while a trainer that has given up ends.
    """
    head, heard = family.head, _heard_at(job)
    if family.progress is not None:
        return family.progress.report.state is TrainerState.FAILED
    if head is None or head.container is None or not head.container.running:
        return False
    return heard is not None and head.created is not None and heard >= head.created


def _is_resumed(job: FineTuneJob, child: JobView) -> bool:
    """Whether the workers start after a suspension and haven't trained since: they were stopped, not lost."""
    heard = _heard_at(job)
    return child.resuming or (child.resumed_at is not None and (heard is None or heard <= child.resumed_at))


def _reported(report: ProgressReport, alive_at: datetime, now: datetime, config: Config, resumed: bool) -> Standing:
    phase = _PHASES[report.state]
    reason = Reason.STARTING if phase is JobPhase.STARTING else Reason.TRAINING
    if reason is Reason.STARTING and report.restarts > 0 and not resumed:
        reason = Reason.RESTARTING
    message = report.message or ("The model is training." if reason is Reason.TRAINING else "The trainer is starting.")
    if (now - alive_at).total_seconds() > config.heartbeat_stale_seconds:
        message = (
            f"No sign of life from the trainer since {rfc3339(alive_at)}. Its pods are still running: look at "
            "their logs; deleting the pod of worker 0 restarts training from the last checkpoint."
        )
    return Standing(phase, reason, message)


def _restarts(family: Family, before: int) -> int:
    """Losses after which training was resumed.

    The trainer counts them and keeps the count in its checkpoints; before the first checkpoint, the pods that followed
    a failed one of worker 0 tell. So the larger number is right.
    """
    heads = [pod for pod in family.pods if pod.index == 0 and not family.cleaned_up(pod)]
    replaced = max(0, len(heads) - 1)
    told = [pod.report.restarts for pod in heads if pod.report is not None]
    told += [family.progress.report.restarts] if family.progress is not None else []
    return max(before + replaced, *told, 0)


def _workers_ready(ready: int, desired: int, standing: Standing) -> Finding:
    if ready >= desired:
        return Finding(JobCondition.WORKERS_READY, TRUE, Reason.WORKERS_READY, f"All {desired} workers are ready.")
    quiet = standing.reason in (Reason.STARTING, Reason.TRAINING, Reason.RESTARTING)
    reason = Reason.WORKERS_MISSING if quiet else standing.reason
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
    return facts.model_copy(update={"first_bad_row": shortened(facts.first_bad_row, MAX_ROW_LENGTH)})


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


def _progress(before: Progress | None, report: ProgressReport | None) -> Progress | None:
    if report is None or report.max_steps == 0:
        # a restarting trainer doesn't know its step yet: what was reached is still the truth that people want
        return before.model_copy(update={"eta_seconds": None}) if before is not None else None
    alive = datetime.fromtimestamp(report.heartbeat_unix, UTC) if report.heartbeat_unix > 0 else None
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
    made = verdict.report.model if verdict.report is not None else None
    if made is None:
        return ModelStatus(uri=job.spec.output.uri.rstrip("/"), digest="")
    return ModelStatus(uri=made.uri, digest=made.digest, size_bytes=made.size_bytes)


def _metrics(before: FineTuneJobStatus, report: TerminationReport | None) -> dict[str, str]:
    if report is None or not report.metrics:
        return before.metrics
    names: Sequence[str] = sorted(report.metrics)[:64]
    return {name: number(report.metrics[name]) for name in names}
