"""What running jobs cost a control plane: parts of `make bench-controlplane`, with gates at what was measured and a fifth.

One life of 75 jobs, then 150, on a control plane of its own; the tests look at its figures.
"""

import time

import pytest

from bench.controlplane.figures import Life, Settings, quiet_requests, start_cpu
from bench.controlplane.load import create_all, job
from bench.controlplane.stage import NAMESPACE, opened
from devcluster import UnsupportedMachine

COUNT = 75
WRITES_PER_JOB = 8 * 1.2
RSS_MIB = 100 * 1.2
GROWTH = 2.2 * 1.2
SETTINGS = Settings(runs=2)


@pytest.fixture(scope="module")
def costs():
    """The figures of `Life`, and `quiet`, `growth`."""
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
    quiet = quiet_requests(stage, 10)
    life.operator.kill()
    once = start_cpu(stage, SETTINGS.code, SETTINGS.runs)["cpu"] - empty
    life.operator = stage.operator()
    more = [f"more-{number}" for number in range(COUNT)]
    create_all(stage.kubeconfig("load", inside=False), [[job(name, NAMESPACE)] for name in more], SETTINGS.qps)
    life.names += more
    life.observer.wait("reason:Training", set(life.names), 120)
    time.sleep(2)
    life.operator.kill()
    twice = start_cpu(stage, SETTINGS.code, SETTINGS.runs)["cpu"] - empty
    life.operator = stage.operator()
    life.finish()
    return life.figures | {"quiet": quiet, "growth": twice / once, "start": (empty, once, twice)}


def test_a_job_costs_few_writes_from_create_to_succeeded(costs, record_property):
    record_property("writes", costs["writes"])
    assert costs["writes_per_job"] <= WRITES_PER_JOB, costs["writes"]


def test_running_jobs_without_news_cost_no_request(costs):
    assert costs["quiet"] == []


def test_the_operator_stays_small(costs):
    assert costs["rss_mib"] <= RSS_MIB


def test_a_start_costs_twice_as_much_for_twice_as_many_objects(costs):
    assert costs["growth"] <= GROWTH, costs["start"]
