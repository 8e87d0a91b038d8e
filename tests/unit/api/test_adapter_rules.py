"""What admission says about the adapters of a ModelDeployment: each rule has a mistake that it refuses."""

import pytest

from support import make
from tunesmith_api.v1alpha1 import ModelDeployment
from tunesmith_cli.refusals import refusals

URI = {"name": "pirate", "uri": "s3://models/adapters/pirate"}
JOB = {"name": "legal", "fineTuneJobRef": {"name": "legal", "digest": "a" * 64}}


@pytest.mark.parametrize(
    "spec",
    [
        {"adapters": []},
        {"adapters": [URI, JOB]},
        {"adapters": [{**URI, "digest": "b" * 64}], "engine": {"type": "LlamaCpp"}},
        {"adapters": [], "engine": {"type": "Transformers"}},
        {"adapters": [{"name": "My.Adapter_v2-b", "uri": "pvc://claim/adapters/a"}]},
    ],
)
def test_adapters_that_can_be_served_are_accepted(spec):
    assert refusals(make.modeldeployment(**spec), ModelDeployment) == []


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ({"adapters": [{"name": "a"}]}, "either fineTuneJobRef or uri"),
        ({"adapters": [{**URI, "fineTuneJobRef": {"name": "tune"}}]}, "either fineTuneJobRef or uri"),
        ({"adapters": [{**JOB, "digest": "b" * 64}]}, "digest goes with uri"),
        ({"adapters": [{**URI, "name": "sentiment"}]}, "can't have the ModelDeployment's own name"),
        ({"adapters": [URI], "engine": {"type": "Transformers"}}, "served by engine.type LlamaCpp"),
        ({"adapters": [{**URI, "name": "a/b"}]}, "adapters"),
        ({"adapters": [{**URI, "uri": "hf://owner/adapter"}]}, "adapters"),
        ({"adapters": [{**URI, "name": f"a{number}"} for number in range(33)]}, "adapters"),
    ],
)
def test_one_that_can_not_is_refused_in_words(spec, complaint):
    found = refusals(make.modeldeployment(**spec), ModelDeployment)
    assert [message for message in found if complaint in message], found
