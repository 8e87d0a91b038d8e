"""Two models' answers to the same rows → the figures that the gate judges by. Called by `compare`; pure."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith_api.v1alpha1.gate import Estimate, Evaluation, Figures, Metric
from tunesmith_server.evaluation.interview import Answer, Answers
from tunesmith_server.evaluation.rows import Row
from tunesmith_server.evaluation.statistics import (
    Interval,
    mean_difference,
    paired_difference,
    perplexity_increase,
    wilson,
)

__all__ = ["Candidate", "figures_of", "metric_of", "score_of"]

LABEL_WORDS = 5
"""More than so many words are no label."""
MOST_EXPONENT = 50.0


@dataclass(frozen=True)
class Candidate:
    """One model: what it answered, and the size of its file."""

    answers: Answers
    size_bytes: int


def metric_of(rows: Sequence[Row]) -> Metric:
    """Say what counts as right: the very words where all references are labels that recur, else words in common."""
    references = {_plain(row.reference) for row in rows}
    if any(row.text is not None for row in rows):
        return Metric.EXACT_MATCH
    short = all(len(reference.split()) <= LABEL_WORDS for reference in references)
    return Metric.EXACT_MATCH if short and 2 * len(references) <= len(rows) else Metric.F1


def score_of(metric: Metric, answer: str, reference: str) -> float:
    """How right an answer is, 0 to 1, without case and punctuation: exact match, or F1 of words (Rajpurkar 2016)."""
    said, wanted = _plain(answer).split(), _plain(reference).split()
    if metric is Metric.EXACT_MATCH or not said or not wanted:
        return float(said == wanted)
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted))


def figures_of(rows: Sequence[Row], baseline: Candidate, quantized: Candidate, digest: str) -> Evaluation:
    """Compare the two models; only what doesn't take rows where there are none that fit."""
    asked = list(zip(rows, baseline.answers.answers, quantized.answers.answers, strict=True))
    fit = [(row, one, other) for row, one, other in asked if one.text is not None and other.text is not None]
    facts = {"examples": len(fit), "skipped": len(asked) - len(fit), "dataset_digest": digest if rows else ""}
    if not fit:
        return Evaluation(baseline=_figures(baseline), quantized=_figures(quantized), **facts)
    metric = metric_of([row for row, _, _ in fit])
    pairs = [(one, other) for _, one, other in fit]
    scores = [
        tuple(_score(metric, it.text or "", row) for it in pair) for (row, *_), pair in zip(fit, pairs, strict=True)
    ]
    first, second = [it[0] for it in scores], [it[1] for it in scores]
    return Evaluation(
        metric=metric,
        baseline=_figures(baseline, [one for one, _ in pairs], first),
        quantized=_figures(quantized, [other for _, other in pairs], second),
        perplexity_increase_percent=_perplexity(pairs),
        accuracy_drop_percent=_accuracy(metric, first, second),
        agreement_percent=_agreement(pairs),
        **facts,
    )


def _score(metric: Metric, answer: str, row: Row) -> float:
    """A class is a name: of it, every character counts."""
    return float(answer == row.reference) if row.text is not None else score_of(metric, answer, row.reference)


def _figures(candidate: Candidate, answers: Sequence[Answer] = (), scores: Sequence[float] = ()) -> Figures:
    return Figures(
        perplexity=_text(_perplexity_of(answers), 4) if answers else None,
        accuracy_percent=_text(100 * sum(scores) / len(scores), 2) if scores else None,
        tokens_per_second=_text(candidate.answers.tokens_per_second, 2),
        size_bytes=candidate.size_bytes,
        memory_bytes=candidate.answers.memory_bytes,
    )


def _perplexity_of(answers: Sequence[Answer]) -> float:
    return math.exp(min(sum(it.loss for it in answers) / sum(it.tokens for it in answers), MOST_EXPONENT))


def _perplexity(pairs: Sequence[tuple[Answer, Answer]]) -> Estimate:
    first, second = [one.loss for one, _ in pairs], [other.loss for _, other in pairs]
    tokens = [one.tokens for one, _ in pairs]
    value = math.expm1(max(-20.0, min((sum(second) - sum(first)) / sum(tokens), 20.0))) * 100
    return _estimate(value, perplexity_increase(first, second, tokens))


def _accuracy(metric: Metric, first: Sequence[float], second: Sequence[float]) -> Estimate:
    value = (sum(first) - sum(second)) / len(first)
    if metric is not Metric.EXACT_MATCH:
        return _estimate(value, mean_difference(first, second), 100)
    cells = Counter(zip(map(bool, first), map(bool, second), strict=True))
    both, lost, won, neither = (cells[it] for it in ((True, True), (True, False), (False, True), (False, False)))
    return _estimate(value, paired_difference(both, lost, won, neither), 100)


def _agreement(pairs: Sequence[tuple[Answer, Answer]]) -> Estimate:
    alike = sum(one.text == other.text for one, other in pairs)
    return _estimate(alike / len(pairs), wilson(alike, len(pairs)), 100)


def _estimate(value: float, interval: Interval, scale: float = 1) -> Estimate:
    low, high = interval
    return Estimate(value=_text(scale * value, 2), low=_text(scale * low, 2), high=_text(scale * high, 2))


def _text(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
