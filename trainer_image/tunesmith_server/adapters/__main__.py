"""`python3 -m tunesmith_server.adapters`: the container of the Job that converts one adapter.

Reads the ServingPlan, makes the adapter's artefact unless it exists already, and reports in its termination message.
"""

from __future__ import annotations

import logging
import os
import sys

from tunesmith_api.keys import Reason
from tunesmith_api.reports import ModelRef, Outcome, TerminationReport
from tunesmith_server.adapters.make import make_adapter
from tunesmith_server.environment import cpu_threads, read_plan, scratch_folder
from tunesmith_server.jobs import run_job
from tunesmith_store.router import store_of

log = logging.getLogger("tunesmith.adapters")


def main() -> int:
    """Convert as the mounted plan says; return the exit code."""
    return run_job(_attempt, log)


def _attempt() -> TerminationReport:
    plan = read_plan(os.environ)
    made = make_adapter(plan, store_of(plan), scratch_folder(os.environ), cpu_threads(os.environ))
    model = ModelRef(
        uri=made.uri,
        digest=made.manifest.digest,
        size_bytes=made.manifest.size_bytes,
        base_digest=made.manifest.base_digest,
    )
    message = f"the adapter is in {made.uri}"
    return TerminationReport(outcome=Outcome.SUCCEEDED, reason=Reason.QUANTIZED, message=message, model=model)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # llama.cpp's threads would otherwise hold the interpreter's shutdown
