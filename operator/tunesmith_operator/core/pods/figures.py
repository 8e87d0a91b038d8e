"""What server pods count: requests, errors and latencies, read from their Prometheus metrics and added up.

A user's model runs in those pods and what they say may be anything: numbers are brought within bounds, lines that say
nothing here are passed over. The adapter reads the text, the poller keeps a `Tally` of each rollout, and the analysis
of a rollout judges by it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from tunesmith_api.keys import METRIC_ADAPTERS, METRIC_HELD, METRIC_IN_FLIGHT
from tunesmith_operator.core.pods.reports import LARGEST

__all__ = ["NOTHING", "Figures", "Tally", "read_figures"]

MOST_SERIES: Final = 10_000
MOST_ADAPTERS: Final = 256
_SAMPLE: Final = re.compile(
    rf"(http_requests_total|http_request_duration_seconds_bucket|{METRIC_ADAPTERS})"
    r"\{([^{}\n]{0,1024})\} ([0-9.eE+-]{1,32})"
)
_GAUGE: Final = re.compile(rf"^(?:{METRIC_IN_FLIGHT}|{METRIC_HELD}) ([0-9.eE+-]{{1,32}})$", re.MULTILINE)
_LABEL: Final = re.compile(r'(\w{1,64})="([^"\\]{0,256})"')
_NOT_REQUESTS: Final = frozenset({"/healthz", "/health", "/metrics"})
"""Questions of the cluster, not of clients."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Counts since some moment. `buckets`: by a bound in seconds, the requests whose latency is no longer.

    `served` are those that weren't refused for want of a key. `in_flight` is no count, but how many there are now.
    """

    requests: float = 0.0
    errors: float = 0.0
    buckets: Mapping[float, float] = field(default_factory=dict)
    adapters: frozenset[str] = frozenset()
    """`name@digest` of the adapters that a pod serves; no count."""
    served: float = 0.0
    in_flight: float = 0.0

    def plus(self, other: Figures) -> Figures:
        """Both together."""
        return self._with(other, 1.0)

    def since(self, earlier: Figures) -> Figures:
        """What has been counted since then."""
        return self._with(earlier, -1.0)

    def _with(self, other: Figures, sign: float) -> Figures:
        bounds = self.buckets.keys() | other.buckets.keys()
        return Figures(
            max(0.0, self.requests + sign * other.requests),
            max(0.0, self.errors + sign * other.errors),
            {it: max(0.0, self.buckets.get(it, 0.0) + sign * other.buckets.get(it, 0.0)) for it in bounds},
        )

    @property
    def error_percent(self) -> float:
        """Part of the requests that failed."""
        return 100.0 * min(1.0, self.errors / self.requests) if self.requests else 0.0

    @property
    def timed(self) -> float:
        """Requests whose latency is known."""
        return max(self.buckets.values(), default=0.0)

    def latency(self, quantile: float) -> float | None:
        """As Prometheus' histogram_quantile says it; above all bounds, the highest of them. None: nothing is known."""
        total, below, least = self.timed, 0.0, 0.0
        if not total:
            return None
        rank = quantile * total
        for bound in sorted(self.buckets):
            count = self.buckets[bound]
            if count >= rank:
                if math.isinf(bound) or count <= below:
                    return least
                return least + (bound - least) * (rank - below) / (count - below)
            below, least = max(below, count), bound
        return least


NOTHING: Final = Figures()


def read_figures(text: str) -> Figures:
    """The figures in a pod's Prometheus text; what isn't understood counts nothing."""
    requests = errors = refused = 0.0
    adapters: set[str] = set()
    buckets: dict[float, float] = {}
    for number, found in enumerate(_SAMPLE.finditer(text)):
        if number >= MOST_SERIES:
            break
        name, value = found[1], _count(found[3])
        labels = dict(_LABEL.findall(found[2]))
        if labels.get("path") in _NOT_REQUESTS:
            continue
        if name == METRIC_ADAPTERS:
            if value and len(adapters) < MOST_ADAPTERS:
                adapters.add(f"{labels.get('name', '')}@{labels.get('digest', '')}")
            continue
        if name == "http_requests_total":
            requests += value
            errors += value if labels.get("code", "").startswith("5") else 0.0
            refused += value if labels.get("code") == "401" else 0.0
        elif (bound := _bound(labels.get("le", ""))) is not None and (bound in buckets or len(buckets) < 64):
            buckets[bound] = buckets.get(bound, 0.0) + value
    in_flight = sum(_count(found[1]) for found in _GAUGE.finditer(text))
    return Figures(requests, errors, buckets, frozenset(adapters), served=requests - refused, in_flight=in_flight)


def _count(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return min(max(value, 0.0), float(LARGEST)) if math.isfinite(value) else 0.0


def _bound(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value >= 0 else None


@dataclass(frozen=True, slots=True)
class Tally:
    """Figures of several pods since `window` began. A pod that is new counts from its start."""

    window: str
    pods: Mapping[str, tuple[Figures, Figures]] = field(default_factory=dict)
    """By uid: as they were when the window began, and as they are."""
    ended: Figures = NOTHING
    """What pods counted that are gone, or that have begun anew."""

    def moved_to(self, window: str) -> Tally:
        """The same at the beginning of another window."""
        if window == self.window:
            return self
        return Tally(window, {uid: (now, now) for uid, (_, now) in self.pods.items()})

    def heard(self, uid: str, figures: Figures) -> Tally:
        """With what a pod says now."""
        begun, before = self.pods.get(uid, (NOTHING, NOTHING))
        ended = self.ended
        if figures.requests < before.requests:  # its container has been restarted and counts from nothing
            ended, begun = ended.plus(before.since(begun)), NOTHING
        return replace(self, pods={**self.pods, uid: (begun, figures)}, ended=ended)

    def adapters(self, uids: Iterable[str]) -> frozenset[str]:
        """The adapters that all of these pods serve; none as long as one has not been heard."""
        found = [self.pods[uid][1].adapters if uid in self.pods else frozenset() for uid in uids]
        return frozenset.intersection(*found) if found else frozenset()

    @property
    def figures(self) -> Figures:
        """All pods together."""
        found = self.ended
        for begun, now in self.pods.values():
            found = found.plus(now.since(begun))
        return found
