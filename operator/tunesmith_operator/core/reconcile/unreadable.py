"""A custom resource that passed admission but that this operator can't read, as one written for a newer version."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from pydantic import ValidationError

from tunesmith_api.keys import JobCondition, Reason
from tunesmith_api.v1alpha1 import ObjectMeta
from tunesmith_operator.core.reconcile.decision import Decision
from tunesmith_operator.core.status.conditions import UNKNOWN, Finding, refused, with_findings
from tunesmith_operator.core.status.resource import Status
from tunesmith_operator.core.status.transitions import transitions

__all__ = ["Unreadable", "decide_unreadable", "describe"]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What is known of it. `summary` is the type of its summary condition."""

    meta: ObjectMeta
    status: Status
    summary: str
    message: str


def describe(error: ValidationError) -> str:
    """The fields that are wrong, by their path, and what to do."""
    found = [f"{'.'.join(str(part) for part in entry['loc'])}: {entry['msg']}" for entry in error.errors()[:3]]
    more = error.error_count() - len(found)
    tail = f" (and {more} more)" if more > 0 else ""
    return (
        f"{'; '.join(found)}{tail}. Correct the field; where it belongs to a newer version of Tunesmith, upgrade the "
        "operator. Nothing is changed until then."
    )


def decide_unreadable(unreadable: Unreadable, now: datetime) -> Decision:
    """Say so in the status and leave everything else as it is."""
    if unreadable.meta.deletion_timestamp is not None:
        return Decision()
    before = unreadable.status
    findings = (
        refused(Reason.INVALID_SPEC, unreadable.message),
        Finding(unreadable.summary, UNKNOWN, Reason.INVALID_SPEC, unreadable.message),
    )
    after = with_findings(before, findings, now, unreadable.meta.generation)
    events = transitions(JobCondition.ACCEPTED, before.conditions, after.conditions, frozenset())
    return Decision(status=after, events=events)
