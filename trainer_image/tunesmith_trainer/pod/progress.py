"""From rank 0, wherever it runs, to the supervisor of pod 0: numbers, log lines and phases, by HTTP.

`loop` and `driver` push; `status_server` receives. Pushing never holds training up and never fails it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import urllib.request
from typing import Any

from pydantic import Field

from tunesmith_api import keys
from tunesmith_api.keys import Reason
from tunesmith_api.model import Contract
from tunesmith_api.reports import CheckpointRef, DatasetFacts, TrainerState

__all__ = ["ProgressPusher", "ProgressUpdate"]

INTERVAL_SECONDS = 0.5


class ProgressUpdate(Contract):
    """What changed; fields that are absent stay as they were."""

    state: TrainerState | None = None
    message: str | None = None
    reason: Reason | None = Field(default=None, description="With a state: what keeps the trainer from getting on.")
    global_step: int | None = None
    max_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: int | None = None
    restarts: int | None = None
    rollbacks: int | None = None
    workers_joined: int | None = None
    dataset: DatasetFacts | None = None
    checkpoint: CheckpointRef | None = None
    phases: tuple[str, ...] = Field(default=(), description="Start-up phases reached since the last update.")
    lines: tuple[str, ...] = Field(default=(), description="Log lines for people, printed by pod 0.")

    def merged(self, newer: ProgressUpdate) -> ProgressUpdate:
        """Return both in one: newer values win, phases and lines add up."""
        values: dict[str, Any] = {**self.model_dump(exclude_none=True), **newer.model_dump(exclude_none=True)}
        return ProgressUpdate(
            **(values | {"phases": self.phases + newer.phases, "lines": (self.lines + newer.lines)[-500:]})
        )


class ProgressPusher:
    """Sends updates from a thread of its own, at most one request each INTERVAL_SECONDS."""

    def __init__(self, host: str, token: str, port: int = keys.PORT_PROGRESS) -> None:
        self._url = f"http://{host}:{port}{keys.PATH_PROGRESS}"
        self._token = token
        # no proxy of the environment: the peer is a pod of the same job
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._queue: queue.SimpleQueue[ProgressUpdate | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def update(self, **changes: Any) -> None:
        """Queue changes of `ProgressUpdate` fields."""
        self._queue.put(ProgressUpdate(**changes))

    def log(self, *lines: str) -> None:
        """Queue log lines for pod 0's standard output."""
        self._queue.put(ProgressUpdate(lines=lines))

    def phase(self, name: str) -> None:
        """Say that a start-up phase has been reached."""
        self._queue.put(ProgressUpdate(phases=(name,)))

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Send what is queued, and end."""
        self._queue.put(None)
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        pending: ProgressUpdate | None = None
        ending = False
        while not ending:
            try:
                item = self._queue.get(timeout=None if pending is None else 2.0)
            except queue.Empty:
                item = ProgressUpdate()
            while True:  # all that is queued goes into one request
                if item is None:
                    ending = True
                else:
                    pending = item if pending is None else pending.merged(item)
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
            if pending is not None and (self._send(pending) or ending):
                pending = None
            if not ending:
                time.sleep(INTERVAL_SECONDS)

    def _send(self, update: ProgressUpdate) -> bool:
        request = urllib.request.Request(  # noqa: S310 - the scheme is ours
            self._url,
            data=update.to_json().encode(),
            headers={"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"},
            method="POST",
        )
        with contextlib.suppress(OSError), self._opener.open(request, timeout=5):
            return True
        return False
