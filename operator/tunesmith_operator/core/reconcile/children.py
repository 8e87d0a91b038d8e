"""Steps that every kind takes with its children: write what has changed, wait for orphans, look again in time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Final

from tunesmith_operator.core.kubernetes.manifest import Manifest
from tunesmith_operator.core.kubernetes.objects import ChildView
from tunesmith_operator.core.reconcile.decision import Apply

__all__ = ["ORPHANS_SECONDS", "apply_if_changed", "orphans_message", "seconds_until", "soonest"]

ORPHANS_SECONDS: Final = 5.0
"""From one look at orphans that are waited for to the next."""


def apply_if_changed(manifest: Manifest, child: ChildView | None) -> Iterator[Apply]:
    """Write the child, where it is missing or was last applied from another manifest."""
    if child is None or child.spec_hash != manifest.hash:
        yield Apply(manifest, owned=child is not None)


def orphans_message(previous_owner: str, orphans: Iterable[ChildView]) -> str:
    """Why nothing is started yet: names are taken by what a previous owner of the same name owns."""
    names = ", ".join(sorted({child.name for child in orphans})[:3])
    return f"Waiting until what an earlier {previous_owner} left behind is gone: {names}."


def seconds_until(moment: datetime | None, now: datetime) -> float | None:
    """Seconds until then, at least one; None for a moment that has passed or isn't known."""
    left = (moment - now).total_seconds() if moment is not None else 0.0
    return max(1.0, left) if left > 0 else None


def soonest(*waits: float | None) -> float | None:
    """The shortest of several waits; None where there is none."""
    return min((wait for wait in waits if wait is not None), default=None)
