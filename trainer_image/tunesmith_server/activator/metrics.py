"""What an activator counts. By the requests that it holds the operator knows that servers are needed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from tunesmith_api.keys import METRIC_HELD

__all__ = ["Metrics"]

SECONDS = (0.01, 0.1, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)


class Metrics:
    """The counters of one activator."""

    def __init__(self) -> None:
        disable_created_metrics()
        self._registry = CollectorRegistry()
        self._held = Gauge(METRIC_HELD, "Requests that wait for a server.", registry=self._registry)
        self._seconds = Histogram(
            "tunesmith_activator_hold_seconds",
            "How long requests waited for a server.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self._requests = Counter(
            "tunesmith_activator_requests",
            "Requests, by status; 499: the client was gone first.",
            ["code"],
            registry=self._registry,
        )

    @contextmanager
    def held(self) -> Iterator[None]:
        """A request waits meanwhile."""
        began = time.monotonic()
        with self._held.track_inprogress():
            yield
        self._seconds.observe(time.monotonic() - began)

    def answered(self, code: int) -> None:
        """A request has ended."""
        self._requests.labels(str(code)).inc()

    def text(self) -> str:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry).decode()
