"""What `samelosses` calls the same: every bit of every number but times, speed and memory."""

import copy
import json
import math

import pytest

from samelosses.compare import PARTS, compare, rows_of, table

POINT = {
    "step": 1,
    "loss": 0.1,
    "learningRate": 0.01,
    "gradNorm": 2.5,
    "tokens": 64.0,
    "seconds": 0.3,
    "memoryBytes": 7,
}
NUMBERS = {
    "metrics": {"trainLoss": 0.1, "steps": 2.0, "trainSeconds": 1.5, "tokensPerSecond": 90.0},
    "history": [POINT, POINT | {"step": 2, "loss": 0.05}],
    "evaluations": [{"step": 0, "loss": 0.7}, {"step": 2, "loss": 0.6}],
}
RECORD = {
    "test": "test_a_task_learns[many labels-LoRA]",
    "outcome": "passed",
    "inputs": {"model/config.json": "aa", "train.jsonl": "bb"},
    "weights": {"tuned/model.safetensors": "cc"},
    "runs": {"tuned": NUMBERS},
}


def changed(path: str, value: object) -> dict:
    """The record with another value at a place such as `runs.tuned.history.1.loss`."""
    record = copy.deepcopy(RECORD)
    *way, last = path.split(".")
    place = record
    for name in way:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[last] = value
    return record


def row(head: dict, base: dict = RECORD):
    (found,) = rows_of([base], [json.loads(json.dumps(head))])
    return found


def test_equal_records_are_the_same_in_every_part():
    found = row(RECORD)
    assert found.is_same(PARTS)
    assert (found.case, found.method, found.trouble) == ("many labels", "LoRA", "")
    assert {name: (part.values, part.differing) for name, part in found.parts.items()} == {
        "inputs": (2, 0), "history": (9, 0), "evaluations": (3, 0), "metrics": (2, 0), "weights": (1, 0),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["seconds", "memoryBytes"])
def test_what_is_measured_takes_no_part(name):
    assert row(changed(f"runs.tuned.history.1.{name}", 99)).is_same(PARTS)


@pytest.mark.parametrize("name", ["trainSeconds", "tokensPerSecond"])
def test_neither_do_the_metrics_of_time(name):
    assert row(changed(f"runs.tuned.metrics.{name}", 99.0)).is_same(PARTS)


@pytest.mark.parametrize(
    ("path", "part", "first"),
    [
        ("history.1.loss", "history", "step 2 loss: 0.05 (0x1.999999999999ap-5) → 0.05000000000000001 (0x1.999999999999bp-5)"),
        ("history.0.gradNorm", "history", "step 1 gradNorm: 2.5 (0x1.4000000000000p+1) → 2.5000000000000004 (0x1.4000000000001p+1)"),
        ("evaluations.0.loss", "evaluations", "step 0 loss: 0.7 (0x1.6666666666666p-1) → 0.7000000000000001 (0x1.6666666666667p-1)"),
        ("metrics.trainLoss", "metrics", "trainLoss: 0.1 (0x1.999999999999ap-4) → 0.10000000000000002 (0x1.999999999999bp-4)"),
    ],
)  # fmt: skip
def test_the_last_bit_of_a_number_is_a_difference_in_its_part_alone(path, part, first):
    *way, last = path.split(".")
    place = NUMBERS
    for name in way:
        place = place[int(name)] if isinstance(place, list) else place[name]
    found = row(changed(f"runs.tuned.{path}", math.nextafter(place[last], math.inf)))
    assert found.parts[part].first == first
    assert [name for name, verdict in found.parts.items() if verdict.differing] == [part]
    assert not found.is_same(PARTS)
    assert found.is_same([name for name in PARTS if name != part])


@pytest.mark.parametrize(
    ("base", "head", "differing"),
    [
        ({"a": 0.0}, {"a": -0.0}, 1),
        ({"a": 1}, {"a": 1.0}, 0),
        ({"a": math.nan}, {"a": math.nan}, 0),
        ({"a": "NaN"}, {"a": 0.5}, 1),
        ({"a": None}, {}, 1),
        ({}, {"a": 1.0}, 1),
        ({"a": True}, {"a": 1.0}, 1),
        ({"a": 1.0, "b": 2.0}, {"b": 2.0, "a": 1.0}, 0),
    ],
)
def test_values_are_compared_exactly(base, head, differing):
    assert compare(base, head).differing == differing


def test_a_step_that_only_one_side_recorded_is_a_difference():
    found = row(changed("runs.tuned.history", [POINT]))
    assert found.parts["history"].first == "records: 2 → 1"
    assert found.parts["history"].differing == 5


def test_other_weights_can_be_left_to_differ_and_other_inputs_can_not():
    assert row(changed("weights", {"tuned/model.safetensors": "dd"})).is_same(["history", "metrics"])
    assert not row(changed("inputs", {"train.jsonl": "dd"})).is_same(["history"])


def test_a_test_that_failed_or_was_not_run_proves_nothing():
    assert row(changed("outcome", "failed")).trouble == "HEAD failed the test"
    assert not row(changed("outcome", "failed")).is_same(PARTS)
    (missing,) = rows_of([RECORD], [])
    assert missing.trouble == "HEAD did not run it"
    assert not missing.is_same(PARTS)
    assert not row(changed("runs", {}), changed("runs", {})).is_same(["history"])


def test_two_runs_of_one_test_are_told_apart():
    twice = changed("runs", {"tuned": NUMBERS, "again": copy.deepcopy(NUMBERS)})
    other = copy.deepcopy(twice)
    other["runs"]["again"]["history"][0]["loss"] = 0.2
    assert row(other, twice).parts["history"].first.startswith("again step 1 loss: 0.1 (")


def test_the_table_marks_what_does_not_decide_and_says_the_first_difference():
    other = changed("runs.tuned.metrics.trainLoss", 0.25)
    head, line, difference = table([row(other)], ["history"])
    assert head.split() == ["case", "method", "inputs", "history", "(evaluations)", "(metrics)", "(weights)"]
    assert line.startswith("many labels  LoRA    2 identical  9 identical  3 identical    1 of 2 differ")
    assert difference == "    metrics: trainLoss: 0.1 (0x1.999999999999ap-4) → 0.25 (0x1.0000000000000p-2)"
