"""Starts servers as processes of their own and says how to reach them. Used by `figures`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.runs import free_port
from tunesmith_api.plan import ServingPlan
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_api.v1alpha1.quantization import QuantizationMethod

__all__ = ["MODEL_NAME", "Server", "bare", "cores", "ours", "plan_of", "running"]

MODEL_NAME = "smollm2"
READY_SECONDS = 180.0
CACHE_MIB = 512
"""Of the bare server: about what ours takes for past prompts."""


@dataclass(frozen=True)
class Server:
    """One that answers."""

    url: str
    pid: int

    def memory(self, name: str) -> int:
        """A line of /proc/PID/status, in bytes: VmHWM is the most that was ever resident."""
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines())
        return int(lines[name].split()[0]) * 1024


def cores() -> int:
    """How many cores there are to compute on."""
    return len(os.sched_getaffinity(0))


def plan_of(context: int, parallel: int) -> ServingPlan:
    """What our server is told."""
    return ServingPlan(
        name=MODEL_NAME, namespace="bench", uid="bench", revision="bench-r1", model_uri="s3://bench/model",
        quantization=QuantizationMethod.Q8_0, engine=EngineType.LLAMA_CPP, context_length=context,
        parallel_requests=parallel, artifact_uri="s3://bench/model/quantized",
    )  # fmt: skip


@contextmanager
def ours(model: Path, plan: ServingPlan, limit: int = 0) -> Iterator[Server]:
    """Our engine LlamaCpp behind our front; with a memory limit it keeps to that."""
    port = free_port()
    command = [sys.executable, "-m", "bench.serving.ours", str(model), str(cores()), str(port)]
    with running([*command, *([str(limit)] if limit else [])], port, stdin=plan.to_json()) as server:
        yield server


@contextmanager
def bare(model: Path, plan: ServingPlan) -> Iterator[Server]:
    """llama.cpp's own server."""
    port = free_port()
    command = [sys.executable, "-m", "bench.serving.bare", str(model), str(cores()), str(port), str(CACHE_MIB)]
    with running(command, port, stdin=plan.to_json()) as server:
        yield server


@contextmanager
def running(
    command: Sequence[str],
    port: int,
    environment: Mapping[str, str] | None = None,
    patience: float = READY_SECONDS,
    stdin: str = "",
) -> Iterator[Server]:
    """A server as a process with all that it starts, once it answers.

    Raises:
        RuntimeError: it ended, or doesn't answer.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            assert process.stdin is not None
            process.stdin.write(stdin.encode())
            process.stdin.close()
            if not _answers(f"http://127.0.0.1:{port}/v1/models", process, patience):
                log.seek(0)
                said = log.read().decode(errors="replace")[-2000:]
                raise RuntimeError(f"{' '.join(command[:4])} does not answer within {patience:.0f} s:\n{said}")
            yield Server(f"http://127.0.0.1:{port}", process.pid)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(url: str, process: subprocess.Popen[bytes], patience: float) -> bool:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return True
        except OSError:
            time.sleep(0.1)
    return False
