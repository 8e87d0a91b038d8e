"""How many requests are taken in, and how many of them an engine sees at once. Used by `server`, in its event loop.

An engine that gets all requests holds a thread and memory for each; here a waiting request is a small object, there
are only so many of them, and one whose client has gone leaves without a trace.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from tunesmith_server.engines.base import AHEAD
from tunesmith_server.front.errors import ApiError

__all__ = ["Gate"]

RETRY_AFTER_SECONDS = 1


class Gate:
    """Counts requests in, and lets so many of their questions through at a time."""

    def __init__(self, parallel: int, waiting: int) -> None:
        self._parallel = parallel
        self._most = parallel + waiting
        self._turns = asyncio.Semaphore(parallel + AHEAD)
        self._asked = 0
        self._queued = 0
        self.in_flight = 0
        """Requests taken in and not yet answered."""

    @property
    def running(self) -> int:
        """Answers that the engine is working on."""
        return min(self._asked, self._parallel)

    @property
    def waiting(self) -> int:
        """Answers that wait for the engine."""
        return self._queued + self._asked - self.running

    @contextmanager
    def request(self) -> Iterator[None]:
        """Take a request in.

        Raises:
            ApiError: there are too many already.
        """
        if self.in_flight >= self._most:
            raise ApiError(
                429,
                f"{self.in_flight} requests are answered or wait already: try again later",
                code="rate_limit_exceeded",
                type_="rate_limit_error",
                headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
            )
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait until the engine may be asked."""
        self._queued += 1
        try:
            await self._turns.acquire()
        finally:
            self._queued -= 1
        self._asked += 1
        try:
            yield
        finally:
            self._asked -= 1
            self._turns.release()
