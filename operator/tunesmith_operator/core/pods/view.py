"""A pod and its container, as the kubelet reports them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tunesmith_api import keys
from tunesmith_api.reports import TerminationReport
from tunesmith_operator.core.kubernetes.objects import ChildView, conditions_of, true_condition
from tunesmith_operator.core.pods.reports import read_termination
from tunesmith_operator.core.text import count_of, parse_time

__all__ = ["ContainerView", "PodView"]

Raw = Mapping[str, Any]
_COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
_CONTAINERS = (keys.TRAINER_CONTAINER, keys.QUANTIZE_CONTAINER, keys.SERVER_CONTAINER)


@dataclass(frozen=True, slots=True)
class ContainerView:
    """A container of a pod: waiting, running or ended."""

    name: str
    image: str = ""
    waiting: str = ""
    waiting_message: str = ""
    running: bool = False
    exit_code: int | None = None
    ended_reason: str = ""
    ended_message: str = ""
    ended_at: datetime | None = None
    restarts: int = 0

    @classmethod
    def of(cls, raw: Raw) -> ContainerView:
        """Read one entry of status.containerStatuses; after a restart, how the container ended before it."""
        state = raw.get("state") or {}
        waiting = state.get("waiting") or {}
        ended = state.get("terminated") or (raw.get("lastState") or {}).get("terminated") or {}
        return cls(
            name=raw["name"],
            image=raw.get("image", ""),
            waiting=waiting.get("reason", "") if state.get("waiting") is not None else "",
            waiting_message=waiting.get("message", ""),
            running="running" in state,
            exit_code=ended.get("exitCode"),
            ended_reason=ended.get("reason", ""),
            ended_message=ended.get("message", ""),
            ended_at=parse_time(ended.get("finishedAt")),
            restarts=raw.get("restartCount", 0),
        )

    @property
    def report(self) -> TerminationReport | None:
        """The termination report that it left, if what it left is one."""
        return read_termination(self.ended_message)


@dataclass(frozen=True, slots=True, kw_only=True)
class PodView(ChildView):
    """A pod with one container of Tunesmith's."""

    phase: str = "Pending"
    reason: str = ""
    message: str = ""
    ip: str = ""
    index: int = 0
    ready: bool = False
    ready_since: datetime | None = None
    scheduled_at: datetime | None = None
    unschedulable: str = ""
    container: ContainerView | None = None

    @classmethod
    def _fields(cls, raw: Raw) -> dict[str, Any]:
        status, meta = raw.get("status", {}), raw["metadata"]
        conditions = conditions_of(raw)
        annotations, labels = meta.get("annotations") or {}, meta.get("labels") or {}
        scheduled = next((entry for entry in conditions if entry.type == "PodScheduled"), None)
        containers = [ContainerView.of(entry) for entry in status.get("containerStatuses") or ()]
        known = [container for container in containers if container.name in _CONTAINERS] or containers
        ready = true_condition(conditions, "Ready")
        blocked = scheduled is not None and scheduled.status == "False"
        return {
            "phase": status.get("phase", "Pending"),
            "reason": status.get("reason", ""),
            "message": status.get("message", ""),
            "ip": status.get("podIP", ""),
            "index": count_of(annotations.get(_COMPLETION_INDEX) or labels.get(_COMPLETION_INDEX), unreadable=-1),
            "ready": ready is not None,
            "ready_since": ready.since if ready is not None else None,
            "scheduled_at": scheduled.since if scheduled and scheduled.status == "True" else None,
            "unschedulable": (scheduled.message or scheduled.reason) if scheduled is not None and blocked else "",
            "container": known[0] if known else None,
        }

    @property
    def finished(self) -> bool:
        """Its containers have ended and won't start again."""
        return self.phase in ("Succeeded", "Failed")

    @property
    def succeeded(self) -> bool:
        """Its container has ended well. The kubelet says so before the pod's phase does."""
        return self.phase == "Succeeded" or self._exit_code == 0

    @property
    def failed(self) -> bool:
        """Its container has ended badly. The kubelet says so before the pod's phase does."""
        return self.phase == "Failed" or self._exit_code not in (None, 0)

    @property
    def _exit_code(self) -> int | None:
        container = self.container
        has_ended = container is not None and not container.running and not container.waiting
        return container.exit_code if container is not None and has_ended else None

    @property
    def started(self) -> bool:
        """Its container runs or has run. One that waits for no reason is just being started, or has just stopped."""
        return self.finished or (self.container is not None and not self.container.waiting)

    @property
    def report(self) -> TerminationReport | None:
        """The termination report of its container."""
        return self.container.report if self.container else None
