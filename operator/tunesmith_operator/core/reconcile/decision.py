"""What `decide` answers: the writes to make, in order, and when to look again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from tunesmith_api.keys import Reason
from tunesmith_operator.core.kubernetes.manifest import JSON, Manifest
from tunesmith_operator.core.kubernetes.resources import Resource
from tunesmith_operator.core.reconcile.progress import Target
from tunesmith_operator.core.status.resource import CustomResource, Status
from tunesmith_operator.core.status.transitions import EventNote, transitions

__all__ = ["Action", "Create", "Decision", "Delete", "Patch", "conclude"]

QUIET: Final = frozenset({Reason.PENDING, Reason.STARTING})
"""Reasons of a summary condition that aren't worth an event."""


@dataclass(frozen=True, slots=True)
class Patch:
    """Merge patch of the object with this uid, and of no other.

    `manifest` is what the patch brings the object to, where that is more than the patch says itself. `undone` is the
    message of an event: what somebody else had changed.
    """

    resource: Resource
    namespace: str
    name: str
    uid: str
    body: JSON
    manifest: Manifest | None = None
    undone: str = ""


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete the object with this uid; one that is gone or another is left alone."""

    resource: Resource
    namespace: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class Create:
    """Create the object; what somebody else has under that name is never touched.

    A Secret gets a random value under `random_key`. The operator can't read Secrets, so one that is there counts as its
    own: the owner's uid is part of the name. `where_new` is carried out only if there was none.
    """

    manifest: Manifest
    random_key: str = ""
    where_new: Delete | None = None


Action = Create | Patch | Delete


@dataclass(frozen=True, slots=True)
class Decision:
    """What to write, and when to look again.

    `actions` are carried out in order and stop at the first failure; `status` is written afterwards, if given and
    changed; `requeue_after` is in seconds. `starts` says that the status presupposes the actions: when one fails, the
    status before is kept. `fleeting` says that the status has counted what will soon be gone: it is written at once,
    even where nothing else has changed.
    """

    actions: tuple[Action, ...] = ()
    status: Status | None = None
    events: tuple[EventNote, ...] = ()
    requeue_after: float | None = None
    poll: Target | None = None
    starts: bool = False
    fleeting: bool = False


def conclude(resource: CustomResource, summary: str, status: Status, actions: Iterable[Action] = ()) -> Decision:
    """Carry out the actions and report that status, with an event where the summary condition has changed."""
    events = transitions(summary, resource.status.conditions, status.conditions, QUIET)
    return Decision(actions=tuple(actions), status=status, events=events)
