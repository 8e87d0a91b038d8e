"""How a Job ended: from its own conditions, explained by the termination report of the pod that decided it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from tunesmith_api.keys import TERMINAL_EXIT_CODES, ExitCode, Reason
from tunesmith_api.reports import TerminationReport
from tunesmith_api.v1alpha1 import FineTuneJobSpec
from tunesmith_operator.core.finetunejob.observed import Children
from tunesmith_operator.core.kubernetes.objects import ConditionView
from tunesmith_operator.core.kubernetes.workloads import JobView
from tunesmith_operator.core.pods.crashes import crash_message, ended_at, first_crash, logs_command
from tunesmith_operator.core.pods.view import PodView
from tunesmith_operator.core.text import duration

__all__ = ["Verdict", "first_failure", "verdict"]

# crashes that keep their own reason, should they come again until the job is given up
_NAMED_CRASHES = frozenset({Reason.COLLECTIVE_TIMEOUT, Reason.DISK_FULL, Reason.STORAGE_UNREACHABLE})
_CODE_REASONS = {
    ExitCode.INVALID_INPUT: (Reason.INVALID_SPEC, "the spec, the data or the model is invalid"),
    ExitCode.STORAGE_DENIED: (Reason.STORAGE_UNREADABLE, "a bucket is missing, unreadable or unwritable"),
    ExitCode.OUT_OF_MEMORY: (Reason.OUT_OF_MEMORY, "memory ran out: use a smaller training.microBatchSize"),
    ExitCode.DIVERGED: (Reason.DIVERGED, "the loss is no longer finite: use a smaller training.learningRate"),
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The end of a job."""

    succeeded: bool
    reason: Reason
    message: str
    report: TerminationReport | None = None
    ended_at: datetime | None = None


def verdict(children: Children, spec: FineTuneJobSpec) -> Verdict | None:
    """How the Job ended, once the Job controller has decided it; None while it hasn't.

    A Job that is bound to end counts as ended as soon as the report that explains it is there, without waiting for the
    other workers' grace period.
    """
    job = children.job
    if job is None:
        return None
    if job.complete or job.succeeding:
        return _success(children.pods, job)
    failing = job.failing
    if failing is None:
        return None
    failed = first_failure(children.pods)
    if failed is not None and failed.container is not None:
        return _user_error(failed, ExitCode(failed.container.exit_code or 0), failing)
    return _failure(job, failing, children.pods, spec) if job.failed is not None else None


def _success(pods: tuple[PodView, ...], job: JobView) -> Verdict | None:
    succeeded = next((pod for pod in pods if pod.index == 0 and pod.succeeded), None)
    report = succeeded.report if succeeded is not None else None
    if report is None and (not job.complete or any(pod.index == 0 and not pod.finished for pod in pods)):
        # of two watches one is behind: the pod's end, and its report with it, is on its way
        return None
    message = report.message if report is not None and report.message else "The tuned model is ready."
    if report is None:
        message = f"Job {job.name} is complete, but the report of worker 0 is gone: the model is in output.uri."
    return Verdict(True, Reason.COMPLETED, message, report, job.succeeded_at)


def first_failure(pods: tuple[PodView, ...]) -> PodView | None:
    """The pod whose exit code ends the job: the first of those that can't be retried."""
    failures = [
        pod
        for pod in pods
        if pod.failed and pod.container is not None and pod.container.exit_code in TERMINAL_EXIT_CODES
    ]
    return min(failures, key=lambda pod: (ended_at(pod), pod.index), default=None)


def _user_error(failed: PodView, code: ExitCode, failing: ConditionView) -> Verdict:
    """A failure that no retry can help, in the trainer's words where it left any."""
    report = failed.report
    if report is None:
        reason, meaning = _CODE_REASONS[code]
        return Verdict(False, reason, f"{meaning}; {crash_message(failed)}", None, failing.since)
    cause = f"{report.message or report.reason.value}{_memory(report)}"
    message = f"{cause} (worker {failed.index}; see: {logs_command(failed)})"
    return Verdict(False, report.reason, message, report, failing.since)


def _failure(job: JobView, failing: ConditionView, pods: tuple[PodView, ...], spec: FineTuneJobSpec) -> Verdict:
    """A Job that was retried in vain, or took too long."""
    report = next((pod.report for pod in pods if pod.index == 0 and pod.report is not None), None)
    if failing.reason == "DeadlineExceeded":
        limit = duration(job.active_deadline_seconds or 0)
        message = (
            f"stopped after activeDeadlineSeconds ({limit}). To go on, create a FineTuneJob with the same "
            "checkpoint.uri and a longer deadline: it resumes from the last checkpoint."
        )
        return Verdict(False, Reason.DEADLINE_EXCEEDED, message, report, failing.since)
    crash = first_crash(pods)
    if crash is None:
        message = f"{failing.reason}: {failing.message}"
        return Verdict(False, Reason.BACKOFF_LIMIT_EXCEEDED, message, report, failing.since)
    crashed = crash.pod
    if crashed.container is not None and crashed.container.ended_reason == "OOMKilled":
        message = f"{crash.message}. Raise workers.resources.memory ({spec.workers.resources.memory})"
        message += " or lower training.microBatchSize."
        return Verdict(False, Reason.OUT_OF_MEMORY, message, report, failing.since)
    message = f"gave up after {job.backoff_limit} retries (failurePolicy.backoffLimit): {crash.message}"
    return Verdict(False, _crash_reason(crashed), message, report or crashed.report, failing.since)


def _crash_reason(crashed: PodView) -> Reason:
    """What a job that was retried in vain is said to have failed of."""
    if crashed.report is not None and crashed.report.reason in _NAMED_CRASHES:
        return crashed.report.reason
    if crashed.container is not None and crashed.container.exit_code == ExitCode.COLLECTIVE_TIMEOUT:
        return Reason.COLLECTIVE_TIMEOUT
    return Reason.BACKOFF_LIMIT_EXCEEDED


def _memory(report: TerminationReport) -> str:
    """The numbers that choosing a smaller micro-batch needs, where memory ran out."""
    facts = report.memory
    if report.reason is not Reason.OUT_OF_MEMORY or facts is None:
        return ""
    limit = f" of {facts.limit_bytes / 2**30:.1f} GiB" if facts.limit_bytes else ""
    return f" [microBatchSize {facts.micro_batch_size}, peak {facts.peak_bytes / 2**30:.1f} GiB{limit}]"
