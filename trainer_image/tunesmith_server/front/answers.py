"""Several answers of an engine as the one that was asked for: choices numbered, usage of all. `relay` calls it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

__all__ = ["LegacyLogprobs", "Usage", "assembled", "event", "merged", "renumbered", "split_events", "usage_event"]

EVENT_END = b"\n\n"


class Usage:
    """Tokens over all answers of a request. A prompt that is answered several times counts once."""

    def __init__(self, answers_per_prompt: int) -> None:
        self._per_prompt = answers_per_prompt
        self.prompt = 0
        self.generated = 0
        self.cached = 0

    def add(self, number: int, usage: Any) -> None:
        """Count the answer with that number, from 0."""
        if not isinstance(usage, dict):
            return
        self.generated += _count(usage, "completion_tokens")
        if number % self._per_prompt == 0:
            self.prompt += _count(usage, "prompt_tokens")
            details = usage.get("prompt_tokens_details")
            self.cached += _count(details, "cached_tokens") if isinstance(details, dict) else 0

    def document(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


def _count(usage: dict[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) else 0


class LegacyLogprobs:
    """Writes log-probabilities as `/v1/completions` always had them: arrays beside each other."""

    def __init__(self) -> None:
        self._offset = 0

    def apply(self, document: dict[str, Any]) -> dict[str, Any]:
        """Change the choice of an answer, or of the next event of one."""
        for choice in document.get("choices", ()):
            entries = (choice.get("logprobs") or {}).get("content")
            if not entries:
                continue
            offsets = []
            for entry in entries:
                offsets.append(self._offset)
                self._offset += len(entry["token"])
            choice["logprobs"] = {
                "tokens": [entry["token"] for entry in entries],
                "token_logprobs": [entry["logprob"] for entry in entries],
                "top_logprobs": [{it["token"]: it["logprob"] for it in entry["top_logprobs"]} for entry in entries],
                "text_offset": offsets,
            }
        return document


def assembled(data: bytes) -> dict[str, Any] | None:
    """The answer that the events of a stream make up; None where it broke off. An error in it is the last event."""
    events = [it.removeprefix(b"data: ") for it in data.split(EVENT_END) if it and not it.startswith(b":")]
    if not events or events[-1] != b"[DONE]":
        return _error_of(events[-1]) if events else None
    whole: dict[str, Any] = {}
    choice: dict[str, Any] = {}
    for raw in events[:-1]:
        document = json.loads(raw)
        for part in document.pop("choices", ()):
            _add(choice, part)
        whole.update(document)
    if "message" in choice:
        message = choice["message"]
        message.setdefault("content", None)
        whole["object"] = "chat.completion"
        if "tool_calls" in message:
            message["tool_calls"] = [call for _, call in sorted(message["tool_calls"].items())]
    return {**whole, "choices": [{"index": 0, "logprobs": None, **choice}]}


def _error_of(end: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(end.removeprefix(b"error: "))
    except ValueError:
        return None
    return found if isinstance(found, dict) and "error" in found else None


def _add(choice: dict[str, Any], part: dict[str, Any]) -> None:
    """Add what an event says of a choice to what others have said."""
    if part.get("finish_reason"):
        choice["finish_reason"] = part["finish_reason"]
    for name, values in (part.get("logprobs") or {}).items():
        if isinstance(values, list):  # one for each token: entries in chats, beside each other in arrays in texts
            choice.setdefault("logprobs", {}).setdefault(name, []).extend(values)
    if "text" in part:
        choice["text"] = choice.get("text", "") + part["text"]
        return
    message = choice.setdefault("message", {"role": "assistant"})
    for name, value in (part.get("delta") or {}).items():
        if name == "tool_calls":
            _add_calls(message.setdefault("tool_calls", {}), value or ())
        elif name != "role" and isinstance(value, str):
            message[name] = (message.get(name) or "") + value


def _add_calls(calls: dict[int, dict[str, Any]], parts: Sequence[dict[str, Any]]) -> None:
    for part in parts:
        call = calls.setdefault(part.get("index", 0), {"type": "function", "function": {"name": "", "arguments": ""}})
        call.update({name: value for name, value in part.items() if name in ("id", "type") and value})
        for name, value in (part.get("function") or {}).items():
            call["function"][name] = call["function"].get(name, "") + (value or "")


def merged(documents: Sequence[dict[str, Any]], usage: Usage) -> dict[str, Any]:
    """One answer with the choices of all."""
    whole = dict(documents[0])
    whole["choices"] = [
        {**choice, "index": number} for number, document in enumerate(documents) for choice in document["choices"]
    ]
    whole["usage"] = usage.document()
    whole.pop("timings", None)
    return whole


def renumbered(document: dict[str, Any], number: int, identity: str) -> bytes:
    """An event of the answer with that number, as part of a stream of several."""
    document["id"] = identity
    for choice in document.get("choices", ()):
        choice["index"] = number
    document.pop("usage", None)
    document.pop("timings", None)
    return event(document)


def usage_event(last: dict[str, Any], usage: Usage) -> bytes:
    """The event after the last choice that tells the usage."""
    named: dict[str, Any] = {name: last[name] for name in ("id", "object", "created", "model") if name in last}
    return event({**named, "choices": [], "usage": usage.document()})


def event(document: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + EVENT_END


def split_events(buffer: bytearray) -> list[bytes]:
    """Take the whole events out of a buffer, each with its end."""
    end = buffer.rfind(EVENT_END)
    if end < 0:
        return []
    whole = bytes(buffer[: end + 2])
    del buffer[: end + 2]
    return [part + EVENT_END for part in whole.split(EVENT_END)[:-1]]
