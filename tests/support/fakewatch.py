"""Lists and watches of a FakeCluster, with what can go wrong on the way: the informers' side of the API server."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable
from typing import Any

from support.fakecluster import FakeCluster, Name
from tunesmith_operator.adapters.errors import ClusterError, Expired
from tunesmith_operator.adapters.watch import Change, Page
from tunesmith_operator.core.kubernetes.resources import Resource

Log = list[tuple[int, str, dict[str, Any]]]


class FakeSource:
    """Delivers every change of the cluster, in order and once, unless told otherwise.

    `fail` is asked before each list and watch and raises what goes wrong; `deliver` turns the changes at hand into
    those that are sent; `delay` says how long they wait; `cut` ends all streams; `compact` forgets what has happened,
    as etcd does; with `until` set, nothing is known of what came after that version; a stream with nothing to say ends
    after `stream_seconds`.
    """

    def __init__(self, cluster: FakeCluster, page_size: int = 2) -> None:
        self._cluster, self._page_size = cluster, page_size
        self._log: Log = []
        self._compacted = 0
        self._streams = 0
        self._changed = asyncio.Event()
        self.fail: Callable[[str, Resource, str | None], ClusterError | None] = lambda verb, resource, namespace: None
        self.deliver: Callable[[Log], Log] = lambda changes: changes
        self.delay: Callable[[], float] = lambda: 0.0
        self.until: int | None = None
        self.stream_seconds: float | None = None
        self._base = dict(cluster.objects)
        self.lists = 0
        cluster.on_change = self._record

    def _record(self, type_: str, raw: dict[str, Any]) -> None:
        self._log.append((int(raw["metadata"]["resourceVersion"]), type_, raw))
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def compact(self) -> None:
        """Watches can only begin from now on."""
        self._compacted, self._log, self._base = self._cluster.version, [], dict(self._cluster.objects)

    def catch_up(self) -> None:
        """All that has happened is known again."""
        self.until = None
        self._wake()

    def cut(self) -> None:
        """All streams end."""
        self._streams += 1
        self._wake()

    async def list(self, resource: Resource, namespace: str | None, token: str) -> Page:
        """A page of what there is, each page as of now (a real list is a snapshot)."""
        self.lists += 1
        self._check("list", resource, namespace)
        await asyncio.sleep(0.01)
        begin = int(token or 0)
        found = [copy.deepcopy(raw) for raw in self._objects(resource, namespace)]
        page = found[begin : begin + self._page_size]
        more = begin + self._page_size < len(found)
        version = self._cluster.version if self.until is None else self.until
        return Page(list(page), str(version), str(begin + self._page_size) if more else "")

    async def watch(self, resource: Resource, namespace: str | None, version: str) -> AsyncIterator[Change]:
        """Changes after that version."""
        self._check("watch", resource, namespace)
        sent = looked = int(version)
        stream = self._streams
        while stream == self._streams:
            if sent < self._compacted:
                raise Expired("too old resource version")
            self._check("stream", resource, namespace)
            changed = self._changed
            news = self._news(looked, resource, namespace)
            pause = self.delay() if news else 0.0
            if pause:
                await asyncio.sleep(pause)
                news = self._news(looked, resource, namespace)
            if self._log and self.until is None:
                looked = self._log[-1][0]
            elif news:
                looked = news[-1][0]
            for _, type_, raw in self.deliver(news):
                yield Change(type_, copy.deepcopy(raw))  # type: ignore[arg-type]
            if not news:
                try:
                    await asyncio.wait_for(changed.wait(), self.stream_seconds)
                except TimeoutError:
                    return
                continue
            sent = news[-1][0]

    def _news(self, sent: int, resource: Resource, namespace: str | None) -> Log:
        found = []
        for entry in reversed(self._log):
            if entry[0] <= sent:
                break
            if (self.until is None or entry[0] <= self.until) and self._concerns(entry[2], resource, namespace):
                found.append(entry)
        return found[::-1]

    def _objects(self, resource: Resource, namespace: str | None) -> list[dict[str, Any]]:
        known = self._cluster.objects if self.until is None else self._as_of(self.until)
        return [raw for raw in known.values() if self._concerns(raw, resource, namespace)]

    def _as_of(self, until: int) -> dict[Name, dict[str, Any]]:
        known = dict(self._base)
        for version, type_, raw in self._log:
            if version > until:
                break
            name = (raw["kind"], raw["metadata"]["namespace"], raw["metadata"]["name"])
            if type_ == "DELETED":
                known.pop(name, None)
            else:
                known[name] = raw
        return known

    @staticmethod
    def _concerns(raw: dict[str, Any], resource: Resource, namespace: str | None) -> bool:
        return raw["kind"] == resource.kind and namespace in (None, raw["metadata"]["namespace"])

    def _check(self, verb: str, resource: Resource, namespace: str | None) -> None:
        error = self.fail(verb, resource, namespace)
        if error is not None:
            raise error
