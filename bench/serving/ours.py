"""Our server on ports of its own: `python -m bench.serving.ours MODEL THREADS PORT [MEMORY_LIMIT]`, the plan on stdin.

Engine and front are started as `tunesmith_server` starts them, but for what needs a pod: the artefact's download and
the probes. With a memory limit it behaves as in a container that has it.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from pathlib import Path

from bench.runs import free_port
from tunesmith_api.plan import ServingPlan
from tunesmith_server.engines.llama_cpp import LlamaEngine
from tunesmith_server.footprint import cache_bound
from tunesmith_server.front.fields import Limits
from tunesmith_server.front.server import Front
from tunesmith_store import memory

__all__: list[str] = []


def limited(limit: int) -> None:
    """Let the server see a container's memory limit, of which this process holds what it holds now."""
    folder = Path(tempfile.mkdtemp(prefix="bench"))
    memory.LIMITS, memory.STATISTICS = (folder / "memory.max",), (folder / "memory.stat",)
    memory.LIMITS[0].write_text(str(limit))
    memory.STATISTICS[0].write_text(f"anon {memory.own_bytes('RssAnon')}")


def main() -> None:
    """Serve until killed."""
    plan = ServingPlan.from_json(sys.stdin.read())
    model, threads, port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    if len(sys.argv) > 4:
        limited(int(sys.argv[4]))
    engine = LlamaEngine(plan, model, threads, port=free_port(), cache_bytes=cache_bound(plan, model, threads))
    limits = Limits((plan.name,), plan.context_length, plan.api.max_tokens)
    Front(engine.url, limits, plan.api, plan.parallel_requests).start(port)
    threading.Event().wait()


if __name__ == "__main__":
    main()
