"""Which rows an importance matrix is computed from, and what is refused before anything starts."""

import pytest

from support import make
from tunesmith_api.plan import CalibrationPlan
from tunesmith_api.v1alpha1 import FineTuneJob, ModelDeployment, Storage
from tunesmith_api.v1alpha1.task import Task
from tunesmith_cli.refusals import refusals
from tunesmith_operator.core.modeldeployment.calibration import cannot_be_calibrated, training_rows_of
from tunesmith_operator.core.modeldeployment.source import SourceModel
from tunesmith_operator.core.modeldeployment.template import template_of

TRAINED = CalibrationPlan(uri="s3://data/train.jsonl")
SOURCE = SourceModel("s3://m/x", "d", Storage(), Task.CHAT_SFT, training=TRAINED)


def deployment(**quantization):
    return ModelDeployment.model_validate(make.modeldeployment(quantization=quantization))


def planned(**quantization):
    return template_of(deployment(**quantization), SOURCE, make.CONFIG)


def test_rows_are_those_that_are_named_else_those_of_the_training():
    assert planned(method="Q4_0").plan.calibration is None
    asked = {"maxExamples": 7, "seed": 3}
    trained = planned(method="Q4_0", calibration=asked).plan.calibration
    assert trained == CalibrationPlan(uri="s3://data/train.jsonl", max_examples=7, seed=3)
    named = planned(method="Q4_0", calibration={"dataset": "s3://data/other"}).plan.calibration
    assert named == CalibrationPlan(uri="s3://data/other")


def test_rows_and_ignored_modules_make_a_revision_and_their_absence_keeps_the_one_there_is():
    hashes = [
        planned(method="Q4_0", **more).hash
        for more in ({}, {"calibration": {}}, {"calibration": {"seed": 1}}, {"ignore": ["lm_head"]})
    ]
    assert len(set(hashes)) == 4
    assert planned(method="Q4_0", ignore=[]).hash == hashes[0]


def test_a_fallback_that_no_matrix_changes_is_made_without():
    spec = make.modeldeployment(
        quantization={"method": "Q4_0", "calibration": {}},
        gate={"maxSizeBytes": 1, "onGateFailure": "FallbackMethod", "fallbackMethod": "Q8_0"},
    )
    asked = ModelDeployment.model_validate(spec)
    fallback = asked.spec.quantization.model_copy(update={"method": asked.spec.gate.fallback_method})
    other = asked.model_copy(update={"spec": asked.spec.model_copy(update={"quantization": fallback})})
    assert template_of(other, SOURCE, make.CONFIG).plan.calibration is None


@pytest.mark.parametrize(
    ("task", "train", "expected"),
    [
        ("ChatSFT", {"uri": "s3://data/t.jsonl"}, CalibrationPlan(uri="s3://data/t.jsonl")),
        ("CausalLM", {"inline": '{"text": "a"}'}, CalibrationPlan(inline='{"text": "a"}')),
        ("ChatSFT", {"uri": "s3://data/t.csv"}, None),
        ("ChatSFT", {"uri": "s3://data/t", "format": "Parquet"}, None),
        ("ChatSFT", {"uri": "hf://o/n"}, None),
        ("DPO", {"uri": "s3://data/t.jsonl"}, None),
    ],
)
def test_training_rows_are_used_where_the_quantize_job_can_read_them(task, train, expected):
    job = FineTuneJob.model_validate(make.finetunejob(task=task, dataset={"train": train}))
    assert training_rows_of(job) == expected


def test_rows_that_can_not_be_had_are_refused_in_words():
    without = SourceModel("s3://m/x", "d", Storage())
    asked = deployment(method="Q4_0", calibration={})
    assert "name some in spec.quantization.calibration.dataset" in cannot_be_calibrated(asked, without).message
    assert cannot_be_calibrated(asked, SOURCE) is None
    csv = deployment(method="Q4_0", calibration={"dataset": "s3://data/x.csv"})
    assert "no JSON Lines" in cannot_be_calibrated(csv, SOURCE).message
    assert cannot_be_calibrated(deployment(method="Q4_0"), without) is None


@pytest.mark.parametrize(
    ("quantization", "source", "words"),
    [
        ({"method": "Q8_0", "calibration": {}}, None, "quantization.calibration goes with method Q6_K"),
        ({"calibration": {}}, None, "quantization.calibration goes with method Q6_K"),
        ({"method": "None", "ignore": ["lm_head"]}, None, "method None quantizes none"),
        ({"method": "Q4_0", "calibration": {}}, {"uri": "s3://models/x"}, "quantization.calibration needs a dataset"),
        ({"method": "Q4_0", "ignore": ["a b"]}, None, "ignore"),
    ],
)
def test_admission_refuses_what_the_spec_alone_shows(quantization, source, words):
    spec = make.modeldeployment(quantization=quantization, **({"source": source, "storage": {}} if source else {}))
    assert any(words in it for it in refusals(spec, ModelDeployment))
