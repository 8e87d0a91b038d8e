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

    async def emptied(self) -> None:
        """Wait until its last request is answered, and close the connections to it."""
        await self.idle.wait()
        await self.relay.close()


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

    async def serve(self, url: str, limits: Limits) -> Backend | None:
        """Lead requests to this engine from now on; return the one before, which may have some left."""
        relay = Relay(url, self._gate)
        limits = await relay.described(limits)
        before, self._current = self._current, Backend(relay, limits)
        self._there.set()
        return before

    def hold(self) -> Backend | None:
        """Let requests wait from now on; return the engine, which may have some left."""
        before, self._current = self._current, None
        self._there.clear()
        return before

    async def close(self) -> None:
        """Close the connections to the engine."""
        if self._current is not None:
            await self._current.relay.close()
