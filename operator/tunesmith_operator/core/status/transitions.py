"""What changed between two statuses: events for people, and whether a write is worth its while."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal, TypeVar

from tunesmith_api.keys import JobCondition, Reason
from tunesmith_api.v1alpha1 import Condition
from tunesmith_operator.core.kubernetes.manifest import JSON
from tunesmith_operator.core.status.conditions import FALSE, TRUE, UNKNOWN, Finding, find, merge
from tunesmith_operator.core.status.resource import Status

__all__ = [
    "EventNote",
    "differs",
    "is_urgent",
    "status_document",
    "transitions",
    "verdict_only",
    "with_apply_failure",
]

S = TypeVar("S", bound=Status)
_COUNTING: Final = frozenset({JobCondition.WORKERS_READY, JobCondition.CHECKPOINT_AVAILABLE})
_FULFILLED: Final = frozenset({JobCondition.ACCEPTED, JobCondition.CHILDREN_APPLIED})
"""Conditions that say nothing new as long as they are True."""
_NUMBERS: Final = frozenset(
    {
        *("phase", "progress", "display", "dataset", "checkpoint", "workers", "restarts", "attempts", "startTime"),
        *("replicas", "readyReplicas", "gpuSeconds", "gpuSecondsTime"),
    }
)
_BEGINNING: Final = frozenset({Reason.PENDING, Reason.STARTING, Reason.QUOTA_PENDING})
_GOOD: Final = frozenset(
    {
        Reason.TRAINING,
        Reason.COMPLETED,
        Reason.SUSPENDED,
        Reason.STARTING,
        Reason.QUOTA_PENDING,
        Reason.QUANTIZING,
        Reason.QUANTIZED,
        Reason.ROLLING_OUT,
        Reason.ROLLED_OUT,
        Reason.PAUSED,
        Reason.REPLICAS_AVAILABLE,
        Reason.SCALED_TO_ZERO,
        Reason.WAKING,
        Reason.SCALING_UP,
        Reason.SOURCE_NOT_READY,
        Reason.ADAPTERS_SERVED,
    }
)


@dataclass(frozen=True, slots=True)
class EventNote:
    """A Kubernetes Event about the custom resource."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


def transitions(
    type_: str, before: Sequence[Condition], after: Sequence[Condition], quiet: Collection[Reason]
) -> tuple[EventNote, ...]:
    """One event where status or reason of the condition has moved, unless it moved to a quiet reason.

    Training that begins after a quiet start is what everybody expects; after anything else it is news.
    """
    old, new = find(before, type_), find(after, type_)
    if new is None or new.reason in quiet:
        return ()
    if new.reason == Reason.TRAINING and (old is None or old.reason in quiet):
        return ()
    if old is not None and (old.status, old.reason) == (new.status, new.reason):
        return ()
    return (EventNote("Normal" if new.reason in _GOOD else "Warning", new.reason, new.message),)


def status_document(status: Status) -> JSON:
    """The status as it is written: absent values left out."""
    return status.model_dump(mode="json", by_alias=True, exclude_none=True)


def differs(before: Status, after: Status) -> bool:
    """Whether anything but the heartbeat has changed, and what is counted beside the rest."""
    return _still(before) != _still(after)


def is_urgent(before: Status, after: Status) -> bool:
    """Whether a verdict, a cause or a refusal has changed, which can't wait for the next write as numbers can.

    Nor is it urgent that all is well at the beginning: within seconds there mostly is more to say.
    """
    old, new = _outline(before), _outline(after)
    if not before.observed_generation:
        old["observedGeneration"] = new["observedGeneration"]
    return old != new


def verdict_only(before: S, after: S) -> S:
    """The status before with the conditions and the phase of the one after: the rest of which can't be written."""
    names = ("conditions", "phase", "observed_generation", "start_time", "completion_time")
    return before.model_copy(update={name: getattr(after, name) for name in names if hasattr(after, name)})


def _outline(status: Status) -> JSON:
    document = {name: value for name, value in status_document(status).items() if name not in _NUMBERS}
    document["conditions"] = [
        (it.type, it.status, "" if it.reason in _BEGINNING else it.reason)
        for it in status.conditions
        if it.type not in _COUNTING and not (it.type in _FULFILLED and it.status == TRUE)
    ]
    return document


def _still(status: Status) -> JSON:
    document = status_document(status)
    for counted in ("gpuSeconds", "gpuSecondsTime"):
        document.pop(counted, None)
    progress = document.get("progress")
    if isinstance(progress, dict):
        progress.pop("lastHeartbeatTime", None)
    return document


def with_apply_failure(
    before: Status, planned: Status, starts: bool, summary: str, message: str, now: datetime, generation: int
) -> Status:
    """The planned status, corrected after a child could not be written.

    The generation is not carried out yet. Where the plan was to start something (`starts`), nothing has started: the
    status before is kept, and its summary condition says why.
    """
    base = before if starts else planned
    # planned as True, it would seem to become False anew with each failure
    known = find(before.conditions, JobCondition.CHILDREN_APPLIED)
    unmoved = [known if known is not None and it.type == known.type else it for it in base.conditions]
    findings = [Finding(JobCondition.CHILDREN_APPLIED, FALSE, Reason.APPLY_FAILED, message)]
    if find(base.conditions, summary) is None or starts:
        findings.append(Finding(summary, UNKNOWN, Reason.APPLY_FAILED, message))
    conditions = merge(unmoved, findings, now, generation)
    return base.model_copy(update={"conditions": conditions, "observed_generation": before.observed_generation})
