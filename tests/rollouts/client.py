"""A client at a steady pace, and what came of its requests."""

from __future__ import annotations

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

PER_SECOND = 20
TIMEOUT_SECONDS = 10.0
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Client:
    """Asks until the context ends, each time on a connection of its own, whether or not the last one was answered."""

    def __init__(self, url: str, timeout: float = TIMEOUT_SECONDS) -> None:
        self.url, self._timeout = f"{url}/v1/completions", timeout
        self.requests = self.answered_500 = 0
        self.longest = 0.0
        self.failures: list[str] = []
        self.pods: set[str] = set()
        self._stop = threading.Event()
        self._silent = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Ask nothing meanwhile."""
        self._silent.set()
        try:
            yield
        finally:
            self._silent.clear()

    def _run(self) -> None:
        # as many as come while the slowest is waited for
        with ThreadPoolExecutor(int(PER_SECOND * self._timeout)) as pool:
            due = time.monotonic()
            while not self._stop.wait(max(0.0, due - time.monotonic())):
                if not self._silent.is_set():
                    pool.submit(self._ask)
                due += 1 / PER_SECOND

    def _ask(self) -> None:
        pod = failure = ""
        code, began = 0, time.monotonic()
        try:
            with OPENER.open(self.url, timeout=self._timeout) as response:
                pod = response.read().decode()
        except urllib.error.HTTPError as error:
            code = error.code
        except Exception as error:
            failure = repr(error)
        with self._lock:
            self.requests += 1
            self.longest = max(self.longest, time.monotonic() - began)
            self.answered_500 += code == 500
            if pod:
                self.pods.add(pod.rpartition("-")[0].rpartition("-")[0])
            if failure or code not in (0, 500):
                self.failures.append(failure or str(code))
