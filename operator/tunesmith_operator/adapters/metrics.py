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
        self.status_seconds = Histogram(
            "tunesmith_status_seconds",
            "From a change that the watches deliver to the status with the verdict or the cause.",
            ["kind"],
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0),
            registry=self.registry,
        )
        self.requests = Counter(
            "tunesmith_api_requests",
            "Requests to the API server; the code is none where no answer came.",
            ["verb", "resource", "code"],
            registry=self.registry,
        )
        self.token_seconds = Histogram(
            "tunesmith_request_wait_seconds",
            "Time that urgent requests wait for their turn (qps, burst).",
            buckets=(0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0),
            registry=self.registry,
        )
        self.refused_statuses = Counter(
            "tunesmith_statuses_refused",
            "Statuses that the API server found invalid, so that conditions and phase alone were written.",
            ["kind"],
            registry=self.registry,
        )
        self.polls = Counter("tunesmith_progress_polls", "Polls of running jobs.", ["result"], registry=self.registry)
        self._depth = Gauge("tunesmith_queue_depth", "Objects that wait to be reconciled.", registry=self.registry)
        self._followed = Gauge("tunesmith_followed_jobs", "Running jobs that are polled.", registry=self.registry)
        self._lost = Gauge(
            "tunesmith_lost_watches",
            "Watches that are lost or haven't listed yet; nothing is decided in the namespaces that they cover.",
            registry=self.registry,
        )
        self._leading = Gauge(
            "tunesmith_leading", "1 where this replica acts, 0 where it stands by.", registry=self.registry
        )

    def watch(
        self,
        depth: Callable[[], float],
        followed: Callable[[], float],
        lost: Callable[[], float],
        leading: Callable[[], float],
    ) -> None:
        """Read the queue's depth, how many jobs are polled, how many watches are lost and whether this one leads."""
        self._depth.set_function(depth)
        self._followed.set_function(followed)
        self._lost.set_function(lost)
        self._leading.set_function(leading)

    def count_request(self, verb: str, resource: str, code: str) -> None:
        """One request to the API server, by the status code of its answer."""
        self.requests.labels(verb, resource, code).inc()

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
