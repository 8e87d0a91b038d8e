"""Clients of an OpenAI-compatible server: whole answers by so many at once, streams of one. Used by `figures`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from bench.serving.servers import MODEL_NAME

__all__ = ["Load", "Message", "first_token_seconds", "load", "whole"]

Message = dict[str, str]


@dataclass(frozen=True)
class Load:
    """What so many requests came to."""

    seconds: float
    latencies: tuple[float, ...]

    @property
    def requests_per_second(self) -> float:
        """Over all of it."""
        return len(self.latencies) / self.seconds


def _body(messages: Sequence[Message], tokens: int, **more: Any) -> dict[str, Any]:
    fixed = {"model": MODEL_NAME, "messages": list(messages), "max_tokens": tokens, "temperature": 0}
    # every answer has the same length: a model that ends early would make another's work
    return {**fixed, "ignore_eos": True, **more}


def load(url: str, prompts: Sequence[Sequence[Message]], clients: int, tokens: int) -> Load:
    """Ask all prompts; each client asks its next question when it has its answer."""
    return asyncio.run(_load(url, prompts, clients, tokens))


async def _load(url: str, prompts: Sequence[Sequence[Message]], clients: int, tokens: int) -> Load:
    waiting = iter([_body(prompt, tokens) for prompt in prompts])
    latencies: list[float] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(_client(session, url, waiting, latencies))
        return Load(time.perf_counter() - began, tuple(latencies))


async def _client(
    session: aiohttp.ClientSession, url: str, waiting: Iterator[dict[str, Any]], latencies: list[float]
) -> None:
    for body in waiting:
        began = time.perf_counter()
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            answer = await response.read()
            if response.status != 200:
                raise RuntimeError(f"{url} answers {response.status}: {answer[:300]!r}")
        latencies.append(time.perf_counter() - began)


def whole(url: str, messages: Sequence[Message], tokens: int) -> float:
    """Seconds until one whole answer is there."""
    return load(url, [messages], 1, tokens).seconds


def first_token_seconds(url: str, messages: Sequence[Message]) -> float:
    """Seconds until the first text of a streamed answer."""
    return asyncio.run(_first_token(url, _body(messages, 2, stream=True)))


async def _first_token(url: str, body: dict[str, Any]) -> float:
    async with aiohttp.ClientSession() as session:
        began = time.perf_counter()
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            first = 0.0
            async for line in response.content:
                # llama.cpp's first event has the role alone
                if not first and line.startswith(b"data: {") and _text(line):
                    first = time.perf_counter() - began
    if not first:
        raise RuntimeError(f"{url} streamed no text")
    return first


def _text(line: bytes) -> str:
    choices = json.loads(line.removeprefix(b"data: ")).get("choices") or [{}]
    return str(choices[0].get("delta", {}).get("content") or "")
