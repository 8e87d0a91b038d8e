"""Keeps the store true to the API server: list, watch, and list again where the watch has lost its place.

One informer for each watched kind (and namespace). It never ends by itself: an API server that is away, refuses or has
forgotten is asked again, ever less often. What a new list no longer has is dropped: nothing that is gone stays known.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final, Protocol

from tunesmith_operator.adapters.errors import ClusterError, Expired, Gone, Transient
from tunesmith_operator.adapters.watch import Change, Page
from tunesmith_operator.core.kubernetes.resources import Resource
from tunesmith_operator.engine.cache import Name

__all__ = ["SILENT_SECONDS", "Informer", "Sink", "Source"]

log = logging.getLogger(__name__)
Raw = Mapping[str, Any]
LONGEST_PAUSE: Final = 10.0
RELIST_SECONDS: Final = 1800.0
"""A watch that has lasted this long is begun anew with a list: an event that never came is made up for."""
UNSERVED_SECONDS: Final = 3.0
_NEWEST: Final = 2**63
SILENT_SECONDS: Final = 600.0
"""An informer that neither asks nor hears for so long is stuck."""


class Source(Protocol):
    """Where objects come from; `adapters.watch` provides it."""

    async def list(self, resource: Resource, namespace: str | None, token: str) -> Page:
        """A part of the list of all objects.

        Raises:
            Expired: the token is too old.
            ClusterError: it didn't work.
        """

    def watch(self, resource: Resource, namespace: str | None, version: str) -> AsyncIterator[Change]:
        """What changes after that version, until the stream ends.

        Raises:
            Expired: the version is too old.
            ClusterError: it didn't work.
        """


class Sink(Protocol):
    """Where objects go; `engine.store` provides it."""

    def received(self, resource: Resource, raw: Raw) -> Name:
        """An object, new or changed or as known; returns its name."""

    def removed(self, resource: Resource, raw: Raw) -> None:
        """An object that is no more."""

    def listed(self, resource: Resource, namespace: str | None, seen: set[Name], version: int) -> None:
        """These are all there are; what else is known is gone."""

    def lost(self, resource: Resource, namespace: str | None) -> None:
        """What is known may be old, until the next list."""


class Informer:
    """List and watch of one kind, in one namespace or (None) in all."""

    def __init__(
        self,
        source: Source,
        sink: Sink,
        resource: Resource,
        namespace: str | None = None,
        *,
        chance: random.Random | None = None,
    ) -> None:
        self.resource, self.namespace = resource, namespace
        self._source, self._sink = source, sink
        self._chance = chance or random.Random()
        self._failures = 0
        self._complaint = ""
        self._heard = 0.0

    def __str__(self) -> str:
        return f"{self.resource.plural} in {self.namespace or 'all namespaces'}"

    def silent_for(self) -> float:
        """Seconds since it last asked or heard anything."""
        return asyncio.get_running_loop().time() - self._heard

    async def run(self) -> None:
        """List and watch until cancelled."""
        version = ""
        while True:
            self._hear()
            try:
                version = await self._watch(version) if version else await self._list()
            except Expired:
                log.info("watch of %s has expired: listing anew", self)
                version, self._failures = "", 0
                self._sink.lost(self.resource, self.namespace)
                await self._pause(0.0)
            except Gone:
                # the kind itself isn't served, and so there are no objects of it
                self._complain(
                    f"the cluster doesn't know {self.resource.plural}: install the CRDs (crds/ or the chart)"
                )
                self._sink.listed(self.resource, self.namespace, set(), _NEWEST)
                version = ""
                await asyncio.sleep(UNSERVED_SECONDS)
            except ClusterError as error:
                self._complain(f"can't watch {self}: {error}")
                if self._failures:
                    # more than a broken connection: only a new list says what has happened meanwhile
                    version = ""
                    self._sink.lost(self.resource, self.namespace)
                await self._pause(error.retry_after or 0.0 if isinstance(error, Transient) else 0.0)
            except Exception:
                log.exception("a bug: the watch of %s failed", self)
                version = ""
                await self._pause(0.0)

    async def _list(self) -> str:
        seen: set[Name] = set()
        version = token = ""
        while True:
            page = await self._source.list(self.resource, self.namespace, token)
            self._hear()
            seen.update(self._sink.received(self.resource, raw) for raw in page.items)
            version, token = version or page.version, page.token
            if not token:
                break
        self._sink.listed(self.resource, self.namespace, seen, int(version or 0))
        self._recovered()
        return version

    async def _watch(self, version: str) -> str:
        until = asyncio.get_running_loop().time() + RELIST_SECONDS * self._chance.uniform(0.8, 1.2)
        while asyncio.get_running_loop().time() < until:
            began = asyncio.get_running_loop().time()
            async for change in self._source.watch(self.resource, self.namespace, version):
                self._hear()
                self._recovered()
                if change.type == "DELETED":
                    self._sink.removed(self.resource, change.object)
                elif change.type != "BOOKMARK":
                    self._sink.received(self.resource, change.object)
                version = change.object["metadata"]["resourceVersion"]
            self._hear()
            if asyncio.get_running_loop().time() - began < 1.0:
                await asyncio.sleep(1.0)  # a server that ends each stream at once isn't to be asked without a pause
        return ""

    def _hear(self) -> None:
        self._heard = asyncio.get_running_loop().time()

    def _recovered(self) -> None:
        if self._complaint:
            log.info("watching %s again", self)
        self._failures, self._complaint = 0, ""

    def _complain(self, text: str) -> None:
        """Log a complaint once, however often it is met in a row."""
        log.log(logging.DEBUG if text == self._complaint else logging.WARNING, "%s; trying again", text)
        self._complaint = text

    async def _pause(self, at_least: float) -> None:
        self._failures += 1
        pause = min(LONGEST_PAUSE, 0.5 * 2.0 ** min(self._failures, 10)) * self._chance.uniform(0.7, 1.3)
        await asyncio.sleep(max(at_least, pause))
