"""What admission says about evaluation and gate of a ModelDeployment: each rule has a mistake that it refuses."""

import pytest

from support import make
from tunesmith_api.v1alpha1 import ModelDeployment
from tunesmith_cli.refusals import refusals

ROWS = {"dataset": "s3://data/eval.jsonl"}
JOB = {"source": {"uri": None, "fineTuneJobRef": {"name": "tune"}}}
FALLBACK = {"onGateFailure": "FallbackMethod", "fallbackMethod": "Q8_0"}
LIMIT = {"maxAccuracyDropPercent": 3}
Q4_0 = {"quantization": {"method": "Q4_0"}}


@pytest.mark.parametrize(
    "spec",
    [
        {"gate": LIMIT, "evaluation": ROWS},
        {"gate": {"maxAccuracyDropPercent": 2.5, "minTokensPerSecond": 0}, "evaluation": {**ROWS, "maxExamples": 50}},
        {"gate": {"maxSizeBytes": 100_000_000, "minTokensPerSecond": 12.5}},
        {"gate": LIMIT, **JOB},
        {"evaluation": {}, **JOB},
        {"gate": {**LIMIT, **FALLBACK}, "evaluation": ROWS, **Q4_0},
    ],
)
def test_a_gate_that_can_be_judged_is_accepted(spec):
    assert refusals(make.modeldeployment(**spec), ModelDeployment) == []


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ({"gate": {}, "evaluation": ROWS}, "a gate needs a limit"),
        ({"gate": {"onGateFailure": "Keep"}, "evaluation": ROWS}, "a gate needs a limit"),
        ({"gate": LIMIT}, "needs held-out rows: give evaluation.dataset"),
        ({"gate": {"minAgreementPercent": 90}}, "needs held-out rows: give evaluation.dataset"),
        ({"evaluation": {}}, "evaluation needs a dataset"),
        ({"gate": {**LIMIT, "onGateFailure": "FallbackMethod"}, "evaluation": ROWS}, "give both or neither"),
        ({"gate": {**LIMIT, "fallbackMethod": "Q8_0"}, "evaluation": ROWS, **Q4_0}, "give both or neither"),
        ({"gate": {**LIMIT, **FALLBACK}, "evaluation": ROWS, "quantization": {"method": "Q8_0"}}, "two different methods"),
        ({"gate": {**LIMIT, **FALLBACK}, "evaluation": ROWS}, "neither of them Auto"),
        ({"gate": {"maxAccuracyDropPercent": -1}, "evaluation": ROWS}, "maxAccuracyDropPercent"),
        ({"gate": {"maxAccuracyDropPercent": "some"}, "evaluation": ROWS}, "maxAccuracyDropPercent"),
    ],
)  # fmt: skip
def test_one_that_can_not_is_refused_in_words(spec, complaint):
    found = refusals(make.modeldeployment(**spec), ModelDeployment)
    assert [message for message in found if complaint in message], found
