"""What the engine and the shell need to know of a kind of custom resource. Each kind's folder has one such value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, TypeVar

from tunesmith_api.v1alpha1 import ObjectMeta
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.kubernetes.resources import Key, Resource
from tunesmith_operator.core.reconcile.decision import Decision
from tunesmith_operator.core.reconcile.observed import ObservedObjects
from tunesmith_operator.core.status.resource import CustomResource, Status

__all__ = ["Kind", "Lookup"]

R = TypeVar("R", bound=CustomResource)
T = TypeVar("T")
Lookup = Callable[[Key], Any]
"""The custom resource of that key, read into its kind's model; None where there is none that can be read."""


def _none(namespace: str, spec: Mapping[str, Any]) -> Iterable[Key]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Kind(Generic[R, T]):
    """One kind of custom resource."""

    resource: Resource
    label: str
    """Names the owner on every child."""
    model: type[R]
    status: type[Status]
    summary: str
    """Type of the condition that sums up."""
    observe: Callable[[R, ObservedObjects, Lookup], T]
    """Puts the resource, its objects and what it refers to together."""
    decide: Callable[[T, datetime, Config], Decision]
    unreadable: Callable[[ObjectMeta, Any, str, bool, datetime], Status]
    """The status of one whose spec it can't read, from the one before, the message why, and whether it has Jobs."""
    references: Callable[[str, Mapping[str, Any]], Iterable[Key]] = _none
    """Custom resources that a spec in a namespace names, a change of which concerns it."""

    def key(self, namespace: str, name: str) -> Key:
        """Names one resource of this kind."""
        return Key(self.resource.kind, namespace, name)
