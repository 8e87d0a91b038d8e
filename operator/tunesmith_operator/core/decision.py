"""What `decide` answers: the writes to make, in order, and when to look again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tunesmith_api.v1alpha1 import FineTuneJobStatus, ModelDeploymentStatus
from tunesmith_operator.core.manifest import JSON, Manifest
from tunesmith_operator.core.resources import Resource

__all__ = ["Action", "Apply", "Create", "Decision", "Delete", "EventNote", "Patch", "PollTarget", "Status"]

Status = FineTuneJobStatus | ModelDeploymentStatus


@dataclass(frozen=True, slots=True)
class Apply:
    """Server-side apply.

    `ours` says that the object is known to be this owner's: its fields are then taken over by
    force; otherwise somebody else's object of that name makes the apply fail instead of being overwritten.
    """

    manifest: Manifest
    ours: bool = False


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
class EventNote:
    """A Kubernetes Event about the custom resource."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class PollTarget:
    """A pod that serves progress."""

    pod_uid: str
    host: str
    port: int


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
