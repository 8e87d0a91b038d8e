"""What vLLM's server is told, how much memory it gets, and what its end means: no vLLM is needed to say it."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from tunesmith_api.keys import Reason
from tunesmith_api.plan import ServingPlan
from tunesmith_server.engines.vllm import refusal
from tunesmith_server.engines.vllm_flags import (
    BLOCK,
    MAX_LORA_RANK,
    PROCESSES,
    ModelFacts,
    cache_bytes,
    environment,
    facts_of,
    flags,
)
from tunesmith_server.front.errors import ApiError
from tunesmith_server.front.metrics import with_engines
from tunesmith_server.front.vllm_fields import for_vllm
from tunesmith_store.errors import Retryable, UserError

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "hidden_size": 576, "vocab_size": 49152,
}  # fmt: skip
GPT2 = {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 100}
FACTS = ModelFacts("bfloat16", 270 << 20, 2 * 30 * 3 * 64 * 2, 49152)
GIB = 1 << 30


def plan(**changes) -> ServingPlan:
    values = {
        "name": "smol", "namespace": "n", "uid": "u", "revision": "smol-r1", "model_uri": "s3://m/m", "quantization": "None",
        "engine": "VLLM", "context_length": 1024, "parallel_requests": 2, "artifact_uri": "s3://m/a",
    }  # fmt: skip
    return ServingPlan(**{**values, **changes})


def told(*arguments) -> dict[str, str | None]:
    """Flags by name."""
    line = flags(*arguments)
    following = [*line[1:], "--"]
    return {
        it: None if after.startswith("--") else after
        for it, after in zip(line, following, strict=True)
        if it[:2] == "--"
    }


def test_on_cpu_flags_say_what_the_plan_says(tmp_path):
    found = told(plan(), tmp_path, FACTS, 8001, 123)
    assert (found["--model"], found["--served-model-name"]) == (str(tmp_path), "smol")
    assert (found["--host"], found["--port"]) == ("127.0.0.1", "8001")
    assert (found["--max-model-len"], found["--max-num-seqs"]) == ("1024", "2")
    assert (found["--dtype"], found["--load-format"]) == ("bfloat16", "safetensors")
    assert found["--kv-cache-memory-bytes"] == "123"
    forms = json.loads(found["--structured-outputs-config"])
    assert (forms["backend"], forms["disable_additional_properties"]) == ("guidance", True)
    assert "--enforce-eager" in found
    assert not {"--tensor-parallel-size", "--trust-remote-code"} & found.keys()
    silent = environment(plan(), 3)
    assert (silent["OMP_NUM_THREADS"], silent["VLLM_CPU_OMP_THREADS_BIND"]) == ("3", "nobind")
    assert (silent["VLLM_NO_USAGE_STATS"], silent["HF_HUB_OFFLINE"]) == ("1", "1")


def test_on_gpus_the_model_is_split_and_vllm_knows_the_memory_itself(tmp_path):
    found = told(plan(gpus=4), tmp_path, FACTS, 8001, 0)
    assert found["--tensor-parallel-size"] == "4"
    assert not {"--enforce-eager", "--kv-cache-memory-bytes"} & found.keys()
    assert "OMP_NUM_THREADS" not in environment(plan(gpus=4), 3)
    same = told(plan(), tmp_path, FACTS, 8001, 123)
    assert {it: found[it] for it in found if it in same} == {it: same[it] for it in same if it in found}


def test_only_a_server_for_adapters_has_places_for_them(tmp_path):
    assert "--enable-lora" not in told(plan(), tmp_path, FACTS, 8001, 1)
    found = told(plan(lora=True), tmp_path, FACTS, 8001, 1)
    assert found["--enable-lora"] is None
    assert found["--max-lora-rank"] == str(MAX_LORA_RANK)
    assert environment(plan(lora=True), 1)["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in environment(plan(), 1)
    facts = replace(FACTS, lora_bytes=10 << 20)
    scarce = FACTS.weight_bytes + PROCESSES + (100 << 20)
    assert (
        cache_bytes(plan(), facts, scarce)
        - cache_bytes(plan(lora=True, parallel_requests=1), facts, scarce + (40 << 20))
        > 0
    )
    with pytest.raises(UserError):
        cache_bytes(plan(lora=True), facts, scarce)


@pytest.mark.parametrize(
    ("config", "token_bytes", "vocabulary"),
    [
        (LLAMA, 2 * 30 * 3 * 64 * 4, 49152),
        ({"text_config": LLAMA, "architectures": ["X"]}, 2 * 30 * 3 * 64 * 4, 49152),
        ({**LLAMA, "head_dim": 128}, 2 * 30 * 3 * 128 * 4, 49152),
        (GPT2, 2 * 2 * 4 * 16 * 4, 100),
        ({"architectures": ["X"]}, 0, 0),
    ],
)
def test_what_a_folder_says_without_loading_it(tmp_path, config, token_bytes, vocabulary):
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": np.zeros((8, 8), np.float32), "b": np.zeros(3, np.float16)}, tmp_path / "model.safetensors")
    found = facts_of(tmp_path)
    assert (found.dtype, found.token_bytes, found.vocabulary) == ("float32", token_bytes, vocabulary)
    assert found.weight_bytes == (tmp_path / "model.safetensors").stat().st_size


def test_the_cache_holds_all_requests_at_their_longest_and_no_more():
    one = (1024 + BLOCK) * FACTS.token_bytes
    assert cache_bytes(plan(), FACTS, 64 * GIB) == 2 * max(one, 64 << 20)
    long = plan(context_length=8192, parallel_requests=8)
    assert cache_bytes(long, FACTS, 64 * GIB) == 8 * (8192 + BLOCK) * FACTS.token_bytes
    # requests wait for each other where memory is scarce
    assert cache_bytes(long, FACTS, 3 * GIB) == 3 * GIB - FACTS.weight_bytes - PROCESSES


def test_a_pod_too_small_for_one_request_says_how_much_it_takes():
    with pytest.raises(UserError, match=r"2048 MiB of memory are too few.*take 2134 MiB.*resources.memory") as caught:
        cache_bytes(plan(), FACTS, 2 * GIB)
    assert caught.value.reason == Reason.OUT_OF_MEMORY


TOO_LONG = (
    "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
    "  Value error, User-specified max_model_len (9000) is greater than the derived max_model_len (max_position_embeddings"
    "=8192.0 or model_max_length=None in model's config.json). To allow overriding this maximum, set the env var "
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1. [type=value_error]",
)


@pytest.mark.parametrize(
    ("status", "said", "killed", "kind", "reason", "words"),
    [
        (1, TOO_LONG, False, UserError, Reason.MODEL_INVALID, "lower spec.engine.contextLength"),
        (1, ["/usr/bin/python3: No module named vllm"], False, UserError, Reason.SERVER_FAILED, "no vLLM in it"),
        (1, ["python3: Error while finding module specification for 'vllm.entrypoints' (ModuleNotFoundError: No module named 'vllm')"], False, UserError, Reason.SERVER_FAILED, "no vLLM in it"),
        (1, ["ValueError: Model architectures ['OddForCausalLM'] are not supported for now."], False, UserError, Reason.MODEL_INVALID, "OddForCausalLM"),
        (1, ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"], False, UserError, Reason.OUT_OF_MEMORY, "spec.engine.gpus"),
        (1, ["(EngineCore pid=2) ValueError: No available memory for the KV cache blocks."], False, UserError, Reason.OUT_OF_MEMORY, "contextLength"),
        (1, ["vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue."], True, UserError, Reason.OUT_OF_MEMORY, "spec.resources.memory"),
        (-signal.SIGKILL, [], False, UserError, Reason.OUT_OF_MEMORY, "spec.resources.memory"),
        (-signal.SIGSEGV, [], False, Retryable, Reason.SERVER_FAILED, "SIGSEGV"),
        (1, ["OSError: the root cause", "RuntimeError: Engine core initialization failed. See root cause above."], False, Retryable, Reason.SERVER_FAILED, "the root cause"),
        (0, [], False, Retryable, Reason.SERVER_FAILED, "exit status 0"),
    ],
)  # fmt: skip
def test_the_end_of_the_server_is_told_in_words(status, said, killed, kind, reason, words):
    warned = (
        "(APIServer pid=1) WARNING 11-30 03:21:54 [x.py:2] limits can cause errors like `OSError: [Errno 24] Too many`"
    )
    found = refusal(status, [warned, *said], killed)
    assert "Errno" not in found.message
    assert "VLLM_ALLOW" not in found.message
    assert (type(found), found.reason) == (kind, reason)
    assert words in found.message


def test_fields_get_vllms_names():
    assert for_vllm({"repeat_penalty": 1.1, "top_k": 3}) == {"repetition_penalty": 1.1, "top_k": 3}
    assert for_vllm({"cache_prompt": True}) == {}
    salts = [for_vllm({"cache_prompt": False})["cache_salt"] for _ in range(2)]
    assert salts[0] != salts[1]
    with pytest.raises(ApiError, match="typical_p"):
        for_vllm({"typical_p": 0.5})


def test_metrics_of_both_are_told_once():
    ours = '# HELP a_total x\n# TYPE a_total counter\na_total{m="s"} 1.0\n'
    engines = (
        '# HELP a_total y\n# TYPE a_total counter\na_total{engine="0"} 1.0\n'
        "# HELP a_created y\n# TYPE a_created gauge\na_created 5.0\n"
        "# HELP b y\n# TYPE b gauge\nb 2.0\n"
    )
    assert with_engines(ours, engines) == ours + "# HELP b y\n# TYPE b gauge\nb 2.0\n"
    assert with_engines(ours, "plain 1\n") == ours + "plain 1\n"
