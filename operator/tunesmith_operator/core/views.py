"""Typed views of the children, read from what the watches deliver. Only the fields that decisions need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Self

from pydantic import ValidationError

from tunesmith_api import keys
from tunesmith_api.reports import ProgressReport, TerminationReport
from tunesmith_operator.core.text import parse_time

__all__ = [
    "ChildView",
    "ConditionView",
    "ConfigMapView",
    "ContainerView",
    "DeploymentView",
    "JobView",
    "PodView",
    "ProgressSample",
    "RejectionView",
    "ServiceView",
]

Raw = Mapping[str, Any]
_INDEX = "batch.kubernetes.io/job-completion-index"

_OURS = (keys.TRAINER_CONTAINER, keys.QUANTIZE_CONTAINER, keys.SERVER_CONTAINER)


def _meta(raw: Raw) -> dict[str, Any]:
    meta = raw["metadata"]
    owners = [owner["uid"] for owner in meta.get("ownerReferences", ()) if owner.get("controller")]
    return {
        "namespace": meta.get("namespace", ""),
        "name": meta["name"],
        "uid": meta.get("uid", ""),
        "version": int(meta.get("resourceVersion") or 0),
        "owner_uid": owners[0] if owners else "",
        "labels": dict(meta.get("labels") or {}),
        "annotations": dict(meta.get("annotations") or {}),
        "created": parse_time(meta.get("creationTimestamp")),
        "deleting": meta.get("deletionTimestamp") is not None,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildView:
    """What every child has."""

    namespace: str
    name: str
    uid: str = ""
    version: int = 0
    owner_uid: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    created: datetime | None = None
    deleting: bool = False

    @classmethod
    def of(cls, raw: Raw) -> Self:
        """Read the object as the API server delivers it."""
        return cls(**_meta(raw), **cls._fields(raw))

    @classmethod
    def _fields(cls, raw: Raw) -> dict[str, Any]:
        return {}

    @property
    def spec_hash(self) -> str:
        """Hash of the manifest that it was last applied from."""
        return self.annotations.get(keys.ANNOTATION_SPEC_HASH, "")


@dataclass(frozen=True, slots=True)
class ConditionView:
    """A condition of a built-in kind."""

    type: str
    status: str
    reason: str = ""
    message: str = ""
    since: datetime | None = None

    @classmethod
    def of(cls, raw: Raw) -> ConditionView:
        """Read one entry of status.conditions."""
        since = parse_time(raw.get("lastTransitionTime"))
        return cls(raw["type"], raw.get("status", ""), raw.get("reason", ""), raw.get("message", ""), since)


def _conditions(raw: Raw) -> tuple[ConditionView, ...]:
    return tuple(ConditionView.of(entry) for entry in raw.get("status", {}).get("conditions") or ())


def _true(conditions: tuple[ConditionView, ...], type_: str) -> ConditionView | None:
    return next((entry for entry in conditions if entry.type == type_ and entry.status == "True"), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView(ChildView):
    """A batch/v1 Job."""

    suspended: bool = False
    start_time: datetime | None = None
    completion_time: datetime | None = None
    conditions: tuple[ConditionView, ...] = ()

    @classmethod
    def _fields(cls, raw: Raw) -> dict[str, Any]:
        status = raw.get("status", {})
        return {
            "suspended": bool(raw.get("spec", {}).get("suspend")),
            "start_time": parse_time(status.get("startTime")),
            "completion_time": parse_time(status.get("completionTime")),
            "conditions": _conditions(raw),
        }

    @property
    def complete(self) -> bool:
        """It has succeeded and its pods have ended."""
        return _true(self.conditions, "Complete") is not None

    @property
    def failed(self) -> ConditionView | None:
        """It has failed and its pods have ended."""
        return _true(self.conditions, "Failed")

    @property
    def succeeding(self) -> bool:
        """It is bound to succeed; some pods may still be ending."""
        return _true(self.conditions, "SuccessCriteriaMet") is not None

    @property
    def failing(self) -> ConditionView | None:
        """It is bound to fail; some pods may still be ending."""
        return _true(self.conditions, "FailureTarget") or self.failed

    @property
    def resuming(self) -> bool:
        """It is to go on after a suspension, and the Job controller hasn't begun yet."""
        return not self.suspended and _true(self.conditions, "Suspended") is not None

    @property
    def resumed_at(self) -> datetime | None:
        """When its last suspension ended; None where it was never suspended, or is."""
        return next((it.since for it in self.conditions if it.type == "Suspended" and it.status == "False"), None)

    @property
    def ending(self) -> bool:
        """Its verdict has fallen."""
        return self.complete or self.succeeding or self.failing is not None


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
        """Read one entry of status.containerStatuses; after a restart, how its predecessor ended."""
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
        if not self.ended_message.startswith("{"):
            return None
        try:
            return TerminationReport.from_json(self.ended_message)
        except ValidationError:
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class PodView(ChildView):
    """A pod with one container of ours."""

    phase: str = "Pending"
    reason: str = ""
    message: str = ""
    ip: str = ""
    index: int = 0
    ready: bool = False
    scheduled_at: datetime | None = None
    unschedulable: str = ""
    container: ContainerView | None = None

    @classmethod
    def _fields(cls, raw: Raw) -> dict[str, Any]:
        status, meta = raw.get("status", {}), raw["metadata"]
        conditions = _conditions(raw)
        annotations, labels = meta.get("annotations") or {}, meta.get("labels") or {}
        scheduled = next((entry for entry in conditions if entry.type == "PodScheduled"), None)
        containers = [ContainerView.of(entry) for entry in status.get("containerStatuses") or ()]
        ours = [container for container in containers if container.name in _OURS] or containers
        blocked = scheduled is not None and scheduled.status == "False"
        return {
            "phase": status.get("phase", "Pending"),
            "reason": status.get("reason", ""),
            "message": status.get("message", ""),
            "ip": status.get("podIP", ""),
            "index": int(annotations.get(_INDEX) or labels.get(_INDEX) or 0),
            "ready": _true(conditions, "Ready") is not None,
            "scheduled_at": scheduled.since if scheduled and scheduled.status == "True" else None,
            "unschedulable": (scheduled.message or scheduled.reason) if scheduled is not None and blocked else "",
            "container": ours[0] if ours else None,
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
        box = self.container
        return box.exit_code if box is not None and not box.running and not box.waiting else None

    @property
    def started(self) -> bool:
        """Its container runs or has run."""
        box = self.container
        return self.finished or (box is not None and (box.running or box.exit_code is not None))

    @property
    def report(self) -> TerminationReport | None:
        """The termination report of its container."""
        return self.container.report if self.container else None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentView(ChildView):
    """An apps/v1 Deployment."""

    generation: int = 0
    observed_generation: int = 0
    desired: int = 0
    replicas: int = 0
    updated: int = 0
    ready: int = 0
    available: int = 0
    deadline_exceeded: bool = False
    replica_failure: str = ""

    @classmethod
    def _fields(cls, raw: Raw) -> dict[str, Any]:
        status = raw.get("status", {})
        progressing = [entry for entry in _conditions(raw) if entry.type == "Progressing"]
        failure = _true(_conditions(raw), "ReplicaFailure")
        return {
            "generation": raw["metadata"].get("generation", 0),
            "observed_generation": status.get("observedGeneration", 0),
            "desired": raw.get("spec", {}).get("replicas", 1),
            "replicas": status.get("replicas", 0),
            "updated": status.get("updatedReplicas", 0),
            "ready": status.get("readyReplicas", 0),
            "available": status.get("availableReplicas", 0),
            "replica_failure": failure.message if failure is not None else "",
            "deadline_exceeded": any(entry.reason == "ProgressDeadlineExceeded" for entry in progressing),
        }

    @property
    def rolled_out(self) -> bool:
        """The controller has seen the newest template and every replica of it is available."""
        seen = self.observed_generation >= self.generation
        return seen and self.updated >= self.desired and self.available >= self.desired


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceView(ChildView):
    """A Service."""

    selector: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def _fields(cls, raw: Raw) -> dict[str, Any]:
        return {"selector": dict(raw.get("spec", {}).get("selector") or {})}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigMapView(ChildView):
    """A ConfigMap."""

    data: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def _fields(cls, raw: Raw) -> dict[str, Any]:
        return {"data": dict(raw.get("data") or {})}


@dataclass(frozen=True, slots=True)
class RejectionView:
    """The Job controller could not create a pod: an Event of reason FailedCreate."""

    job_uid: str
    message: str
    first_seen: datetime | None
    last_seen: datetime | None

    @classmethod
    def of(cls, raw: Raw) -> RejectionView:
        """Read a core/v1 Event."""
        series = raw.get("series") or {}
        last = series.get("lastObservedTime") or raw.get("lastTimestamp") or raw.get("eventTime")
        first = raw.get("firstTimestamp") or raw.get("eventTime") or last
        uid = raw.get("involvedObject", {}).get("uid", "")
        return cls(uid, raw.get("message", ""), parse_time(first), parse_time(last))


@dataclass(frozen=True, slots=True)
class ProgressSample:
    """The newest report of a pod, and when (by the operator's clock) its heartbeat last moved."""

    pod_uid: str
    report: ProgressReport
    alive_at: datetime
