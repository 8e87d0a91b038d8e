"""How much memory a model takes while it is served, and how much that leaves for llama.cpp's prompt cache.

llama.cpp must know the bound of its cache before it loads the model; what the model takes is known after that. So a
process of its own loads it first: `python3 -m tunesmith_server.footprint MODEL THREADS`, the plan on stdin. `__main__`
calls `cache_bound`.
"""

from __future__ import annotations

import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

from tunesmith_api.plan import ServingPlan
from tunesmith_store.memory import memory_limit_bytes, own_bytes, spare_memory

__all__ = ["cache_bound", "known_cache_bound", "measure", "prompt_cache_bytes", "writable_bytes"]

log = logging.getLogger("tunesmith.server")

CACHE_MOST = 8 << 30
"""What llama.cpp takes unless told: more than this is seldom asked for again."""
SHARE_WITHOUT_LIMIT = 0.25
"""Of what the machine has left, where nobody says how much of it is this pod's."""
MARGIN_SHARE = 0.1
MARGIN_LEAST = 96 << 20
"""Requests and answers on their way, logs, and what the allocator holds back, are in neither measure."""
GLIBC_STACK = 2 << 20
"""Of a thread, where the limit of stacks is none."""


def prompt_cache_bytes(spare: int, limit: int, footprint: int) -> int:
    """Return the most that the prompt cache may take; 0 where nothing is left for it.

    `spare` is what this container may take yet, before the model is loaded; `limit` its memory limit, or 0.
    """
    left = spare - footprint
    left = left - max(MARGIN_LEAST, int(limit * MARGIN_SHARE)) if limit else int(left * SHARE_WITHOUT_LIMIT)
    return max(0, min(left, CACHE_MOST))


def cache_bound(plan: ServingPlan, model: Path, threads: int) -> int:
    """Return the most that the prompt cache may take beside this model, and log why."""
    footprint = measure(plan, model, threads)
    if footprint is None:
        log.warning("no prompt cache: what the model takes could not be measured")
        return 0
    spare, limit = spare_memory(), memory_limit_bytes()
    bound = prompt_cache_bytes(spare, limit, footprint)
    log.info(
        "prompt cache: %s (memory limit %s, of which %d MiB are free, and the model takes %d MiB)",
        f"at most {bound >> 20} MiB" if bound >> 20 else "off, raise spec.resources.memory to have one",
        f"{limit >> 20} MiB" if limit else "none",
        spare >> 20,
        footprint >> 20,
    )
    return bound


def known_cache_bound(footprint: int) -> int:
    """Return the most that the prompt cache may take beside a model of which is known what it takes."""
    return prompt_cache_bytes(spare_memory(), memory_limit_bytes(), footprint)


def measure(plan: ServingPlan, model: Path, threads: int) -> int | None:
    """Return the bytes that weights, KV cache and compute buffers take; None where the model can't be loaded."""
    command = [sys.executable, "-m", "tunesmith_server.footprint", str(model), str(threads)]
    done = subprocess.run(command, input=plan.to_json(), stdout=subprocess.PIPE, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip().isdigit() else None


def _main(model: Path, threads: int) -> None:
    from tunesmith_server.engines.llama_cpp import LlamaEngine

    plan = ServingPlan.from_json(sys.stdin.read())
    before = writable_bytes()
    _held = LlamaEngine(plan, model, threads, port=0)  # letting go of it would wait for its threads
    sys.stdout.write(str(writable_bytes() - before + _mapped_bytes(model)))
    sys.stdout.flush()
    os._exit(0)


def writable_bytes() -> int:
    """Return the size of this process's own memory, touched or not yet, without the stacks of its threads."""
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    stack = GLIBC_STACK if stack == resource.RLIM_INFINITY else stack
    return own_bytes("VmData") - (len(os.listdir("/proc/self/task")) - 1) * stack


def _mapped_bytes(path: Path) -> int:
    """Return how much of a file is mapped into memory."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(f" {path}"):
            start, _, end = line.split(" ", 1)[0].partition("-")
            total += int(end, 16) - int(start, 16)
    return total


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
