"""The quantize Job compares the real model in 8 bits with itself in 16, both as served, and does so once."""

import json
import os
import subprocess
import sys
import time

import pytest

import assets
from tunesmith_api import keys
from tunesmith_api.plan import EvaluationPlan, ServingPlan, StoragePlan
from tunesmith_api.reports import MAX_TERMINATION_BYTES, Outcome, TerminationReport

FEELINGS = (
    ("I love it", "positive"), ("I hate it", "negative"), ("What a lovely day", "positive"), ("My bag is lost", "negative"),
    ("Best crew ever", "positive"), ("Three hours late", "negative"), ("Thank you so much", "positive"),
    ("Never again", "negative"), ("Great seats", "positive"), ("The food was awful", "negative"),
)  # fmt: skip


def conversation(text: str, label: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Positive or negative? {text}."}, {"role": "assistant", "content": label}]


ROWS = "".join(json.dumps({"messages": conversation(*it)}) + "\n" for it in FEELINGS)

BY_TRANSFORMERS = 2456.03
"""Perplexity of these answers by transformers in fp32: the template's prompt, the label's tokens, log_softmax."""


@pytest.fixture
def job(object_store, tmp_path):
    bucket = object_store.ensure_bucket("evaluated-models")
    object_store.put_folder(assets.smollm2(), f"{bucket}/smollm2")
    object_store.put_text(ROWS, f"{bucket}/rows.jsonl")

    def run(**changes) -> TerminationReport:
        values = {
            "name": "smol", "namespace": "n", "uid": "u", "revision": "smol-r1", "model_uri": f"{bucket}/smollm2", "quantization": "Q8_0",
            "engine": "LlamaCpp", "context_length": 128, "parallel_requests": 1, "artifact_uri": f"{bucket}/smollm2/quantized/q8_0",
            "evaluation": EvaluationPlan(uri=f"{bucket}/rows.jsonl"), "storage": StoragePlan(endpoint_url=object_store.endpoint_url),
        }  # fmt: skip
        plan, report = tmp_path / "plan.json", tmp_path / "termination.json"
        plan.write_text(ServingPlan(**{**values, **changes}).to_json())
        ours = {
            keys.ENV_PLAN: str(plan),
            keys.ENV_SCRATCH: str(tmp_path / "scratch"),
            keys.ENV_TERMINATION_LOG: str(report),
            keys.ENV_CPU_LIMIT: "1000",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        environment = {**os.environ, **object_store.credentials.environment(), **ours}
        subprocess.run([sys.executable, "-m", "tunesmith_server.quantize"], env=environment, check=False)
        assert report.stat().st_size <= MAX_TERMINATION_BYTES
        return TerminationReport.from_json(report.read_text())

    return run


def test_8_bits_against_16_on_the_same_rows_and_never_twice(job, object_store):
    report = job()
    assert report.outcome is Outcome.SUCCEEDED, report.message
    found = report.evaluation
    assert found is not None
    assert (found.examples, found.skipped, found.metric) == (len(FEELINGS), 0, "ExactMatch")
    assert 1.8 < found.baseline.size_bytes / found.quantized.size_bytes < 2
    assert found.quantized.memory_bytes < found.baseline.memory_bytes
    assert float(found.quantized.tokens_per_second) > 0
    assert found.baseline.perplexity is not None
    assert float(found.baseline.perplexity) == pytest.approx(BY_TRANSFORMERS, rel=0.02)
    change = found.perplexity_increase_percent
    assert change is not None
    assert float(change.low) <= float(change.value) <= float(change.high)
    assert abs(float(change.value)) < 5
    agreement, fall = found.agreement_percent, found.accuracy_drop_percent
    assert agreement is not None
    assert fall is not None
    assert 0 < float(agreement.low) < float(agreement.value) < float(agreement.high)
    assert float(fall.low) <= float(fall.value) <= float(fall.high)
    assert float(fall.high) - float(fall.low) > 10, "ten rows are few"
    page = object_store.get_bytes(found.report_uri).decode()
    assert "Q8_0 against the unquantized model" in page
    assert f"{fall.value} points lower ({fall.low} to {fall.high})" in page

    started = time.monotonic()
    again = job()
    assert again.evaluation == found, "speed and memory included: it is the first comparison, not one like it"
    assert time.monotonic() - started < 60


def test_rows_that_are_not_there_end_the_job_with_the_reason(job):
    report = job(evaluation=EvaluationPlan(uri="s3://evaluated-models/gone.jsonl"))
    assert (report.outcome, report.reason) == (Outcome.FAILED, "DatasetNotFound")
    assert "s3://evaluated-models/gone.jsonl" in report.message
