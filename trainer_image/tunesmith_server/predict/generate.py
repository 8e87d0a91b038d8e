"""`POST /v1/chat/completions` and `/v1/completions` by transformers itself: the reference for other engines.

One answer at a time, in the order of the requests.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from tunesmith_server.predict.answers import Handler, Refusal
from tunesmith_server.predict.backends import load_model
from tunesmith_server.predict.batching import TooBusy
from tunesmith_server.predict.kinds import ModelKind
from tunesmith_server.predict.sampling import Sampling, messages_of
from tunesmith_server.predict.texts import TOKENIZER
from tunesmith_store.pretrained import load_tokenizer

__all__ = ["Generator", "TextSoFar"]

log = logging.getLogger("tunesmith.server")

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MOST_WAITING = 64
BROKEN = "�"


class TextSoFar:
    """The text of the tokens so far, given out as far as no stop text begins in it and no character is half there."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]) -> None:
        self._decode, self._stops = decode, stops
        self._tokens: list[int] = []
        self._given = 0
        self.stopped = False

    def add(self, token: int) -> str:
        """Return what can be given out once `token` has come."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        found = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._give(text, min(found))
        end = len(text.rstrip(BROKEN))
        for stop in self._stops:
            end = min(end, len(text) - _begun(text, stop))
        return self._give(text, end)

    def rest(self) -> str:
        """Return what was held back, at the end."""
        return "" if self.stopped else self._give(text := self._decode(self._tokens), len(text))

    def _give(self, text: str, end: int) -> str:
        new = text[self._given : end]
        self._given = max(self._given, end)
        return new


def _begun(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` begin `stop`."""
    return next((size for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size])), 0)


@dataclass
class _Run:
    """One answer on its way from the computing thread to the request."""

    ids: list[int]
    sampling: Sampling
    room: int
    text: TextSoFar
    pieces: asyncio.Queue[str | Exception | None] = field(default_factory=asyncio.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    tokens: int = 0
    reason: str = "length"


class Generator:
    """Text in, text out."""

    def __init__(self, name: str, folder: Path, longest: int, threads: int) -> None:
        self._name = name
        self.tokenizer = load_tokenizer(folder, TOKENIZER)
        self.model = load_model(folder, ModelKind.LANGUAGE_MODEL, threads)
        positions = getattr(self.model.config, "max_position_embeddings", None)
        self._longest = min(longest, positions or longest)
        ends = self.model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        if self.tokenizer.eos_token_id is not None:
            self._ends.add(self.tokenizer.eos_token_id)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._waiting = 0

    @property
    def paths(self) -> Mapping[str, Handler]:
        """What it answers to."""
        chat = {CHAT: self.chat} if self.tokenizer.chat_template else {}
        return {**chat, TEXT: self.complete}

    @property
    def sample(self) -> tuple[str, dict[str, Any]]:
        """A request that only the model can answer."""
        return TEXT, {"prompt": "Hello", "max_tokens": 1, "temperature": 0}

    async def chat(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """Answer a conversation."""
        try:
            text = self.tokenizer.apply_chat_template(messages_of(body), add_generation_prompt=True, tokenize=False)
        except Refusal:
            raise
        except Exception as error:  # a template's own complaint: roles that don't take turns
            raise Refusal(f"the model's chat template can't write this conversation: {error}", "messages") from error
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return await self._answer(request, body, ids, _ChatForm(self._name))

    async def complete(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """Go on with a text."""
        prompt = body.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise Refusal("prompt must be one text that isn't empty", "prompt")
        return await self._answer(request, body, self.tokenizer(prompt)["input_ids"], _Form(self._name))

    async def _answer(
        self, request: web.Request, body: dict[str, Any], ids: list[int], form: _Form
    ) -> web.StreamResponse:
        sampling = Sampling.of(body)
        room = self._longest - len(ids)
        if room < 1:
            message = f"the prompt has {len(ids)} tokens, and prompt and answer together may have {self._longest}"
            raise Refusal(f"{message}: shorten it, or raise spec.engine.contextLength", form.prompt_field)
        if self._waiting >= MOST_WAITING:
            raise TooBusy(f"{self._waiting} requests wait already: try again later, or raise spec.replicas")
        room = min(room, sampling.max_tokens or room)
        run = _Run(ids, sampling, room, TextSoFar(self._decoded, sampling.stops))
        pieces = self._pieces(run)
        if not sampling.stream:
            text = "".join([piece async for piece in pieces])
            return web.json_response(form.whole(text, run))
        return await _streamed(request, form, run, pieces)

    def _decoded(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    async def _pieces(self, run: _Run) -> AsyncIterator[str]:
        loop = asyncio.get_running_loop()
        self._waiting += 1
        computed = loop.run_in_executor(self._thread, self._generate, run, loop)
        try:
            while (piece := await run.pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                if piece:
                    yield piece
        finally:
            run.cancelled.set()
            self._waiting -= 1
            await asyncio.wait([computed])

    def _generate(self, run: _Run, loop: asyncio.AbstractEventLoop) -> None:
        def put(piece: str | Exception | None) -> None:
            loop.call_soon_threadsafe(run.pieces.put_nowait, piece)

        try:
            if not run.cancelled.is_set():
                self._run(run, put)
                put(run.text.rest())
            put(None)
        except Exception as error:
            put(error)

    def _run(self, run: _Run, put: Callable[[str], None]) -> None:
        import torch

        sampling = run.sampling
        drawn = (
            {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
            if sampling.temperature > 0
            else {"do_sample": False}
        )
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        ids = torch.tensor([run.ids])

        def told(found: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
            token = int(found[0, -1])
            run.tokens += 1
            if token in self._ends:
                run.reason = "stop"
            else:
                put(run.text.add(token))
            if run.text.stopped:
                run.reason = "stop"
            return torch.tensor([run.reason == "stop" or run.cancelled.is_set()])

        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=run.room,
                stopping_criteria=[told],
                pad_token_id=self.tokenizer.pad_token_id or next(iter(self._ends), 0),
                **drawn,
            )


@dataclass
class _Form:
    """How one answer is written down, whole or in pieces: a text, unless a subclass says otherwise."""

    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    prompt_field = "prompt"
    prefix, whole_object, piece_object = "cmpl", "text_completion", "text_completion"

    def whole(self, text: str, run: _Run) -> dict[str, Any]:
        """The answer in one."""
        choice = {"index": 0, **self.said(text), "logprobs": None, "finish_reason": run.reason}
        return {**self._head(self.whole_object), "choices": [choice], "usage": usage_of(run)}

    def piece(self, text: str, first: bool = False, reason: str | None = None) -> dict[str, Any]:
        """A part of it."""
        choice = {"index": 0, **self.more(text, first), "logprobs": None, "finish_reason": reason}
        return {**self._head(self.piece_object), "choices": [choice]}

    def counted(self, run: _Run) -> dict[str, Any]:
        """The last part, where usage is asked for."""
        return {**self._head(self.piece_object), "choices": [], "usage": usage_of(run)}

    def _head(self, object_: str) -> dict[str, Any]:
        return {"id": f"{self.prefix}-{self.id}", "object": object_, "created": self.created, "model": self.model}

    def said(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def more(self, text: str, first: bool) -> dict[str, Any]:
        return {"text": text}


class _ChatForm(_Form):
    prompt_field = "messages"
    prefix, whole_object, piece_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def said(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def more(self, text: str, first: bool) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": text} if first else {"content": text} if text else {}}


def usage_of(run: _Run) -> dict[str, int]:
    """Count the tokens."""
    asked, answered = len(run.ids), run.tokens
    return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}


async def _streamed(request: web.Request, form: _Form, run: _Run, pieces: AsyncIterator[str]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)

    async def send(value: dict[str, Any] | str) -> None:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        await response.write(f"data: {text}\n\n".encode())

    await send(form.piece("", first=True))
    try:
        async for piece in pieces:
            await send(form.piece(piece))
    except Exception as error:  # the head is out: what went wrong can only be said in the stream
        log.exception("an answer broke off")
        await send({"error": {"message": f"the model failed: {error}", "type": "server_error"}})
        return response
    await send(form.piece("", reason=run.reason))
    if run.sampling.stream_usage:
        await send(form.counted(run))
    await send("[DONE]")
    return response
