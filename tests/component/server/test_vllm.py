"""Engine VLLM with the real vLLM on CPU: behind the front as a pod has it, asked what LlamaCpp is asked.

`make vllm` makes vLLM's environment, which is none of the development environment's, and names it in TUNESMITH_VLLM.
"""

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import assets
from support.openaicalls import ANSWERED, CONTEXT, PARALLEL, REFUSED, USER, WEATHER, called, chat, serving, text
from tunesmith_api import keys
from tunesmith_api.keys import Reason
from tunesmith_api.plan import ServingPlan
from tunesmith_api.reports import TerminationReport
from tunesmith_api.v1alpha1.api import Api
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_server.engines.base import LocalAdapter
from tunesmith_server.engines.vllm import VllmEngine
from tunesmith_server.front.server import Front
from tunesmith_server.serving import Serving
from tunesmith_store.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = os.environ.get("TUNESMITH_VLLM", "")
PYTHON = f"{ENVIRONMENT}/bin/python"
pytestmark = [
    pytest.mark.skipif(
        not ENVIRONMENT, reason="vLLM has an environment of its own: `make vllm` makes it and runs this"
    ),
    pytest.mark.timeout(1200),
]
PLAN = {
    "name": "smol", "namespace": "n", "uid": "u", "revision": "smol-r1", "model_uri": "pvc://models/smol", "quantization": "None",
    "engine": "VLLM", "context_length": CONTEXT, "parallel_requests": PARALLEL, "artifact_uri": "pvc://models/made",
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def engine():
    started = VllmEngine(ServingPlan(**PLAN), assets.smollm2(), 1, free_port(), PYTHON)
    yield started
    started.close()


def front_of(engine, **api):
    return serving(engine, kind=EngineType.VLLM, timeout=300, **api)


@pytest.fixture(scope="module")
def server(engine):
    assert engine.answers()
    with front_of(engine) as found:
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


def test_what_only_llama_cpp_knows_is_renamed_or_refused(server):
    assert text(chat(server, extra_body={"repeat_penalty": 1.1, "top_k": 5, "min_p": 0.1, "cache_prompt": True}))
    with pytest.raises(openai.BadRequestError, match="typical_p"):
        chat(server, extra_body={"typical_p": 0.9})


def test_streams_come_in_pieces_and_tell_the_usage_where_asked(server):
    whole = text(chat(server))
    plain = list(chat(server, stream=True))
    assert "".join(it.choices[0].delta.content or "" for it in plain) == whole
    assert all(it.usage is None and it.choices for it in plain)
    *pieces, last = chat(server, stream=True, n=2, stream_options={"include_usage": True})
    assert (last.choices, last.usage.completion_tokens) == ([], 16)
    assert len({it.id for it in pieces}) == 1
    with server.client.chat.completions.stream(
        model="smol", messages=[USER], max_tokens=40, temperature=0, tools=[WEATHER], tool_choice="required"
    ) as stream:
        assert called(stream.get_final_completion()) == ["weather"]


def test_completions_of_several_prompts(server):
    wanted = {"model": "smol", "max_tokens": 4, "temperature": 0}
    prompts = ["The capital of France is", "One, two, three, four,"]
    answer = server.client.completions.create(prompt=prompts, logprobs=2, **wanted)
    assert "Paris" in answer.choices[0].text
    assert [it.index for it in answer.choices] == [0, 1]
    assert answer.usage.completion_tokens == 8
    found = answer.choices[0].logprobs
    assert "".join(found.tokens) == answer.choices[0].text
    assert [len(it) for it in found.top_logprobs] == [2] * 4
    assert found.text_offset[:2] == [0, len(found.tokens[0])]
    streamed = list(server.client.completions.create(prompt=[1, 2, 3], stream=True, logprobs=1, **wanted))
    assert streamed[-1].choices[0].finish_reason == "length"
    assert streamed[0].choices[0].logprobs.tokens == [streamed[0].choices[0].text]
    with pytest.raises(openai.BadRequestError, match="below"):
        server.client.completions.create(prompt=[10**6], **wanted)


def test_a_prompt_that_was_asked_before_is_found_unless_that_is_refused(server):
    # whole blocks of 128 tokens are kept
    messages = [{"role": "user", "content": "Count: " + " ".join(map(str, range(100)))}]

    def cached(**body):
        usage = chat(server, messages=messages, max_tokens=1, extra_body=body).usage
        return usage.prompt_tokens_details.cached_tokens

    assert [cached(cache_prompt=True), cached(cache_prompt=False)] == [0, 0]
    assert cached(cache_prompt=True) > 100


def test_each_metric_is_there_once_ours_where_both_have_it(server):
    chat(server)
    metrics = server.front.metrics()
    heads = re.findall(r"^# TYPE (\S+)", metrics, re.MULTILINE)
    assert len(heads) == len(set(heads))
    assert re.findall(r"^vllm:num_requests_running\{(.*)\}", metrics, re.MULTILINE) == ['model_name="smol"']
    assert "vllm:kv_cache_usage_perc{" in metrics


def running(engine) -> float:
    with urllib.request.urlopen(engine.url + keys.PATH_METRICS, timeout=20) as response:
        return sum(
            map(float, re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", response.read().decode(), re.MULTILINE))
        )


def until(what, seconds=300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("stream", [True, False])
def test_nobody_works_for_a_client_that_is_gone(engine, server, stream):
    body = json.dumps({"model": "smol", "messages": [USER], "ignore_eos": True, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", server.front.port)) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        until(lambda: running(engine) == 1)
    until(lambda: not running(engine))
    until(lambda: not server.front.in_flight)


def test_it_listens_on_loopback_only(engine):
    """All of what the server and its workers listen on."""
    mine = {pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if session(pid) == engine._process.pid}
    assert len(mine) >= 3
    inodes = set()
    for pid in mine:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            inodes.update(re.findall(r"socket:\[(\d+)\]", os.readlink(entry)))
    listening = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    addresses = {row[1].partition(":")[0] for row in listening if row[3] == "0A" and row[9] in inodes}
    assert addresses == {"0100007F"}


def session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def test_what_is_asked_while_the_pod_stops_is_still_answered(engine):
    with front_of(engine) as server:
        early: list = []
        asking = threading.Thread(
            target=lambda: early.append(chat(server, max_tokens=30, extra_body={"ignore_eos": True}))
        )
        asking.start()
        until(lambda: server.front.in_flight == 1)
        stopping = threading.Thread(target=server.front.drain, args=(1.0, time.monotonic() + 300))
        stopping.start()
        late = server.client.chat.completions.with_raw_response.create(model="smol", messages=[USER], max_tokens=2)
        assert late.headers["Connection"] == "close"
        stopping.join(310)
        asking.join(5)
        assert early[0].usage.completion_tokens == 30


def test_a_context_longer_than_the_model_reads_is_refused_with_the_field():
    with pytest.raises(UserError, match=r"lower spec\.engine\.contextLength.*8192") as caught:
        VllmEngine(ServingPlan(**{**PLAN, "context_length": 100_000}), assets.smollm2(), 1, free_port(), PYTHON)
    assert caught.value.reason == Reason.MODEL_INVALID


def test_a_worker_that_dies_is_the_engines_failure(engine):
    assert engine.failure is None
    (worker,) = [
        pid
        for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
        if session(pid) == engine._process.pid and b"Worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(worker, signal.SIGSEGV)
    until(lambda: engine.failure is not None)
    assert engine.failure.reason == Reason.SERVER_FAILED
    assert not engine.is_alive()


def adapter(folder, seed):
    """A LoRA adapter that changes every answer, as PEFT writes it."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(assets.smollm2())
    tuned = get_peft_model(
        base, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    for name, weights in tuned.named_parameters():
        if "lora_B" in name:
            weights.data.normal_(0, 0.3)
    place = folder / str(seed)
    tuned.save_pretrained(place)
    return place


def test_adapters_come_and_go_and_each_answers_its_own_way(tmp_path):
    one, two = (LocalAdapter(name, adapter(tmp_path, seed), name) for name, seed in (("one", 1), ("two", 2)))
    broken = LocalAdapter("broken", tmp_path, "broken")
    plan = ServingPlan(**PLAN, lora=True)
    port = free_port()
    started = VllmEngine(plan, assets.smollm2(), 1, port, PYTHON, adapters=(one, broken))
    process = started._process.pid
    serving = Serving(plan, SimpleNamespace(start=lambda adapters: started))
    try:
        serving.start((one, broken))
        assert serving._engine.load((one, broken)) == (one,)
        front = Front(started.url, serving.limits_of(started), plan.api, PARALLEL)
        front.start(0)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{front.port}/v1", api_key="-", max_retries=0, timeout=300)

        def said(model):
            answer = client.completions.create(
                model=model, prompt="The capital of France is", max_tokens=6, temperature=0
            )
            assert answer.model == model
            return answer.choices[0].text

        first = said("one")
        assert "Paris" in said("smol") != first
        with pytest.raises(openai.NotFoundError):
            said("two")
        serving.change((one, two), front)
        assert len({said("smol"), said("one"), said("two")}) == 3
        assert said("one") == first
        assert serving.digests == {"one": "one", "two": "two"}
        serving.change((two,), front)
        with pytest.raises(openai.NotFoundError):
            said("one")
        assert [it.id for it in client.models.list().data] == ["smol", "two"]
        # of vLLM itself, too: what was let go takes none of its places
        with urllib.request.urlopen(f"{started.url}/v1/models", timeout=20) as response:
            assert {it["id"] for it in json.load(response)["data"]} == {"smol", "two"}
        assert (started._process.pid, started._process.poll()) == (process, None)
        front.stop()
    finally:
        started.close()


@pytest.fixture
def pod(tmp_path):
    """Starts one of our programs in vLLM's environment, as the image has it, with a claim for the model."""
    claim = tmp_path / "volumes" / "models"
    claim.mkdir(parents=True)
    (claim / "smol").symlink_to(assets.smollm2())
    plan = tmp_path / "plan.json"
    plan.write_text(ServingPlan(**PLAN, api=Api(termination_grace_period_seconds=120)).to_json())
    ours = {
        "PYTHONPATH": f"{ROOT}/crds:{ROOT}/trainer_image",
        keys.ENV_PLAN: str(plan),
        keys.ENV_SCRATCH: str(tmp_path / "scratch"),
        keys.ENV_VOLUMES: str(tmp_path / "volumes"),
        keys.ENV_TERMINATION_LOG: str(tmp_path / "report.json"),
    }
    started = []

    def start(module):
        log = (tmp_path / f"{module}.log").open("w")
        process = subprocess.Popen([PYTHON, "-m", module], env=os.environ | ours, stdout=log, stderr=log)
        started.append(process)
        return process

    yield start, tmp_path
    for process in started:
        process.kill()
        process.wait()


def test_a_pod_makes_its_artefact_serves_it_and_finishes_what_is_in_flight(pod):
    start, folder = pod
    quantizing = start("tunesmith_server.quantize")
    assert quantizing.wait(300) == 0, (folder / "report.json").read_text()
    report = TerminationReport.from_json((folder / "report.json").read_text())
    assert report.reason == Reason.QUANTIZED
    serves = start("tunesmith_server")

    def is_ready():
        assert serves.poll() is None, (folder / "tunesmith_server.log").read_text()[-3000:]
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{keys.PORT_HEALTH}{keys.PATH_HEALTH}", timeout=5
            ) as response:
                return response.status == 200
        except OSError:
            return False

    until(is_ready, 600)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{keys.PORT_SERVER}/v1", api_key="-", max_retries=0, timeout=120)
    stream = client.chat.completions.create(
        model="smol", messages=[USER], max_tokens=20, stream=True, extra_body={"ignore_eos": True}
    )
    first = next(iter(stream))
    serves.terminate()
    assert [*stream][-1].choices[0].finish_reason == "length", first
    assert serves.wait(120) == 0
