"""`python3 -m tunesmith_server`: the container of a server pod.

Fetches the artefact, loads it, answers one question itself, and only then says that it is ready. SIGTERM lets the
requests in flight finish.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time

from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.reports import Outcome, TerminationReport
from tunesmith_server.artifact import fetch_artifact
from tunesmith_server.engines.base import Engine
from tunesmith_server.engines.registry import start_engine
from tunesmith_server.environment import cpu_threads, read_plan, scratch_folder, write_report
from tunesmith_server.health import HealthServer
from tunesmith_store.errors import Failure, Retryable
from tunesmith_store.store import S3Store

log = logging.getLogger("tunesmith.server")

# Services stop sending some moments after a pod is told to stop: new requests still come in that time
ENDPOINT_REMOVAL_SECONDS = 3.0
DRAIN_SECONDS = 25.0


def main() -> int:
    """Serve until SIGTERM; return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    health = HealthServer()
    try:
        engine = _start(health)
    except Failure as failure:
        log.error("%s: %s", failure.reason, failure.message)
        write_report(TerminationReport(outcome=Outcome.FAILED, reason=failure.reason, message=failure.message))
        return int(failure.exit_code)
    stop.wait()
    health.drain()
    _drain(engine)
    log.info("stopped")
    return int(ExitCode.SUCCESS)


def _start(health: HealthServer) -> Engine:
    plan = read_plan(os.environ)
    started = time.monotonic()
    health.state = "downloading"
    model = fetch_artifact(S3Store(plan.storage), plan, scratch_folder(os.environ))
    downloaded = time.monotonic()
    threads = cpu_threads(os.environ)
    engine = start_engine(plan, model, threads, lambda phase: setattr(health, "state", phase))
    health.state = "first answer"
    if not engine.answers():
        raise Retryable("the model is loaded but gives no answer", Reason.SERVER_FAILED)
    health.ready(engine.is_alive)
    log.info(
        "ready as %s on %d threads: download %.1f s, load and first answer %.1f s",
        plan.name,
        threads,
        downloaded - started,
        time.monotonic() - downloaded,
    )
    return engine


def _drain(engine: Engine) -> None:
    log.info("told to stop: finishing the requests in flight")
    deadline = time.monotonic() + DRAIN_SECONDS
    time.sleep(ENDPOINT_REMOVAL_SECONDS)
    while engine.requests_in_flight() and time.monotonic() < deadline:
        time.sleep(0.2)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # llama.cpp's threads would otherwise hold the interpreter's shutdown
