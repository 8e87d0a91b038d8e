"""vLLM's CPU build as a peer, where its environment is on this machine: TUNESMITH_VLLM names it. Called by `figures`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import assets
from bench.runs import Skipped, free_port
from bench.serving.servers import MODEL_NAME, Server, cores, running
from tunesmith_api.plan import ServingPlan

__all__ = ["served"]

ENVIRONMENT = "TUNESMITH_VLLM"
READY_SECONDS = 600.0
KV_BYTES = 1 << 30


@contextmanager
def served(plan: ServingPlan) -> Iterator[Server]:
    """The same model as it was published, in its 16 bits.

    Raises:
        Skipped: there is no environment with vLLM.
    """
    folder = Path(os.environ.get(ENVIRONMENT) or "/nonexistent")
    python = folder / "bin" / "python"
    if not python.exists():
        raise Skipped(f"there is no vLLM here: {ENVIRONMENT} names no environment that has it")
    port = free_port()
    command = [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(assets.smollm2()), "--served-model-name", MODEL_NAME,
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--max-model-len", str(plan.context_length),
        "--max-num-seqs", str(plan.parallel_requests), "--enforce-eager", "--kv-cache-memory-bytes", str(KV_BYTES),
    ]  # fmt: skip
    silent = {"VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    # bound to cores it would keep one of two for HTTP
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(cores())}
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with running(command, port, variables | silent | bound, READY_SECONDS) as server:
        yield server
