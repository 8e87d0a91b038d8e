"""The API types: what they accept, refuse and fill in."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tunesmith_api.keys import Reason
from tunesmith_api.model import Quantity, SpecModel
from tunesmith_api.plan import OptimizationPlan, TrainingPlan
from tunesmith_api.reports import MAX_TERMINATION_BYTES, Outcome, TerminationReport
from tunesmith_api.v1alpha1 import FineTuneJob

MINIMAL = {
    "metadata": {"name": "sentiment", "namespace": "ml"},
    "spec": {
        "model": {"uri": "s3://models/base"},
        "dataset": {"train": {"uri": "s3://data/train.jsonl"}},
        "checkpoint": {"uri": "s3://checkpoints/sentiment"},
        "output": {"uri": "s3://models/sentiment"},
    },
}


def plan(**changes) -> TrainingPlan:
    training = OptimizationPlan(
        num_train_epochs=1, learning_rate=2e-4, lr_scheduler_type="cosine", warmup_ratio=0.03, weight_decay=0, adam_beta1=0.9,
        adam_beta2=0.999, adam_epsilon=1e-8, max_grad_norm=1, global_batch_size=8, micro_batch_size=4, max_length=64,
        precision="FP32", seed=1,
    )  # fmt: skip
    values = {
        "name": "a", "namespace": "b", "uid": "c", "task": "ChatSFT", "model_uri": "s3://models/m",
        "dataset": {"train": {"uri": "s3://data/t"}}, "method": {"type": "Full"}, "training": training, "replicas": 2, "head_host": "h", "checkpoint_uri": "s3://ckpt/a",
        "checkpoint_every_steps": 5, "checkpoint_keep_last": 2, "output_uri": "s3://models/o",
    }  # fmt: skip
    return TrainingPlan(**{**values, **changes})


def test_a_minimal_job_gets_every_default():
    job = FineTuneJob.model_validate(MINIMAL)
    assert job.spec.training.learning_rate == 2e-4
    assert job.spec.workers.replicas == 1
    assert job.spec.method.type == "LoRA"
    assert not job.spec.suspend


def test_an_unknown_spec_field_is_named():
    body = {**MINIMAL, "spec": {**MINIMAL["spec"], "learningRate": 1e-3}}
    with pytest.raises(ValidationError, match="learningRate"):
        FineTuneJob.model_validate(body)


def test_an_unknown_status_field_of_a_newer_version_is_ignored():
    assert (
        FineTuneJob.model_validate({**MINIMAL, "status": {"phase": "Training", "future": 1}}).status.phase == "Training"
    )


class Box(SpecModel):
    cpu: Quantity = "1"


@pytest.mark.parametrize(("given_value", "kept"), [(2, "2"), (0.5, "0.5"), ("500m", "500m"), ("3Gi", "3Gi")])
def test_a_quantity_may_be_a_number(given_value, kept):
    assert Box(cpu=given_value).cpu == kept


def test_placement_does_not_change_the_plan_digest_but_the_learning_rate_does():
    base = plan()
    assert plan(replicas=4, attempt=3, max_restarts=1).digest == base.digest
    assert plan(training=base.training.model_copy(update={"micro_batch_size": 1})).digest == base.digest
    assert plan(training=base.training.model_copy(update={"learning_rate": 1e-3})).digest != base.digest
    assert plan(model_uri="s3://models/other").digest != base.digest
    assert plan(method={"type": "LoRA"}).digest != base.digest
    assert plan(dataset={"train": {"uri": "s3://data/t"}, "cacheUri": "s3://data/c"}).digest == base.digest
    assert plan(dataset={"train": {"uri": "s3://data/t"}, "onBadRow": "Skip"}).digest != base.digest


@pytest.mark.parametrize("field", ["packing", "group_by_length", "gradient_checkpointing"])
def test_what_does_not_change_the_result_does_not_change_the_digest(field):
    base = plan()
    turned = base.training.model_copy(update={field: not getattr(base.training, field)})
    assert plan(training=turned).digest == base.digest


def test_a_plan_survives_the_round_trip():
    assert TrainingPlan.from_json(plan().to_json()) == plan()


def test_a_plan_of_another_schema_version_is_refused():
    document = {**json.loads(plan().to_json()), "schemaVersion": 2}
    with pytest.raises(ValidationError, match="schemaVersion"):
        TrainingPlan.from_json(json.dumps(document))


@given(
    message=st.text(max_size=9000),
    metrics=st.dictionaries(st.text(max_size=40), st.floats(allow_nan=False, allow_infinity=False), max_size=80),
)
def test_a_termination_report_always_fits_and_keeps_its_reason(message, metrics):
    report = TerminationReport(outcome=Outcome.FAILED, reason=Reason.DATASET_INVALID, message=message, metrics=metrics)
    text = report.to_bounded_json()
    assert len(text.encode()) <= MAX_TERMINATION_BYTES
    assert TerminationReport.from_json(text).reason == Reason.DATASET_INVALID
