"""Asks the engine and hands its answers on: whole, streamed, or several as one. Used by `server`, in its event loop.

Leaving a block early, for a time limit or because the client is gone, closes the connection to the engine, which then
stops working on the answer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import aiohttp

from tunesmith_server.front.answers import (
    LegacyLogprobs,
    Usage,
    assembled,
    event,
    merged,
    renumbered,
    split_events,
    usage_event,
)
from tunesmith_server.front.errors import ApiError, engine_error
from tunesmith_server.front.fetch import Fetched, fetch
from tunesmith_server.front.fields import Call, Limits
from tunesmith_server.front.gate import Gate
from tunesmith_server.front.toolcalls import as_call, call_events

__all__ = ["Relay", "Sink", "StreamBroken"]

T = TypeVar("T")
USAGE = b'"usage"'
EVENTS = "text/event-stream"
DONE = b"data: [DONE]\n\n"
FAILED = (b'data: {"error"', b"error:")


class Sink(Protocol):
    """Where a streamed answer goes."""

    async def write(self, data: bytes) -> None:
        """Send so many bytes, the first of them with the head of the response."""


class StreamBroken(Exception):
    """The engine failed in the midst of an answer, which has said so."""


class Relay:
    """One engine's API."""

    def __init__(self, engine_url: str, gate: Gate) -> None:
        self._url = engine_url
        self._gate = gate
        self._session = aiohttp.ClientSession(
            # each connection holds a thread of the engine: none stays open for later
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Content-Type": "application/json"},
            read_bufsize=1 << 18,
            trust_env=False,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def described(self, limits: Limits) -> Limits:
        """The limits with what the engine says of its model: its vocabulary, and whether it knows tools."""
        model, caps = await self._get("/v1/models", "data", 0, "meta"), await self._get("/props", "chat_template_caps")
        return replace(
            limits,
            vocabulary=model.get("n_vocab", limits.vocabulary),
            tools=caps.get("supports_tools", limits.tools),
        )

    async def _get(self, path: str, *where: str | int) -> dict[str, Any]:
        """An object out of what the engine says at a path; empty where it says nothing of the kind."""
        try:
            async with self._session.get(self._url + path) as response:
                found = await response.json()
            for name in where:
                found = found[name]
        except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError):
            return {}
        return found if isinstance(found, dict) else {}

    async def plain(self, path: str, call: Call) -> tuple[bytes, dict[str, str]]:
        """The engine's own answer and headers about it. Engines put such requests together, so none waits here."""
        found = await self._fetched(path, call.bodies[0])
        return found.body, {name: value for name, value in found.headers.items() if name.startswith("x-")}

    async def whole(self, path: str, call: Call, usage: Usage) -> bytes:
        """The answer to a request, as JSON."""
        documents = await _together([self._ask(path, body) for body in call.bodies])
        for number, document in enumerate(documents):
            usage.add(number, document.get("usage"))
            _name(document, call)
            if call.legacy_logprobs:
                LegacyLogprobs().apply(document)
            if call.required_call:
                as_call(document)
        whole = documents[0] if len(documents) == 1 else merged(documents, usage)
        return json.dumps(whole, ensure_ascii=False).encode()

    async def stream(self, path: str, call: Call, usage: Usage, sink: Sink) -> None:
        """The answer to a request, event by event.

        Raises:
            StreamBroken: it ended before it was whole.
        """
        if call.required_call:
            await self._stream_calls(path, call, usage, sink)
        elif len(call.bodies) == 1:
            await self._stream_one(path, call, usage, sink)
        else:
            await self._stream_several(path, call, usage, sink)

    async def _ask(self, path: str, body: bytes) -> dict[str, Any]:
        async with self._gate.turn():
            found = await self._fetched(path, body)
        if not found.headers.get("content-type", "").startswith(EVENTS):
            return _parsed(found.body)
        document = assembled(found.body)
        if document is None:
            raise ApiError(502, "The engine's answer broke off", code="engine_failed", type_="server_error")
        if "error" in document:
            raise engine_error(500, json.dumps(document).encode())
        return document

    async def _fetched(self, path: str, body: bytes) -> Fetched:
        try:
            found = await fetch(self._url, path, body)
        except OSError as error:
            raise _unavailable(error) from error
        if found.status != 200:
            raise engine_error(found.status, found.body)
        return found

    @asynccontextmanager
    async def _response(self, path: str, body: bytes) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with self._session.post(self._url + path, data=body) as response:
                if response.status != 200:
                    raise engine_error(response.status, await response.read())
                yield response
        except (aiohttp.ClientError, OSError) as error:
            raise _unavailable(error) from error

    async def _stream_one(self, path: str, call: Call, usage: Usage, sink: Sink) -> None:
        async with self._gate.turn(), self._response(path, call.bodies[0]) as response:
            buffer, legacy = bytearray(), LegacyLogprobs()
            async for chunk in response.content.iter_any():
                buffer += chunk
                events = split_events(buffer)
                kept = b"".join(it for it in events if self._keep(it, call, usage))
                if call.legacy_logprobs or call.renamed:
                    kept = b"".join(_rewritten(it, legacy, call) for it in split_events(bytearray(kept)))
                if kept:
                    await sink.write(kept)
                if any(it.startswith(FAILED) for it in events):
                    raise StreamBroken
            if buffer:
                raise StreamBroken

    @staticmethod
    def _keep(data: bytes, call: Call, usage: Usage) -> bool:
        """Whether the client asked for this event; the one about the usage comes always."""
        if USAGE not in data:
            return True
        document = _document(data)
        found = document.get("usage")
        if not found:
            return True
        usage.add(0, found)
        return call.include_usage or bool(document.get("choices"))

    async def _stream_calls(self, path: str, call: Call, usage: Usage, sink: Sink) -> None:
        """Calls of functions, each told at once: a part of one is of no use."""
        documents = await _together([self._ask(path, body) for body in call.bodies])
        for number, document in enumerate(documents):
            usage.add(number, document.get("usage"))
            _name(document, call)
            await sink.write(call_events(as_call(document), number, str(documents[0].get("id", ""))))
        if call.include_usage:
            await sink.write(usage_event({**documents[0], "object": "chat.completion.chunk"}, usage))
        await sink.write(DONE)

    async def _stream_several(self, path: str, call: Call, usage: Usage, sink: Sink) -> None:
        last: dict[str, Any] = {}

        async def one(number: int, body: bytes) -> None:
            async with self._gate.turn(), self._response(path, body) as response:
                buffer, legacy = bytearray(), LegacyLogprobs()
                async for chunk in response.content.iter_any():
                    buffer += chunk
                    for data in split_events(buffer):
                        if data.startswith(FAILED):
                            await sink.write(data)
                            raise StreamBroken
                        document = _document(data)
                        _name(document, call)
                        if call.legacy_logprobs:
                            legacy.apply(document)
                        usage.add(number, document.get("usage"))
                        if document.get("choices"):
                            if not last:
                                last.update(document)
                            await sink.write(renumbered(document, number, str(last.get("id", ""))))

        await _together([one(number, body) for number, body in enumerate(call.bodies)])
        if call.include_usage:
            await sink.write(usage_event(last, usage))
        await sink.write(DONE)


async def _together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all; the first failure stops the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(it) for it in work]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return [task.result() for task in tasks]


def _unavailable(error: Exception) -> ApiError:
    message = f"The engine doesn't answer ({type(error).__name__}): try again later"
    return ApiError(503, message, code="engine_unavailable", type_="server_error")


def _parsed(payload: bytes) -> dict[str, Any]:
    """An engine's answer, which is a JSON object."""
    try:
        found = json.loads(payload)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ApiError(502, "The engine's answer can't be read", code="engine_failed", type_="server_error")
    return found


def _rewritten(data: bytes, legacy: LegacyLogprobs, call: Call) -> bytes:
    document = _document(data)
    if not document:
        return data
    _name(document, call)
    return event(legacy.apply(document) if call.legacy_logprobs else document)


def _name(document: dict[str, Any], call: Call) -> None:
    """Name the model that was asked for: an engine names the one that it has loaded, whatever adapter it has used."""
    if call.renamed and "model" in document:
        document["model"] = call.model


def _document(data: bytes) -> dict[str, Any]:
    """The JSON of an event; empty where it holds none."""
    try:
        found = json.loads(data.removeprefix(b"data: "))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
