"""What the engine's poller is asked to follow, and what it brings."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from tunesmith_api.reports import ProgressReport
from tunesmith_operator.core.pods.figures import Figures
from tunesmith_operator.core.pods.load import Load

__all__ = [
    "LoadTarget",
    "PollTarget",
    "ProgressSample",
    "QuotaSample",
    "QuotaTarget",
    "Sample",
    "ServersSample",
    "ServersTarget",
    "Target",
]


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


@dataclass(frozen=True, slots=True)
class LoadTarget:
    """Pods whose requests in flight are counted, by uid and address; `total` are as many as there are.

    `window_seconds` is how far back the most has to be known. They are asked every `interval_seconds`, where that is
    more often than usual.
    """

    pods: tuple[tuple[str, str], ...]
    total: int
    window_seconds: float
    interval_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class ServersTarget:
    """Server pods of a revision that is taking over, by uid and address. A new `window` begins to count anew."""

    window: str
    pods: tuple[tuple[str, str], ...]
    port: int
    load: LoadTarget | None = None

    @property
    def asked(self) -> dict[str, str]:
        """Every pod that is asked, each once."""
        return dict(self.pods) | dict(self.load.pods if self.load is not None else ())


@dataclass(frozen=True, slots=True)
class ServersSample:
    """What the pods of a window have counted in it, as far as they were heard, and how much there is to do."""

    window: str
    figures: Figures
    adapters: frozenset[str] = frozenset()
    """`name@digest` of the adapters that each of the pods has said it serves."""
    load: Load | None = None


@dataclass(frozen=True, slots=True)
class QuotaTarget:
    """A Job that waits in a queue of Kueue's."""

    namespace: str
    job_uid: str


@dataclass(frozen=True, slots=True)
class QuotaSample:
    """Why it isn't admitted, in Kueue's own words."""

    job_uid: str
    words: str


Target = PollTarget | ServersTarget | QuotaTarget
Sample = ProgressSample | ServersSample | QuotaSample
