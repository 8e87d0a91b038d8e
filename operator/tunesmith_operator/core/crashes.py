"""What a pod that ended badly tells about the cause."""

from __future__ import annotations

from collections.abc import Iterable

from tunesmith_api.reports import Outcome
from tunesmith_operator.core.views import PodView

__all__ = ["crash_message", "ended_at", "last_crash", "logs_command"]


def last_crash(pods: Iterable[PodView]) -> PodView | None:
    """The pod that failed last."""
    return max((pod for pod in pods if pod.failed), key=ended_at, default=None)


def ended_at(pod: PodView) -> float:
    """When its container ended, in seconds since 1970; 0 where that isn't known."""
    box = pod.container
    return box.ended_at.timestamp() if box is not None and box.ended_at is not None else 0.0


def logs_command(pod: PodView, previous: bool = False) -> str:
    """The command that shows its log."""
    return f"kubectl logs -n {pod.namespace} {pod.name}{' --previous' if previous else ''}"


def crash_message(pod: PodView) -> str:
    """Exit code, cause, the end of its log, and the command that shows the rest."""
    box, report = pod.container, pod.report
    if report is not None and report.outcome is not Outcome.SUCCEEDED:
        detail = f"{report.reason.value}: {report.message}" if report.message else report.reason.value
    elif box is not None and box.exit_code is not None:
        named = f" ({box.ended_reason})" if box.ended_reason not in ("", "Error") else ""
        detail = f"exit code {box.exit_code}{named}"
        lines = [line.strip() for line in box.ended_message.splitlines() if line.strip()]
        detail += f", its last line: {lines[-1][:300]}" if lines else ""
    else:
        detail = ": ".join(part for part in (pod.reason, pod.message) if part) or "no exit code was recorded"
    restarted = box is not None and box.restarts > 0
    return f"pod {pod.name} failed: {detail.rstrip('.')}. See: {logs_command(pod, restarted)}"
