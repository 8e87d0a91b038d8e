"""`/v1/completions`, and the ways to ask encoders: `/v1/embeddings` and `/classify`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tunesmith_server.front.errors import ApiError
from tunesmith_server.front.fields import (
    GENERATION,
    Call,
    Fields,
    Limits,
    calls,
    encode,
    generation,
    model_of,
    refuse_unknown,
)

__all__ = ["completion_call", "encoder_call"]

KNOWN = GENERATION | {"prompt", "echo", "suffix", "best_of"}


def completion_call(body: Mapping[str, Any], limits: Limits) -> Call:
    """Check a request for the text that goes on from one prompt or several.

    Raises:
        ApiError: it can't be answered as it is meant.
    """
    refuse_unknown(body, KNOWN)
    fields = Fields(body)
    wanted = generation(fields, limits)
    if fields.flag("echo"):
        raise ApiError(400, "The prompt can't be part of the answer here: leave 'echo' out", param="echo")
    if fields.text("suffix"):
        raise ApiError(400, "Text can't be filled in before a suffix here: leave 'suffix' out", param="suffix")
    best_of = fields.integer("best_of", 1, 20)
    if best_of is not None and best_of != (fields.integer("n", 1, 128) or 1):
        raise ApiError(400, "Answers aren't ranked here: leave 'best_of' out, or use 'n'", param="best_of")
    if (logprobs := fields.integer("logprobs", 0, 5)) is not None:
        wanted["logprobs"] = max(1, logprobs)
    call = calls(wanted, [{"prompt": prompt} for prompt in _prompts(fields, limits)], fields)
    return replace(call, legacy_logprobs="logprobs" in wanted)


def _prompts(fields: Fields, limits: Limits) -> list[str | list[int]]:
    """The prompts: one text or several, or as many arrays of token ids."""
    value = fields.get("prompt")
    if isinstance(value, str) and value:
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(it, str) and it for it in value):
            return list(value)
        several = value if all(isinstance(it, list) for it in value) else [value]
        if all(it and all(_is_token(token, limits) for token in it) for it in several):
            return [list(it) for it in several]
    ids = (
        f"token ids below {limits.vocabulary}" if limits.vocabulary else "no token ids, which this engine doesn't take"
    )
    raise fields.refuse("prompt", f"a string that is not empty, or an array of such ({ids})")


def _is_token(value: Any, limits: Limits) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limits.vocabulary


def encoder_call(body: Mapping[str, Any], limits: Limits) -> Call:
    """Check a request for vectors or classes; what is particular to it, the engine checks."""
    fields = Fields(body)
    if fields.text("model") is not None:
        model_of(fields, limits)
    return Call((encode(body),), plain=True)
