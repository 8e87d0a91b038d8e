"""The CEL rules of the API types: each has a mistake that it refuses, and none reads a field that may be absent."""

from pydantic import BaseModel

from support.mistakes import MISTAKES
from tunesmith_api.v1alpha1 import FineTuneJob, FineTuneJobSpec
from tunesmith_api.v1alpha1.finetunejob import ABSENT_UNLESS_GIVEN, IMMUTABLE_AFTER_START


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
