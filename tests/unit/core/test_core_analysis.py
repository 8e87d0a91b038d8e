"""What server pods say of themselves, read and added up, and the judgement that a rollout makes of it."""

import pytest

from tunesmith_api.v1alpha1.rollout import Analysis
from tunesmith_operator.core.modeldeployment.analysis import Verdict, judge
from tunesmith_operator.core.pods.figures import NOTHING, Figures, Tally, read_figures

TEXT = """# HELP http_requests_total Requests
# TYPE http_requests_total counter
http_requests_total{path="/v1/chat/completions",code="200"} 90
http_requests_total{path="/v1/chat/completions",code="500"} 6
http_requests_total{code="503",path="/v1/completions"} 4.0
http_requests_total{path="/healthz",code="503"} 1000
http_request_duration_seconds_bucket{path="/v1/chat/completions",le="0.1"} 50
http_request_duration_seconds_bucket{path="/v1/chat/completions",le="1.0"} 90
http_request_duration_seconds_bucket{path="/v1/chat/completions",le="+Inf"} 96
http_request_duration_seconds_bucket{path="/v1/completions",le="0.1"} 4
http_request_duration_seconds_bucket{path="/v1/completions",le="1.0"} 4
http_request_duration_seconds_bucket{path="/v1/completions",le="+Inf"} 4
http_request_duration_seconds_sum{path="/v1/completions"} 4
python_gc_objects_collected_total{generation="0"} 77
"""


def test_requests_errors_and_latencies_are_read_over_all_paths_of_clients():
    found = read_figures(TEXT)
    assert (found.requests, found.errors, found.error_percent) == (100, 10, 10.0)
    assert found.buckets == {0.1: 54, 1.0: 94, float("inf"): 100}
    assert found.latency(0.5) == pytest.approx(0.1 * 50 / 54)
    assert found.latency(0.95) == 1.0, "above all bounds nothing more is known than the highest"
    assert NOTHING.latency(0.95) is None


@pytest.mark.parametrize(
    "text",
    [
        "", "junk", "http_requests_total 5", 'http_requests_total{path="/v1/x",code="500"} NaN',
        'http_requests_total{path="/v1/x",code="500"} -3', 'http_requests_total{path="/v1/x",code="500"} 1e999',
        'http_request_duration_seconds_bucket{le="x"} 3', 'http_request_duration_seconds_bucket{le="nan"} 3',
    ],
)  # fmt: skip
def test_what_says_nothing_counts_nothing(text):
    assert read_figures(text) == NOTHING


def test_a_pod_cannot_say_more_than_fits():
    many = "\n".join(f'http_request_duration_seconds_bucket{{le="{it}"}} 1' for it in range(500))
    assert len(read_figures(many).buckets) == 64
    assert read_figures('http_requests_total{path="/v1/x",code="500"} 9e300').requests == 2**53 - 1


def test_a_tally_counts_pods_from_their_start_and_in_a_new_window_anew():
    tally = Tally("r2/0").heard("a", Figures(10, 1)).heard("b", Figures(5))
    assert tally.heard("a", Figures(12, 1)).figures == Figures(17, 1)
    later = tally.moved_to("r2/1")
    assert later.figures == Figures()
    assert later.heard("a", Figures(30, 4)).figures == Figures(20, 3)
    assert later.moved_to("r2/1") is later


def test_a_restarted_container_takes_nothing_away():
    tally = Tally("w").heard("a", Figures(10, 2, {1.0: 10})).heard("a", Figures(3, 1, {1.0: 3}))
    assert tally.figures == Figures(13, 3, {1.0: 13})


GOOD = Figures(100, 1, {0.5: 100})


@pytest.mark.parametrize(
    ("analysis", "figures", "restarts", "verdict"),
    [
        ({}, GOOD, 9, Verdict()),
        ({"maxRestarts": 0}, None, 0, Verdict()),
        ({"maxRestarts": 1}, None, 2, Verdict("its containers have restarted 2 times (rollout.analysis.maxRestarts: 1)")),
        ({"maxErrorPercent": 1}, GOOD, 0, Verdict(note="100 requests, 1 % with errors, 95 % within 0.475 s.")),
        ({"maxErrorPercent": 0.5}, GOOD, 0, Verdict(
            "1 of 100 requests (1 %) were answered with a status of 500 or above (rollout.analysis.maxErrorPercent: 0.5)"
        )),
        ({"maxLatencyP95Seconds": 0.4}, GOOD, 0, Verdict(
            "5 % of 100 requests took longer than 0.475 s (rollout.analysis.maxLatencyP95Seconds: 0.4)"
        )),
        ({"maxErrorPercent": 0, "minRequests": 101}, GOOD, 0, Verdict(
            note="Not judged yet: 100 requests (rollout.analysis.minRequests: 101)."
        )),
        ({"maxErrorPercent": 0}, None, 0, Verdict(note="Its servers have not been asked for their metrics yet.")),
    ],
)  # fmt: skip
def test_a_revision_is_judged_by_what_is_asked_for(analysis, figures, restarts, verdict):
    assert judge(Analysis.model_validate(analysis), figures, restarts) == verdict
