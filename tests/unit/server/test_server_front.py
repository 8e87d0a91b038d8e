"""The front's parts that need no engine: what requests are made of, what is refused and how, keys, counters."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from tunesmith_server.front.answers import Usage, assembled, event, merged, split_events
from tunesmith_server.front.apikeys import ApiKeys
from tunesmith_server.front.chat import chat_call
from tunesmith_server.front.completions import completion_call, encoder_call
from tunesmith_server.front.errors import ApiError, engine_error
from tunesmith_server.front.fetch import fetch
from tunesmith_server.front.fields import Limits, parse
from tunesmith_server.front.gate import Gate
from tunesmith_server.front.metrics import Metrics
from tunesmith_server.front.schema import check_schema
from tunesmith_server.front.toolcalls import as_call

LIMITS = Limits(("smol",), 512, None, 1000)
USER = {"role": "user", "content": "Hi"}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALLED = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}


def sent(limits=LIMITS, **fields) -> dict:
    """What the engine gets for a chat request."""
    (body,) = chat_call({"model": "smol", "messages": [USER], **fields}, limits).bodies
    return json.loads(body)


def refusal(check, limits=LIMITS, **fields) -> ApiError:
    with pytest.raises(ApiError) as caught:
        check({"model": "smol", **fields}, limits)
    document = json.loads(caught.value.body())
    assert set(document["error"]) == {"message", "type", "param", "code"}
    return caught.value


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "developer", "content": "Be brief."}, {"role": "system", "content": "Be brief."}),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, {"role": "user", "content": "a\nb"}),
        ({"role": "assistant", "content": None, "tool_calls": [CALLED]}, {"role": "assistant", "content": None, "tool_calls": [CALLED]}),
        # as the client's own message objects are written back
        ({"role": "assistant", "content": "x", "refusal": None, "function_call": None, "tool_calls": None, "audio": None}, {"role": "assistant", "content": "x"}),
        ({"role": "tool", "tool_call_id": "a", "content": "sunny"}, {"role": "tool", "tool_call_id": "a", "content": "sunny"}),
    ],
)  # fmt: skip
def test_messages_reach_the_engine_in_one_form(message, expected):
    assert sent(messages=[USER, message])["messages"] == [{"role": "user", "content": "Hi"}, expected]


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"messages": []}, "messages", "at least one"),
        ({"messages": "hi"}, "messages", "array"),
        ({"messages": ["hi"]}, "messages[0]", "object"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "developer"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]}, "messages[0].content[0]", "text only"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{**CALLED, "function": {"name": "f", "arguments": "{"}}]}]}, "messages[0].tool_calls[0]", "JSON"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "tool_call_id"),
        ({"temperature": -1}, "temperature", "0 to 2"),
        ({"temperature": True}, "temperature", "number"),
        ({"top_p": 1.5}, "top_p", "0 to 1"),
        ({"max_tokens": 0}, "max_tokens", "from 1"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "different"),
        ({"n": 0}, "n", "from 1"),
        ({"n": 17}, "n", "16"),
        ({"stop": ["a", ""]}, "stop", "empty"),
        ({"seed": "x"}, "seed", "whole number"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "-100"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}, "tools": [WEATHER]}, "tool_choice", "names one"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "letters"),
        ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "tools", "together"),
        ({"response_format": {"type": "yaml"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "schema"),
        ({"modalities": ["audio"]}, "modalities", "text only"),
        ({"id_slot": 0}, "id_slot", "Unrecognized"),
        ({"grammar": "root ::= x"}, "grammar", "Unrecognized"),
        ({"model": None}, "model", "smol"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_by_field(fields, param, word):
    found = refusal(chat_call, **{"messages": [USER], **fields})
    assert (found.status, found.param) == (400, param)
    assert word in str(found)


def test_an_unknown_model_is_not_found():
    found = refusal(chat_call, messages=[USER], model="gpt-4")
    assert (found.status, found.code, found.param) == (404, "model_not_found", "model")


def test_answers_are_bounded_by_the_limit_or_else_by_the_context():
    limited = Limits(("smol",), 512, 64)
    assert sent()["max_tokens"] == 512
    assert sent(limited)["max_tokens"] == 64
    assert sent(max_completion_tokens=7)["max_tokens"] == 7
    assert sent(max_tokens=100_000)["max_tokens"] == 512
    assert "64 tokens at most" in str(refusal(chat_call, limited, messages=[USER], max_tokens=65))


def test_each_answer_is_asked_for_by_itself_with_a_seed_of_its_own():
    call = chat_call({"model": "smol", "messages": [USER], "n": 3, "seed": 2**32 - 2}, LIMITS)
    assert [json.loads(body)["seed"] for body in call.bodies] == [2**32 - 2, 0, 1]
    assert all("n" not in json.loads(body) for body in call.bodies)
    call = completion_call({"model": "smol", "prompt": ["a", "b"], "n": 2, "stream": True}, LIMITS)
    assert [json.loads(body)["prompt"] for body in call.bodies] == ["a", "a", "b", "b"]
    assert call.stream
    assert not call.include_usage


@pytest.mark.parametrize(("choice", "names"), [("required", ["weather", "other"]), ({"type": "function", "function": {"name": "other"}}, ["other"])])  # fmt: skip
def test_a_tool_that_must_be_called_is_all_that_can_be_answered(choice, names):
    other = {"type": "function", "function": {"name": "other"}}
    wanted = sent(tools=[WEATHER, other], tool_choice=choice)
    schema = wanted["response_format"]["json_schema"]["schema"]
    shapes = schema.get("anyOf", [schema])
    assert [shape["properties"]["name"]["const"] for shape in shapes] == names
    system, user = wanted["messages"]
    assert all(name in system["content"] for name in names)
    assert user == USER
    assert "tools" not in sent(tools=[WEATHER], tool_choice="none")


def test_definitions_of_several_functions_keep_apart():
    parameters = {"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}}
    tools = [
        {
            "type": "function",
            "function": {"name": f"f{it}", "parameters": {**parameters, "$defs": {"x": {"const": it}}}},
        }
        for it in (0, 1)
    ]
    schema = sent(tools=tools, tool_choice="required")["response_format"]["json_schema"]["schema"]
    assert schema["$defs"] == {"t0-x": {"const": 0}, "t1-x": {"const": 1}}
    assert [it["properties"]["arguments"]["properties"]["a"] for it in schema["anyOf"]] == [
        {"$ref": "#/$defs/t0-x"},
        {"$ref": "#/$defs/t1-x"},
    ]


@pytest.mark.parametrize(
    ("content", "finish", "expected"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', "stop", ([("f", '{"a": 1}')], "tool_calls")),
        ('{"name": "f", "arguments": {"a": ', "length", ([("f", '{"a": ')], "length")),
        ('{"na', "length", ([], "length")),
    ],
)
def test_an_answer_bound_to_a_call_is_given_as_the_call(content, finish, expected):
    document = {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": finish}]}
    (choice,) = as_call(document)["choices"]
    functions = [call["function"] for call in choice["message"]["tool_calls"]]
    assert ([(it["name"], it["arguments"]) for it in functions], choice["finish_reason"]) == expected
    assert choice["message"]["content"] is None


def test_tools_that_the_model_would_never_see_are_refused():
    blind = Limits(("smol",), 512, tools=False)
    assert refusal(chat_call, blind, messages=[USER], tools=[WEATHER]).param == "tools"
    assert "tools" not in sent(blind, tools=[WEATHER], tool_choice="none")


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object", "properties": {"a": {"type": ["string", "null"]}}, "required": ["a"], "additionalProperties": False},
        {"type": "array", "items": {"$ref": "#/$defs/x"}, "minItems": 1, "$defs": {"x": {"enum": ["a", 1]}}},
        {"anyOf": [{"type": "integer", "minimum": 0}, {"const": None}], "title": "t"},
        {"type": "string", "pattern": "^(?:a|b)+$"},
        {"allOf": [{"$ref": "#/$defs/x"}], "description": "as pydantic writes it", "$defs": {"x": {"type": "number"}}},
    ],
)  # fmt: skip
def test_schemas_that_grammars_express_pass(schema):
    assert check_schema(schema, "s") is not None


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "object", "if": {}, "then": {}}, "if"),
        ({"type": "object", "properties": {"a": {"type": "number", "minimum": 3}}}, "minimum"),
        ({"type": "integer", "multipleOf": 2}, "multipleOf"),
        ({"type": "array", "items": {}, "uniqueItems": True}, "uniqueItems"),
        ({"type": "wibble"}, "type must be"),
        ({"$ref": "#/nowhere"}, "$defs"),
        ({"$ref": "https://example.org/schema.json"}, "$defs"),
        ({"$ref": "#/$defs/x", "minLength": 3, "$defs": {"x": {"type": "string"}}}, "beside"),
        ({"type": "string", "pattern": "a"}, "begin with ^"),
        ({"type": "string", "pattern": "^(?=a)b$"}, "look-around"),
        ({"type": "string", "pattern": "^[$"}, "regular expression"),
        ({"type": "string", "format": "email"}, "format"),
        ({"type": "string", "maxLength": 10**6}, "maxLength"),
        ({"allOf": [{"type": "string"}, {"type": "string"}]}, "allOf"),
        ({"type": "object", "required": ["a"]}, "none of its properties"),
        ({"minLength": 1, "minItems": 1}, "needs a type"),
        ({"properties": {"a": {"type": "string"}}, "enum": [1]}, "beside"),
    ],
)  # fmt: skip
def test_schemas_beyond_a_grammar_are_refused_not_loosened(schema, word):
    with pytest.raises(ApiError, match="can't be enforced") as caught:
        check_schema(schema, "s")
    assert (caught.value.status, caught.value.code) == (400, "unsupported_schema")
    assert word in str(caught.value)


def test_a_deep_schema_and_deep_json_are_refused():
    schema: dict = {}
    for _ in range(40):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ApiError, match="deeper"):
        check_schema(schema, "s")
    with pytest.raises(ApiError, match="JSON"):
        parse(b'{"a":' + b"[" * 100_000)


@pytest.mark.parametrize("data", [b"{", b"[]", b"", b'{"a": "\xff"}', b'{"a": NaN}'])
def test_what_is_no_json_object_is_refused(data):
    with pytest.raises(ApiError, match=r"JSON") as caught:
        parse(data)
    assert caught.value.status == 400


def test_half_a_surrogate_pair_is_refused():
    body = parse(b'{"model": "smol", "messages": [{"role": "user", "content": "\\ud800"}]}')
    with pytest.raises(ApiError, match="JSON"):
        chat_call(body, LIMITS)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({}, "string"),
        ({"prompt": []}, "string"),
        ({"prompt": [1, 1000]}, "below 1000"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "suffix": "x"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": ["a"] * 9, "n": 2}, "16"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
    ],
)
def test_completions_that_cannot_be_made_are_refused(fields, word):
    assert word in str(refusal(completion_call, **fields))


def test_token_ids_are_a_prompt_where_the_vocabulary_is_known():
    (body,) = completion_call({"model": "smol", "prompt": [1, 2]}, LIMITS).bodies
    assert json.loads(body)["prompt"] == [1, 2]
    assert "no token ids" in str(refusal(completion_call, Limits(("smol",), 512), prompt=[1, 2]))


def test_encoders_are_asked_as_they_stand():
    call = encoder_call({"inputs": ["a"], "raw_scores": True}, LIMITS)
    assert json.loads(call.bodies[0]) == {"inputs": ["a"], "raw_scores": True}
    assert call.plain
    assert refusal(encoder_call, model="other", input="a").status == 404


@pytest.mark.parametrize(
    ("status", "error", "expected"),
    [
        (400, {"message": "too long", "type": "exceed_context_size_error"}, (400, "context_length_exceeded")),
        (500, {"message": "Jinja Exception: roles must alternate"}, (400, "invalid_messages")),
        (501, {"message": "no embeddings"}, (404, "not_supported")),
        (400, {"message": "failed to parse grammar"}, (400, "unsupported_schema")),
        (413, {"message": "inputs are longer", "param": "inputs"}, (413, None)),
        (429, {"message": "the queue is full"}, (429, None)),
        (500, {"message": "out of slots"}, (502, "engine_failed")),
    ],
)
def test_an_engines_refusal_is_told_as_what_it_means(status, error, expected):
    found = engine_error(status, json.dumps({"error": error}).encode())
    assert (found.status, found.code) == expected
    assert error["message"] in str(found)


def test_usage_counts_all_answers_and_each_prompt_once():
    usage = Usage(2)
    for number in range(4):
        usage.add(number, {"prompt_tokens": 10 + number // 2, "completion_tokens": 3})
    assert usage.document() | {"prompt_tokens_details": None} == {
        "prompt_tokens": 21, "completion_tokens": 12, "total_tokens": 33, "prompt_tokens_details": None,
    }  # fmt: skip
    document = merged([{"id": "a", "choices": [{"index": 0, "text": str(it)}]} for it in range(4)], usage)
    assert [(it["index"], it["text"]) for it in document["choices"]] == [(0, "0"), (1, "1"), (2, "2"), (3, "3")]


def events(*documents, end=b"data: [DONE]\n\n") -> bytes:
    return b"".join(event(it) for it in documents) + end


def test_a_streamed_answer_is_put_together_as_a_whole_one():
    function = {"name": "weather", "arguments": ""}
    deltas = [
        {"role": "assistant", "content": None}, {"content": "Hel"}, {"content": "lo"},
        {"tool_calls": [{"index": 0, "id": "a", "type": "function", "function": function}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"ci'}}]}, {"tool_calls": [{"index": 0, "function": {"arguments": 'ty":1}'}}]},
    ]  # fmt: skip
    parts = [
        {"id": "x", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": it, "finish_reason": None}]}
        for it in deltas
    ]
    parts[1]["choices"][0]["logprobs"] = parts[2]["choices"][0]["logprobs"] = {"content": [{"token": "t"}]}
    last = {"id": "x", "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}
    whole = assembled(
        events(*parts, last, {"id": "x", "choices": [], "usage": {"completion_tokens": 5}, "timings": {"cache_n": 1}})
    )
    (choice,) = whole.pop("choices")
    assert whole == {
        "id": "x",
        "object": "chat.completion",
        "usage": {"completion_tokens": 5},
        "timings": {"cache_n": 1},
    }
    assert choice["finish_reason"] == "tool_calls"
    assert len(choice["logprobs"]["content"]) == 2
    assert choice["message"] == {
        "role": "assistant", "content": "Hello",
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city":1}'}}],
    }  # fmt: skip


def test_a_stream_that_broke_off_is_no_answer():
    part = {"choices": [{"text": "a", "finish_reason": None}]}
    assert assembled(events(part, end=b"")) is None
    assert assembled(b"") is None
    assert assembled(events(part, {"error": {"message": "m"}}, end=b"")) == {"error": {"message": "m"}}
    assert assembled(events(part, part))["choices"][0]["text"] == "aa"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nContent-Length: 2\r\n\r\nab", (200, b"ab")),
        (b"HTTP/1.1 400 Bad Request\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n2;x=y\r\nbc\r\n0\r\n\r\n", (400, b"abc")),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab", None),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n5\r\nbc", None),
        (b"HTTP/1.1 200 OK\r\nContent-", None),
        (b"", None),
    ],
)  # fmt: skip
async def test_a_response_is_taken_up_whole_or_not_at_all(response, expected):
    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"Content-Length: 2\r\n" in head
        assert await reader.readexactly(2) == b"{}"
        writer.write(response)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        if expected is None:
            with pytest.raises(OSError, match="broke off"):
                await fetch(url, "/x", b"{}")
        else:
            found = await fetch(url, "/x", b"{}")
            assert (found.status, found.body) == expected


def test_events_that_come_in_pieces_are_put_together():
    buffer, found = bytearray(), []
    for piece in (b"data: a\n", b"\ndata: b", b"\n\n", b"data: c"):
        buffer += piece
        found += split_events(buffer)
    assert found == [b"data: a\n\n", b"data: b\n\n"]
    assert bytes(buffer) == b"data: c"


# --- keys ---


def test_keys_come_and_go_with_the_files_of_the_secret(tmp_path):
    now = SimpleNamespace(value=0.0)
    # as the kubelet writes them: entries are links into a folder that is swapped
    first, second = tmp_path / "..1", tmp_path / "..2"
    first.mkdir()
    second.mkdir()
    (first / "alice").write_text("key-a\n")
    (second / "bob").write_text("key-b")
    link = tmp_path / "..data"
    link.symlink_to(first)
    (tmp_path / "alice").symlink_to(link / "alice")
    keys = ApiKeys(tmp_path, clock=lambda: now.value)
    keys.check("Bearer key-a")
    keys.check("bearer key-a ")
    for wrong in ("Bearer key-b", "Bearer ", "", "key-a", "Basic key-a", "Bearer key-a key-a"):
        with pytest.raises(ApiError) as caught:
            keys.check(wrong)
        assert caught.value.status == 401
        assert caught.value.headers["WWW-Authenticate"] == "Bearer"
    link.unlink()
    link.symlink_to(second)
    (tmp_path / "alice").unlink()
    (tmp_path / "bob").symlink_to(link / "bob")
    now.value = 2.0
    keys.check("Bearer key-b")
    with pytest.raises(ApiError):
        keys.check("Bearer key-a")


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_no_keys_let_nobody_in(content, tmp_path):
    if content is not None:
        (tmp_path / "a").write_text(content)
    keys = ApiKeys(tmp_path)
    assert len(keys) == 0
    for offered in ("", "Bearer", "Bearer ", "Bearer x"):
        with pytest.raises(ApiError):
            keys.check(offered)


# --- the gate and the counters ---


async def test_requests_beyond_the_queue_are_told_to_come_again():
    gate = Gate(parallel=1, waiting=1)
    with gate.request(), gate.request():
        with pytest.raises(ApiError) as caught, gate.request():
            pass
        assert (caught.value.status, "Retry-After" in caught.value.headers) == (429, True)
        assert gate.in_flight == 2
    assert gate.in_flight == 0


async def test_who_leaves_while_waiting_leaves_no_trace():
    gate, inside = Gate(parallel=1, waiting=9), asyncio.Event()

    async def hold() -> None:
        async with gate.turn():
            inside.set()
            await asyncio.sleep(3600)

    tasks = [asyncio.create_task(hold()) for _ in range(5)]
    await inside.wait()
    await asyncio.sleep(0)
    assert (gate.running, gate.waiting) == (1, 4)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (gate.running, gate.waiting) == (0, 0)


def test_counters_have_the_names_that_dashboards_know():
    metrics = Metrics("smol")
    metrics.answered("/v1/completions", 200, 0.2)
    metrics.tokens(5, 7)
    text = metrics.text(running=2, waiting=3, in_flight=5)
    for line in (
        'http_requests_total{code="200",path="/v1/completions"} 1.0',
        'http_request_duration_seconds_count{path="/v1/completions"} 1.0',
        'vllm:prompt_tokens_total{model_name="smol"} 5.0',
        'vllm:generation_tokens_total{model_name="smol"} 7.0',
        'vllm:num_requests_running{model_name="smol"} 2.0',
        'vllm:num_requests_waiting{model_name="smol"} 3.0',
    ):
        assert line in text.splitlines(), text
