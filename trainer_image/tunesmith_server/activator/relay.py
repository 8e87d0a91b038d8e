"""Takes requests in, holds them until a server answers, and hands its answers on, word by word. Used by `__main__`.

A request is held after its key was checked, whole, within bounds of number, bytes and time; beyond them it is refused
with 503 and Retry-After. Servers check keys and requests themselves: here nothing of a body is looked at.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from tunesmith_api.activation import ActivatorSettings
from tunesmith_server.activator.metrics import Metrics
from tunesmith_server.activator.servers import Servers
from tunesmith_server.front.apikeys import ApiKeys
from tunesmith_server.front.errors import ApiError

__all__ = ["Relay"]

log = logging.getLogger("tunesmith.activator")

HEALTH = "/health"
CLIENT_GONE = 499
BODY_SECONDS = 30.0
CONNECT_SECONDS = 5.0
RETRY_AFTER_SECONDS = 5
MOST_TRIES = 3
"""Of a request that a server may have begun to answer, and broke off before its first byte."""
OF_THE_CONNECTION = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer"),
        *("transfer-encoding", "upgrade", "host", "content-length", "expect"),
    }
)


class Relay:
    """Answers requests from `open` on until `close`."""

    def __init__(self, settings: ActivatorSettings, metrics: Metrics, api_keys: ApiKeys | None) -> None:
        self._settings = settings
        self._metrics = metrics
        self._keys = api_keys
        self._bytes = 0
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    async def open(self) -> None:
        """Get ready to reach servers; in the event loop that requests come in."""
        self._session = aiohttp.ClientSession(
            # each request finds its own way to one of the servers
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )
        self._servers = Servers(self._session, self._settings.servers_url)

    async def idle(self) -> None:
        """Wait until everything that was taken in is answered."""
        await self._idle.wait()

    async def close(self) -> None:
        """Close all connections to servers."""
        self._servers.close()
        await self._session.close()

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """One request, from its head to the end of its answer."""
        code = CLIENT_GONE
        try:
            response = await self._outcome(request)
            code = response.status
        except ConnectionError:
            response = web.Response(status=CLIENT_GONE)
        except ApiError as error:
            code = error.status
            response = web.Response(
                status=code, body=error.body(), content_type="application/json", headers=error.headers
            )
        finally:
            if request.path != HEALTH:
                self._metrics.answered(code)
        if self.draining and not response.prepared:
            response.force_close()
        return response

    async def _outcome(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == HEALTH:
            return web.json_response({"status": "ok"})
        if self._keys is not None:
            self._keys.check(request.headers.get("Authorization", ""))
        if not request.raw_path.startswith("/"):
            raise ApiError(400, "The request names more than a path: this is no proxy", code="invalid_url")
        deadline = time.monotonic() + self._settings.hold_seconds
        with self._place():
            body = bytearray()
            try:
                await self._read(request, body)
                try:
                    answer = await self._first(request, bytes(body), deadline)
                except TimeoutError:
                    raise _no_server(self._settings.hold_seconds) from None
                return await self._handed_on(request, answer)
            finally:
                self._bytes -= len(body)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """One of the places for requests.

        Raises:
            ApiError: there is none left.
        """
        if self._in_flight >= self._settings.most_requests:
            raise _busy(f"{self._in_flight} requests wait already for this model, which is being started")
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def _read(self, request: web.BaseRequest, body: bytearray) -> None:
        """Take the body in, and count it among those that are held."""
        most = self._settings.max_body_bytes
        large = ApiError(
            413, f"The body is larger than the {most} bytes that a request may have", code="body_too_large"
        )
        if (request.content_length or 0) > most:
            raise large
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.content.iter_any():
                    body += chunk
                    self._bytes += len(chunk)
                    if len(body) > most:
                        raise large
                    if self._bytes > self._settings.most_bytes:
                        raise _busy("The requests that wait for this model, which is being started, are too large")
        except TimeoutError as error:
            message = f"The body did not come within {BODY_SECONDS:.0f} s"
            raise ApiError(408, message, code="body_timeout") from error

    async def _first(self, request: web.BaseRequest, body: bytes, deadline: float) -> aiohttp.ClientResponse:
        """The head of a server's answer.

        Raises:
            TimeoutError: there was no server in time.
        """
        tries = 0
        while True:
            with self._metrics.held():
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._servers.ready()
            try:
                return await self._session.request(
                    request.method,
                    URL(f"{self._settings.servers_url}{request.raw_path}", encoded=True),
                    data=body or None,
                    headers=_passed_on(request.headers),
                    allow_redirects=False,
                )
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
                self._servers.failed()
            except (aiohttp.ClientError, OSError) as error:
                self._servers.failed()
                tries += 1
                if tries >= MOST_TRIES:
                    message = f"The server broke off ({type(error).__name__}): try again later"
                    raise ApiError(502, message, code="server_failed", type_="server_error") from error

    async def _handed_on(self, request: web.BaseRequest, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        """The answer as it comes; one that breaks off breaks off for the client, too."""
        async with answer:
            response = web.StreamResponse(
                status=answer.status, reason=answer.reason, headers=_passed_on(answer.headers)
            )
            response.content_length = answer.content_length
            if self.draining:
                response.force_close()
            await response.prepare(request)
            try:
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                await response.write_eof()
            except aiohttp.ClientError:
                if request.transport is not None:
                    request.transport.abort()
        return response


def _passed_on(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """Headers that are the client's and the server's affair."""
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in OF_THE_CONNECTION)


def _busy(message: str) -> ApiError:
    return ApiError(
        503, f"{message}: try again later", code="starting", type_="server_error",
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
    )  # fmt: skip


def _no_server(seconds: int) -> ApiError:
    return _busy(f"This model was being started, and did not answer within {seconds} s")
