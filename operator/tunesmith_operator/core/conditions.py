"""Conditions: what holds, since when, why, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1 import Condition, ConditionStatus
from tunesmith_operator.core.text import rfc3339

__all__ = ["FALSE", "TRUE", "UNKNOWN", "Finding", "find", "holds", "merge"]

TRUE, FALSE, UNKNOWN = ConditionStatus.TRUE, ConditionStatus.FALSE, ConditionStatus.UNKNOWN
MAX_MESSAGE = 2048


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
        moved = before is None or before.status != finding.status
        message = finding.message
        merged[finding.type] = Condition(
            type=finding.type,
            status=finding.status,
            reason=finding.reason.value,
            message=message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…",
            last_transition_time=rfc3339(now) if moved or before is None else before.last_transition_time,
            observed_generation=generation,
        )
    return list(merged.values())
