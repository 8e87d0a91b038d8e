"""How vLLM's server is told what a plan says: its flags and its environment. Called by `vllm`.

The same for CPU and for GPUs but for what only one of them has: `plan.gpus` decides.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.plan import ServingPlan
from tunesmith_api.v1alpha1.adapters import MOST_ADAPTERS
from tunesmith_server.predict.kinds import config_of
from tunesmith_store.errors import UserError
from tunesmith_store.weights import stored_tensors

__all__ = ["MAX_LORA_RANK", "ModelFacts", "cache_bytes", "environment", "facts_of", "flags"]

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
BLOCK = 128
"""Tokens that vLLM's CPU build sets aside at a time."""
CACHE_LEAST = 64 << 20
MAX_LORA_RANK = 64
LORA_PLACES = 4
"""Adapters that requests answered at once can be of."""
EMBEDDINGS = re.compile(r"embed|wte|lm_head")
PROCESSES = 1800 << 20
"""What vLLM's three processes hold beside weights and cache: 1,550 MiB were measured after the first answers."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model's folder says without loading it."""

    dtype: str
    """Number format of most weights, by vLLM's name; `auto` where it is none that it computes in."""
    weight_bytes: int
    token_bytes: int
    """Of keys and values, for each token of a context; 0 where config.json doesn't say."""
    vocabulary: int
    lora_bytes: int = 0
    """Of one place for an adapter of the largest rank."""


def facts_of(model: Path) -> ModelFacts:
    """Read config.json and the headers of the weights.

    Raises:
        UserError: config.json can't be read.
    """
    config = config_of(model)
    text = config.get("text_config") or config
    counted: Counter[str] = Counter()
    tensors = stored_tensors(model)
    for tensor in tensors:
        counted[tensor.dtype] += prod(tensor.shape)
    dtype = DTYPES.get(max(counted, key=lambda it: counted[it], default=""), "auto")
    sizes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    size = SIZES.get(dtype, 2)
    layers = sum(sum(it.shape) for it in tensors if len(it.shape) == 2 and not EMBEDDINGS.search(it.name))
    lora = layers * MAX_LORA_RANK * size
    return ModelFacts(dtype, sizes, _token_bytes(text, size), _number(text, "vocab_size"), lora)


def _number(config: dict[str, Any], *names: str) -> int:
    return next((value for name in names if isinstance(value := config.get(name), int)), 0)


def _token_bytes(config: dict[str, Any], size: int) -> int:
    layers = _number(config, "num_hidden_layers", "n_layer")
    heads = _number(config, "num_attention_heads", "n_head")
    width = _number(config, "head_dim") or _number(config, "hidden_size", "n_embd") // max(1, heads)
    return 2 * layers * (_number(config, "num_key_value_heads") or heads) * width * size


def cache_bytes(plan: ServingPlan, facts: ModelFacts, spare: int) -> int:
    """Return the memory for keys and values on CPU: what all requests at their longest take, and no more than is left.

    `spare` is what the pod may take yet, before the model is loaded.

    Raises:
        UserError: it doesn't suffice for one request.
    """
    blocks = -(-plan.context_length // BLOCK)
    one = max(CACHE_LEAST, (blocks + 1) * BLOCK * facts.token_bytes)
    loras = LORA_PLACES * facts.lora_bytes if plan.lora else 0
    left = spare - facts.weight_bytes - PROCESSES - loras
    if left < one:
        needed = (one + facts.weight_bytes + PROCESSES + loras) >> 20
        message = (
            f"{spare >> 20} MiB of memory are too few for vLLM: weights, context and its processes take {needed} MiB; "
            "raise spec.resources.memory, or lower spec.engine.contextLength"
        )
        raise UserError(Reason.OUT_OF_MEMORY, message, ExitCode.OUT_OF_MEMORY)
    return min(left, one * plan.parallel_requests)


def flags(plan: ServingPlan, model: Path, facts: ModelFacts, port: int, cache: int) -> list[str]:
    """Return the command line of vLLM's server; `cache` is of CPU alone."""
    # as llama.cpp's grammars have it: no white space without end, and no properties that a schema doesn't name
    schemas = {"backend": "guidance", "disable_any_whitespace": True, "disable_additional_properties": True}
    return [
        *("--model", str(model)),
        *("--served-model-name", plan.name),
        *("--host", "127.0.0.1"),
        *("--port", str(port)),
        *("--load-format", "safetensors"),
        *("--dtype", facts.dtype),
        *("--max-model-len", str(plan.context_length)),
        *("--max-num-seqs", str(plan.parallel_requests)),
        # a schema that can't be held to is refused, not passed over
        *("--structured-outputs-config", json.dumps(schemas)),
        "--enable-prompt-tokens-details",
        "--disable-uvicorn-access-log",
        "--disable-fastapi-docs",
        *_device(plan, cache),
        *(_LORA if plan.lora else ()),
    ]


_LORA = (
    "--enable-lora",
    *("--max-loras", str(LORA_PLACES)),
    *("--max-lora-rank", str(MAX_LORA_RANK)),
    *("--max-cpu-loras", str(MOST_ADAPTERS)),
)


def _device(plan: ServingPlan, cache: int) -> list[str]:
    if plan.gpus:
        return ["--tensor-parallel-size", str(plan.gpus)]
    # compiling takes minutes and a compiler, which the image has not
    return ["--enforce-eager", "--kv-cache-memory-bytes", str(cache)]


def environment(plan: ServingPlan, threads: int) -> dict[str, str]:
    """Return the variables of its process."""
    silent = {"VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_COLOR": "0"}
    if plan.lora:
        silent["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if plan.gpus:
        return silent
    # bound to cores, the pods of a node would share the first ones; and one core of two would be kept for HTTP
    return silent | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
