"""A manifest is refused without an API server in the API server's words (tests/integration holds the two together)."""

from pathlib import Path

import pytest

from support.make import merged
from support.mistakes import MISTAKES, SHAPES
from tunesmith_cli.kubernetes_yaml import parsed
from tunesmith_cli.refusals import refusals

ROOT = Path(__file__).resolve().parents[3]
SAMPLES = sorted((ROOT / "manifests/samples").glob("finetunejob*.yaml"))


def sample(name="finetunejob.yaml"):
    return parsed((ROOT / "manifests/samples" / name).read_text())[0]


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_a_sample_is_not_refused(path):
    assert refusals(sample(path.name)) == []


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket", "s3://bucket/", "s3://my_bucket/a/b", "s3://My-Bucket.x/run=1/x_y", "s3://bucket/Größe (neu)/ä b #1",
        "pvc://claim", "pvc://claim/my models/größe", "hf://gpt2", "hf://owner/name", "hf://owner/name/folder/a b.bin",
    ],
)  # fmt: skip
def test_places_as_people_call_them_are_accepted(uri):
    assert refusals(merged(sample(), {"spec": {"model": {"uri": uri}}})) == []


@pytest.mark.parametrize("url", ["http://s3.svc:8333", "https://store/", "http://[fd00::1]:9000", "https://gw/s3/v1"])
def test_stores_are_found_behind_gateways_too(url):
    assert refusals(merged(sample(), {"spec": {"storage": {"endpointURL": url}}})) == []


@pytest.mark.parametrize("rate", [2e-4, 0.5])
def test_fractions_are_written_as_in_every_tutorial(rate):
    assert refusals(merged(sample(), {"spec": {"training": {"learningRate": rate}}})) == []


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_refused_by_its_field(mistake):
    (line,) = [line for line in refusals(merged(sample(), mistake.change)) if mistake.complaint in line]
    assert not mistake.field or line.startswith(f"{mistake.field}: ")


def test_all_faults_of_shape_are_told_at_once():
    faults = [
        mistake for mistake in SHAPES if mistake.name in ("no such task", "an unknown object", "text for a number")
    ]
    job = sample()
    for fault in faults:
        job = merged(job, fault.change)
    assert sorted(refusals(job)) == [
        'spec.task: Unsupported value: "Chat": supported values: "ChatSFT", "CausalLM", "MaskedLM", '
        '"SequenceClassification", "TokenClassification", "Seq2Seq", "DPO", "Reward", "ImageClassification"',
        'spec.training.maxSteps: Invalid value: "string": spec.training.maxSteps in body must be of type integer: "string"',
        'unknown field "spec.optimiser"',
    ]


@pytest.mark.parametrize("field", ["seed", "evalSteps"])
def test_a_null_counts_as_absent(field):
    job = sample()
    job["spec"]["training"][field] = None
    assert refusals(job) == []
    job["spec"]["output"] = None
    assert refusals(job) == ["spec.output: Required value"]


def test_a_rule_about_what_changed_is_not_asked_of_a_new_job():
    job = {**sample(), "status": {"startTime": "2026-11-24T12:00:00Z"}}
    assert refusals(job) == []
