"""What `decide` answers: the writes to make, in order, and when to look again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from tunesmith_api.keys import Reason
from tunesmith_operator.core.kubernetes.manifest import JSON, Manifest
from tunesmith_operator.core.kubernetes.resources import Resource
from tunesmith_operator.core.reconcile.progress import PollTarget
from tunesmith_operator.core.status.resource import CustomResource, Status
from tunesmith_operator.core.status.transitions import EventNote, transitions

__all__ = ["Action", "Apply", "Create", "Decision", "Delete", "Patch", "conclude"]

QUIET: Final = frozenset({Reason.PENDING, Reason.STARTING})
"""Reasons of a summary condition that aren't worth an event."""


@dataclass(frozen=True, slots=True)
class Apply:
    """Server-side apply.

    `owned` says that the object is known to have this owner: its fields are then taken over by
    force; otherwise somebody else's object of that name makes the apply fail instead of being overwritten.
    """

    manifest: Manifest
    owned: bool = False


@dataclass(frozen=True, slots=True)
class Create:
    """Create a Secret with a random value under `random_key`; one that is there already stays as it is."""

    manifest: Manifest
    random_key: str


@dataclass(frozen=True, slots=True)
class Patch:
    """Merge patch of a few fields of an object whose rest can't change."""

    resource: Resource
    namespace: str
    name: str
    body: JSON


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete the object with this uid; one that is gone or another is left alone."""

    resource: Resource
    namespace: str
    name: str
    uid: str


Action = Apply | Create | Patch | Delete


@dataclass(frozen=True, slots=True)
class Decision:
    """What to write, and when to look again.

    `actions` are carried out in order and stop at the first failure; `status` is written afterwards, if given and
    changed; `requeue_after` is in seconds. `starts` says that the status presupposes the actions: when one fails, the
    status before is kept.
    """

    actions: tuple[Action, ...] = ()
    status: Status | None = None
    events: tuple[EventNote, ...] = ()
    requeue_after: float | None = None
    poll: PollTarget | None = None
    starts: bool = False


def conclude(resource: CustomResource, summary: str, status: Status, actions: Iterable[Action] = ()) -> Decision:
    """Carry out the actions and report that status, with an event where the summary condition has changed."""
    events = transitions(summary, resource.status.conditions, status.conditions, QUIET)
    return Decision(actions=tuple(actions), status=status, events=events)
