"""What a watch has delivered of one kind, by name and by what it belongs to. `store` has one for each kind.

Events may come twice, late or out of order, and lists may be older than what was just written: of one object, the
newest version stays, and what is known to be gone never comes back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, TypeVar

__all__ = ["Cache", "Entry", "Name"]

V = TypeVar("V")
GONE_REMEMBERED: Final = 4096
"""Deleted objects that are remembered, so that a late event doesn't bring one back."""


class Name(NamedTuple):
    """Names one object of a kind."""

    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class Entry(Generic[V]):
    """One object. `group` is what it's looked up by; None for one that nobody looks up."""

    uid: str
    version: int
    group: Hashable | None
    value: V


class Cache(Generic[V]):
    """Entries by name and by group."""

    def __init__(self) -> None:
        self._entries: dict[Name, Entry[V]] = {}
        self._groups: dict[Hashable, dict[Name, Entry[V]]] = {}
        self._gone: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry[V]]:
        return iter(self._entries.values())

    def get(self, name: Name) -> Entry[V] | None:
        """The object of that name."""
        return self._entries.get(name)

    def of(self, group: Hashable) -> tuple[V, ...]:
        """All objects of a group."""
        found = self._groups.get(group)
        return tuple(entry.value for entry in found.values()) if found else ()

    def names(self, namespace: str | None) -> set[Name]:
        """Names of all objects, or of those in a namespace."""
        return {name for name in self._entries if namespace is None or name.namespace == namespace}

    def put(self, name: Name, entry: Entry[V]) -> tuple[bool, Entry[V] | None]:
        """Take the entry in, unless a newer version of it is known or it is gone.

        Returns whether it was taken in, and what was there before.
        """
        before = self._entries.get(name)
        if before is not None and entry.version <= before.version:
            return False, before
        if entry.version <= self._gone.get(entry.uid, -1):
            return False, before
        if before is not None:
            self._leave(name, before)
        self._entries[name] = entry
        if entry.group is not None:
            self._groups.setdefault(entry.group, {})[name] = entry
        return True, before

    def drop(self, name: Name, uid: str, version: int) -> Entry[V] | None:
        """Let go of that object, which is gone as of that version; returns what was there."""
        self._gone[uid] = max(version, self._gone.get(uid, -1))
        self._gone.move_to_end(uid)
        while len(self._gone) > GONE_REMEMBERED:
            self._gone.popitem(last=False)
        before = self._entries.get(name)
        if before is None or before.uid != uid:
            return None
        del self._entries[name]
        self._leave(name, before)
        return before

    def prune(self, names: set[Name], version: int) -> list[Entry[V]]:
        """Let go of objects that a list of that version no longer had, unless they are newer; returns them."""
        dropped = []
        for name in names:
            entry = self._entries.get(name)
            if entry is not None and entry.version <= version:
                self.drop(name, entry.uid, version)
                dropped.append(entry)
        return dropped

    def _leave(self, name: Name, entry: Entry[V]) -> None:
        members = self._groups.get(entry.group)
        if members is not None:
            members.pop(name, None)
            if not members:
                del self._groups[entry.group]
