"""The front before the real engine, with the real small model, asked by the openai client."""

import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack

import openai
import pytest

import assets
from support.openaicalls import ANSWERED, CONTEXT, PARALLEL, REFUSED, USER, WEATHER, called, chat, serving, text
from tunesmith_api import keys
from tunesmith_api.plan import ServingPlan
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_server.artifact import MODEL_FILE
from tunesmith_server.engines.llama_cpp import LlamaEngine
from tunesmith_server.front.apikeys import ApiKeys
from tunesmith_server.health import HealthServer
from tunesmith_server.quantizers import quantizer_of


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder, method = tmp_path_factory.mktemp("gguf"), QuantizationMethod.Q8_0
    quantizer_of(EngineType.LLAMA_CPP, method)(assets.smollm2(), folder / "scratch", 1).make(method, folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    plan = ServingPlan(
        name="smol", namespace="n", uid="u", revision="smol-r1", model_uri="s3://m/m", quantization="Q8_0", engine="LlamaCpp",
        context_length=CONTEXT, parallel_requests=PARALLEL, artifact_uri="s3://m/a",
    )  # fmt: skip
    return LlamaEngine(plan, folder / MODEL_FILE, threads=1, port=port)


@pytest.fixture(scope="module")
def server(engine):
    with serving(engine) as found:
        yield found


@pytest.mark.parametrize(("fields", "check"), ANSWERED)
def test_what_openai_answers_is_answered(server, fields, check):
    answer = chat(server, **fields)
    assert check(answer), answer
    assert answer.model == "smol"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize(("fields", "status", "code", "param"), REFUSED)
def test_what_cannot_be_answered_is_refused_as_openai_does(server, fields, status, code, param):
    with pytest.raises(openai.APIStatusError) as caught:
        chat(server, **fields)
    error = caught.value
    assert (error.status_code, error.code, error.param) == (status, code, param)
    assert error.type == "invalid_request_error"


def test_streams_come_in_pieces_and_tell_the_usage_where_asked(server):
    whole = text(chat(server))
    plain = list(chat(server, stream=True))
    assert "".join(it.choices[0].delta.content or "" for it in plain) == whole
    assert all(it.usage is None and it.choices for it in plain)
    *pieces, last = chat(server, stream=True, n=2, stream_options={"include_usage": True})
    assert (last.choices, last.usage.completion_tokens) == ([], 16)
    assert len({it.id for it in pieces}) == 1
    for number in (0, 1):
        mine = [it.choices[0] for it in pieces if it.choices[0].index == number]
        assert "".join(it.delta.content or "" for it in mine) == whole
        assert mine[-1].finish_reason


def test_a_required_call_comes_in_a_stream_as_well(server):
    with server.client.chat.completions.stream(
        model="smol", messages=[USER], max_tokens=40, temperature=0, tools=[WEATHER], tool_choice="required"
    ) as stream:
        assert called(stream.get_final_completion()) == ["weather"]


def test_completions_of_several_prompts(server):
    wanted = {"model": "smol", "max_tokens": 4, "temperature": 0}
    answer = server.client.completions.create(
        prompt=["The capital of France is", "One, two, three, four,"], logprobs=2, **wanted
    )
    assert "Paris" in answer.choices[0].text
    assert [it.index for it in answer.choices] == [0, 1]
    assert answer.usage.completion_tokens == 8
    found = answer.choices[0].logprobs
    assert "".join(found.tokens) == answer.choices[0].text
    assert [len(it) for it in found.top_logprobs] == [2] * 4
    assert found.text_offset[:2] == [0, len(found.tokens[0])]
    streamed = list(server.client.completions.create(prompt=[1, 2, 3], stream=True, **wanted))
    assert streamed[-1].choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="below"):
        server.client.completions.create(prompt=[10**6], **wanted)


def test_models_are_listed(server):
    (model,) = server.client.models.list().data
    assert (model.id, server.client.models.retrieve("smol").id) == ("smol", "smol")
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("other")


def plain(server, path, data=None, method=None, **headers) -> tuple[int, dict, dict]:
    request = urllib.request.Request(server.base + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, dict(response.headers), json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), json.load(error)


@pytest.mark.parametrize(
    ("path", "data", "method", "status"),
    [
        ("/v1/chat/completions", b"{", None, 400),
        ("/v1/chat/completions", b'{"model": "smol"', None, 400),
        ("/v1/chat/completions", b"x" * 2_000_000, None, 413),
        ("/v1/chat/completions", None, "GET", 405),
        ("/v1/chat/completions", None, "OPTIONS", 405),
        ("/slots", None, "GET", 404),
        ("/props", None, "GET", 404),
        ("/metrics", None, "GET", 404),
        ("/v1/embeddings", b'{"model": "smol", "input": "x"}', None, 404),
        ("/v1/models", None, "GET", 200),
        ("/health", None, "GET", 200),
    ],
)
def test_every_refusal_has_openais_form_and_no_page_may_read_it(server, path, data, method, status):
    code, headers, document = plain(server, path, data, method, Origin="http://elsewhere.example")
    assert code == status
    assert code == 200 or set(document["error"]) == {"message", "type", "param", "code"}
    assert not [name for name in headers if name.lower().startswith("access-control")]


def busy(engine) -> int:
    metrics = urllib.request.urlopen(engine.url + keys.PATH_METRICS, timeout=10).read().decode()
    return sum(int(float(it)) for it in re.findall(r"^llamacpp:requests_\w+ (\S+)$", metrics, re.MULTILINE))


def until(what, seconds=30) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


ENDLESS = {"max_tokens": openai.omit, "extra_body": {"ignore_eos": True}, "temperature": 1}


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_takes_too_long_is_ended_and_the_engine_with_it(engine, stream):
    with serving(engine, request_timeout_seconds=1) as server:
        with pytest.raises(openai.APIError) as caught:
            for _ in chat(server, stream=stream, **ENDLESS):
                pass
        assert "1 s" in str(caught.value)
        until(lambda: not busy(engine))
        path = "/v1/chat/completions"
        assert f'http_requests_total{{code="504",path="{path}"}} 1.0' in server.front.metrics()


@pytest.mark.parametrize("stream", [True, False])
def test_nobody_works_for_a_client_that_is_gone(engine, server, stream):
    body = {"model": "smol", "messages": [USER], "ignore_eos": True, "stream": stream}
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", server.front.port)) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        client.sendall(head.encode() + data)
        until(lambda: busy(engine) == 1)
    until(lambda: not busy(engine))
    until(lambda: not server.front.in_flight)


def test_a_full_server_says_when_to_come_again_and_its_probe_still_answers(engine):
    with ExitStack() as stack:
        server = stack.enter_context(serving(engine, max_waiting_requests=40))
        health = HealthServer(port=0)
        health.ready(lambda: server.front.is_alive() and engine.is_alive(), server.front.metrics)
        clients = [socket.create_connection(("127.0.0.1", server.front.port)) for _ in range(PARALLEL + 40)]
        data = json.dumps({"model": "smol", "messages": [USER], "ignore_eos": True, "stream": True}).encode()
        for client in clients:
            stack.callback(client.close)
            client.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
            )
        until(lambda: server.front.in_flight == PARALLEL + 40)
        with pytest.raises(openai.RateLimitError) as caught:
            chat(server)
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        for _ in range(5):
            started = time.monotonic()
            with urllib.request.urlopen(f"http://127.0.0.1:{health.port}{keys.PATH_HEALTH}", timeout=5) as response:
                assert response.status == 200
            assert time.monotonic() - started < 1
        with urllib.request.urlopen(f"http://127.0.0.1:{health.port}{keys.PATH_METRICS}", timeout=5) as response:
            metrics = response.read().decode()
        assert f'vllm:num_requests_running{{model_name="smol"}} {PARALLEL}.0' in metrics
        assert 'vllm:num_requests_waiting{model_name="smol"} 40.0' in metrics
        assert "llamacpp:requests_processing" in metrics
    until(lambda: not busy(engine))


def test_keys_are_asked_for_where_there_are_some(engine, tmp_path):
    (tmp_path / "alice").write_text("key-a")
    with serving(engine, ApiKeys(tmp_path)) as server:
        assert "Paris" in text(chat(server))
        code, headers, document = plain(server, "/v1/models")
        assert (code, headers["WWW-Authenticate"]) == (401, "Bearer")
        assert document["error"]["type"] == "invalid_request_error"
        with pytest.raises(openai.AuthenticationError) as caught:
            chat(server.__class__(client=server.client.with_options(api_key="key-b")))
        assert caught.value.code == "invalid_api_key"
        assert plain(server, "/health")[0] == 200


def test_what_is_asked_while_the_pod_stops_is_still_answered(engine):
    with serving(engine) as server:
        early: list = []
        asking = threading.Thread(
            target=lambda: early.append(chat(server, max_tokens=60, extra_body={"ignore_eos": True}))
        )
        asking.start()
        until(lambda: server.front.in_flight == 1)
        stopping = threading.Thread(target=server.front.drain, args=(1.0, time.monotonic() + 30))
        stopping.start()
        late = server.client.with_options(timeout=30).chat.completions.with_raw_response.create(
            model="smol", messages=[USER], max_tokens=4
        )
        assert late.headers["Connection"] == "close"
        assert late.parse().usage.completion_tokens == 4
        stopping.join(40)
        asking.join(5)
        assert early[0].usage.completion_tokens == 60
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", server.front.port))


def test_ipv6_and_ipv4_reach_the_same_server(server):
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    for address in ("127.0.0.1", "[::1]"):
        with urllib.request.urlopen(f"http://{address}:{server.front.port}/health", timeout=5) as response:
            assert response.status == 200
