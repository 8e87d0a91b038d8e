"""Prometheus metrics of the operator itself."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

__all__ = ["Metrics"]


class Metrics:
    """What the engine counts. `serve` makes it readable at /metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reconciles = Counter(
            "tunesmith_reconciles", "Reconciles by kind and result.", ["kind", "result"], registry=self.registry
        )
        self.seconds = Histogram(
            "tunesmith_reconcile_seconds", "Time that one reconcile takes.", ["kind"], registry=self.registry
        )
        self.requests = Counter(
            "tunesmith_api_requests", "Requests to the API server.", ["verb", "resource"], registry=self.registry
        )
        self.polls = Counter("tunesmith_progress_polls", "Polls of running jobs.", ["result"], registry=self.registry)
        self._depth = Gauge("tunesmith_queue_depth", "Objects that wait to be reconciled.", registry=self.registry)

    def watch_depth(self, depth: Callable[[], float]) -> None:
        """Read the queue's depth from there."""
        self._depth.set_function(depth)

    def count_request(self, verb: str, resource: str) -> None:
        """One request to the API server."""
        self.requests.labels(verb, resource).inc()

    def count_poll(self, result: str) -> None:
        """One poll of a running job, by what came of it (`adapters.progress.PollResult`)."""
        self.polls.labels(result).inc()

    def serve(self, port: int) -> Callable[[], None]:
        """Serve on all addresses; returns a function that stops it."""
        server, thread = start_http_server(port, registry=self.registry)

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join(timeout=1)

        return stop
