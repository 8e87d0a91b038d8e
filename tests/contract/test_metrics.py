"""What the server counts is what the operator reads of it: the two know nothing of each other's code."""

from tunesmith_operator.core.pods.figures import read_figures
from tunesmith_server.front.metrics import Metrics


def test_requests_errors_and_latencies_of_the_server_arrive():
    metrics = Metrics("sentiment")
    for number in range(100):
        metrics.answered("/v1/chat/completions", 500 if number < 7 else 200, 0.2)
    metrics.answered("/v1/completions", 499, 30.0)
    figures = read_figures(metrics.text(running=1, waiting=0))
    assert (figures.requests, figures.errors, figures.timed) == (101, 7, 101)
    p95 = figures.latency(0.95)
    assert p95 is not None
    assert 0.1 <= p95 <= 0.5
