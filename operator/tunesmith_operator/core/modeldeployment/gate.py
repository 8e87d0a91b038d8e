"""Limits x figures → may this revision have traffic, and in words why, by how much, and how sure that is.

`revisions` asks when an artefact has been made and evaluated, and again when a limit has changed; `status` for the
condition. A limit is broken by what was measured; the interval says whether that may be chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum

from tunesmith_api.keys import DeploymentCondition, Reason
from tunesmith_api.v1alpha1 import ModelDeployment
from tunesmith_api.v1alpha1.deploymentstatus import Revision, RevisionPhase
from tunesmith_api.v1alpha1.gate import Estimate, Evaluation, Gate, Metric
from tunesmith_operator.core.status.conditions import FALSE, TRUE, UNKNOWN, Finding
from tunesmith_operator.core.text import number, shortened

__all__ = ["Outcome", "Verdict", "held_back", "judge", "judged", "quality_held"]

MAX_MESSAGE = 1024


class Outcome(StrEnum):
    """What a gate says."""

    PASSED = "Passed"
    FAILED = "Failed"
    NOT_EVALUATED = "NotEvaluated"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a gate says, and in words why."""

    outcome: Outcome
    message: str


@dataclass(frozen=True, slots=True)
class _Check:
    """One limit, compared with one figure. `doubtful`: the interval has the limit inside."""

    text: str
    broken: bool
    doubtful: bool = False


def judge(gate: Gate, evaluation: Evaluation | None) -> Verdict:
    """Compare every limit with what was measured."""
    if evaluation is None:
        return Verdict(Outcome.NOT_EVALUATED, "it has not been evaluated")
    checks: list[_Check] = []
    for field, find in _FIGURES.items():
        if getattr(gate, field) is None:
            continue
        found = find(gate, evaluation)
        if found is None:
            name = Gate.model_fields[field].alias
            return Verdict(Outcome.NOT_EVALUATED, f"gate.{name} is given, and that figure was not measured")
        checks.append(found)
    broken = [it for it in checks if it.broken]
    shown = broken or checks
    text = "; ".join(it.text for it in shown)
    if any(it.doubtful for it in shown):
        text += (
            f". With {evaluation.examples} rows that is not sure: the limit lies within the interval; "
            "more held-out rows (evaluation.maxExamples) say more"
        )
    return Verdict(Outcome.FAILED if broken else Outcome.PASSED, text)


def _perplexity(gate: Gate, found: Evaluation) -> _Check | None:
    text = "perplexity {verb} {amount} %"
    return _most(
        found.perplexity_increase_percent,
        gate.max_perplexity_increase_percent,
        text,
        ("rose", "fell"),
        "PerplexityIncrease",
    )


def _accuracy(gate: Gate, found: Evaluation) -> _Check | None:
    name = "F1" if found.metric is Metric.F1 else "accuracy"
    text = name + " {verb} {amount} points"
    return _most(found.accuracy_drop_percent, gate.max_accuracy_drop_percent, text, ("fell", "rose"), "AccuracyDrop")


def _most(figure: Estimate | None, limit: float | None, text: str, verbs: tuple[str, str], name: str) -> _Check | None:
    if figure is None or limit is None:
        return None
    value, low, high, most = (Decimal(it) for it in (figure.value, figure.low, figure.high, number(limit)))
    broken = value > most
    if value < 0:
        # said the other way round, so is the interval
        verb, (value, low, high) = verbs[1], (-value, -high, -low)
    else:
        verb = verbs[0]
    beyond = "more than" if broken else "within"
    said = f"{text.format(verb=verb, amount=_short(value))} (95 % interval {_short(low)} to {_short(high)})"
    doubtful = Decimal(figure.low) <= most < Decimal(figure.high)
    return _Check(f"{said}, {beyond} gate.max{name}Percent {number(limit)}", broken, doubtful)


def _agreement(gate: Gate, found: Evaluation) -> _Check | None:
    figure, limit = found.agreement_percent, gate.min_agreement_percent
    if figure is None or limit is None:
        return None
    value, low, high, least = (Decimal(it) for it in (figure.value, figure.low, figure.high, number(limit)))
    beyond = "less than" if value < least else "not less than"
    said = f"{_short(value)} % of the answers are the same (95 % interval {_short(low)} to {_short(high)})"
    return _Check(f"{said}, {beyond} gate.minAgreementPercent {number(limit)}", value < least, low < least <= high)


def _speed(gate: Gate, found: Evaluation) -> _Check | None:
    limit = number(gate.min_tokens_per_second or 0)
    value, least = Decimal(found.quantized.tokens_per_second), Decimal(limit)
    beyond = "less than" if value < least else "not less than"
    text = f"{_short(value)} tokens per second, {beyond} gate.minTokensPerSecond {limit}"
    return _Check(text, value < least)


def _size(gate: Gate, found: Evaluation) -> _Check | None:
    size, most = found.quantized.size_bytes, gate.max_size_bytes or 0
    return _Check(
        f"the file has {size} bytes, {'more than' if size > most else 'within'} gate.maxSizeBytes {most}", size > most
    )


_FIGURES: dict[str, Callable[[Gate, Evaluation], _Check | None]] = {
    "max_accuracy_drop_percent": _accuracy,
    "max_perplexity_increase_percent": _perplexity,
    "min_agreement_percent": _agreement,
    "min_tokens_per_second": _speed,
    "max_size_bytes": _size,
}


def _short(value: Decimal) -> str:
    return f"{round(value, 1) + 0:.1f}"  # no "-0.0"


def held_back(revision: Revision) -> bool:
    """Whether the gate keeps a revision from its traffic."""
    reasons = (Reason.QUALITY_GATE_FAILED, Reason.NOT_EVALUATED)
    return revision.phase is RevisionPhase.FAILED and revision.reason in reasons


def judged(deployment: ModelDeployment, revision: Revision) -> Revision:
    """The revision whose artefact is made, on its way to the servers or held back."""
    gate = deployment.spec.gate
    verdict = judge(gate, revision.evaluation) if gate is not None else Verdict(Outcome.PASSED, "")
    if verdict.outcome is Outcome.PASSED:
        return revision.model_copy(update={"phase": RevisionPhase.ROLLING_OUT, "reason": "", "message": ""})
    if verdict.outcome is Outcome.FAILED:
        reason, message = Reason.QUALITY_GATE_FAILED, f"the quality gate holds it back: {verdict.message}"
    else:
        again = f"kubectl delete job -n {deployment.metadata.namespace} {revision.name}-quantize"
        reason, message = (
            Reason.NOT_EVALUATED,
            f"the quality gate holds it back: {verdict.message}. Try again with: {again}",
        )
    update = {"phase": RevisionPhase.FAILED, "reason": reason.value, "message": shortened(message, MAX_MESSAGE)}
    return revision.model_copy(update=update)


def quality_held(deployment: ModelDeployment, revisions: tuple[Revision, ...]) -> Finding:
    """The condition about the newest revision, by the limits as they are now."""
    type_, gate, latest = DeploymentCondition.QUALITY_HELD, deployment.spec.gate, revisions[-1]
    if gate is None:
        message = "There is no gate: spec.gate says what quantization may cost."
        return Finding(type_, UNKNOWN, Reason.NOT_EVALUATED, message)
    verdict = judge(gate, latest.evaluation)
    message = f"{latest.name}: {verdict.message}.{' '.join(_instead_of(latest, revisions))}"
    if verdict.outcome is Outcome.NOT_EVALUATED:
        return Finding(type_, UNKNOWN, Reason.NOT_EVALUATED, message)
    if verdict.outcome is Outcome.FAILED:
        return Finding(type_, FALSE, Reason.QUALITY_GATE_FAILED, message)
    return Finding(type_, TRUE, Reason.QUALITY_GATE_PASSED, message)


def _instead_of(latest: Revision, revisions: tuple[Revision, ...]) -> Iterator[str]:
    if not latest.stands_in_for:
        return
    for first in reversed(revisions):
        if first.hash == latest.stands_in_for and held_back(first):
            yield f" {latest.quantization} is tried instead of {first.quantization}: of {first.name}, {first.message}."
            return
