"""The quantize Job and the server, as processes, with the real model and a real S3 store."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from random import Random

import pytest

import assets
from tunesmith_api import keys
from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.plan import ServingPlan, StoragePlan
from tunesmith_api.reports import Outcome, TerminationReport
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_operator.core.modeldeployment.memory import need_of
from tunesmith_server.artifact import MODEL_FILE
from tunesmith_server.engines.llama_cpp import LlamaEngine
from tunesmith_server.footprint import measure
from tunesmith_server.quantizers import quantizer_of

QUESTIONS = ("What is the capital of France?", "What color is the sky?", "Name an animal that barks.", "What is 2 + 2?")


@pytest.fixture
def model_uri(smollm2_job) -> str:
    return smollm2_job.plan.model_uri


@pytest.fixture
def environment(object_store, tmp_path, model_uri):
    def build(**changes) -> dict[str, str]:
        values = {
            "name": "smol", "namespace": "n", "uid": "u", "revision": "smol-r1", "model_uri": model_uri, "quantization": "Q8_0",
            "engine": "LlamaCpp", "context_length": 256, "parallel_requests": 2, "artifact_uri": f"{model_uri}/made",
            "storage": StoragePlan(endpoint_url=object_store.endpoint_url),
        }  # fmt: skip
        plan = tmp_path / "plan.json"
        plan.write_text(ServingPlan(**{**values, **changes}).to_json())
        ours = {
            keys.ENV_PLAN: str(plan),
            keys.ENV_SCRATCH: str(tmp_path / "scratch"),
            keys.ENV_TERMINATION_LOG: str(tmp_path / "termination.json"),
            keys.ENV_CPU_LIMIT: "1000",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        return {**os.environ, **object_store.credentials.environment(), **ours}

    return build


def quantize(environment) -> tuple[int, TerminationReport]:
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith_server.quantize"], env=environment, check=False, capture_output=True
    )
    return done.returncode, TerminationReport.from_json(Path(environment[keys.ENV_TERMINATION_LOG]).read_text())


def ask(base: str, question: str, **extra) -> dict:
    body = {
        "model": "smol",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 12,
        "temperature": 0,
        **extra,
    }
    request = urllib.request.Request(
        f"{base}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def text_of(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


def test_eight_bits_take_half_the_space_and_give_the_same_answers(smollm2_job):
    plan, report = smollm2_job.plan, smollm2_job.report
    assert report.reason == Reason.QUANTIZED
    assert report.model.uri.startswith(f"{plan.artifact_uri}/q8_0-")
    answers, sizes = {}, {}
    for method in ("None", "Q8_0"):
        path = smollm2_job.file(method)
        sizes[method] = path.stat().st_size
        engine = LlamaEngine(plan, path, threads=1, port=free_port())
        answers[method] = [text_of(ask(engine.url, question)) for question in QUESTIONS]
    assert "Paris" in answers["Q8_0"][0]
    same = sum(left == right for left, right in zip(answers["None"], answers["Q8_0"], strict=True))
    assert same >= len(QUESTIONS) - 1, answers
    assert sizes["Q8_0"] < 0.6 * sizes["None"]
    assert sizes["Q8_0"] == pytest.approx(report.model.size_bytes, abs=20_000), "a Modelfile beside it"


def test_what_the_operator_computes_of_the_manifest_leaves_the_same_for_the_program_whatever_the_context(quantized):
    plan, path, report = quantized["Q8_0"]
    left = []
    for context, parallel in ((256, 2), (4096, 2)):
        sized = plan.model_copy(update={"context_length": context, "parallel_requests": parallel})
        left.append(need_of(sized, report.model).least - measure(sized, path, threads=1))
    assert min(left) > 128 << 20, "interpreter, front, and a body of the largest size"
    assert abs(left[0] - left[1]) < 16 << 20, [it >> 20 for it in left]


@pytest.mark.parametrize("family", ["Qwen3", "Mistral", "Gemma3"])
def test_families_that_share_a_module_with_a_newer_one_are_converted_and_load(family, smollm2_job, tmp_path):
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(assets.smollm2())
    config = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    sizes = config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
    )  # fmt: skip
    folder = tmp_path / "model"
    transformers.AutoModelForCausalLM.from_config(sizes).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    quantizer_of(EngineType.LLAMA_CPP, QuantizationMethod.Q8_0)(folder, tmp_path / "scratch", 1).make(
        QuantizationMethod.Q8_0, tmp_path
    )
    assert measure(smollm2_job.plan, tmp_path / MODEL_FILE, threads=1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_finished_artefact_is_not_made_again(smollm2_job, environment, object_store):
    plan, first = smollm2_job.plan, smollm2_job.report
    key = f"{first.model.uri.removeprefix('s3://served-models/')}/{MODEL_FILE}"
    before = object_store.client().head_object(Bucket="served-models", Key=key)["LastModified"]
    for revision in (plan.revision, "smol-r2"):  # one that has it, and one that finds it
        code, report = quantize(env := environment(artifact_uri=plan.artifact_uri, revision=revision))
        assert (code, report.model) == (0, first.model)
        assert not (Path(env[keys.ENV_SCRATCH]) / "model").exists(), "the model was fetched again"
    after = object_store.client().head_object(Bucket="served-models", Key=key)["LastModified"]
    assert after == before


def test_a_missing_model_and_a_broken_one_are_told_apart(environment, object_store, bucket):
    code, report = quantize(environment(model_uri=f"{bucket}/nothing"))
    assert (code, report.outcome, report.reason) == (ExitCode.INVALID_INPUT, Outcome.FAILED, Reason.MODEL_NOT_FOUND)
    object_store.put_text('{"architectures": ["NoSuchModel"], "model_type": "llama"}', f"{bucket}/broken/config.json")
    code, report = quantize(environment(model_uri=f"{bucket}/broken", artifact_uri=f"{bucket}/out"))
    assert (code, report.reason) == (ExitCode.INVALID_INPUT, Reason.MODEL_INVALID)
    assert "GGUF" in report.message


def test_a_bucket_that_may_only_be_read_is_named(environment, object_store, model_uri, bucket):
    env = {**environment(artifact_uri=f"{bucket}/out"), **object_store.read_only.environment()}
    code, report = quantize(env)
    assert (code, report.reason) == (ExitCode.STORAGE_DENIED, Reason.STORAGE_UNWRITABLE)
    assert bucket.removeprefix("s3://") in report.message


def test_the_server_is_ready_after_an_answer_streams_and_drains(smollm2_job, environment):
    plan = smollm2_job.plan
    env = environment(artifact_uri=plan.artifact_uri)
    process = subprocess.Popen([sys.executable, "-m", "tunesmith_server"], env=env)
    base, health = f"http://127.0.0.1:{keys.PORT_SERVER}", f"http://127.0.0.1:{keys.PORT_HEALTH}{keys.PATH_HEALTH}"
    try:
        wait_ready(health, process)
        models = json.load(urllib.request.urlopen(f"{base}/v1/models"))
        assert [entry["id"] for entry in models["data"]] == ["smol"]
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(base, "Hi", messages="not a list")
        assert refused.value.code == 400
        assert list(stream(base, "Count to five."))[-1] == "[DONE]"

        answers: list[dict] = []
        long_request = threading.Thread(target=lambda: answers.append(ask(base, "Tell a story.", max_tokens=120)))
        long_request.start()
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        long_request.join(timeout=30)
        assert answers, "the request in flight was cut off"
        assert answers[0]["usage"]["completion_tokens"] > 12
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()


# a container's limit and what it holds, as its cgroup says; then the server as it is
WITH_LIMIT = """
import sys
from pathlib import Path
from tunesmith_store import memory
memory.LIMITS, memory.STATISTICS = (Path(sys.argv[1]),), (Path(sys.argv[2]),)
from tunesmith_server.__main__ import main
main()
"""
MARGIN, ROOM = 96 << 20, 12 << 20


def test_different_prompts_fill_what_the_pod_has_left_and_no_more(smollm2_job, environment, tmp_path):
    plan, path = smollm2_job.plan, smollm2_job.file("Q8_0")
    limit, held = tmp_path / "memory.max", tmp_path / "memory.stat"
    limit.write_text(str(measure(plan, path, 1) + MARGIN + ROOM))
    held.write_text("anon 0")
    process = subprocess.Popen(
        [sys.executable, "-c", WITH_LIMIT, str(limit), str(held)],
        env=environment(artifact_uri=plan.artifact_uri), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_ready(f"http://127.0.0.1:{keys.PORT_HEALTH}{keys.PATH_HEALTH}", process)
        base = f"http://127.0.0.1:{keys.PORT_SERVER}"
        for number in range(4):  # both slots are filled, all buffers touched
            ask(base, story(number), max_tokens=1)
        before = resident_bytes(process.pid)
        tokens = [ask(base, story(number), max_tokens=1)["usage"]["prompt_tokens"] for number in range(4, 18)]
        grown = resident_bytes(process.pid) - before
        assert sum(tokens) * STATE_BYTES > 3 * ROOM, "these prompts would not have filled it"
        assert grown < 1.5 * ROOM
        again = ask(base, story(16), max_tokens=1)  # no slot holds it any more
        assert again["timings"]["cache_n"] > 0.8 * tokens[16 - 4]
    finally:
        process.kill()
        log = process.communicate()[0]
    said = re.search(r"prompt cache: at most (\d+) MiB", log)
    assert said, log
    assert int(said[1]) == pytest.approx(ROOM >> 20, abs=2)


STATE_BYTES = 30 * 2 * 3 * 64 * 2
"""Of a token: keys and values of SmolLM2's 30 layers, 3 heads of 64 numbers of 16 bits."""


def story(number: int) -> str:
    random = Random(number)
    return " ".join(
        f"{random.choice(('stone', 'river', 'lamp', 'window'))} {random.randint(10, 99)}" for _ in range(45)
    )


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def wait_ready(health: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        try:
            if urllib.request.urlopen(health, timeout=2).status == 200:
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("not ready in 60 s")


def stream(base: str, question: str):
    body = {"model": "smol", "messages": [{"role": "user", "content": question}], "max_tokens": 8, "stream": True}
    request = urllib.request.Request(
        f"{base}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        for line in response:
            if line.startswith(b"data: "):
                yield line.removeprefix(b"data: ").strip().decode()
