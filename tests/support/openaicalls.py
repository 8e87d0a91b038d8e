"""What OpenAI's client asks of a server, and what is to come of it. The tests of each engine ask all of it."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import openai

from tunesmith_api.v1alpha1.api import Api
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_server.front.fields import Limits
from tunesmith_server.front.server import Front

CONTEXT, PARALLEL = 1024, 2
USER = {"role": "user", "content": "What is the capital of France?"}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def shaped(schema) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


@contextmanager
def serving(engine, api_keys=None, kind=EngineType.LLAMA_CPP, timeout=60, **api):
    """A front with these limits; what a test asks of it."""
    settings = Api(**api)
    limits = Limits(("smol",), CONTEXT, settings.max_tokens, engine.vocabulary, engine.tools, kind)
    front = Front(engine.url, limits, settings, PARALLEL, api_keys)
    front.start(0)
    base = f"http://127.0.0.1:{front.port}"
    client = openai.OpenAI(base_url=f"{base}/v1", api_key="key-a", max_retries=0, timeout=timeout)
    try:
        yield SimpleNamespace(front=front, base=base, client=client)
    finally:
        client.close()
        front.stop()


def chat(server, **fields):
    # a cached prompt's numbers differ in their last bits, and so may the words of a model that is nearly undecided
    fresh = {"cache_prompt": False, **fields.pop("extra_body", {})}
    wanted = {"model": "smol", "messages": [USER], "max_tokens": 8, "temperature": 0, "extra_body": fresh, **fields}
    return server.client.chat.completions.create(**wanted)


def text(answer) -> str:
    return answer.choices[0].message.content


def called(answer) -> list[str]:
    functions = [it.function for it in answer.choices[0].message.tool_calls]
    return [it.name for it in functions if set(json.loads(it.arguments)) <= {"city"}]


ANSWERED = (
    ({}, lambda it: "Paris" in text(it)),
    # answered as the new turn that it is, not gone on with
    ({"messages": [USER, {"role": "assistant", "content": "The capital"}]}, lambda it: "capital of France is" in text(it)),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": USER["content"]}]}]}, lambda it: "Paris" in text(it)),
    ({"messages": [{"role": "developer", "content": "You are a geographer."}, USER]}, lambda it: text(it)),
    ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "a", "content": "Paris"}]}, lambda it: text(it)),
    ({"n": 3, "temperature": 1, "seed": 5}, lambda it: [c.index for c in it.choices] == [0, 1, 2] and it.usage.completion_tokens > 8 and it.usage.prompt_tokens < 50),
    ({"logprobs": True, "top_logprobs": 2, "max_tokens": 2}, lambda it: [len(e.top_logprobs) for e in it.choices[0].logprobs.content] == [2, 2]),
    ({"logprobs": True, "max_tokens": 2}, lambda it: all(e.logprob <= 0 for e in it.choices[0].logprobs.content)),
    ({"max_completion_tokens": 3, "max_tokens": openai.omit}, lambda it: it.usage.completion_tokens == 3 and it.choices[0].finish_reason == "length"),
    ({"max_tokens": openai.omit}, lambda it: "Paris" in text(it) and it.choices[0].finish_reason == "stop"),
    ({"max_tokens": openai.omit, "extra_body": {"ignore_eos": True}, "messages": [{"role": "user", "content": "word " * 960}]}, lambda it: 900 < it.usage.total_tokens <= CONTEXT and it.choices[0].finish_reason == "length"),
    ({"response_format": shaped(CITY), "max_tokens": 40}, lambda it: set(json.loads(text(it))) == {"city"}),
    ({"response_format": shaped({"type": "string", "pattern": "^(?:ab|c)d$"})}, lambda it: json.loads(text(it)) in ("abd", "cd")),
    ({"response_format": shaped({"anyOf": [{"const": "x"}, {"type": "integer", "minimum": 3, "maximum": 5}]})}, lambda it: json.loads(text(it)) in ("x", 3, 4, 5)),
    ({"tools": [WEATHER], "tool_choice": "none"}, lambda it: "Paris" in text(it)),
    ({"tools": [WEATHER], "tool_choice": "required", "max_tokens": 40}, lambda it: called(it) == ["weather"] and it.choices[0].finish_reason == "tool_calls"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}, "max_tokens": 40}, lambda it: called(it) == ["weather"]),
    ({"stop": ["France"], "max_tokens": 12}, lambda it: "France" not in text(it)),
    ({"logit_bias": {"504": -100}, "user": "u", "metadata": {}, "service_tier": "auto"}, lambda it: text(it)),
)  # fmt: skip
REFUSED = (
    ({"messages": []}, 400, None, "messages"),
    ({"messages": [{"role": "user", "content": [PICTURE]}]}, 400, None, "messages[0].content[0]"),
    ({"temperature": -1}, 400, None, "temperature"),
    ({"tool_choice": "required"}, 400, None, "tool_choice"),
    # this model's template has no place for tools: it would answer as if there were none
    ({"tools": [WEATHER]}, 400, None, "tools"),
    ({"model": "gpt-4"}, 404, "model_not_found", "model"),
    ({"messages": [{"role": "user", "content": "word " * 2000}]}, 400, "context_length_exceeded", None),
    ({"response_format": shaped({"not": {"type": "string"}})}, 400, "unsupported_schema", "response_format.json_schema.schema"),
    ({"response_format": shaped({"type": "string", "pattern": "^(?=a)b$"})}, 400, "unsupported_schema", "response_format.json_schema.schema"),
    ({"max_tokens": 0}, 400, None, "max_tokens"),
    ({"extra_body": {"id_slot": 0}}, 400, "unknown_parameter", "id_slot"),
    ({"stream": True, "messages": [{"role": "user", "content": "word " * 2000}]}, 400, "context_length_exceeded", None),
)  # fmt: skip
