"""Revisions that take over, or are taken back, on real nodes: a client at 20 requests a second gets every answer."""

import json
from pathlib import Path

import pytest

from rollouts.scenarios import SCENARIOS, run_all
from testbed import Testbed


@pytest.mark.timeout(600)
def test_no_request_fails_whatever_becomes_of_a_revision(testbed: Testbed, tmp_path: Path, capsys) -> None:
    results = run_all(testbed, tmp_path)
    with capsys.disabled():
        print(json.dumps(results), flush=True)
    assert set(results) == {it.__name__ for it in SCENARIOS}
    outcomes = {name: it.get("error", it["outcome"]) for name, it in results.items()}
    taken_back = {"bad_canary": "RolledBack", "slow_canary": "RolledBack"}
    over = dict.fromkeys(("blue_green", "rolling_update", "canary"), "RolledOut")
    moved = {"scaling": "Scaled", "zero_and_back": "Woken", "drained_node": "Drained"}
    assert outcomes == over | taken_back | moved, results
    assert {name: it["failed_requests"] for name, it in results.items()} == dict.fromkeys(results, 0), results
    assert [name for name, it in results.items() if it["answered_500"]] == ["bad_canary"]
