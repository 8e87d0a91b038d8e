"""What running jobs cost a control plane: parts of `make bench-controlplane`, with gates at what was measured and a fifth.

One life of 75 jobs on a control plane of its own; the tests look at its figures.
"""

import pytest

from bench.controlplane.figures import Life, Settings, quiet_requests, start_cpu
from bench.controlplane.measure import writes
from bench.controlplane.stage import OPERATOR, opened
from devcluster import UnsupportedMachine

COUNT = 75
WRITES_PER_JOB = 1.2 * 8.4
RSS_MIB = 1.2 * 94
START = 1.2 * 1.45
"""CPU of a start with 525 objects there, against one with none: by a ratio, since machines differ. It was 2.3 when each object woke
every worker of kopf's."""
SETTINGS = Settings(runs=1)


@pytest.fixture(scope="module")
def costs():
    """The figures of `Life`, and of a start with its jobs there."""
    try:
        place = opened()
        stage = place.__enter__()
    except UnsupportedMachine as reason:
        pytest.skip(f"no local cluster: this machine {reason}")
    try:
        yield lived(stage)
    finally:
        place.__exit__(None, None, None)


def lived(stage):
    empty = start_cpu(stage, SETTINGS.code, SETTINGS.runs)["cpu"]
    life = Life(stage, COUNT, SETTINGS)
    life.create()
    quiet = quiet_requests(stage, 8)
    life.operator.kill()
    start = start_cpu(stage, SETTINGS.code, SETTINGS.runs)
    rewritten = writes(stage.audit.read(), OPERATOR)
    life.operator = SETTINGS.operator(stage)
    life.finish()
    life.memory()
    costs = life.figures | {
        "quiet": quiet, "start": start["cpu"] / empty, "start_rss_mib": start["rss"], "rewritten": dict(rewritten),
    }  # fmt: skip
    print(costs)
    return costs


def test_a_job_costs_few_writes_from_create_to_succeeded(costs):
    assert costs["all_writes_per_job"] <= WRITES_PER_JOB, costs["all_writes"]


def test_running_jobs_without_news_cost_no_request(costs):
    assert costs["quiet"] == []


def test_an_operator_that_starts_writes_nothing_anew(costs):
    assert costs["rewritten"] == {}


def test_the_operator_stays_small(costs):
    assert max(costs["rss_mib"], costs["start_rss_mib"]) <= RSS_MIB


def test_a_start_costs_little_for_what_is_there(costs):
    assert costs["start"] <= START
