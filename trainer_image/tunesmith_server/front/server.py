"""The HTTP server that clients reach: a thread with an event loop of its own. Started by `__main__` beside an engine.

Every answer that is no success has OpenAI's form, and no header lets a browser's page of another origin read any.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
import urllib.request
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from aiohttp import web

from tunesmith_api import keys
from tunesmith_api.v1alpha1.api import Api
from tunesmith_server.front.answers import Usage, event
from tunesmith_server.front.apikeys import ApiKeys
from tunesmith_server.front.backends import Backend, Backends
from tunesmith_server.front.chat import chat_call
from tunesmith_server.front.completions import completion_call, encoder_call
from tunesmith_server.front.errors import ApiError
from tunesmith_server.front.fields import Call, Limits, parse
from tunesmith_server.front.gate import Gate
from tunesmith_server.front.metrics import CLIENT_GONE, Metrics, with_engines
from tunesmith_server.front.relay import StreamBroken
from tunesmith_store.listen import listening_socket

__all__ = ["Front"]

log = logging.getLogger("tunesmith.server")

BODY_SECONDS = 30.0
"""A client that sends its request more slowly holds a place that others could have."""
ALIVE_SECONDS = 2.0
LAST_WORD_SECONDS = 1.0
LAST_ANSWERS_SECONDS = 0.5
ROUTES: Mapping[str, Callable[[Mapping[str, Any], Limits], Call]] = {
    "/v1/chat/completions": chat_call,
    "/v1/completions": completion_call,
    "/v1/embeddings": encoder_call,
    "/classify": encoder_call,
}
MODELS = "/v1/models"
HEALTH = "/health"
JSON = "application/json"
Answer = tuple[bytes, Mapping[str, str]]
"""A body, and headers beside it."""
STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class ClientGone(Exception):
    """Nobody reads the answer any more."""


class _Sink:
    """The client's end of a streamed answer."""

    def __init__(self, request: web.BaseRequest, begun: Callable[[str], None]) -> None:
        self._request = request
        self._begun = begun
        self.model = ""
        self.response = web.StreamResponse(headers=STREAM_HEADERS)

    async def write(self, data: bytes) -> None:
        try:
            if not self.response.prepared:
                await self.response.prepare(self._request)
                self._begun(self.model)
            await self.response.write(data)
        except OSError as error:
            raise ClientGone from error

    async def fail(self, failure: ApiError) -> None:
        """Say in the stream what happened, as its head is out; who doesn't read that either is cut off."""
        self.response.force_close()
        try:
            async with asyncio.timeout(LAST_WORD_SECONDS):
                if str(failure):
                    await self.write(event(json.loads(failure.body())))
                await self.response.write_eof()
        except (ClientGone, ConnectionError, TimeoutError):
            if self._request.transport is not None:
                self._request.transport.abort()


class Front:
    """Listens from `start` on until `stop`."""

    def __init__(
        self,
        engine_url: str,
        limits: Limits,
        api: Api,
        parallel: int,
        api_keys: ApiKeys | None = None,
        digests: Mapping[str, str] | None = None,
    ) -> None:
        """`digests` are those of the adapters that the engine has, by name."""
        self._engine_url = engine_url
        self._limits = limits
        self._api = api
        self._keys = api_keys
        self._metrics = Metrics(limits.models[0])
        self._metrics.adapters(digests or {})
        self._gate = Gate(parallel, api.max_waiting_requests)
        self._backends = Backends(self._gate)
        self._loop = asyncio.new_event_loop()
        self._started = int(time.time())
        self._draining = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="front", daemon=True)
        self.port = 0

    @property
    def in_flight(self) -> int:
        """Requests taken in and not yet answered."""
        return self._gate.in_flight

    def start(self, port: int = keys.PORT_SERVER) -> None:
        """Begin to answer, on all addresses of the pod."""
        self._thread.start()
        self._do(self._open(port)).result()

    def is_alive(self) -> bool:
        """Say whether requests are still looked at."""
        try:
            self._do(asyncio.sleep(0)).result(ALIVE_SECONDS)
        except (TimeoutError, RuntimeError):
            return False
        return True

    def serve(self, engine_url: str, limits: Limits, digests: Mapping[str, str]) -> None:
        """Lead requests to another engine, with adapters of these digests; return when the one before has none left."""
        self._do(self._serve(engine_url, limits, digests)).result()

    def hold(self) -> None:
        """Let new requests wait for `serve`; return when the engine has answered those that it has."""
        self._do(self._hold()).result()

    def metrics(self) -> str:
        """The counters as Prometheus reads them, with those of the engine, where it has some."""
        ours = self._metrics.text(self._gate.running, self._gate.waiting, self._gate.in_flight)
        try:
            with urllib.request.urlopen(self._engine_url + keys.PATH_METRICS, timeout=ALIVE_SECONDS) as response:  # noqa: S310 - our own loopback URL
                return with_engines(ours, response.read().decode())
        except OSError:
            return ours

    def drain(self, removal_seconds: float, deadline: float) -> None:
        """Answer new requests until Services know; then finish those in flight, until that monotonic time."""
        self._draining = True
        time.sleep(removal_seconds)
        self._do(self._stop_listening()).result()
        while self.in_flight and time.monotonic() < deadline:
            time.sleep(0.05)
        self.stop()

    def stop(self) -> None:
        """Close all connections; once is enough."""
        if not self._thread.is_alive():
            return
        self._do(self._close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _do(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _open(self, port: int) -> None:
        await self._backends.serve(self._engine_url, self._limits)
        self._server = web.Server(self._answer, handler_cancellation=True, access_log=None, keepalive_timeout=75.0)
        listener = listening_socket(port)
        self.port = int(listener.getsockname()[1])
        self._listener = await self._loop.create_server(self._server, sock=listener, backlog=1024)

    async def _serve(self, engine_url: str, limits: Limits, digests: Mapping[str, str]) -> None:
        before = await self._backends.serve(engine_url, limits)
        self._engine_url, self._limits = engine_url, limits
        self._metrics.adapters(digests)
        if before is not None:
            await before.emptied()

    async def _hold(self) -> None:
        if (before := self._backends.hold()) is not None:
            await before.emptied()

    async def _stop_listening(self) -> None:
        self._listener.close()

    async def _close(self) -> None:
        self._listener.close()
        await self._server.shutdown(LAST_ANSWERS_SECONDS)
        await self._backends.close()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        started, path = time.monotonic(), request.path
        counted = path if path in ROUTES else MODELS if _names_models(path) else "other"
        code = CLIENT_GONE
        try:
            response, code = await self._respond(request, path, started)
        finally:
            if path != HEALTH:
                self._metrics.answered(counted, code, time.monotonic() - started)
        return response

    async def _respond(self, request: web.BaseRequest, path: str, started: float) -> tuple[web.StreamResponse, int]:
        """The response, and the status that tells how it ended."""
        sink = _Sink(request, lambda model: self._metrics.first_token(time.monotonic() - started, model))
        if self._draining:
            sink.response.force_close()
        try:
            async with asyncio.timeout(self._api.request_timeout_seconds):
                answer = await self._outcome(request, path, sink)
            if answer is not None:
                return self._response(200, *answer), 200
            return sink.response, 200
        except StreamBroken:
            failure = ApiError(502, "")
        except ApiError as error:
            failure = error
        except TimeoutError:
            message = f"The answer took longer than the {self._api.request_timeout_seconds} s that a request may take"
            failure = ApiError(504, message, code="request_timeout", type_="server_error")
        except (ClientGone, ConnectionError):
            return sink.response if sink.response.prepared else web.Response(status=CLIENT_GONE), CLIENT_GONE
        except RecursionError:
            failure = ApiError(400, "The body is nested too deeply", code="invalid_json")
        except web.RequestPayloadError as error:
            failure = ApiError(400, f"The body can't be read: {error}", code="invalid_body")
        except Exception as error:
            log.exception("a request to %s failed", path)
            message = f"Unexpected {type(error).__name__}"
            failure = ApiError(500, message, code="internal_error", type_="server_error")
        if sink.response.prepared:
            await sink.fail(failure)
            return sink.response, failure.status
        return self._response(failure.status, failure.body(), failure.headers), failure.status

    async def _outcome(self, request: web.BaseRequest, path: str, sink: _Sink) -> Answer | None:
        """The whole answer; None where it was streamed."""
        if path == HEALTH and request.method in ("GET", "HEAD"):
            return b'{"status":"ok"}', {}
        if self._keys is not None:
            self._keys.check(request.headers.get("Authorization", ""))
        if _names_models(path):
            return self._models(request.method, path.removeprefix(MODELS).removeprefix("/")), {}
        check = ROUTES.get(path)
        if check is None:
            known = ", ".join((*ROUTES, MODELS))
            raise ApiError(404, f"There is no {path} here, but {known}", code="unknown_url")
        if request.method != "POST":
            raise ApiError(405, f"{path} takes POST only", code="method_not_allowed", headers={"Allow": "POST"})
        with self._gate.request():
            body = parse(await self._body(request))
            async with self._backends.one() as backend:
                return await self._asked(backend, path, check(body, backend.limits), sink)

    async def _asked(self, backend: Backend, path: str, call: Call, sink: _Sink) -> Answer | None:
        """What an engine answers to a checked request."""
        if call.plain:
            return await backend.relay.plain(path, call)
        call = replace(call, renamed=call.model != backend.limits.models[0])
        usage, sink.model = Usage(call.answers_per_prompt), call.model
        try:
            if not call.stream:
                return await backend.relay.whole(path, call, usage), {}
            await backend.relay.stream(path, call, usage, sink)
            return None
        finally:
            self._metrics.tokens(usage.prompt, usage.generated, call.model)

    def _models(self, method: str, name: str) -> bytes:
        if method not in ("GET", "HEAD"):
            raise ApiError(405, f"{MODELS} takes GET only", code="method_not_allowed", headers={"Allow": "GET"})
        base = self._limits.models[0]
        listed = [
            {
                "id": model,
                "object": "model",
                "created": self._started,
                "owned_by": "tunesmith",
                "max_model_len": self._limits.context_length,
                **({"parent": base} if model != base else {}),
            }
            for model in self._limits.models
        ]
        if not name:
            return json.dumps({"object": "list", "data": listed}).encode()
        found = [entry for entry in listed if entry["id"] == name]
        if not found:
            raise ApiError(404, f"The model '{name}' does not exist here", param="model", code="model_not_found")
        return json.dumps(found[0]).encode()

    async def _body(self, request: web.BaseRequest) -> bytes:
        most = self._api.max_body_bytes
        too_large = ApiError(
            413, f"The body is larger than the {most} bytes that a request may have", code="body_too_large"
        )
        if (request.content_length or 0) > most:
            raise too_large
        data = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.content.iter_any():
                    data += chunk
                    if len(data) > most:
                        raise too_large
        except TimeoutError as error:
            message = f"The body did not come within {BODY_SECONDS:.0f} s"
            raise ApiError(408, message, code="body_timeout") from error
        return bytes(data)

    def _response(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> web.Response:
        response = web.Response(status=status, body=body, content_type=JSON, headers={**(headers or {})})
        if self._draining:
            response.force_close()
        return response


def _names_models(path: str) -> bool:
    """Whether a path is the list of models, or one of them."""
    return path == MODELS or path.startswith(f"{MODELS}/")
