"""llama.cpp's own server, with nothing before it: `python -m bench.serving.bare MODEL THREADS PORT CACHE_MIB`, the plan on stdin.

It has the flags with which it is best here (docs/performance.md says which those are and what others cost): as many threads as
cores, as many slots as ours, and no fewer HTTP threads than clients.
"""

from __future__ import annotations

import sys
import threading

import xllamacpp

from tunesmith_api.plan import ServingPlan

__all__: list[str] = []

MOST_CLIENTS = 40


def main() -> None:
    """Serve until killed."""
    plan = ServingPlan.from_json(sys.stdin.read())
    model, threads, port, cache = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.model_alias = {plan.name}
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = port
    parameters.n_ctx = plan.context_length * plan.parallel_requests
    parameters.n_parallel = plan.parallel_requests
    parameters.cpuparams.n_threads = threads
    parameters.cpuparams_batch.n_threads = threads
    parameters.n_threads_http = MOST_CLIENTS
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cache_ram_mib = cache
    parameters.verbosity = 1
    _held = xllamacpp.Server(parameters)
    threading.Event().wait()


if __name__ == "__main__":
    main()
