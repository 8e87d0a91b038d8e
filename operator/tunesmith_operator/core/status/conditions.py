"""Conditions: what holds, since when, why, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from tunesmith_api.keys import JobCondition, Reason
from tunesmith_api.v1alpha1 import Condition, ConditionStatus
from tunesmith_api.v1alpha1.common import NEVER
from tunesmith_operator.core.status.resource import Status
from tunesmith_operator.core.text import rfc3339, shortened

__all__ = [
    "FALSE",
    "TRUE",
    "UNKNOWN",
    "Finding",
    "accepted",
    "children_applied",
    "find",
    "holds",
    "merge",
    "refused",
    "with_findings",
]

TRUE, FALSE, UNKNOWN = ConditionStatus.TRUE, ConditionStatus.FALSE, ConditionStatus.UNKNOWN
MAX_MESSAGE = 2048
S = TypeVar("S", bound=Status)


@dataclass(frozen=True, slots=True)
class Finding:
    """A condition as just observed, before it is compared with what was known."""

    type: str
    status: ConditionStatus
    reason: Reason
    message: str = ""


def find(conditions: Iterable[Condition], type_: str) -> Condition | None:
    """The condition of that type."""
    return next((condition for condition in conditions if condition.type == type_), None)


def holds(conditions: Iterable[Condition], type_: str) -> bool:
    """Whether the condition of that type is True."""
    condition = find(conditions, type_)
    return condition is not None and condition.status == TRUE


def merge(known: Sequence[Condition], findings: Iterable[Finding], now: datetime, generation: int) -> list[Condition]:
    """Findings replace known conditions of their type; the transition time moves only when the status does."""
    merged = {condition.type: condition for condition in known}
    for finding in findings:
        before = merged.get(finding.type)
        moved = before is None or before.status != finding.status or before.last_transition_time == NEVER
        merged[finding.type] = Condition(
            type=finding.type,
            status=finding.status,
            reason=finding.reason.value,
            message=shortened(finding.message, MAX_MESSAGE),
            last_transition_time=rfc3339(now) if moved or before is None else before.last_transition_time,
            observed_generation=generation,
        )
    return list(merged.values())


def with_findings(before: S, findings: Iterable[Finding], now: datetime, generation: int, **fields: object) -> S:
    """The status with these findings and fields in place of what was known."""
    conditions = merge(before.conditions, findings, now, generation)
    return before.model_copy(update={"conditions": conditions, **fields})


# conditions that all kinds have; the types are the same in `DeploymentCondition`


def accepted() -> Finding:
    """The spec breaks no policy."""
    return Finding(JobCondition.ACCEPTED, TRUE, Reason.VALID, "The spec is valid.")


def refused(reason: Reason, message: str) -> Finding:
    """The spec breaks a policy, or can't be read."""
    return Finding(JobCondition.ACCEPTED, FALSE, reason, message)


def children_applied() -> Finding:
    """Nothing is left to write."""
    return Finding(JobCondition.CHILDREN_APPLIED, TRUE, Reason.APPLIED, "All child objects are as they should be.")
