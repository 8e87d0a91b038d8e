"""Why a pod has crashed, from its exit code, its report or the end of its log."""

from __future__ import annotations

from collections.abc import Iterable

from tunesmith_api.reports import Outcome
from tunesmith_operator.core.pods.view import PodView

__all__ = ["crash_message", "ended_at", "last_crash", "logs_command"]


def last_crash(pods: Iterable[PodView]) -> PodView | None:
    """The pod that failed last."""
    return max((pod for pod in pods if pod.failed), key=ended_at, default=None)


def ended_at(pod: PodView) -> float:
    """When its container ended, in seconds since 1970; 0 where that isn't known."""
    container = pod.container
    return container.ended_at.timestamp() if container is not None and container.ended_at is not None else 0.0


def logs_command(pod: PodView, previous: bool = False) -> str:
    """The command that shows its log."""
    return f"kubectl logs -n {pod.namespace} {pod.name}{' --previous' if previous else ''}"


def crash_message(pod: PodView) -> str:
    """Exit code, cause, the end of its log, and the command that shows the rest."""
    container, report = pod.container, pod.report
    if report is not None and report.outcome is not Outcome.SUCCEEDED:
        detail = f"{report.reason.value}: {report.message}" if report.message else report.reason.value
    elif container is not None and container.exit_code is not None:
        named = f" ({container.ended_reason})" if container.ended_reason not in ("", "Error") else ""
        detail = f"exit code {container.exit_code}{named}"
        lines = [line.strip() for line in container.ended_message.splitlines() if line.strip()]
        detail += f", its last line: {lines[-1][:300]}" if lines else ""
    else:
        detail = ": ".join(part for part in (pod.reason, pod.message) if part) or "no exit code was recorded"
    restarted = container is not None and container.restarts > 0
    return f"pod {pod.name} failed: {detail.rstrip('.')}. See: {logs_command(pod, restarted)}"
