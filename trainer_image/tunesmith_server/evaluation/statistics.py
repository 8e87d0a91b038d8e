"""How sure a comparison of few examples is: 95 % intervals. Called by `figures`.

Both models answer the same rows, so differences are paired: rows that both get right, or both wrong, say nothing about
which is better and much about how alike they are. None of the intervals closes to a point where all rows agree, as a
bootstrap of proportions would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy

__all__ = ["Interval", "mean_difference", "paired_difference", "perplexity_increase", "wilson"]

Interval = tuple[float, float]
Z = 1.959963984540054  # of a normal distribution, 97.5 % lie below
RESAMPLES = 2000
BLOCK = 200
"""Resamples at once: memory stays small with many rows."""


def wilson(successes: int, trials: int) -> Interval:
    """Return the score interval of a proportion (Wilson 1927, JASA 22: 209-212)."""
    share = successes / trials
    centre = share + Z * Z / (2 * trials)
    spread = Z * math.sqrt(share * (1 - share) / trials + Z * Z / (4 * trials * trials))
    scale = 1 + Z * Z / trials
    # at the ends rounding would leave the true value outside
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == trials else (centre + spread) / scale
    return low, high


def paired_difference(both: int, first_only: int, second_only: int, neither: int) -> Interval:
    """Return the interval of a difference of two proportions on the same rows, first less second.

    Method 10 of Newcombe 1998 (Statistics in Medicine 17: 2635-2650), by the score intervals of both proportions and
    their correlation: right with few rows, too, and where all rows agree.
    """
    rows = both + first_only + second_only + neither
    first, second = (both + first_only) / rows, (both + second_only) / rows
    (low_1, high_1), (low_2, high_2) = wilson(both + first_only, rows), wilson(both + second_only, rows)
    phi = _correlation(both, first_only, second_only, neither)

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * phi * one * other + other * other))

    difference = first - second
    return difference - reach(first - low_1, high_2 - second), difference + reach(high_1 - first, second - low_2)


def _correlation(both: int, first_only: int, second_only: int, neither: int) -> float:
    margins = (both + first_only) * (second_only + neither) * (both + second_only) * (first_only + neither)
    if margins == 0:
        return 0.0
    rows, excess = both + first_only + second_only + neither, float(both * neither - first_only * second_only)
    if excess > 0:
        excess = max(excess - rows / 2, 0.0)
    return excess / math.sqrt(margins)


def mean_difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Interval:
    """Return the interval of the mean difference of scores on the same rows: percentile bootstrap over rows."""
    differences = numpy.asarray(first) - numpy.asarray(second)
    means = [differences[draw].mean(axis=1) for draw in _draws(len(differences), seed)]
    return _ends(numpy.concatenate(means))


def perplexity_increase(
    first: Sequence[float], second: Sequence[float], tokens: Sequence[int], seed: int = 0
) -> Interval:
    """Return the interval, in percent, of how much higher the second perplexity is: percentile bootstrap over rows.

    `first` and `second` are sums of negative log-likelihoods over the tokens of each row's reference answer.
    """
    excess, weights = numpy.asarray(second) - numpy.asarray(first), numpy.asarray(tokens)
    ratios = [
        numpy.exp(numpy.clip(excess[draw].sum(axis=1) / weights[draw].sum(axis=1), -20, 20))
        for draw in _draws(len(excess), seed)
    ]
    low, high = _ends(numpy.concatenate(ratios))
    return (low - 1) * 100, (high - 1) * 100


def _draws(rows: int, seed: int) -> list[numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.int64]]]:
    chance = numpy.random.default_rng(seed)
    return [chance.integers(0, rows, (BLOCK, rows)) for _ in range(RESAMPLES // BLOCK)]


def _ends(values: numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.float64]]) -> Interval:
    low, high = numpy.percentile(values, (2.5, 97.5))
    return float(low), float(high)
