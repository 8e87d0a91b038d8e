"""A checked request's fields as vLLM has them: it passes over what it doesn't know. Used by `fields`."""

from __future__ import annotations

import secrets
from typing import Any

from tunesmith_server.front.errors import ApiError

__all__ = ["for_vllm"]


def for_vllm(wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the fields by vLLM's names.

    Raises:
        ApiError: vLLM has nothing of the kind.
    """
    if "typical_p" in wanted:
        raise ApiError(400, "The engine VLLM doesn't know 'typical_p': leave it out", param="typical_p")
    found = dict(wanted)
    if (penalty := found.pop("repeat_penalty", None)) is not None:
        found["repetition_penalty"] = penalty
    if found.pop("cache_prompt", True) is False:
        # states of past prompts are found by it: a new one finds none
        found["cache_salt"] = secrets.token_urlsafe(32)
    return found
