"""Answers as the product's server does, as far as a rollout sees it: requests, health, metrics, drain.

`ERROR_PERCENT` of the requests are answered 500, each after `DELAY_SECONDS`.
"""

import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tunesmith_api import keys

ERROR_PERCENT = int(os.environ.get("ERROR_PERCENT", "0"))
DELAY_SECONDS = float(os.environ.get("DELAY_SECONDS", "0"))
DRAIN_SECONDS = 6.0
BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
PATH = "/v1/completions"

lock = threading.Lock()
in_flight = 0
counts: dict[int, int] = {200: 0, 500: 0}
times: list[float] = []
stopping = threading.Event()


def metrics() -> str:
    with lock:
        lines = [f'http_requests_total{{path="{PATH}",code="{code}"}} {count}' for code, count in counts.items()]
        for bound in (*BOUNDS, float("inf")):
            count = sum(1 for it in times if it <= bound)
            name = "+Inf" if bound == float("inf") else bound
            lines.append(f'http_request_duration_seconds_bucket{{path="{PATH}",le="{name}"}} {count}')
        lines.append(f"{keys.METRIC_IN_FLIGHT} {in_flight}")
    return "\n".join(lines) + "\n"


class Handler(BaseHTTPRequestHandler):
    def answer(self, code: int, text: str) -> None:
        body = text.encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """One line for each request would be the whole log."""


class Requests(Handler):
    def do_GET(self) -> None:
        global in_flight
        if self.path == "/health":
            self.answer(200, "ready")
            return
        began = time.monotonic()
        with lock:
            in_flight += 1
        time.sleep(DELAY_SECONDS)
        with lock:
            in_flight -= 1
            number = sum(counts.values())
            code = 500 if number % 100 * ERROR_PERCENT % 100 < ERROR_PERCENT else 200
            counts[code] += 1
            times.append(time.monotonic() - began)
        self.answer(code, os.environ[keys.ENV_POD_NAME])


class Health(Handler):
    def do_GET(self) -> None:
        if self.path == keys.PATH_METRICS:
            self.answer(200, metrics())
        else:
            self.answer(503 if stopping.is_set() else 200, "stopping" if stopping.is_set() else "ready")


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


signal.signal(signal.SIGTERM, lambda *_: stopping.set())
for port, handler in ((keys.PORT_SERVER, Requests), (keys.PORT_HEALTH, Health)):
    threading.Thread(target=Server(("", port), handler).serve_forever, daemon=True).start()
stopping.wait()
# nodes may send requests here until they have heard of it
time.sleep(DRAIN_SECONDS)
