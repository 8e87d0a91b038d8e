"""`/v1/chat/completions`: messages, tools and formats as OpenAI's clients send them, made plain for engines."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_server.front.errors import ApiError
from tunesmith_server.front.fields import GENERATION, Call, Fields, Limits, calls, generation, refuse_unknown
from tunesmith_server.front.schema import check_schema
from tunesmith_server.front.toolcalls import required_call

__all__ = ["chat_call"]

IGNORED = frozenset(
    [
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prediction",
        "verbosity",
        "reasoning_effort",
    ]
)
"""Fields of OpenAI's service that change nothing of what an answer is."""
KNOWN = (
    GENERATION
    | IGNORED
    | {"messages", "response_format", "tools", "tool_choice", "parallel_tool_calls", "top_logprobs"}
    | {"chat_template_kwargs", "modalities", "store"}
)
ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
NAME = re.compile(r"[a-zA-Z0-9_.:-]{1,128}")
MAX_TOOLS = 128
KNOWS_NO_TOOLS = "This model's chat template knows no tools"


def chat_call(body: Mapping[str, Any], limits: Limits) -> Call:
    """Check a request for the next message of a conversation.

    Raises:
        ApiError: it can't be answered as it is meant.
    """
    refuse_unknown(body, KNOWN)
    fields = Fields(body)
    _check_extras(fields)
    wanted = generation(fields, limits) | _logprobs(fields)
    wanted["messages"] = _messages(fields)
    tools, required = _tools(fields, limits)
    form = _response_format(fields)
    if form is not None and tools:
        raise ApiError(400, "'response_format' and 'tools' can't go together here: leave one out", param="tools")
    if form is not None:
        wanted["response_format"] = form
    if (template := fields.mapping("chat_template_kwargs")) is not None:
        wanted["chat_template_kwargs"] = template
    if required:
        return replace(calls(wanted | required_call(wanted["messages"], tools), [{}], fields), required_call=True)
    if tools:
        parallel = fields.flag("parallel_tool_calls")
        wanted |= {"tools": tools, "tool_choice": "auto"}
        wanted |= {"parallel_tool_calls": parallel} if parallel is not None else {}
    return calls(wanted, [{}], fields)


def _check_extras(fields: Fields) -> None:
    modalities = fields.items("modalities")
    if modalities not in (None, ["text"]):
        raise ApiError(400, "This model answers with text only: leave 'modalities' out", param="modalities")
    if fields.flag("store"):
        raise ApiError(400, "Nothing is stored here: leave 'store' out", param="store")


def _logprobs(fields: Fields) -> dict[str, Any]:
    wanted, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, 20)
    if top is not None and not wanted:
        raise ApiError(400, "'top_logprobs' needs logprobs: true", param="top_logprobs")
    return {"logprobs": True, "top_logprobs": max(1, top or 0)} if wanted else {}


def _messages(fields: Fields) -> list[dict[str, Any]]:
    messages = fields.items("messages")
    if not messages:
        raise ApiError(400, "'messages' must hold at least one message", param="messages")
    return [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ApiError(400, f"'{where}' must be an object with role and content", param=where)
    fields = Fields(message, f"{where}.")
    role = ROLES.get(fields.text("role") or "")
    if role is None:
        raise fields.refuse("role", f"one of {', '.join(ROLES)}")
    if message.get("function_call"):
        raise ApiError(400, f"'{where}.function_call' has been replaced by tool_calls: use these", param=where)
    found: dict[str, Any] = {"role": role, "content": _content(message.get("content"), f"{where}.content")}
    tool_calls = _tool_calls(fields, where) if role == "assistant" else []
    if tool_calls:
        found["tool_calls"] = tool_calls
    elif found["content"] is None:
        raise ApiError(400, f"'{where}.content' must be a string or an array of parts", param=f"{where}.content")
    if role == "assistant" and (thought := fields.text("reasoning_content")):
        found["reasoning_content"] = thought
    if role == "tool":
        found["tool_call_id"] = fields.text("tool_call_id") or ""
        if not found["tool_call_id"]:
            raise ApiError(400, f"'{where}.tool_call_id' must name the call that this answers", param=where)
    if (name := fields.text("name")) is not None:
        found["name"] = name
    return found


def _content(content: Any, where: str) -> str | None:
    """The text of a message: parts are joined by line ends, as chat templates take text."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ApiError(400, f"'{where}' must be a string or an array of parts", param=where)
    texts = []
    for number, part in enumerate(content):
        place = f"{where}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image_url", "input_audio", "file", "video_url", "input_image"):
            raise ApiError(400, f"This model reads text only: '{place}' is of type {kind}", param=place)
        text = part.get("text" if kind == "text" else "refusal") if kind in ("text", "refusal") else None
        if not isinstance(text, str):
            raise ApiError(400, f'\'{place}\' must be a part such as {{"type": "text", "text": "…"}}', param=place)
        texts.append(text)
    return "\n".join(texts)


def _tool_calls(fields: Fields, where: str) -> list[dict[str, Any]]:
    return [_tool_call(it, f"{where}.tool_calls[{at}]") for at, it in enumerate(fields.items("tool_calls") or [])]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise ApiError(400, f"'{where}' must have type function and a function", param=where)
    fields = Fields(function, f"{where}.function.")
    name, arguments = fields.text("name"), fields.text("arguments")
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        parsed = None
    if not name or not isinstance(parsed, dict):
        raise ApiError(400, f"'{where}.function' must have a name, and arguments that are a JSON object", param=where)
    identity = Fields(call, f"{where}.").text("id") or ""
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments or "{}"}}


def _tools(fields: Fields, limits: Limits) -> tuple[list[dict[str, Any]], bool]:
    """The tools that may be called, and whether one of them must be; a choice of one tool leaves that one only."""
    listed = fields.items("tools") or []
    if len(listed) > MAX_TOOLS:
        raise fields.refuse("tools", f"an array of up to {MAX_TOOLS} tools")
    tools = [_tool(tool, f"tools[{number}]") for number, tool in enumerate(listed)]
    choice = fields.get("tool_choice")
    if choice == "none":
        return [], False
    if choice is not None and not tools:
        raise ApiError(400, "'tool_choice' needs tools", param="tool_choice")
    if choice in (None, "auto"):
        if tools and not limits.tools:
            who = "The engine VLLM reads no calls here" if limits.engine is EngineType.VLLM else KNOWS_NO_TOOLS
            message = f"{who}: leave 'tools' out, or set tool_choice to required"
            raise ApiError(400, message, param="tools")
        return tools, False
    if choice != "required":
        function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
        name = function.get("name") if isinstance(function, dict) else None
        tools = [tool for tool in tools if tool["function"]["name"] == name]
        if not tools:
            wanted = "none, auto, required, or an object that names one of the tools' functions"
            raise fields.refuse("tool_choice", wanted)
    return tools, True


def _tool(tool: Any, where: str) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(function, dict):
        raise ApiError(400, f"'{where}' must have type function and a function", param=where)
    fields = Fields(function, f"{where}.function.")
    name = fields.text("name") or ""
    if not NAME.fullmatch(name):
        raise fields.refuse("name", "a name of letters, digits, '_' and '-'")
    parameters = fields.mapping("parameters") or {"type": "object", "properties": {}}
    if fields.flag("strict"):
        check_schema(parameters, f"{where}.function.parameters")
    described = {"name": name, "description": fields.text("description") or "", "parameters": parameters}
    return {"type": "function", "function": described}


def _response_format(fields: Fields) -> dict[str, Any] | None:
    form = fields.mapping("response_format")
    kind = form.get("type") if form is not None else "text"
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "json_object"}
    if kind != "json_schema":
        raise ApiError(400, "'response_format.type' must be text, json_object or json_schema", param="response_format")
    inner = Fields(form, "response_format.").mapping("json_schema")
    schema = Fields(inner or {}, "response_format.json_schema.").mapping("schema")
    if inner is None or schema is None:
        message = "'response_format.json_schema' must be an object with name and schema"
        raise ApiError(400, message, param="response_format")
    checked = check_schema(schema, "response_format.json_schema.schema")
    return {"type": "json_schema", "json_schema": {"name": str(inner.get("name", "answer")), "schema": checked}}
