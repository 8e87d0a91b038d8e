"""Jobs and Deployments: typed views of them, and the rules by which a Job judges its pods' exits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from tunesmith_api.keys import LABEL_QUEUE, TERMINAL_EXIT_CODES, ExitCode
from tunesmith_operator.core.kubernetes.manifest import JSON
from tunesmith_operator.core.kubernetes.objects import (
    ChildView,
    ConditionView,
    SpecView,
    conditions_of,
    content_of,
    true_condition,
)
from tunesmith_operator.core.text import parse_time

__all__ = ["JOB_FIELDS", "DeploymentView", "JobView", "pod_failure_policy"]

Raw = Mapping[str, Any]
JOB_FIELDS: Final[JSON] = {"parallelism": 1, "backoffLimit": 6, "activeDeadlineSeconds": None, "suspend": False}
"""What can be changed of a Job that runs, and what it is where nothing is given."""


def pod_failure_policy(container: str, ignored: Sequence[ExitCode] = ()) -> JSON:
    """A user's error ends the Job at once; a disrupted pod, or one that exits with an ignored code, costs no retry."""

    def on_exit(action: str, codes: Sequence[ExitCode]) -> JSON:
        values = sorted(int(code) for code in codes)
        return {"action": action, "onExitCodes": {"containerName": container, "operator": "In", "values": values}}

    disrupted: JSON = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    rules = [on_exit("FailJob", TERMINAL_EXIT_CODES), disrupted]
    return {"rules": [*rules, on_exit("Ignore", ignored)] if ignored else rules}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView(ChildView):
    """A batch/v1 Job."""

    suspended: bool = False
    queue: str = ""
    """Of Kueue, where it has one: `suspend` is Kueue's then, and nobody else's."""
    backoff_limit: int = 0
    active_deadline_seconds: int | None = None
    start_time: datetime | None = None
    completion_time: datetime | None = None
    conditions: tuple[ConditionView, ...] = ()

    @classmethod
    def _fields(cls, raw: Raw) -> dict[str, Any]:
        status, spec = raw.get("status", {}), raw.get("spec") or {}
        changeable = {name: spec.get(name, default) for name, default in JOB_FIELDS.items()}
        return {
            "suspended": bool(changeable["suspend"]),
            "queue": (raw["metadata"].get("labels") or {}).get(LABEL_QUEUE, ""),
            "backoff_limit": changeable["backoffLimit"],
            "active_deadline_seconds": changeable["activeDeadlineSeconds"],
            "content": content_of(spec=changeable),
            "start_time": parse_time(status.get("startTime")),
            "completion_time": parse_time(status.get("completionTime")),
            "conditions": conditions_of(raw),
        }

    @property
    def complete(self) -> bool:
        """It has succeeded and its pods have ended."""
        return true_condition(self.conditions, "Complete") is not None

    @property
    def failed(self) -> ConditionView | None:
        """It has failed and its pods have ended."""
        return true_condition(self.conditions, "Failed")

    @property
    def succeeding(self) -> bool:
        """It is bound to succeed; some pods may still be ending."""
        return true_condition(self.conditions, "SuccessCriteriaMet") is not None

    @property
    def succeeded_at(self) -> datetime | None:
        """When it succeeded, or became bound to."""
        conditions = (true_condition(self.conditions, type_) for type_ in ("SuccessCriteriaMet", "Complete"))
        return self.completion_time or next((it.since for it in conditions if it is not None), None)

    @property
    def failing(self) -> ConditionView | None:
        """It is bound to fail; some pods may still be ending."""
        return true_condition(self.conditions, "FailureTarget") or self.failed

    @property
    def resuming(self) -> bool:
        """It is to go on after a suspension, and the Job controller hasn't begun yet."""
        return not self.suspended and true_condition(self.conditions, "Suspended") is not None

    @property
    def suspended_at(self) -> datetime | None:
        """When its suspension began; None where the Job controller hasn't said so."""
        condition = true_condition(self.conditions, "Suspended")
        return condition.since if condition is not None else None

    @property
    def resumed_at(self) -> datetime | None:
        """When its last suspension ended; None where it was never suspended, or is."""
        return next((it.since for it in self.conditions if it.type == "Suspended" and it.status == "False"), None)

    @property
    def ending(self) -> bool:
        """It has succeeded or failed, or is bound to."""
        return self.complete or self.succeeding or self.failing is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentView(SpecView):
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
        progressing = [entry for entry in conditions_of(raw) if entry.type == "Progressing"]
        failure = true_condition(conditions_of(raw), "ReplicaFailure")
        return {
            "content": content_of(spec=raw.get("spec") or {}),
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
