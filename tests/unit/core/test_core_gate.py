"""The gate: each limit against each figure, in words that say by how much and how sure."""

import pytest

from tunesmith_api.v1alpha1.gate import Estimate, Evaluation, Figures, Gate, Metric
from tunesmith_operator.core.modeldeployment.gate import Outcome, judge


def figures(**changes) -> Figures:
    return Figures(**{"tokens_per_second": "20.00", "size_bytes": 91, "memory_bytes": 1, **changes})


def found(**changes) -> Evaluation:
    values = {
        "examples": 200,
        "metric": Metric.EXACT_MATCH,
        "baseline": figures(),
        "quantized": figures(),
        "accuracy_drop_percent": Estimate(value="11.20", low="6.10", high="16.40"),
        "perplexity_increase_percent": Estimate(value="4.00", low="1.00", high="7.00"),
        "agreement_percent": Estimate(value="88.50", low="83.00", high="92.00"),
    }
    return Evaluation(**{**values, **changes})


def drop(value: str, low: str, high: str) -> Evaluation:
    return found(accuracy_drop_percent=Estimate(value=value, low=low, high=high))


NOT_SURE = "With 200 rows that is not sure"
TABLE = [
    # limit, figures, outcome, what the message says, whether it is sure
    ({"max_accuracy_drop_percent": 3}, found(), Outcome.FAILED,
     "accuracy fell 11.2 points (95 % interval 6.1 to 16.4), more than gate.maxAccuracyDropPercent 3", True),
    ({"max_accuracy_drop_percent": 3}, drop("5", "1", "9"), Outcome.FAILED, "fell 5.0 points", False),
    ({"max_accuracy_drop_percent": 3}, drop("1", "-3", "5"), Outcome.PASSED,
     "accuracy fell 1.0 points (95 % interval -3.0 to 5.0), within gate.maxAccuracyDropPercent 3", False),
    ({"max_accuracy_drop_percent": 3}, drop("3", "2", "3"), Outcome.PASSED, "fell 3.0 points", True),
    ({"max_accuracy_drop_percent": 3}, drop("-2", "-5", "1"), Outcome.PASSED,
     "accuracy rose 2.0 points (95 % interval -1.0 to 5.0), within", True),
    ({"max_accuracy_drop_percent": 0.5}, drop("0", "0", "0"), Outcome.PASSED, "fell 0.0 points", True),
    ({"max_accuracy_drop_percent": 20}, found(metric=Metric.F1), Outcome.PASSED, "F1 fell 11.2 points", True),
    ({"max_perplexity_increase_percent": 3.5}, found(), Outcome.FAILED,
     "perplexity rose 4.0 % (95 % interval 1.0 to 7.0), more than gate.maxPerplexityIncreasePercent 3.5", False),
    ({"min_agreement_percent": 95}, found(), Outcome.FAILED,
     "88.5 % of the answers are the same (95 % interval 83.0 to 92.0), less than gate.minAgreementPercent 95", True),
    ({"min_agreement_percent": 85}, found(), Outcome.PASSED, "not less than gate.minAgreementPercent 85", False),
    ({"min_tokens_per_second": 21}, found(), Outcome.FAILED, "20.0 tokens per second, less than", True),
    ({"min_tokens_per_second": 20}, found(), Outcome.PASSED, "not less than gate.minTokensPerSecond 20", True),
    ({"max_size_bytes": 90}, found(), Outcome.FAILED, "the file has 91 bytes, more than gate.maxSizeBytes 90", True),
    ({"max_size_bytes": 91}, found(), Outcome.PASSED, "the file has 91 bytes, within gate.maxSizeBytes 91", True),
    ({"max_accuracy_drop_percent": 3}, None, Outcome.NOT_EVALUATED, "has not been evaluated", True),
    ({"max_accuracy_drop_percent": 3}, found(accuracy_drop_percent=None), Outcome.NOT_EVALUATED,
     "gate.maxAccuracyDropPercent is given, and that figure was not measured", True),
]  # fmt: skip


@pytest.mark.parametrize(("limit", "figures_found", "outcome", "words", "sure"), TABLE)
def test_a_limit_is_judged_by_the_figure_and_its_interval(limit, figures_found, outcome, words, sure):
    verdict = judge(Gate(**limit), figures_found)
    assert verdict.outcome is outcome
    assert words in verdict.message
    assert (NOT_SURE in verdict.message) is not sure


def test_all_broken_limits_are_named_and_kept_ones_are_not():
    gate = Gate(max_accuracy_drop_percent=3, max_perplexity_increase_percent=2, min_tokens_per_second=1)
    message = judge(gate, found()).message
    assert "accuracy fell 11.2" in message
    assert "perplexity rose 4.0" in message
    assert "tokens per second" not in message
