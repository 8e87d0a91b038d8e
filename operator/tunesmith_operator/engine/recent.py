"""Read your own writes: what the operator has just written counts as observed before the watch delivers it.

Without it, a reconcile that runs before the watch has caught up would see a child missing that it has just created.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from tunesmith_operator.core.kubernetes.objects import ChildView
from tunesmith_operator.core.kubernetes.resources import Key, Resource

__all__ = ["RecentWrites"]

V = TypeVar("V", bound=ChildView)
FORGET_AFTER_SECONDS = 30.0


class RecentWrites:
    """Newest versions of children that the operator wrote, and uids that it deleted, for half a minute."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._written: dict[tuple[Key, Resource, str], tuple[float, ChildView]] = {}
        self._deleted: dict[str, float] = {}

    def wrote(self, key: Key, resource: Resource, view: ChildView) -> None:
        """Remember a child of `key` as the API server returned it."""
        self._written[key, resource, view.name] = (self._monotonic() + FORGET_AFTER_SECONDS, view)

    def deleted(self, uid: str) -> None:
        """Remember that this object is no more."""
        self._deleted[uid] = self._monotonic() + FORGET_AFTER_SECONDS

    def merge(self, key: Key, resource: Resource, observed: Iterable[V]) -> tuple[V, ...]:
        """What was observed, corrected by what was written since."""
        now = self._monotonic()
        self._deleted = {uid: until for uid, until in self._deleted.items() if until > now}
        merged = {view.name: view for view in observed if view.uid not in self._deleted}
        for entry in [entry for entry in self._written if entry[:2] == (key, resource)]:
            until, view = self._written[entry]
            seen = merged.get(view.name)
            if until <= now or view.uid in self._deleted or (seen is not None and seen.version >= view.version):
                del self._written[entry]
            else:
                merged[view.name] = view  # type: ignore[assignment]
        return tuple(merged.values())

    def forget(self, key: Key) -> None:
        """The owner is gone, and with it its children."""
        for entry in [entry for entry in self._written if entry[0] == key]:
            del self._written[entry]
