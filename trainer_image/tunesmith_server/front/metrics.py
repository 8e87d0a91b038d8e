"""What is counted of requests, under the names that dashboards and autoscalers know.

`http_requests_total` and `http_request_duration_seconds` are what web servers call them; the others are vLLM's, which
dashboards, KEDA scalers and gateways for inference read. `server` counts, the health port shows, and the operator's
analysis of a rollout reads.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from tunesmith_api import keys

__all__ = ["Metrics", "with_engines"]

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
CLIENT_GONE = 499
HEADS = ("# HELP ", "# TYPE ")


class Metrics:
    """The counters of one server. Safe to use from several threads."""

    def __init__(self, model: str) -> None:
        disable_created_metrics()
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "http_requests",
            "Requests answered, by path and status; 499: the client was gone first. An answer that broke off after "
            "its first bytes counts as the failure that it is.",
            ["path", "code"],
            registry=self._registry,
        )
        self._duration = Histogram(
            "http_request_duration_seconds",
            "From a request's arrival to the end of its answer.",
            ["path"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._in_flight = Gauge(
            keys.METRIC_IN_FLIGHT,
            "Requests taken in and not yet answered: by these Tunesmith scales.",
            registry=self._registry,
        )
        self._model = model
        self._first = Histogram(
            "vllm:time_to_first_token_seconds",
            "From a request's arrival to the first text of its answer, of streamed ones.",
            ["model_name"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._generated = self._counter("generation_tokens", "Tokens of answers.")
        for shown in (self._first, self._prompt, self._generated):
            shown.labels(model)
        self._running = self._gauge("num_requests_running", "Answers that the engine is working on.", model)
        self._waiting = self._gauge("num_requests_waiting", "Answers that wait for the engine.", model)

        self._adapters = Gauge(
            keys.METRIC_ADAPTERS, "1 for each adapter that is served.", ["name", "digest"], registry=self._registry
        )

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, ["model_name"], registry=self._registry)

    def _gauge(self, name: str, text: str, model: str) -> Gauge:
        return Gauge(f"vllm:{name}", text, ["model_name"], registry=self._registry).labels(model)

    def answered(self, path: str, code: int, seconds: float) -> None:
        """A request has ended."""
        self._requests.labels(path, str(code)).inc()
        self._duration.labels(path).observe(seconds)

    def first_token(self, seconds: float, model: str = "") -> None:
        """A streamed answer has begun."""
        self._first.labels(model or self._model).observe(seconds)

    def tokens(self, prompt: int, generated: int, model: str = "") -> None:
        """An answer has cost so many tokens."""
        self._prompt.labels(model or self._model).inc(prompt)
        self._generated.labels(model or self._model).inc(generated)

    def adapters(self, digests: Mapping[str, str]) -> None:
        """These adapters are served, by name and digest, and no others."""
        self._adapters.clear()
        for name, digest in digests.items():
            self._adapters.labels(name, digest).set(1)

    def text(self, running: int, waiting: int, in_flight: int) -> str:
        """All of it, as Prometheus reads it, with how many answers are under way and wait, of so many requests."""
        self._in_flight.set(in_flight)
        self._running.set(running)
        self._waiting.set(waiting)
        return generate_latest(self._registry).decode()


def with_engines(ours: str, engines: str) -> str:
    """Both texts as one. Of a metric that both have, ours counts: vLLM has the same names for what it sees of it."""
    known = {_family(line) for line in ours.splitlines() if line.startswith(HEADS)}
    kept, wanted = [], True
    for line in engines.splitlines(keepends=True):
        if line.startswith(HEADS):
            wanted = _family(line) not in known
        if wanted:
            kept.append(line)
    return ours + "".join(kept)


def _family(head: str) -> str:
    """The name of a metric in a line that describes it, or that describes when it began."""
    return head.split(" ", 3)[2].removesuffix("_created").removesuffix("_total")
