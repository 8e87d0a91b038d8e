"""A tool that must be called: asked for as an answer bound to a schema, and given back as the call that it is.

Chat templates only tell a model of tools, and llama.cpp lets it answer in words first, whatever `tool_choice` says: a
client that requires a call could get none. `chat` asks, `relay` gives back.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from typing import Any

from tunesmith_server.front.answers import event
from tunesmith_server.front.schema import check_schema

__all__ = ["as_call", "call_events", "required_call"]

BEGUN = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"]*)"\s*,\s*"arguments"\s*:\s*(.*)', re.DOTALL)
"""A call that was cut off by the limit of tokens, in the order that the grammar fixes."""


def required_call(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The messages and the form of answer that leave the model no other choice.

    Raises:
        ApiError: a function's parameters can't be enforced.
    """
    functions = [tool["function"] for tool in tools]
    told = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
    text = (
        'Call one of these functions. Answer with a JSON object of its "name" and "arguments" and nothing else.\n'
        + told
    )
    first, *rest = messages
    if first["role"] == "system":
        asked = [{**first, "content": f"{first['content']}\n\n{text}"}, *rest]
    else:
        asked = [{"role": "system", "content": text}, *messages]
    shapes, definitions = [], {}
    for number, function in enumerate(functions):
        shape, found = _shape(function, number)
        shapes.append(shape)
        definitions.update(found)
    schema = {"anyOf": shapes, "$defs": definitions} if len(shapes) > 1 else {**shapes[0], "$defs": definitions}
    return {
        "messages": asked,
        "response_format": {"type": "json_schema", "json_schema": {"name": "call", "schema": schema}},
    }


def _shape(function: dict[str, Any], number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The schema of a call, and the definitions that it refers to, under names that no other function has."""
    checked = check_schema(function["parameters"], f"tools[{number}].function.parameters")
    definitions = {**checked.pop("definitions", {}), **checked.pop("$defs", {})}
    arguments = {"type": "object", **checked} if not checked.keys() & {"$ref", "anyOf", "oneOf"} else checked
    shape = {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": _renamed(arguments, number)},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
    return shape, {f"t{number}-{name}": _renamed(part, number) for name, part in definitions.items()}


def _renamed(node: Any, number: int) -> Any:
    if isinstance(node, list):
        return [_renamed(it, number) for it in node]
    if not isinstance(node, dict):
        return node
    if isinstance(node.get("$ref"), str):
        return {"$ref": f"#/$defs/t{number}-{node['$ref'].rpartition('/')[2]}"}
    return {name: _renamed(it, number) for name, it in node.items()}


def as_call(document: dict[str, Any]) -> dict[str, Any]:
    """Make the answer, which is a JSON object, the call that it stands for."""
    for choice in document["choices"]:
        message = choice["message"]
        text = message.get("content") or ""
        try:
            said = json.loads(text)
            name, arguments = said["name"], json.dumps(said["arguments"], ensure_ascii=False)
        except (ValueError, LookupError, TypeError):
            begun = BEGUN.match(text)
            name, arguments = (begun[1], begun[2]) if begun is not None else ("", "")
        function = {"name": name, "arguments": arguments}
        call = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
        message.update({"content": None, "tool_calls": [call] if name else []})
        if choice.get("finish_reason") == "stop":
            choice["finish_reason"] = "tool_calls"
    return document


def call_events(document: dict[str, Any], number: int, identity: str) -> bytes:
    """A call as the events of a stream, whose answer with that number it is."""
    head: dict[str, Any] = {name: document[name] for name in ("created", "model") if name in document}
    head |= {"id": identity, "object": "chat.completion.chunk"}
    (choice,) = document["choices"]
    calls = [{"index": at, **call} for at, call in enumerate(choice["message"]["tool_calls"])]
    delta = {"role": "assistant", "content": None, "tool_calls": calls}
    begun = {**head, "choices": [{"index": number, "delta": delta, "finish_reason": None}]}
    ended = {**head, "choices": [{"index": number, "delta": {}, "finish_reason": choice.get("finish_reason")}]}
    return event(begun) + event(ended)
