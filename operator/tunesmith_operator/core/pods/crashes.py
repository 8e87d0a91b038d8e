"""Which pod crashed first, and why: from exit codes, reports and the ends of logs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from tunesmith_api.reports import Outcome
from tunesmith_operator.core.pods.view import PodView
from tunesmith_operator.core.text import shortened

__all__ = ["Crash", "crash_message", "ended_at", "first_crash", "logs_command"]

MAX_LOG_LINE: Final = 300
CONSEQUENCE_SECONDS: Final = 900.0
"""A pod that fails later than this after another has a cause of its own."""


@dataclass(frozen=True, slots=True)
class Crash:
    """The pod that failed first, and how many others failed after it: they lost their peer."""

    pod: PodView
    followers: int = 0

    @property
    def message(self) -> str:
        """What happened to it."""
        return crash_message(self.pod, self.followers)


def first_crash(pods: Iterable[PodView], peers: Iterable[PodView] = ()) -> Crash | None:
    """Where the newest failure began: the first since all workers were there, as the others mostly fail of its loss.

    `peers` are pods that may have taken the place of a failed one, where they aren't among `pods`.
    """
    pods = tuple(pods)
    failed = sorted((pod for pod in pods if pod.failed), key=lambda pod: (ended_at(pod), pod.index))
    if not failed:
        return None
    first, followers = failed[-1], 0
    for earlier in reversed(failed[:-1]):
        if not _follows(first, earlier, (*pods, *peers)):
            break
        first, followers = earlier, followers + 1
    return Crash(first, followers)


def _follows(later: PodView, earlier: PodView, pods: Iterable[PodView]) -> bool:
    """Whether the later one was there when the earlier one failed, and failed before that was made good."""
    fell, ended = ended_at(earlier), ended_at(later)
    if later.index == earlier.index or ended - fell > CONSEQUENCE_SECONDS:
        return False
    if later.created is not None and later.created.timestamp() > fell:
        return False
    successors = (pod for pod in pods if pod.index == earlier.index and pod.ready_since is not None)
    return not any(fell <= pod.ready_since.timestamp() < ended for pod in successors if pod.ready_since is not None)


def ended_at(pod: PodView) -> float:
    """When its container ended, in seconds since 1970; 0 where that isn't known."""
    container = pod.container
    return container.ended_at.timestamp() if container is not None and container.ended_at is not None else 0.0


def logs_command(pod: PodView, previous: bool = False) -> str:
    """The command that shows its log."""
    return f"kubectl logs -n {pod.namespace} {pod.name}{' --previous' if previous else ''}"


def crash_message(pod: PodView, followers: int = 0) -> str:
    """Exit code, cause, the end of its log, and the command that shows the rest."""
    container, report = pod.container, pod.report
    if report is not None and report.outcome is not Outcome.SUCCEEDED:
        detail = f"{report.reason.value}: {report.message}" if report.message else report.reason.value
    elif container is not None and container.exit_code is not None:
        named = f" ({container.ended_reason})" if container.ended_reason not in ("", "Error") else ""
        detail = f"exit code {container.exit_code}{named}"
        lines = [line.strip() for line in container.ended_message.splitlines() if line.strip()]
        detail += f", its last line: {shortened(lines[-1], MAX_LOG_LINE)}" if lines else ""
    else:
        detail = ": ".join(part for part in (pod.reason, pod.message) if part) or "no exit code was recorded"
    restarted = container is not None and container.restarts > 0
    first = f" first, {followers} more after it" if followers else ""
    return f"pod {pod.name} failed{first}: {detail.rstrip('.')}. See: {logs_command(pod, restarted)}"
