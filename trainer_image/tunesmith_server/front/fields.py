"""Reads fields of a request's body, each with its type and bounds. Used by `chat` and `completions`."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_server.front.errors import ApiError
from tunesmith_server.front.vllm_fields import for_vllm

__all__ = [
    "GENERATION",
    "Call",
    "Fields",
    "Limits",
    "calls",
    "encode",
    "generation",
    "model_of",
    "parse",
    "refuse_unknown",
]

MAX_ANSWERS = 16
"""Choices of one request: `n` times the prompts."""
MAX_STOPS = 16
MAX_BIASES = 1024
SEEDS = 2**32 - 1
"""llama.cpp takes 32 bits, of which the highest number means any seed."""

STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
"""How engines are asked, whatever the client wants: llama.cpp works on for one that is gone unless it streams."""
GENERATION = frozenset(
    [
        "model",
        "stream",
        "stream_options",
        "n",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "frequency_penalty",
        "presence_penalty",
        "stop",
        "seed",
        "logit_bias",
        "logprobs",
        "user",
        "top_k",
        "min_p",
        "typical_p",
        "repeat_penalty",
        "ignore_eos",
        "cache_prompt",
    ]
)
"""Fields of both ways to ask for text. Those from top_k on are not OpenAI's."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server allows."""

    models: tuple[str, ...]
    context_length: int
    max_tokens: int | None = None
    vocabulary: int = 0
    """Tokens that there are; 0 where the engine doesn't say."""
    tools: bool = True
    """Whether the model's chat template tells the model of tools."""
    engine: EngineType = EngineType.LLAMA_CPP
    """Whose names of fields the engine is asked by."""
    asked: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name of a model → what the engine is asked with for it, beside what clients say."""


@dataclass(frozen=True, slots=True)
class Call:
    """A checked request: what the engine is asked, once for each answer."""

    bodies: tuple[bytes, ...]
    answers_per_prompt: int = 1
    stream: bool = False
    include_usage: bool = False
    plain: bool = False
    """Whether the engine's answer is no text that comes word by word: it is handed on as it is."""
    required_call: bool = False
    """Whether the answer stands for the call of a function."""
    legacy_logprobs: bool = False
    """Whether log-probabilities are wanted in the form that `/v1/completions` had first."""
    model: str = ""
    """The model that was asked for; empty where the engine's answer is handed on as it is."""
    renamed: bool = False
    """Whether that is an adapter, and the engine calls it by the model's own name."""


class Fields:
    """A body, read field by field; null is as good as absent."""

    def __init__(self, body: Mapping[str, Any], where: str = "") -> None:
        self._body = body
        self._where = where

    def get(self, name: str) -> Any:
        """The value as it came."""
        return self._body.get(name)

    def path(self, name: str) -> str:
        """The field as messages name it."""
        return f"{self._where}{name}"

    def refuse(self, name: str, wanted: str) -> ApiError:
        """The error that says what a field should be."""
        shown = json.dumps(self._body.get(name))
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        return ApiError(400, f"'{self.path(name)}' must be {wanted}, not {shown}", param=self.path(name))

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number within bounds."""
        value = self._body.get(name)
        if value is None:
            return None
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or not math.isfinite(value) or not low <= value <= high:
            raise self.refuse(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def integer(self, name: str, low: int, high: int) -> int | None:
        """A whole number within bounds."""
        value = self._body.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.refuse(name, f"a whole number from {low} to {high}")
        return value

    def flag(self, name: str) -> bool | None:
        """True or false."""
        value = self._body.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def text(self, name: str) -> str | None:
        """A string."""
        value = self._body.get(name)
        if value is not None and not isinstance(value, str):
            raise self.refuse(name, "a string")
        return value

    def mapping(self, name: str) -> dict[str, Any] | None:
        """An object."""
        value = self._body.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.refuse(name, "an object")
        return value

    def items(self, name: str) -> list[Any] | None:
        """An array."""
        value = self._body.get(name)
        if value is not None and not isinstance(value, list):
            raise self.refuse(name, "an array")
        return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def parse(data: bytes) -> dict[str, Any]:
    """The body of a request as a JSON object."""
    try:
        body = json.loads(data.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is no valid JSON: {error}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, "The body must be a JSON object", code="invalid_json")
    return body


def encode(body: Mapping[str, Any]) -> bytes:
    """A body for the engine."""
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        # half of a surrogate pair, a number beyond all bounds
        raise ApiError(400, f"The body holds what no JSON text can: {error}", code="invalid_json") from error


def refuse_unknown(body: Mapping[str, Any], known: Collection[str]) -> None:
    """A field that nothing reads would be thought to work."""
    for name, value in body.items():
        if name not in known and value is not None:
            raise ApiError(400, f"Unrecognized request argument: {name}", param=name, code="unknown_parameter")


def model_of(fields: Fields, limits: Limits) -> str:
    """The name of a model that is served here."""
    name = fields.text("model")
    if not name:
        raise ApiError(400, f"You must provide a model parameter: {limits.models[0]}", param="model")
    if name not in limits.models:
        message = f"The model '{name}' does not exist here: use {' or '.join(limits.models)}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return name


def _most_tokens(fields: Fields, limits: Limits) -> int:
    old = fields.integer("max_tokens", 1, 2**31 - 1)
    new = fields.integer("max_completion_tokens", 1, 2**31 - 1)
    if old is not None and new is not None and old != new:
        message = "'max_tokens' and 'max_completion_tokens' say different things: leave max_tokens out"
        raise ApiError(400, message, param="max_tokens")
    wanted, name = (old, "max_tokens") if new is None else (new, "max_completion_tokens")
    if wanted is not None and limits.max_tokens is not None and wanted > limits.max_tokens:
        message = f"'{name}' is too large: {wanted}. This server answers with {limits.max_tokens} tokens at most"
        raise ApiError(400, message, param=name)
    return min(wanted or limits.max_tokens or limits.context_length, limits.context_length)


def _stops(fields: Fields) -> list[str] | None:
    value = fields.get("stop")
    found = [value] if isinstance(value, str) else value
    if found is None or found == []:
        return None
    good = isinstance(found, list) and len(found) <= MAX_STOPS and all(isinstance(it, str) and it for it in found)
    if not good:
        raise fields.refuse("stop", f"a string, or up to {MAX_STOPS} strings, none of them empty")
    return list(found)


def _biases(fields: Fields) -> dict[str, float] | None:
    value = fields.mapping("logit_bias")
    if not value:
        return None
    if len(value) > MAX_BIASES or not all(name.isdecimal() for name in value):
        raise fields.refuse("logit_bias", f"an object of up to {MAX_BIASES} token ids")
    inner = Fields(value, "logit_bias.")
    return {name: inner.number(name, -100, 100) or 0.0 for name in value}


def generation(fields: Fields, limits: Limits) -> dict[str, Any]:
    """What both ways to ask for text have in common, as the engine gets it."""
    seed = fields.integer("seed", -(2**63), 2**63 - 1)
    model = model_of(fields, limits)
    wanted = {
        **limits.asked.get(model, {}),
        "model": model,
        "max_tokens": _most_tokens(fields, limits),
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "stop": _stops(fields),
        "seed": seed % SEEDS if seed is not None else None,
        "logit_bias": _biases(fields),
        "top_k": fields.integer("top_k", 0, 2**31 - 1),
        "min_p": fields.number("min_p", 0, 1),
        "typical_p": fields.number("typical_p", 0, 1),
        "repeat_penalty": fields.number("repeat_penalty", 0.1, 10),
        "ignore_eos": fields.flag("ignore_eos"),
        "cache_prompt": fields.flag("cache_prompt"),
    }
    found = {name: value for name, value in wanted.items() if value is not None}
    return for_vllm(found) if limits.engine is EngineType.VLLM else found


def streaming(fields: Fields) -> tuple[bool, bool]:
    """Whether the answer is streamed, and whether its end tells the usage."""
    stream, options = bool(fields.flag("stream")), fields.mapping("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise ApiError(400, "'stream_options' goes with stream: true only", param="stream_options")
    refuse_unknown(options, ("include_usage", "include_obfuscation"))
    return stream, bool(Fields(options, "stream_options.").flag("include_usage"))


def calls(body: Mapping[str, Any], prompts: list[dict[str, Any]], fields: Fields) -> Call:
    """One body for each answer: `n` of each prompt, told apart by their seeds where one is given."""
    stream, include_usage = streaming(fields)
    count = fields.integer("n", 1, MAX_ANSWERS) or 1
    if count * len(prompts) > MAX_ANSWERS:
        message = f"'n' times the prompts is {count * len(prompts)}: {MAX_ANSWERS} answers at most in one request"
        raise ApiError(400, message, param="n")
    bodies = []
    for prompt in prompts:
        for number in range(count):
            seed = {"seed": (body["seed"] + number) % SEEDS} if "seed" in body else {}
            bodies.append(encode({**body, **prompt, **seed, **STREAMED}))
    return Call(
        tuple(bodies), model=body["model"], answers_per_prompt=count, stream=stream, include_usage=include_usage
    )
