"""How many server pods there are to be, by the requests in flight: the pure arithmetic of `spec.autoscaling`.

The number that is asked for stands in `status.autoscaling`, and each look moves it on from there by what was heard of
the pods (`Load`). `decide` puts it in the place of `spec.replicas`, so that all else goes on as if somebody had written
it there; the spec itself is never written, which an HPA or KEDA may do.

Up at once, where more is in flight than the pods are meant for, at two hearings in a row. Down to the most that was
needed in the whole of `scaleDownDelaySeconds`. To zero where nothing was asked for `idleSeconds`, and only while an
activator stands by. While a revision is taking over nothing is taken away, and at least one pod is there to prove it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from tunesmith_api.v1alpha1.autoscaling import Autoscaling
from tunesmith_operator.core.pods.load import Load
from tunesmith_operator.core.text import duration

__all__ = ["FRESH", "Scale", "Scaler"]

TOLERANCE = 1.1
"""More in flight than is meant for the pods by less than this changes nothing."""
FRESH = timedelta(seconds=45)
"""What was heard longer ago decides nothing."""
SOON = timedelta(seconds=1)
"""When it is looked again for what is due, but not yet known: pods say it at their next hearing."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A number of pods, what it was before, why, and since when; `next_look` is when time alone may change it."""

    desired: int
    previous: int
    message: str
    since: datetime | None
    next_look: datetime | None = None

    def moved(self, desired: int, message: str, now: datetime) -> Scale:
        """Another number from now on."""
        return Scale(desired, self.desired, message, now)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaler:
    """What is asked for, and what is known.

    `target` is for each pod. `taking_over`: a revision is, so nothing may be taken away. `may_sleep`: somebody would
    hold the requests.
    """

    spec: Autoscaling
    target: int
    load: Load | None
    taking_over: bool
    may_sleep: bool

    def next(self, before: Scale, now: datetime) -> Scale:
        """The number of pods now, where `before` were asked for."""
        bounded = self._bounded(before, now)
        load = self.load
        if load is None:
            return bounded
        if now - load.heard_at > FRESH:
            return replace(bounded, next_look=now + FRESH)
        if bounded.desired == 0:
            return self._woken(bounded, load, now)
        return self._more(bounded, load, now) or self._fewer(bounded, load, now)

    def _bounded(self, before: Scale, now: datetime) -> Scale:
        """As many as the spec and a revision that is taking over allow, whatever the load."""
        least, most = self.spec.min_replicas, self.spec.max_replicas
        if before.desired > most:
            return before.moved(most, f"autoscaling.maxReplicas is {most}.", now)
        if before.desired == 0 and self.taking_over:
            return before.moved(self._least, "A new revision has to prove that it answers.", now)
        if before.desired < least:
            return before.moved(least, f"autoscaling.minReplicas is {least}.", now)
        return before

    @property
    def _least(self) -> int:
        """Fewest pods of what isn't asleep."""
        return max(1, self.spec.min_replicas)

    def _needed(self, in_flight: float) -> int:
        if math.isinf(in_flight):
            return self.spec.max_replicas
        return min(max(self._least, math.ceil(in_flight / self.target)), self.spec.max_replicas)

    def _woken(self, before: Scale, load: Load, now: datetime) -> Scale:
        asked = before.since is not None and load.active_at > before.since and load.since < load.active_at
        if not load.in_flight and not asked:
            return before
        return before.moved(self._needed(load.in_flight), "A request has come.", now)

    def _more(self, before: Scale, load: Load, now: datetime) -> Scale | None:
        in_flight = load.sustained
        if before.desired >= self.spec.max_replicas or in_flight <= before.desired * self.target * TOLERANCE:
            return None
        needed = self._needed(in_flight)
        return before.moved(needed, f"{in_flight:.0f} requests were in flight, {self.target} for each replica.", now)

    def _fewer(self, before: Scale, load: Load, now: datetime) -> Scale:
        if self.taking_over:
            return before
        quiet_since = max(load.active_at, before.since or load.since)
        idle = timedelta(seconds=self.spec.idle_seconds)
        sleeps = self.spec.min_replicas == 0 and self.may_sleep
        if sleeps and load.heard_at - quiet_since >= idle:
            return before.moved(0, f"Nothing was asked for {duration(self.spec.idle_seconds)}.", now)
        delay = timedelta(seconds=self.spec.scale_down_delay_seconds)
        settled = before.since is None or load.heard_at - before.since >= delay
        peak = load.peak(load.heard_at - delay)
        if settled and peak is not None and (needed := self._needed(peak)) < before.desired:
            message = f"{peak:.0f} requests at most were in flight for {duration(delay.total_seconds())}."
            return before.moved(needed, message, now)
        looks = [max(quiet_since + idle, now + SOON)] if sleeps and not load.in_flight else []
        if self._needed(load.in_flight) < before.desired:
            # a part of the window may be over by then, and its most forgotten
            looks.append(now + max(delay / 12, SOON))
        return replace(before, next_look=min(looks, default=None))
