"""Reads the progress of a job's worker 0, and the metrics of servers.

A user's code runs in these pods: nothing of what they say is trusted. No redirect is followed, no cookie kept, nothing
decompressed, and a body is read to a bound only.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from enum import StrEnum
from typing import Any, TypeVar

import aiohttp

from tunesmith_api.keys import PATH_METRICS, PATH_PROGRESS
from tunesmith_api.reports import ProgressReport
from tunesmith_operator.core.pods.figures import Figures, read_figures
from tunesmith_operator.core.pods.reports import read_progress

__all__ = ["MAX_BYTES", "PollResult", "ProgressClient"]

MAX_BYTES = 65_536
MAX_METRICS_BYTES = 1_048_576
T = TypeVar("T")


class PollResult(StrEnum):
    """What came of one poll, as the metric counts it."""

    OK = "ok"
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    INVALID = "invalid"
    TOO_LARGE = "too_large"
    REDIRECTED = "redirected"


class _NoReport(Exception):
    """There is an answer, and it is no report."""

    def __init__(self, result: PollResult) -> None:
        super().__init__(result.value)
        self.result = result


class ProgressClient:
    """One HTTP client for all jobs; the poller decides how many are asked at once."""

    def __init__(self, timeout_seconds: float = 2.0, on_poll: Callable[[str], None] = lambda result: None) -> None:
        self._on_poll = on_poll
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._session: aiohttp.ClientSession | None = None

    async def fetch(self, host: str, port: int) -> ProgressReport | None:
        """The report, or None where there is none to be had: the pod may be starting, or gone.

        Raises:
            TimeoutError: the pod kept us waiting until the time was over.
        """
        return await self._counted(self._report(host, port))

    async def figures(self, host: str, port: int) -> Figures | None:
        """What a server pod has counted, or None where it can't be had.

        Raises:
            TimeoutError: the pod kept us waiting until the time was over.
        """
        return await self._counted(self._figures(host, port))

    async def _counted(self, answer: Coroutine[Any, Any, T]) -> T | None:
        try:
            found = await answer
        except TimeoutError:  # before OSError, which it is one of
            self._on_poll(PollResult.TIMEOUT)
            raise
        except _NoReport as answer:
            self._on_poll(answer.result)
            return None
        except (aiohttp.ClientError, OSError):
            self._on_poll(PollResult.UNREACHABLE)
            return None
        self._on_poll(PollResult.OK)
        return found

    async def _report(self, host: str, port: int) -> ProgressReport:
        report = read_progress(await self._read(host, port, PATH_PROGRESS, MAX_BYTES))
        if report is None:
            raise _NoReport(PollResult.INVALID)
        return report

    async def _figures(self, host: str, port: int) -> Figures:
        return read_figures((await self._read(host, port, PATH_METRICS, MAX_METRICS_BYTES)).decode(errors="replace"))

    async def _read(self, host: str, port: int, path: str, most: int) -> bytes:
        name = f"[{host}]" if ":" in host else host
        async with self._open().get(f"http://{name}:{port}{path}", allow_redirects=False) as response:
            if 300 <= response.status < 400:
                raise _NoReport(PollResult.REDIRECTED)
            if response.status != 200:
                raise _NoReport(PollResult.INVALID)
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > most:
                    raise _NoReport(PollResult.TOO_LARGE)
        return bytes(body)

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=self._timeout,
                # no limit here: a poll's clock starts with its connection, not while it waits for one
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Accept-Encoding": "identity"},
                auto_decompress=False,
                # a proxy of the operator's environment never leads to pods
                trust_env=False,
            )
        return self._session
