"""How much a deployment's pods have to do, over time: what the poller hears of them, folded for the autoscaling.

It is kept in memory alone. An operator that starts anew begins to observe anew, and until it has seen a whole window
nothing is taken away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from tunesmith_operator.core.pods.figures import Figures

__all__ = ["Load", "heard"]

PARTS = 12
"""Of the window, for each of which the most is kept."""
GAP = timedelta(seconds=90)
"""What nobody has heard of for longer may have been anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests in flight: answered by servers, or held by an activator.

    `before` is what they were at the last but one hearing. `active_at` is when something was last asked, at the
    earliest `since`, when observing began.
    """

    since: datetime
    heard_at: datetime
    active_at: datetime
    in_flight: float = 0.0
    before: float = 0.0
    peaks: tuple[tuple[datetime, float], ...] = ()
    pods: Mapping[str, Figures] = field(default_factory=dict)

    @property
    def sustained(self) -> float:
        """What was in flight at both of the last hearings: one burst asks for nothing."""
        return min(self.in_flight, self.before)

    def peak(self, moment: datetime) -> float | None:
        """The most since then; None where that was not observed throughout."""
        if self.since > moment:
            return None
        ends = [*(begun for begun, _ in self.peaks[1:]), self.heard_at]
        return max((most for (_, most), end in zip(self.peaks, ends, strict=True) if end >= moment), default=0.0)


def heard(
    load: Load | None, found: Mapping[str, Figures], asked: int, total: int, window: timedelta, now: datetime
) -> Load:
    """The load with what pods say now, by uid: `asked` of them were asked, of `total` that there are.

    A pod that didn't answer may be answering others: it counts with what it said last, and as long as there is one
    nothing is idle and no maximum is known.
    """
    if load is None or now - load.heard_at > GAP:
        load = Load(since=now, heard_at=now, active_at=now)
    missing = asked - len(found)
    pods = {**load.pods, **found} if missing else dict(found)
    in_flight = sum(it.in_flight for it in pods.values()) * max(1.0, total / asked if asked else 1.0)
    asked_since = any(uid in load.pods and it.served != load.pods[uid].served for uid, it in found.items())
    return Load(
        since=load.since,
        heard_at=now,
        active_at=now if in_flight or asked_since or missing else load.active_at,
        in_flight=in_flight,
        before=load.in_flight,
        peaks=_with(load.peaks, math.inf if missing else in_flight, window, now),
        pods=pods,
    )


def _with(
    peaks: tuple[tuple[datetime, float], ...], most: float, window: timedelta, now: datetime
) -> tuple[tuple[datetime, float], ...]:
    """The maxima of parts of the window, the newest last."""
    part = window / PARTS
    if peaks and now - peaks[-1][0] < part:
        peaks = (*peaks[:-1], (peaks[-1][0], max(peaks[-1][1], most)))
    else:
        peaks = (*peaks, (now, most))
    return peaks[-(PARTS + 2) :]
