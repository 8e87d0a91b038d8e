"""A request for text, read and checked: what is asked, how long it may be, how it is drawn. Used by `generate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith_server.predict.answers import Refusal, boolean

__all__ = ["Sampling", "messages_of"]

UNSUPPORTED = ("logprobs", "top_logprobs", "tools", "tool_choice", "functions", "echo", "suffix", "logit_bias")
ROLES = ("system", "user", "assistant", "tool")
MOST_STOPS = 4


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is drawn, and where it ends."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = None
    seed: int | None = None
    stops: tuple[str, ...] = ()
    stream: bool = False
    stream_usage: bool = False

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Sampling:
        """Read it from a request.

        Raises:
            Refusal: a field has a value that means nothing, or asks for what this engine doesn't do.
        """
        for field in UNSUPPORTED:
            if body.get(field) not in (None, False, [], {}, "none"):
                raise Refusal(f"{field} is not answered by the engine Transformers: leave it out", field)
        if (body.get("n") or 1) != 1 or (body.get("best_of") or 1) != 1:
            raise Refusal("the engine Transformers gives one answer to a request: leave n out", "n")
        if (format_ := body.get("response_format")) and format_ != {"type": "text"}:
            raise Refusal("response_format: the engine Transformers answers with text only", "response_format")
        for field in ("frequency_penalty", "presence_penalty"):
            if body.get(field):
                raise Refusal(f"{field} is not known to the engine Transformers: leave it out", field)
        field = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
        seed = body.get("seed")
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
            raise Refusal("seed must be a whole number", "seed")
        return cls(
            temperature=_number(body, "temperature", 1.0, 0.0, 2.0),
            top_p=_number(body, "top_p", 1.0, 1e-6, 1.0),
            max_tokens=_count(body, field),
            seed=seed,
            stops=_stops(body.get("stop")),
            stream=boolean(body, "stream", False),
            stream_usage=_counts(body.get("stream_options")),
        )


def messages_of(body: Mapping[str, Any]) -> list[dict[str, str]]:
    """Read a conversation; content in parts becomes one text, and `developer` is today's name of `system`.

    Raises:
        Refusal: it is none.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal("messages must be a list of at least one message", "messages")
    return [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _message(message: Any, field: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise Refusal(f"{field} must be an object with role and content", field)
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in ROLES:
        raise Refusal(f"{field}.role must be one of developer, {', '.join(ROLES)}", f"{field}.role")
    return {"role": str(role), "content": _content(message.get("content"), f"{field}.content")}


def _content(content: Any, field: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refusal(f"{field} must be a text or a list of parts", field)
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Refusal(f"{field}: this model reads text only, in parts of type text", field)
    return "\n".join(part["text"] for part in content)


def _number(body: Mapping[str, Any], field: str, default: float, least: float, most: float) -> float:
    value = body.get(field)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise Refusal(f"{field} must be a number from {least:g} to {most:g}", field)
    return float(value)


def _count(body: Mapping[str, Any], field: str) -> int | None:
    value = body.get(field)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Refusal(f"{field} must be a whole number of at least 1", field)
    return value


def _counts(options: Any) -> bool:
    if not isinstance(options or {}, dict):
        raise Refusal("stream_options must be an object, such as {include_usage: true}", "stream_options")
    return boolean(options or {}, "include_usage", False)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(it, str) and it for it in stops):
        raise Refusal(f"stop must be a text, or a list of at most {MOST_STOPS}", "stop")
    return tuple(stops)
