"""Which engine a request asks, while one takes the place of another. Used by `server`, in its event loop.

A request stays with the engine that it began with, whose adapters it is about; that one goes when it has no more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tunesmith_server.front.fields import Limits
from tunesmith_server.front.gate import Gate
from tunesmith_server.front.relay import Relay

__all__ = ["Backend", "Backends"]


class Backend:
    """One engine: how it is asked, and what it allows."""

    def __init__(self, relay: Relay, limits: Limits) -> None:
        self.relay = relay
        self.limits = limits
        self.users = 0
        self.idle = asyncio.Event()
        self.idle.set()


class Backends:
    """The engine that the next request asks; none for a moment where there isn't room for two."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._there = asyncio.Event()
        self._current: Backend | None = None

    @asynccontextmanager
    async def one(self) -> AsyncIterator[Backend]:
        """The engine of a request, which waits for it."""
        while self._current is None:
            await self._there.wait()
        backend = self._current
        backend.users += 1
        backend.idle.clear()
        try:
            yield backend
        finally:
            backend.users -= 1
            if not backend.users:
                backend.idle.set()

    async def serve(self, url: str, limits: Limits) -> None:
        """Lead requests to this engine from now on; return once the one before has none left."""
        relay = Relay(url, self._gate)
        before, self._current = self._current, Backend(relay, await relay.described(limits))
        self._there.set()
        if before is not None:
            await _emptied(before)

    async def hold(self) -> None:
        """Let requests wait from now on; return once the engine has answered those that it had."""
        before, self._current = self._current, None
        self._there.clear()
        if before is not None:
            await _emptied(before)

    async def close(self) -> None:
        """Close the connections to the engine."""
        if self._current is not None:
            await self._current.relay.close()


async def _emptied(backend: Backend) -> None:
    await backend.idle.wait()
    await backend.relay.close()
