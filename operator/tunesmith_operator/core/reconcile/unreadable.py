"""Custom resources that passed admission but that this operator can't read in full, as ones of a newer version.

`read` is how the engine's store turns every custom resource into its kind's model. A status is the operator's own: what
can be read of it is, so that nothing is forgotten over one field. A spec is read as a whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from pydantic import ValidationError

from tunesmith_api.keys import JobCondition
from tunesmith_api.v1alpha1 import ObjectMeta
from tunesmith_operator.core.reconcile.decision import Decision
from tunesmith_operator.core.reconcile.kind import Kind
from tunesmith_operator.core.status.resource import Status
from tunesmith_operator.core.status.transitions import status_document, transitions

__all__ = ["Unreadable", "decide_unreadable", "describe", "read"]

S = TypeVar("S", bound=Status)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What is known of it."""

    meta: ObjectMeta
    status: Status
    message: str
    has_jobs: bool = False
    """Whether something was started for it; the store knows."""


def read(kind: Kind[Any, Any], raw: Mapping[str, Any]) -> Any:
    """The custom resource in its kind's model; `Unreadable` where the spec can't be read."""
    try:
        return kind.model.model_validate(raw)
    except ValidationError:
        status = readable_part(kind.status, raw.get("status") or {})
    try:
        return kind.model.model_validate({**raw, "status": status_document(status)})
    except ValidationError as error:
        return Unreadable(ObjectMeta.model_validate(raw["metadata"]), status, describe(error))


def readable_part(model: type[S], document: Mapping[str, Any]) -> S:
    """The document without the fields, and without the entries of lists, that the model doesn't know how to read."""
    left: dict[str, Any] = dict(document)
    while True:
        try:
            return model.model_validate(left)
        except ValidationError as error:
            faults = [fault["loc"] for fault in error.errors()]
        for field in {str(place[0]) for place in faults}:
            entries = {place[1] for place in faults if place[0] == field and len(place) > 1}
            value = left.pop(field)
            if isinstance(value, list) and entries:
                left[field] = [entry for number, entry in enumerate(value) if number not in entries]


def describe(error: ValidationError) -> str:
    """The fields that are wrong, by their path, and what to do."""
    found = [f"{'.'.join(str(part) for part in entry['loc'])}: {entry['msg']}" for entry in error.errors()[:3]]
    more = error.error_count() - len(found)
    tail = f" (and {more} more)" if more > 0 else ""
    return (
        f"{'; '.join(found)}{tail}. Correct the field; where it belongs to a newer version of Tunesmith, upgrade the "
        "operator. Nothing is changed until then."
    )


def decide_unreadable(kind: Kind[Any, Any], found: Unreadable, now: datetime) -> Decision:
    """Say so in the status, as its kind says such things, and leave everything else as it is."""
    if found.meta.deletion_timestamp is not None:
        return Decision()
    after = kind.unreadable(found.meta, found.status, found.message, found.has_jobs, now)
    events = transitions(JobCondition.ACCEPTED, found.status.conditions, after.conditions, frozenset())
    return Decision(status=after, events=events)
