"""The HTTP face of a supervisor: /progress for the operator, /metrics for Prometheus, /healthz for kubelet and peers.

Standard library only, since the supervisor must be up within a second. POST /progress takes `ProgressUpdate`s from
rank 0 and from the driver, with the job's Ray token.
"""

from __future__ import annotations

import hmac
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from pydantic import ValidationError

from tunesmith_api import keys
from tunesmith_api.reports import ProgressReport, TrainerState
from tunesmith_store.listen import PodHTTPServer
from tunesmith_trainer.pod.progress import ProgressUpdate

__all__ = ["ProgressBoard", "StatusServer"]

MAX_BODY = 1 << 20
BEYOND_INPUT = {"inputChecked", "dataLoaded"}
"""Phases that are reached once the store has been read."""


class ProgressBoard:
    """The newest progress, shared between the HTTP threads and the supervisor."""

    def __init__(
        self, attempt: int, clock: Callable[[], float] = time.time, echo: Callable[[str], None] = print
    ) -> None:
        self._lock = threading.Lock()
        self._clock = clock
        self._echo = echo
        self._started = clock()
        self._report = ProgressReport(attempt=attempt, heartbeat_unix=self._started)

    @property
    def report(self) -> ProgressReport:
        """The current report."""
        with self._lock:
            return self._report

    def apply(self, update: ProgressUpdate) -> None:
        """Take an update in, print its log lines, and stamp the heartbeat."""
        for line in update.lines:
            self._echo(line)
        changes = update.model_dump(exclude={"phases", "lines"}, exclude_none=True)
        if update.checkpoint:
            changes["checkpoint"] = update.checkpoint
        if update.dataset:
            changes["dataset"] = update.dataset
        tries = update.state in (None, TrainerState.PREPARING) and not BEYOND_INPUT & set(update.phases)
        if update.reason is None and not tries:
            changes["reason"] = ""  # it holds through the next try, until that has got beyond it
        with self._lock:
            now = self._clock()
            # only the first time counts: these are the seconds of the start, not of a restart
            phases = self._report.phase_seconds | {
                name: round(now - self._started, 1) for name in update.phases if name not in self._report.phase_seconds
            }
            changes["restarts"] = max(self._report.restarts, update.restarts or 0)
            self._report = self._report.model_copy(update={**changes, "phase_seconds": phases, "heartbeat_unix": now})

    def metrics(self) -> str:
        """Return the report as Prometheus text (version 0.0.4)."""
        report = self.report
        values = {
            "tunesmith_global_step": ("gauge", "Optimizer steps done.", report.global_step),
            "tunesmith_max_steps": ("gauge", "Optimizer steps in all.", report.max_steps),
            "tunesmith_epoch": ("gauge", "Passes over the data done.", report.epoch),
            "tunesmith_loss": ("gauge", "Training loss per token of the last recorded step.", report.loss),
            "tunesmith_eval_loss": ("gauge", "Held-out loss per token.", report.eval_loss),
            "tunesmith_learning_rate": ("gauge", "Learning rate of the last step.", report.learning_rate),
            "tunesmith_grad_norm": ("gauge", "Gradient norm before clipping.", report.grad_norm),
            "tunesmith_tokens_per_second": ("gauge", "Tokens per second over all workers.", report.tokens_per_second),
            "tunesmith_eta_seconds": ("gauge", "Estimated seconds until the last step.", report.eta_seconds),
            "tunesmith_restarts_total": ("counter", "Times that training was resumed after a loss.", report.restarts),
            "tunesmith_workers_joined": ("gauge", "Workers that have joined.", report.workers_joined),
            "tunesmith_heartbeat_timestamp_seconds": ("gauge", "Last sign of life.", report.heartbeat_unix),
        }
        lines = []
        for name, (kind, text, value) in values.items():
            if value is not None:
                lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", f"{name} {value}"]
        lines += ["# HELP tunesmith_phase_seconds Seconds from the start to each start-up phase."]
        lines += ["# TYPE tunesmith_phase_seconds gauge"]
        lines += [f'tunesmith_phase_seconds{{phase="{name}"}} {value}' for name, value in report.phase_seconds.items()]
        return "\n".join(lines) + "\n"


class StatusServer:
    """Serves a board until it is closed.

    `health` returns whether this pod's Ray node is up, and what peers need to know of it (any JSON).
    """

    def __init__(
        self,
        board: ProgressBoard,
        token: str,
        health: Callable[[], tuple[bool, dict[str, Any]]],
        port: int,
        ip: str = "",
    ) -> None:
        handler = _handler(board, token, health)
        self._server = PodHTTPServer(port, handler, ip)
        self._thread = threading.Thread(target=self._server.serve_forever, name="status", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()


def _handler(
    board: ProgressBoard, token: str, health: Callable[[], tuple[bool, dict[str, Any]]]
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def _answer(self, code: int, body: str, kind: str = "application/json") -> None:
            data = body.encode()
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            if self.path == keys.PATH_PROGRESS:
                self._answer(200, board.report.to_json())
            elif self.path == keys.PATH_METRICS:
                self._answer(200, board.metrics(), "text/plain; version=0.0.4")
            elif self.path == keys.PATH_HEALTH:
                up, facts = health()
                self._answer(200 if up else 503, json.dumps(facts))
            else:
                self._answer(404, '{"error":"not found"}')

        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            if self.path != keys.PATH_PROGRESS or not 0 < size <= MAX_BODY:
                self._answer(404, '{"error":"not found"}')
                return
            offered = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(offered.encode(), token.encode()):
                self._answer(401, '{"error":"wrong token"}')
                return
            try:
                board.apply(ProgressUpdate.from_json(self.rfile.read(size)))
            except ValidationError as error:
                self._answer(400, json.dumps({"error": str(error)}))
                return
            self._answer(200, "{}")

        def log_message(self, format: str, *args: Any) -> None:
            """Keep probes out of the log that people read."""

    return Handler
