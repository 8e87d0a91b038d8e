"""Accuracy of the model before tuning, measured on this machine: the conversion, engine and prompts of a deployed one."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import assets
from demo import evaluation
from demo.evaluation import accuracy
from tunesmith_api.plan import ServingPlan
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_server.engines.llama_cpp import LlamaEngine
from tunesmith_server.quantizers.conversion import to_gguf


def base_gguf() -> Path:
    """The model before tuning, 16 bits, converted once."""
    folder = assets.smollm2()
    output = folder.with_name(f"{folder.name}.gguf")
    if not output.exists():
        scratch = output.with_suffix(f".{os.getpid()}")
        to_gguf(folder, scratch)
        scratch.rename(output)
    return output


def base_accuracy(rows: Path, tick: Callable[[], None]) -> tuple[float, int]:
    """Accuracy before tuning, measured once for this model, these tweets and this way of asking: it can't change."""
    gguf = base_gguf()
    digest = hashlib.sha256(rows.read_bytes() + Path(evaluation.__file__).read_bytes())
    digest.update(f"{gguf.name} {gguf.stat().st_size}".encode())
    known = gguf.with_name(f"{gguf.stem}-accuracy-{digest.hexdigest()[:16]}.json")
    if not known.exists():
        share, examples = _local_accuracy(gguf, rows, tick)
        scratch = known.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps({"accuracy": share, "examples": examples}))
        scratch.rename(known)
    record = json.loads(known.read_text())
    return float(record["accuracy"]), int(record["examples"])


def _local_accuracy(gguf: Path, rows: Path, tick: Callable[[], None]) -> tuple[float, int]:
    """Serve a GGUF file in this process and ask it about every tweet."""
    plan = ServingPlan(
        name="model",
        namespace="local",
        uid="local",
        revision="local",
        model_uri="s3://local",
        quantization=QuantizationMethod.NONE,
        engine=EngineType.LLAMA_CPP,
        context_length=512,
        parallel_requests=2,
        artifact_uri="s3://local",
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    engine = LlamaEngine(plan, gguf, threads=len(os.sched_getaffinity(0)), port=port)
    return accuracy(engine.url, plan.name, rows, tick)
