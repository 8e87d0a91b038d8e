"""What the engine's poller is asked to follow, and what it brings."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from tunesmith_api.reports import ProgressReport

__all__ = ["PollTarget", "ProgressSample"]


@dataclass(frozen=True, slots=True)
class PollTarget:
    """A pod that serves progress."""

    pod_uid: str
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class ProgressSample:
    """The newest report of a pod, and when (by the operator's clock) its heartbeat last moved."""

    pod_uid: str
    report: ProgressReport
    alive_at: datetime
