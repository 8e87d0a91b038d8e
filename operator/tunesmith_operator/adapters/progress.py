"""Reads the progress that worker 0 of a running job serves."""

from __future__ import annotations

from collections.abc import Callable

import aiohttp
from pydantic import ValidationError

from tunesmith_api.keys import PATH_PROGRESS
from tunesmith_api.reports import ProgressReport

__all__ = ["ProgressClient"]

MAX_BYTES = 65_536


class ProgressClient:
    """One HTTP client for all jobs. A pod that doesn't answer is no error: it may be starting, or gone."""

    def __init__(
        self,
        timeout_seconds: float = 2.0,
        connections: int = 32,
        on_poll: Callable[[str], None] = lambda result: None,
    ) -> None:
        self._on_poll = on_poll
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._connections = connections
        self._session: aiohttp.ClientSession | None = None

    async def fetch(self, host: str, port: int) -> ProgressReport | None:
        """The report, or None where there is none to be had."""
        report = await self._read(host, port)
        self._on_poll("ok" if report is not None else "unreachable")
        return report

    async def _read(self, host: str, port: int) -> ProgressReport | None:
        name = f"[{host}]" if ":" in host else host
        try:
            async with self._open().get(f"http://{name}:{port}{PATH_PROGRESS}") as response:
                if response.status != 200:
                    return None
                text = await response.content.read(MAX_BYTES)
            return ProgressReport.from_json(text)
        except (aiohttp.ClientError, TimeoutError, OSError, ValidationError):
            return None

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=self._connections, force_close=True)
            # a proxy of the operator's environment never leads to pods
            self._session = aiohttp.ClientSession(timeout=self._timeout, connector=connector, trust_env=False)
        return self._session
