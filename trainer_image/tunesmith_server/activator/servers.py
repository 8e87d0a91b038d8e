"""Whether there is a server: asked as long as requests wait for one. Used by `relay`, in its event loop."""

from __future__ import annotations

import asyncio
import time

import aiohttp

__all__ = ["Servers"]

ASK_SECONDS = 0.25
ANSWER_SECONDS = 2.0
FRESH_SECONDS = 1.0


class Servers:
    """The servers behind one address, which answers only where one of them is ready."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url
        self._answered_at = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    async def ready(self) -> None:
        """Wait until one answers, or has just answered; several who wait ask together."""
        if time.monotonic() - self._answered_at < FRESH_SECONDS:
            return
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        # who gives up leaves the others waiting
        await asyncio.shield(self._asking)

    def failed(self) -> None:
        """One that was taken to be ready wasn't."""
        self._answered_at = float("-inf")

    def close(self) -> None:
        """Ask no longer."""
        if self._asking is not None:
            self._asking.cancel()

    async def _ask(self) -> None:
        while True:
            if await self._answers():
                self._answered_at = time.monotonic()
                return
            await asyncio.sleep(ASK_SECONDS)

    async def _answers(self) -> bool:
        try:
            async with asyncio.timeout(ANSWER_SECONDS), self._session.get(f"{self._url}/health") as response:
                return response.status == 200
        except (aiohttp.ClientError, OSError):
            return False
