"""Pauses between corrections of one child that somebody else changes back each time, so that two loops don't run hot.

The controller asks before it patches a child. Corrections towards another manifest (the spec was edited, an autoscaler
scales) are no contest and wait for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from tunesmith_operator.core.kubernetes.manifest import Manifest
from tunesmith_operator.core.kubernetes.resources import Key

__all__ = ["Contests"]

LONGEST: Final = timedelta(minutes=5)
OVER_AFTER: Final = timedelta(minutes=15)


@dataclass(frozen=True, slots=True)
class Correction:
    """The last one of a child: towards which manifest, when, and how many of them in a row."""

    hash: str
    at: datetime
    times: int

    @property
    def due(self) -> datetime:
        """When the next is allowed: at once after the first, then each time twice as late."""
        return self.at + min(LONGEST, timedelta(seconds=2.0 ** min(self.times, 30)) if self.times > 1 else timedelta())


class Contests:
    """The last correction of each child, for a quarter of an hour."""

    def __init__(self) -> None:
        self._last: dict[Key, dict[str, Correction]] = {}

    def wait(self, key: Key, manifest: Manifest, now: datetime) -> float:
        """Seconds until the child of that owner may be corrected again."""
        last = self._known(key, manifest, now)
        return max(0.0, (last.due - now).total_seconds()) if last is not None else 0.0

    def corrected(self, key: Key, manifest: Manifest, now: datetime) -> None:
        """The child has just been corrected."""
        last = self._known(key, manifest, now)
        times = last.times + 1 if last is not None else 1
        self._last.setdefault(key, {})[str(manifest)] = Correction(manifest.hash, now, times)

    def forget(self, key: Key) -> None:
        """The owner is gone."""
        self._last.pop(key, None)

    def _known(self, key: Key, manifest: Manifest, now: datetime) -> Correction | None:
        last = self._last.get(key, {}).get(str(manifest))
        return last if last is not None and last.hash == manifest.hash and now - last.at < OVER_AFTER else None
