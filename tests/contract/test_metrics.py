"""What the server counts is what the operator reads of it: the two know nothing of each other's code."""

from tunesmith_operator.core.pods.figures import read_figures
from tunesmith_server.activator.metrics import Metrics as ActivatorMetrics
from tunesmith_server.front.metrics import Metrics


def test_requests_errors_and_latencies_of_the_server_arrive():
    metrics = Metrics("sentiment")
    for number in range(100):
        metrics.answered("/v1/chat/completions", 500 if number < 7 else 200, 0.2)
    metrics.answered("/v1/completions", 499, 30.0)
    figures = read_figures(metrics.text(running=1, waiting=0, in_flight=3))
    assert (figures.requests, figures.errors, figures.timed) == (101, 7, 101)
    assert (figures.served, figures.in_flight) == (101, 3)
    p95 = figures.latency(0.95)
    assert p95 is not None
    assert 0.1 <= p95 <= 0.5


def test_requests_that_an_activator_holds_arrive():
    metrics = ActivatorMetrics()
    with metrics.held(), metrics.held():
        assert read_figures(metrics.text()).in_flight == 2
    assert read_figures(metrics.text()).in_flight == 0
