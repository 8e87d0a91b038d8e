"""The quantize Job compares the real model in 8 bits with itself in 16, both as served, and does so once."""

import os
import subprocess
import sys
import time

import pytest

from tunesmith_api import keys
from tunesmith_api.plan import EvaluationPlan
from tunesmith_api.reports import MAX_TERMINATION_BYTES, Outcome, TerminationReport

BY_TRANSFORMERS = 2456.03
"""Perplexity of these answers by transformers in fp32: the template's prompt, the label's tokens, log_softmax."""


@pytest.fixture
def job(smollm2_job, object_store, tmp_path):
    """Runs one more Job like the first; returns its report."""

    def run(**changes) -> TerminationReport:
        plan, report = tmp_path / "plan.json", tmp_path / "termination.json"
        plan.write_text(smollm2_job.plan.model_copy(update=changes).to_json())
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


def test_8_bits_against_16_on_the_same_rows_and_never_twice(job, smollm2_job, object_store):
    report = smollm2_job.report
    assert report.outcome is Outcome.SUCCEEDED, report.message
    found = report.evaluation
    assert found is not None
    assert (found.examples, found.skipped, found.metric) == (10, 0, "ExactMatch")
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
    report = job(evaluation=EvaluationPlan(uri="s3://served-models/gone.jsonl"))
    assert (report.outcome, report.reason) == (Outcome.FAILED, "DatasetNotFound")
    assert "s3://served-models/gone.jsonl" in report.message
