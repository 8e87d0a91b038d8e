"""Tells the kubelet whether this pod may get requests. Started by `__main__` before the model is there.

Ready means: the model has produced a real answer, its HTTP server responds, and nobody told the pod to stop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tunesmith_api import keys

__all__ = ["HealthServer"]


class HealthServer:
    """Answers PATH_HEALTH with 200 or 503 and the state in words."""

    def __init__(self, port: int = keys.PORT_HEALTH) -> None:
        self.state = "starting"
        self._is_alive: Callable[[], bool] = lambda: True
        self._server = ThreadingHTTPServer(("", port), self._handler())
        threading.Thread(target=self._server.serve_forever, name="health", daemon=True).start()

    @property
    def port(self) -> int:
        """The port in use."""
        return int(self._server.server_address[1])

    def ready(self, is_alive: Callable[[], bool]) -> None:
        """From now on the pod is ready for as long as `is_alive` says so."""
        self._is_alive = is_alive
        self.state = "ready"

    def drain(self) -> None:
        """From now on the pod gets no new requests."""
        self.state = "stopping"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        health = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                ok = self.path == keys.PATH_HEALTH and health.state == "ready" and health._is_alive()
                body = health.state.encode()
                self.send_response(200 if ok else 503)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Probes come every second: no log lines for them."""

        return Handler
