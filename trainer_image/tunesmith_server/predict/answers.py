"""What the served models have in common: paths, the shape of a refusal, and how a request's fields are read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from aiohttp import web

__all__ = ["Handler", "Refusal", "Served", "boolean", "inputs_of"]

Handler = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]
"""Request and its JSON object → answer."""
MOST_INPUTS = 1000
TRUNCATED_HEADER = "X-Truncated-Inputs"


class Refusal(Exception):
    """A request that can't be answered, and what to change."""

    def __init__(self, message: str, field: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.field, self.status = message, field, status


class Served(Protocol):
    """A loaded model."""

    @property
    def paths(self) -> Mapping[str, Handler]:
        """What it answers to, by POST."""

    @property
    def sample(self) -> tuple[str, dict[str, Any]]:
        """Path and body of a small request that only the model itself can answer."""


def boolean(body: Mapping[str, Any], field: str, default: bool) -> bool:
    """Read a field that is true or false."""
    value = body.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise Refusal(f"{field} must be true or false", field)
    return value


def inputs_of(body: Mapping[str, Any], field: str) -> list[Any]:
    """Read the inputs of a request, one or a list of them, as a list that isn't empty."""
    if field not in body:
        raise Refusal(f"{field} is missing: it is what the model is asked about", field)
    value = body[field]
    many = value if isinstance(value, list) else [value]
    if not many:
        raise Refusal(f"{field} is an empty list", field)
    if len(many) > MOST_INPUTS:
        raise Refusal(f"{field} holds {len(many)} inputs: send at most {MOST_INPUTS} at once", field, 413)
    return many


def text_of(value: Any, field: str) -> str:
    """Read a text."""
    if not isinstance(value, str):
        raise Refusal(f"{field} must be a text or a list of texts, not {type(value).__name__}", field)
    if not value:
        raise Refusal(f"{field} holds an empty text", field)
    return value


def refuse_truncated(truncated: int, body: Mapping[str, Any], field: str, longest: int) -> None:
    """Refuse what would be cut where the request says that it must not be."""
    if truncated and not boolean(body, "truncate", True):
        message = f"{truncated} of the inputs are longer than the {longest} tokens that the model reads"
        raise Refusal(f"{message}: shorten them, or send truncate: true", field, 413)
