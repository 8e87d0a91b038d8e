"""Whether a revision that is taking over is good enough, by what its servers and pods say: `rollout.analysis`.

`revisions` asks at every look while a share of the requests goes to it. A verdict is a text with the figures in it;
where too few requests have come to tell, that is said and nothing is held against it.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith_api.v1alpha1.rollout import Analysis
from tunesmith_operator.core.pods.figures import Figures
from tunesmith_operator.core.text import number

__all__ = ["Verdict", "judge"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """`failure` says why the revision is taken back; `note` what is known where it isn't. Either may be empty."""

    failure: str = ""
    note: str = ""


def judge(analysis: Analysis, figures: Figures | None, restarts: int) -> Verdict:
    """Compare what is known with what is asked for. None: its servers could not be asked yet."""
    if analysis.max_restarts is not None and restarts > analysis.max_restarts:
        return Verdict(
            f"its containers have restarted {restarts} times (rollout.analysis.maxRestarts: {analysis.max_restarts})"
        )
    if analysis.max_error_percent is None and analysis.max_latency_p95_seconds is None:
        return Verdict()
    if figures is None:
        return Verdict(note="Its servers have not been asked for their metrics yet.")
    if figures.requests < analysis.min_requests:
        least = f"rollout.analysis.minRequests: {analysis.min_requests}"
        return Verdict(note=f"Not judged yet: {figures.requests:.0f} requests ({least}).")
    failure = _errors(analysis, figures) or _latency(analysis, figures)
    return Verdict(failure) if failure else Verdict(note=_figures(figures))


def _errors(analysis: Analysis, figures: Figures) -> str:
    most = analysis.max_error_percent
    if most is None or figures.error_percent <= most:
        return ""
    return (
        f"{figures.errors:.0f} of {figures.requests:.0f} requests ({number(figures.error_percent, 3)} %) were answered "
        f"with a status of 500 or above (rollout.analysis.maxErrorPercent: {number(most)})"
    )


def _latency(analysis: Analysis, figures: Figures) -> str:
    most, p95 = analysis.max_latency_p95_seconds, figures.latency(0.95)
    if most is None or p95 is None or figures.timed < analysis.min_requests or p95 <= most:
        return ""
    return (
        f"5 % of {figures.requests:.0f} requests took longer than {number(p95, 3)} s "
        f"(rollout.analysis.maxLatencyP95Seconds: {number(most)})"
    )


def _figures(figures: Figures) -> str:
    p95 = figures.latency(0.95)
    slow = f", 95 % within {number(p95, 3)} s" if p95 is not None else ""
    return f"{figures.requests:.0f} requests, {number(figures.error_percent, 3)} % with errors{slow}."
