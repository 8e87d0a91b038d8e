"""Scores from counts that add up over batches and ranks. Called by `assess` (the counts) and `metrics` (the scores).

An F1 of all data is not the mean of the batches' F1: so batches hand over counts, and only their sums are made into
scores. All formulas agree with scikit-learn's, a score without a denominator being 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = [
    "CONFUSION_LIMIT",
    "class_scores",
    "class_sums",
    "confusion_matrix",
    "has_spans",
    "matthews",
    "multi_label_sums",
    "regression_scores",
    "regression_sums",
    "unit_scores",
]

CONFUSION_LIMIT = 100
"""Most classes of which a confusion matrix is kept: a larger one is too big to send around, and to look at."""

Sums = Mapping[str, Sequence[float]]


def class_sums(targets: ArrayLike, predicted: ArrayLike, classes: int) -> dict[str, list[float]]:
    """Count the outcomes of examples with one class each.

    Args:
        targets: [examples] true class numbers.
        predicted: [examples] class numbers that the model puts first.
        classes: how many there are.

    Returns:
        Per class: `hits` (true positives), `predicted` and `actual` (how often it was said and was so), each [classes];
        `confusion` [classes * classes], row by row: rows are the true class. It is left out above CONFUSION_LIMIT.
    """
    import numpy as np

    true, said = np.asarray(targets, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    sums = {
        "hits": np.bincount(true[true == said], minlength=classes),
        "predicted": np.bincount(said, minlength=classes),
        "actual": np.bincount(true, minlength=classes),
    }
    if classes <= CONFUSION_LIMIT:
        sums["confusion"] = np.bincount(true * classes + said, minlength=classes * classes)
    return {name: counts.astype(float).tolist() for name, counts in sums.items()}


def multi_label_sums(targets: ArrayLike, predicted: ArrayLike) -> dict[str, list[float]]:
    """Count the outcomes of examples with any number of classes each.

    Args:
        targets: [examples, classes], true or 1 where an example has the class.
        predicted: the same, as the model says it.

    Returns:
        `hits`, `predicted`, `actual`: as `class_sums` has them; `exact` [1]: examples with all classes right.
    """
    import numpy as np

    true, said = np.asarray(targets) > 0, np.asarray(predicted) > 0
    return {
        "hits": (true & said).sum(0).astype(float).tolist(),
        "predicted": said.sum(0).astype(float).tolist(),
        "actual": true.sum(0).astype(float).tolist(),
        "exact": [float((true == said).all(1).sum())],
    }


def has_spans(names: Sequence[str]) -> bool:
    """Whether tags mark spans (B-X, I-X, O), and not each word for itself (NOUN, VERB)."""
    return any(name.startswith("B-") for name in names) and all(
        name == "O" or name[:2] in {"B-", "I-"} for name in names
    )


def unit_scores(hits: float, predicted: float, actual: float) -> tuple[float, float, float]:
    """Return precision, recall and F1 (their harmonic mean) of counts (van Rijsbergen, 1979, ch. 7)."""
    return _part(hits, predicted), _part(hits, actual), _part(2 * hits, predicted + actual)


def class_scores(sums: Sums) -> dict[str, float]:
    """Turn `hits`, `predicted` and `actual` into scores.

    Returns:
        `precision`, `recall`, `f1`: macro, the plain mean over classes (scikit-learn's `average="macro"`; a class that
        occurs neither in the data nor in the answers is left out). `f1Micro`: F1 of the summed counts; with one class
        per example that is the accuracy.
    """
    hits, said, true = sums["hits"], sums["predicted"], sums["actual"]
    classes = [unit_scores(*counts) for counts in zip(hits, said, true, strict=True) if counts[1] or counts[2]]
    means = [_part(math.fsum(scores), len(classes)) for scores in zip(*classes, strict=True)] or [0.0] * 3
    micro = unit_scores(sum(hits), sum(said), sum(true))[2]
    return {"precision": means[0], "recall": means[1], "f1": means[2], "f1Micro": micro}


def matthews(sums: Sums) -> float:
    """Return the Matthews correlation of examples with one class each, over all classes.

    Only the margins of the confusion matrix and its trace are needed: Gorodkin (2004), "Comparing two K-category
    assignments by a K-category correlation coefficient", R_K.
    """
    said, true = sums["predicted"], sums["actual"]
    examples = sum(true)
    covariance = sum(sums["hits"]) * examples - sum(a * b for a, b in zip(said, true, strict=True))
    spread = (examples**2 - sum(a * a for a in said)) * (examples**2 - sum(b * b for b in true))
    return _part(covariance, math.sqrt(spread))


def confusion_matrix(sums: Sums) -> list[list[int]] | None:
    """Return the matrix that `class_sums` flattened, rows being the true class; None where it was too large to keep."""
    flat = sums.get("confusion")
    if flat is None:
        return None
    classes = math.isqrt(len(flat))
    return [[round(count) for count in flat[row * classes : (row + 1) * classes]] for row in range(classes)]


def regression_sums(targets: ArrayLike, predicted: ArrayLike) -> list[float]:
    """Add up what `regression_scores` needs of [examples] true and [examples] predicted numbers, in float64."""
    import numpy as np

    true, said = np.asarray(targets, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    error = said - true
    parts = (np.ones_like(true), true, said, true * true, said * said, true * said, error * error, np.abs(error))
    return [float(part.sum()) for part in parts]


def regression_scores(sums: Sequence[float]) -> dict[str, float]:
    """Turn the sums of `regression_sums` into `mse`, `mae` and `pearson` (Pearson, 1895).

    The correlation is 0 where one side does not vary.
    """
    count, true, said, true_squared, said_squared, product, squared_error, absolute_error = sums
    covariance = count * product - true * said
    spreads = (count * true_squared - true * true, count * said_squared - said * said)
    # what is left of two equal sums by rounding is no variance
    varies = all(
        spread > 1e-12 * count * squares for spread, squares in zip(spreads, (true_squared, said_squared), strict=True)
    )
    return {
        "mse": _part(squared_error, count),
        "mae": _part(absolute_error, count),
        "pearson": covariance / (math.sqrt(spreads[0]) * math.sqrt(spreads[1])) if varies else 0.0,
    }


def _part(of: float, whole: float) -> float:
    return of / whole if whole else 0.0
