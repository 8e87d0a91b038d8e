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
from functools import partial
from pathlib import Path

from tunesmith_api import keys
from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.plan import ServingPlan
from tunesmith_api.reports import Outcome, TerminationReport
from tunesmith_api.v1alpha1.adapters import ADAPTER_ENGINES
from tunesmith_server.adapters.served import fetched, wanted_adapters
from tunesmith_server.artifact import fetch_artifact
from tunesmith_server.engines.registry import Launcher
from tunesmith_server.environment import cpu_threads, read_plan, scratch_folder, write_report
from tunesmith_server.front.apikeys import ApiKeys
from tunesmith_server.front.server import Front
from tunesmith_server.health import HealthServer
from tunesmith_server.serving import Serving
from tunesmith_store.errors import Failure, Retryable, UserError
from tunesmith_store.router import store_of

log = logging.getLogger("tunesmith.server")

# Services stop sending some moments after a pod is told to stop: new requests still come in that time
ENDPOINT_REMOVAL_SECONDS = 3.0
LOOK_SECONDS = 0.5
# of the grace period, kept for the end: what is left of it would be cut off by SIGKILL
STOP_MARGIN_SECONDS = 3.0


def main() -> int:
    """Serve until SIGTERM; return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    health = HealthServer()
    try:
        plan = read_plan(os.environ)
        serving, front = _start(plan, health)
    except Failure as failure:
        return _ended(failure)
    while not stop.wait(LOOK_SECONDS):
        if (ended := serving.failure) is not None:
            # a pod without its engine would go on being Running: its container ends, and the kubelet starts it anew
            return _ended(ended)
    deadline = time.monotonic() + plan.api.termination_grace_period_seconds - STOP_MARGIN_SECONDS
    health.drain()
    log.info("told to stop: finishing the requests in flight")
    front.drain(ENDPOINT_REMOVAL_SECONDS, deadline)
    serving.close()
    log.info("stopped")
    return int(ExitCode.SUCCESS)


def _ended(failure: Failure) -> int:
    log.error("%s: %s", failure.reason, failure.message)
    write_report(TerminationReport(outcome=Outcome.FAILED, reason=failure.reason, message=failure.message))
    return int(failure.exit_code)


def _start(plan: ServingPlan, health: HealthServer) -> tuple[Serving, Front]:
    started = time.monotonic()
    api_keys = _api_keys(plan)
    health.state = "downloading"
    store, scratch = store_of(plan), scratch_folder(os.environ)
    model = fetch_artifact(store, plan, scratch)
    fetch = partial(fetched, store, folder=scratch / "adapters", engine=plan.engine)
    adapters = fetch(wanted_adapters(os.environ) or ())
    downloaded = time.monotonic()
    threads = cpu_threads(os.environ)
    serving = Serving(plan, Launcher(plan, model, threads, lambda phase: setattr(health, "state", phase)))
    engine = serving.start(adapters)
    health.state = "first answer"
    if not engine.answers():
        raise Retryable("the model is loaded but gives no answer", Reason.SERVER_FAILED)
    front = Front(engine.url, serving.limits_of(engine), plan.api, plan.parallel_requests, api_keys, serving.digests)
    front.start()
    health.ready(lambda: front.is_alive() and serving.is_alive(), front.metrics)
    if plan.engine in ADAPTER_ENGINES:
        serving.follow(lambda: wanted_adapters(os.environ), fetch, front)
    log.info(
        "ready as %s on %d threads: download %.1f s, load and first answer %.1f s",
        plan.name,
        threads,
        downloaded - started,
        time.monotonic() - downloaded,
    )
    return serving, front


def _api_keys(plan: ServingPlan) -> ApiKeys | None:
    """The keys that clients must show, where the spec names a Secret of them.

    Raises:
        UserError: there are none.
    """
    secret = plan.api.keys_secret_ref
    if secret is None:
        return None
    found = ApiKeys(Path(os.environ.get(keys.ENV_API_KEYS, keys.API_KEYS_DIRECTORY)))
    if not len(found):
        message = (
            f"Secret {secret.name} is not there or has no keys: create it in namespace {plan.namespace} "
            "(spec.api.keysSecretRef names it), each entry one API key"
        )
        raise UserError(Reason.SECRET_NOT_FOUND, message)
    return found


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # llama.cpp's threads would otherwise hold the interpreter's shutdown
