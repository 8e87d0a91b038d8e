"""The record of a run: it survives JSON whole, and holds what plan, loop and data say."""

import json
import math

import pytest
from pydantic import ValidationError

from support.plans import training_plan
from support.records import run_record
from tunesmith_api.v1alpha1.dataset import Dataset
from tunesmith_trainer.report.record import Confusion, Data, Evaluation, Histogram, RunRecord, installed_versions
from tunesmith_trainer.report.settings import method_name, settings_of


def test_a_whole_record_survives_json():
    record = run_record()
    assert RunRecord.from_json(record.to_json()) == record


def test_numbers_that_are_not_finite_survive_json_that_any_reader_takes():
    points = [{"step": 1, "loss": math.nan, "learningRate": 1e-4, "gradNorm": math.inf, "tokens": 10, "seconds": 0.1}]
    record = RunRecord.of(training_plan(), history=points, evaluations=[{"step": 0, "loss": -math.inf}])
    text = record.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    again = RunRecord.from_json(text)
    assert math.isnan(again.history[0].loss)
    assert again.history[0].grad_norm == math.inf
    assert again.evaluations[0].metrics["loss"] == -math.inf


def test_history_takes_fields_that_a_newer_loop_adds():
    point = {"step": 1, "loss": 1.0, "learningRate": 1e-4, "gradNorm": 1.0, "tokens": 10, "seconds": 0.1, "new": 3}
    assert RunRecord.of(training_plan(), history=[point]).history[0].step == 1


def test_before_is_the_evaluation_at_step_0_and_after_that_of_the_saved_weights():
    record = run_record()
    assert (record.before.step, record.after.step) == (0, 60)
    best = record.model.model_copy(update={"step": 40})
    assert record.model_copy(update={"model": best}).after.step == 40
    nothing = RunRecord.of(training_plan())
    assert nothing.before is None
    assert nothing.after is None
    only_before = RunRecord.of(training_plan(), evaluations=[{"step": 0, "loss": 1.0}])
    assert only_before.after is None


def test_the_plan_is_told_by_names_and_the_rows_of_inline_data_are_left_out():
    rows = '{"messages": [{"role": "user", "content": "secret"}]}'
    data = Dataset.model_validate({"train": {"inline": rows}, "splitPercent": 5})
    record = RunRecord.of(training_plan(dataset=data))
    assert record.plan.train_data == "inline"
    assert record.plan.eval_data == "part of the training data (splitPercent: 5)"
    assert "secret" not in record.to_json()


def test_settings_have_the_names_of_the_spec():
    plan = training_plan(method="LoRA", training={"learning_rate": 2e-5, "eval_steps": 10})
    settings = settings_of(plan)
    assert settings["training.learningRate"] == "2e-05"
    assert settings["method.lora.targetModules"] == "all-linear"
    assert settings["training.packing"] == "true"
    assert settings["dataset.train.uri"] == "s3://bucket/train.jsonl"
    assert not any(name.startswith(("preference.", "maskedLM.", "classification.")) for name in settings)
    assert settings_of(training_plan(task="DPO"))["preference.beta"] == "0.1"


def test_a_method_is_named_with_its_options():
    plan = training_plan(method={"type": "Full", "pruning": {}, "distillation": {"teacherUri": "s3://bucket/teacher"}})
    assert method_name(plan.method) == "Full with pruning and distillation"


def test_data_statistics_are_taken_over_in_the_order_of_the_models_outputs():
    import numpy as np

    from tunesmith_trainer.data import statistics

    train = statistics.set_statistics("s3://b/t", 4, np.array([3, 5, 8]), 1, 1, {"a": 1, "b": 2})
    held_out = statistics.set_statistics("s3://b/e", 2, np.array([4, 4]), 0, 0, {"a": 2})
    found = Data.of(statistics.DataStatistics(train=train, eval=held_out, duplicates=7), labels=["b", "a"])
    assert (found.train_examples, found.eval_examples, found.train_tokens) == (3, 2, 16)
    assert (found.truncated, found.nothing_left, found.duplicates) == (1, 1, 7)
    assert [(item.label, item.train, item.held_out) for item in found.classes] == [("b", 2, 0), ("a", 1, 2)]
    assert found.lengths.total == 3
    assert Data.of(statistics.DataStatistics()).train_examples is None


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValidationError, match="one edge more"):
        Histogram(edges=(0, 1), counts=(1, 2))
    with pytest.raises(ValidationError, match="a row and a column for each label"):
        Confusion(labels=("a", "b"), counts=((1, 2),))


def test_an_evaluation_is_read_from_a_flat_record():
    assert Evaluation.of({"step": 3, "loss": 0.5, "f1": 0.1}) == Evaluation(step=3, metrics={"loss": 0.5, "f1": 0.1})


def test_versions_are_those_that_are_installed():
    import torch
    from packaging.version import Version

    # PyPI's build is 2.13.0 to the installer and 2.13.0+cu130 to itself
    assert Version(installed_versions()["torch"]).public == Version(torch.__version__).public
