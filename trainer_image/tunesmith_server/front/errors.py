"""Refusals in the form that clients of OpenAI's API read. Raised by all modules of `front`, written by `server`."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["ApiError", "engine_error"]

TEMPLATE_WORDS = ("jinja", "template", "conversation roles")
CONTEXT_CODE = "context_length_exceeded"


class ApiError(Exception):
    """An answer that is no success: status, words, and where known the field and a stable code."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type_: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.type = type_
        self.headers = headers or {}

    def body(self) -> bytes:
        """The error object, as JSON."""
        error = {"message": str(self), "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


def engine_error(status: int, payload: bytes) -> ApiError:
    """What an engine's refusal means to the client.

    Engines answer 500 where a chat template or a grammar refuses its input: these are the request's faults.
    """
    message, type_, param = _read(payload)
    lowered = message.lower()
    if type_ == "exceed_context_size_error" or "context size" in lowered or "context length" in lowered:
        return ApiError(400, f"The prompt does not fit the model's context: {message}", code=CONTEXT_CODE)
    if status in (404, 501):
        return ApiError(404, f"This model does not offer that: {message}", code="not_supported")
    if any(word in lowered for word in TEMPLATE_WORDS):
        text = f"The model's chat template refuses these messages: {message}"
        return ApiError(400, text, param="messages", code="invalid_messages")
    if "grammar" in lowered or "schema" in lowered:
        text = f"The schema can't be enforced: {message}"
        return ApiError(400, text, param="response_format", code="unsupported_schema")
    if 400 <= status < 500:
        headers = {"Retry-After": "1"} if status == 429 else {}
        return ApiError(status if status in (413, 422, 429) else 400, message, param=param, headers=headers)
    return ApiError(502, f"The engine failed: {message}", code="engine_failed", type_="server_error")


def _read(payload: bytes) -> tuple[str, str, str | None]:
    try:
        document: Any = json.loads(payload)
    except ValueError:
        return payload[:200].decode(errors="replace").strip() or "no reason given", "", None
    error = document.get("error", document) if isinstance(document, dict) else document
    if not isinstance(error, dict):
        return str(error)[:1000], "", None
    param = error.get("param")
    message, type_ = str(error.get("message", "no reason given"))[:1000], str(error.get("type", ""))
    return message, type_, param if isinstance(param, str) else None
