"""Rows of conversations in any form that is around → the one that chat templates read: messages and tools. No torch.

`ChatSFT` and `vision_chat` call it when rows are read, so that all that comes after sees one form; `preference_pairs`
calls `read_message` for the messages of a pair. What is in that form already comes back as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tunesmith_api.v1alpha1.dataset import Columns
from tunesmith_trainer.tasks.base import BadRow, Row
from tunesmith_trainer.tasks.fields import shorten

__all__ = ["OTHER_FIELDS", "Message", "read_conversation", "read_message", "read_parts", "template_arguments"]

Message = dict[str, Any]

ROLES = {"system", "user", "assistant", "tool"}
SAME_ROLES = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""Other names of roles: OpenAI's, ShareGPT's, Gemma's and LLaMA-Factory's."""
CALLS = {"function_call", "tool_call"}
"""Roles whose text is a tool call written as JSON."""
QUESTIONS = ("instruction", "prompt")
ANSWERS = ("output", "completion", "response")
INPUTS = ("input", "context")
OTHER_FIELDS = ("conversations", "system", "history", *QUESTIONS, *INPUTS, *ANSWERS)
"""What rows of the other forms are made of."""
KNOWN_FORMS = (
    "give each row a list of messages, or one of the other known forms: 'conversations' (ShareGPT), 'instruction' and "
    "'output' (Alpaca), 'prompt' and 'completion'"
)
RESERVED = frozenset(
    {
        "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
        "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
        "tokenizer_kwargs", "messages",
    }
)  # fmt: skip
"""What rows may not say of how a template is applied."""


def read_conversation(row: Row, columns: Columns, read: Callable[[Any, str], Message] | None = None) -> dict[str, Any]:
    """Return the fields `messages`, `tools` and template arguments of a row, by their columns; the last two if any.

    Args:
        row: in one of the known forms.
        columns: names of the fields.
        read: reads a message; `read_message` unless the model sees.

    Raises:
        BadRow: it is in none of the forms, or something is missing in it.
    """
    one = read or read_message
    messages = [one(item, where) for item, where in _raw_messages(row, columns)]
    found: dict[str, Any] = {columns.messages: messages}
    tools = _tools(row.get(columns.tools), columns.tools)
    if tools:
        found[columns.tools] = tools
    arguments = _arguments(row.get(columns.chat_template_kwargs), columns.chat_template_kwargs)
    if arguments:
        found[columns.chat_template_kwargs] = arguments
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("has no assistant message to learn from")
    return found


def template_arguments(row: Row, columns: Columns) -> dict[str, Any]:
    """Return what a row in the one form says to its chat template beside the messages."""
    tools = {"tools": row[columns.tools]} if row.get(columns.tools) else {}
    return {**tools, **(row.get(columns.chat_template_kwargs) or {})}


# ---- forms


def _raw_messages(row: Row, columns: Columns) -> list[tuple[Any, str]]:
    """Return the messages as they are written, and how errors call each."""
    if row.get(columns.messages) is not None:
        return _numbered(_listed(row[columns.messages], columns.messages))
    before = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    if row.get("conversations") is not None:
        return _numbered([*before, *_listed(row["conversations"], "conversations")])
    question = next((name for name in QUESTIONS if row.get(name) is not None), None)
    answer = next((name for name in ANSWERS if row.get(name) is not None), None)
    if question is None or answer is None:
        names = ", ".join(sorted(map(str, row))) or "none"
        empty = " that isn't empty" if columns.messages in row else ""
        raise BadRow(
            f"has no field {columns.messages!r}{empty} (its fields: {names}); set spec.dataset.columns.messages, or "
            f"{KNOWN_FORMS}"
        )
    if not isinstance(row[question], str):
        # what the assistant said in the prompt is there to be answered, not to be learned
        asked = [_unlearned(item) for item in _listed(row[question], question)]
        return _numbered([*before, *asked, *_answer(row[answer], answer)])
    text = "\n".join([row[question], *(row[name] for name in INPUTS if _is_text(row.get(name)))])
    if not text.strip():
        raise BadRow(f"field {question!r} is empty")
    return _numbered([*before, *_history(row), {"role": "user", "content": text}, *_answer(row[answer], answer)])


def _numbered(messages: Sequence[Any]) -> list[tuple[Any, str]]:
    return [(message, f"message {number}") for number, message in enumerate(messages, 1)]


def _listed(value: Any, column: str) -> Sequence[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _from_json(value, f"field {column!r}")
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadRow(f"field {column!r} must be a list of at least one message")
    return value


def _history(row: Row) -> list[Message]:
    """Earlier turns of an Alpaca row, as LLaMA-Factory writes them: pairs of a question and an answer."""
    turns: list[Message] = []
    for pair in row.get("history") or ():
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise BadRow("field 'history' must be a list of pairs of a question and an answer")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _answer(value: Any, column: str) -> list[Any]:
    if not isinstance(value, str):
        return list(_listed(value, column))
    if not value.strip():
        raise BadRow(f"field {column!r} is empty")
    return [{"role": "assistant", "content": value}]


def _unlearned(message: Any) -> Any:
    said = isinstance(message, Mapping) and _role(message) == "assistant"
    return {**message, "weight": 0} if said else message


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


# ---- messages


def _role(message: Mapping[str, Any]) -> Any:
    role = message.get("role", message.get("from"))
    return SAME_ROLES.get(role, role) if isinstance(role, str) else role


def read_message(message: Any, where: str) -> Message:
    """Return a message in the form that templates read; `where` is how errors call it.

    Raises:
        BadRow: its role isn't known, or it has no content.
    """
    return read_parts(message, where, _text_of)


def read_parts(message: Any, where: str, read_content: Callable[[Any, str], Any]) -> Message:
    """The same, of a message whose content is more than text: `read_content` reads what isn't a text."""
    if not isinstance(message, Mapping):
        raise BadRow(f"{where} is not an object with role and content")
    found = dict(message)
    if "role" not in found and "from" in found:
        found["role"], found["content"] = found.pop("from"), found.pop("value", None)
    given = found.get("role")
    if not isinstance(given, str):
        raise BadRow(f"{where} needs a text 'role'")
    found["role"] = _role(found)
    if found["role"] not in ROLES:
        raise BadRow(f"{where} has role {shorten(given)!r}; use system, user, assistant or tool")
    if given in CALLS:
        found["tool_calls"], found["content"] = found["content"], ""
    _read_calls(found, where)
    content = found.get("content")
    if content is None and (found.get("tool_calls") or _thoughts(found)):
        found["content"] = ""
    elif found["role"] == "tool" and content is not None and not _is_content(content):
        found["content"] = json.dumps(content, ensure_ascii=False)
    elif content is None:
        raise BadRow(f"{where} needs a text 'content'")
    elif not isinstance(content, str):
        found["content"] = read_content(content, where)
    return found


def _text_of(content: Any, where: str) -> str:
    """Return the text of a content that is written in parts, one below the other, as the model server reads it.

    Raises:
        BadRow: it is none.
    """
    if not isinstance(content, Sequence) or isinstance(content, str) or not content:
        raise BadRow(f"{where} needs a text 'content'")
    texts = []
    for number, part in enumerate(content, 1):
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text":
            raise BadRow(f"{where}, part {number} has type {shorten(str(kind))!r}, and this model reads text only")
        if not isinstance(text, str):
            raise BadRow(f"{where}, part {number} needs a text 'text'")
        texts.append(text)
    return "\n".join(texts)


def _is_content(content: Any) -> bool:
    """Whether it is a text or a list of parts, and no data that a tool has returned."""
    if isinstance(content, str):
        return True
    return isinstance(content, Sequence) and all(isinstance(part, Mapping) and "type" in part for part in content)


def _thoughts(message: Message) -> bool:
    return any(message.get(name) for name in ("reasoning_content", "reasoning", "thinking"))


# ---- tools


def _read_calls(message: Message, where: str) -> None:
    if message.get("function_call"):  # OpenAI's older name
        message["tool_calls"] = [message.pop("function_call")]
    calls = message.get("tool_calls")
    if not calls:
        return
    calls = _from_json(calls, f"{where}, tool_calls") if isinstance(calls, str) else calls
    if isinstance(calls, Mapping):
        calls = [calls]
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise BadRow(f"{where}: tool_calls must be a list of {{name, arguments}}")
    if message["role"] != "assistant":
        raise BadRow(f"{where} has tool_calls, and only the assistant calls tools")
    message["tool_calls"] = [_call(call, f"{where}, tool call {number}") for number, call in enumerate(calls, 1)]


def _call(call: Any, where: str) -> dict[str, Any]:
    call = _from_json(call, where) if isinstance(call, str) else call
    if isinstance(call, Mapping) and not isinstance(call.get("function"), Mapping):
        call = {"type": "function", "function": dict(call)}
    if not isinstance(call, Mapping) or not isinstance(call["function"].get("name"), str):
        raise BadRow(f"{where} needs a text 'name'")
    function = dict(call["function"])
    arguments = function.get("arguments", function.pop("parameters", None))
    if isinstance(arguments, str):
        arguments = _from_json(arguments, f"{where}, arguments") if arguments.strip() else {}
    if not isinstance(arguments, Mapping | None):
        raise BadRow(f"{where}: arguments must be an object, or one written as JSON")
    function["arguments"] = dict(arguments or {})
    return {**call, "type": call.get("type") or "function", "function": function}


def _tools(value: Any, column: str) -> list[dict[str, Any]]:
    where = f"field {column!r}"
    if isinstance(value, str):
        value = _from_json(value, where) if value.strip() else None
    if value is None:
        return []
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadRow(f"{where} must be a list of tools, or one written as JSON")
    return [_tool(tool, f"{where}, tool {number}") for number, tool in enumerate(value, 1)]


def _tool(tool: Any, where: str) -> dict[str, Any]:
    tool = _from_json(tool, where) if isinstance(tool, str) else tool
    if isinstance(tool, Mapping) and not isinstance(tool.get("function"), Mapping):
        tool = {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}
    if not isinstance(tool, Mapping) or not isinstance(tool["function"].get("name"), str):
        raise BadRow(
            f"{where} needs a text 'name'; give {{type: function, function: {{name, description, parameters}}}}"
        )
    function = {name: value for name, value in tool["function"].items() if value is not None}
    if isinstance(function.get("parameters"), str):
        function["parameters"] = _from_json(function["parameters"], f"{where}, parameters")
    return {**{name: value for name, value in tool.items() if value is not None}, "function": function}


def _arguments(value: Any, column: str) -> dict[str, Any]:
    where = f"field {column!r}"
    if isinstance(value, str):
        value = _from_json(value, where) if value.strip() else None
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BadRow(f"{where} must be an object, or one written as JSON")
    refused = sorted(RESERVED & set(value))
    if refused:
        raise BadRow(f"{where} sets {', '.join(refused)}, which is not for rows to say; remove it")
    return {str(name): item for name, item in value.items() if item is not None}


def _from_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{where} is not valid JSON ({error}): {shorten(text)}") from error
