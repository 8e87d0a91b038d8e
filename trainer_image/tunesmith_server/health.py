"""Tells the kubelet whether this pod may get requests, and Prometheus how it fares.

Ready means: the model has produced a real answer, front and engine respond, and nobody told the pod to stop. A port and
threads of its own: however many requests are open, a probe is answered. `__main__` starts it before the model is there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler

from tunesmith_api import keys
from tunesmith_store.listen import PodHTTPServer

__all__ = ["HealthServer"]


class HealthServer:
    """Answers PATH_HEALTH with 200 or 503 and the state in words, and PATH_METRICS."""

    def __init__(self, port: int = keys.PORT_HEALTH) -> None:
        self.state = "starting"
        self._is_alive: Callable[[], bool] = lambda: True
        self._metrics: Callable[[], str] = str
        self._server = PodHTTPServer(port, self._handler())
        threading.Thread(target=self._server.serve_forever, name="health", daemon=True).start()

    @property
    def port(self) -> int:
        """The port in use."""
        return int(self._server.server_address[1])

    def ready(self, is_alive: Callable[[], bool], metrics: Callable[[], str] = str) -> None:
        """From now on the pod is ready for as long as `is_alive` says so."""
        self._is_alive = is_alive
        self._metrics = metrics
        self.state = "ready"

    def drain(self) -> None:
        """From now on the pod gets no new requests."""
        self.state = "stopping"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        health = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                if self.path == keys.PATH_METRICS:
                    self._send(200, health._metrics(), "text/plain; version=0.0.4; charset=utf-8")
                    return
                known = self.path in (keys.PATH_HEALTH, "/health")
                ok = known and health.state == "ready" and health._is_alive()
                self._send(200 if ok else 503, health.state, "text/plain")

            def _send(self, code: int, text: str, kind: str) -> None:
                body = text.encode()
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Probes come every second: no log lines for them."""

        return Handler
