"""A client at a steady pace, and what came of its requests."""

from __future__ import annotations

import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

PER_SECOND = 20
TIMEOUT_SECONDS = 10.0
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Client:
    """Asks until the context ends, each time on a connection of its own, whether or not the last one was answered."""

    def __init__(self, url: str) -> None:
        self.url = f"{url}/v1/completions"
        self.requests = self.answered_500 = 0
        self.failures: list[str] = []
        self.pods: set[str] = set()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with ThreadPoolExecutor(64) as pool:
            due = time.monotonic()
            while not self._stop.wait(max(0.0, due - time.monotonic())):
                pool.submit(self._ask)
                due += 1 / PER_SECOND

    def _ask(self) -> None:
        pod = failure = ""
        code = 0
        try:
            with OPENER.open(self.url, timeout=TIMEOUT_SECONDS) as response:
                pod = response.read().decode()
        except urllib.error.HTTPError as error:
            code = error.code
        except Exception as error:
            failure = repr(error)
        with self._lock:
            self.requests += 1
            self.answered_500 += code == 500
            if pod:
                self.pods.add(pod.rpartition("-")[0].rpartition("-")[0])
            if failure or code not in (0, 500):
                self.failures.append(failure or str(code))
