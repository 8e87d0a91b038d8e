"""How numbers are written for people: metrics by their names, durations, sizes. Used by report and model card."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

__all__ = ["Metric", "change", "count", "duration", "magnitude", "metric", "percent", "storage"]

THIN = "\u202f"
"""Narrow no-break space, between a number and its unit."""
MINUS = "\u2212"


@dataclass(frozen=True)
class Metric:
    """How a metric is called and written."""

    name: str
    label: str
    is_share: bool = False
    """A part of 1, written in percent."""

    def text(self, value: float | None) -> str:
        """Write a value."""
        if value is None:
            return "–"
        return percent(value) if self.is_share else magnitude(value)


_SHARES = {
    "accuracy": "accuracy",
    "tokenAccuracy": "token accuracy",
    "exactMatch": "exact match",
    "precision": "precision (macro)",
    "recall": "recall (macro)",
    "f1": "F1 (macro)",
    "f1Micro": "F1 (micro)",
    "rewardAccuracy": "preferred answer wins",
    "rougeL": "ROUGE-L",
}
_LABELS = {
    "mcc": "Matthews correlation",
    "mse": "mean squared error",
    "mae": "mean absolute error",
    "pearson": "Pearson correlation",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rewardMargin": "reward margin",
}

_ENTITIES = {"precision": "entity precision", "recall": "entity recall", "f1": "entity F1"}
"""Where tags mark spans, these count whole entities, all kinds together."""

RELATIVE = {"loss", "perplexity", "mse", "mae"}
"""Metrics whose change is told relative to what they were: they have a zero that means something."""


def metric(name: str, of_entities: bool = False) -> Metric:
    """Describe a metric by its name; one that isn't known here is named by its words."""
    if name in _SHARES:
        label = _ENTITIES.get(name) if of_entities else None
        return Metric(name, label or _SHARES[name], is_share=True)
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).lower()
    return Metric(name, _LABELS.get(name, words))


def percent(share: float) -> str:
    """Write a share as `34.8 %`."""
    return _signless(f"{share * 100:.1f}") + f"{THIN}%" if math.isfinite(share) else "not a number"


def magnitude(value: float) -> str:
    """Write a number with about four significant digits, large ones with thousands separated."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    size = abs(value)
    if size >= 1000:
        text = f"{value:,.0f}".replace(",", THIN)
    elif size >= 100:
        text = f"{value:.1f}"
    elif size >= 10:
        text = f"{value:.2f}"
    elif size >= 0.001 or value == 0:
        text = f"{value:.3f}"
    else:
        text = f"{value:.2e}"
    return _signless(text)


def change(described: Metric, before: float, after: float) -> str:
    """Write a change with its sign: in points for shares, in percent for errors, else as it is."""
    difference = after - before
    if not math.isfinite(difference):
        return "–"
    if described.is_share:
        return f"{_sign(difference)}{abs(difference) * 100:.1f} points"
    if described.name not in RELATIVE or before == 0:
        return f"{_sign(difference)}{magnitude(abs(difference))}"
    return f"{_sign(difference)}{abs(difference / before) * 100:.1f}{THIN}%"


def count(number: float) -> str:
    """Write a whole number with its thousands separated."""
    return f"{number:,.0f}".replace(",", THIN)


def duration(seconds: float) -> str:
    """Write a duration as `1 h 04 min`, `3 min 20 s` or `4.2 s`."""
    if seconds < 60:
        return f"{seconds:.1f}{THIN}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}{THIN}h {minutes:02d}{THIN}min"
    return f"{minutes}{THIN}min {rest:02d}{THIN}s"


def storage(size: float) -> str:
    """Write bytes in decimal units, as disks and stores count them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g}{THIN}{unit}"
    return f"{size:.0f}{THIN}B"


def _signless(text: str) -> str:
    return text.replace("-", MINUS)


def _sign(difference: float) -> str:
    return "+" if difference > 0 else MINUS if difference < 0 else "±"
