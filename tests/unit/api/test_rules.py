"""The CEL rules of the API types: each has a mistake that it refuses, and none reads a field that may be absent."""

import cel
import pytest
from pydantic import BaseModel

from support.mistakes import MISTAKES
from support.simulation.specs import MODELS, schema
from tunesmith_api.v1alpha1 import FineTuneJob, FineTuneJobSpec, ModelDeployment
from tunesmith_api.v1alpha1.finetunejob import (
    ABSENT_UNLESS_GIVEN,
    IMMUTABLE_AFTER_START,
    READ_AT_START,
    FailurePolicy,
)


def rules_of(node):
    if isinstance(node, dict):
        yield from node.get("x-kubernetes-validations", ())
        for value in node.values():
            yield from rules_of(value)
    elif isinstance(node, list):
        for value in node:
            yield from rules_of(value)


def test_every_rule_has_a_mistake_that_it_refuses():
    messages = {rule["message"] for rule in rules_of(FineTuneJob.model_json_schema()) if "oldSelf" not in rule["rule"]}
    assert len(messages) > 25
    complaints = [mistake.complaint for mistake in MISTAKES]
    assert [message for message in messages if not any(complaint in message for complaint in complaints)] == []


def test_the_fields_that_may_be_absent_are_known_to_the_rules_of_immutability():
    fields = {info.alias: info for info in FineTuneJobSpec.model_fields.values()}
    absent = {name for name in IMMUTABLE_AFTER_START if not fields[name].is_required() and fields[name].default is None}
    absent -= {name for name in absent if fields[name].default_factory is not None}
    assert absent == set(ABSENT_UNLESS_GIVEN)
    assert set(fields) >= set(IMMUTABLE_AFTER_START)
    assert issubclass(FineTuneJobSpec, BaseModel)


CARRIED_OUT = {
    "suspend",
    "activeDeadlineSeconds",
    "preRunningDeadlineSeconds",
    "ttlSecondsAfterFinished",
    "childrenTTLSecondsAfterFinished",
    "budget",
    "failurePolicy.backoffLimit",
    "failurePolicy.startupTimeoutSeconds",
}


def test_every_field_is_carried_out_after_the_start_or_refuses_to_change():
    fields = {info.alias for info in FineTuneJobSpec.model_fields.values()} - {"failurePolicy"}
    fields |= {f"failurePolicy.{info.alias}" for info in FailurePolicy.model_fields.values()}
    unchanging = set(IMMUTABLE_AFTER_START) | set(READ_AT_START)
    assert fields == unchanging | CARRIED_OUT
    assert not unchanging & CARRIED_OUT
    rules = {
        rule["message"].split()[0] for rule in rules_of(FineTuneJob.model_json_schema()) if "oldSelf" in rule["rule"]
    }
    assert rules == {f"spec.{field}" for field in unchanging}


def test_a_field_that_pods_have_read_says_how_to_go_on_with_another_value():
    (rule,) = [it for it in rules_of(FineTuneJob.model_json_schema()) if "spec.failurePolicy.maxRestarts" in it["rule"]]
    assert rule["message"].startswith("spec.failurePolicy.maxRestarts can't change once the job has started: delete it")
    assert "checkpoint.uri" in rule["message"]


def test_a_deployment_does_not_take_the_name_of_a_jobs_service():
    (rule,) = [it for it in rules_of(ModelDeployment.model_json_schema()) if "-workers" in it["rule"]]
    assert rule["rule"].startswith("has(self.status) ||"), "a status must stay possible to write"
    assert rule["message"].endswith("choose another name")


def _defaults(node):
    """Every part of a schema that has both rules and a default, which the API server judges as it is written."""
    if isinstance(node, dict):
        if "x-kubernetes-validations" in node and "default" in node:
            yield node["default"], [it["rule"] for it in node["x-kubernetes-validations"]]
        for inner in node.values():
            yield from _defaults(inner)


@pytest.mark.parametrize("kind", MODELS)
def test_defaults_keep_the_rules_without_the_defaults_within_them(kind):
    found = list(_defaults(schema(kind)))
    for default, rules in found:
        assert [rule for rule in rules if cel.evaluate(rule, {"self": default}) is not True] == [], default
