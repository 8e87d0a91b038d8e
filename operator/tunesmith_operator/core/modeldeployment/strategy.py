"""How far a new revision has taken over from the one before: the pure arithmetic of `rollout.strategy`.

Where a revision is stands in its status (`stepIndex`, `weight`, `stepTime`); from there and from what answers now,
`Takeover` says where it is next, and how many replicas each side needs for it. Nothing is remembered besides, so an
operator that dies anywhere goes on from there. `revisions` moves revisions by it, `traffic` counts replicas by it.

Shares are made of replicas, both revisions behind one Service. Up to 50 % the old revision keeps all of its replicas
and the new one comes on top; beyond, the new one has all of its own and the old one goes. So there are never fewer
than `spec.replicas`, and up to half of the requests can be taken back at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from tunesmith_api.v1alpha1.rollout import CanaryStep, RolloutStrategy

__all__ = ["Counts", "Place", "Takeover", "share"]


@dataclass(frozen=True, slots=True)
class Counts:
    """Replicas of the revision before and of the new one."""

    before: int
    new: int


@dataclass(frozen=True, slots=True)
class Place:
    """How far a new revision is: its fields of the same names in status."""

    step: int = 0
    weight: int = 0
    since: datetime | None = None


def share(replicas: int, weight: int) -> Counts:
    """Replicas that come nearest to a share of `weight` percent, rounded half up, at least one of each revision."""
    if weight <= 50:
        return Counts(replicas, max(1, _rounded(replicas * weight, 100 - weight)))
    return Counts(max(1, _rounded(replicas * (100 - weight), weight)), replicas)


def _rounded(dividend: int, divisor: int) -> int:
    return (2 * dividend + divisor) // (2 * divisor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Takeover:
    """One revision taking over: what is asked for, and what answers now.

    `settled` says that all `desired` replicas of the new one are available. With nobody to take over from (`alone`: no
    revision has answered yet, or none is to answer) there are no steps.
    """

    strategy: RolloutStrategy
    replicas: int
    alone: bool
    steps: Sequence[CanaryStep] = ()
    promoted: bool = False
    after_switch: timedelta = timedelta()
    deadline: timedelta = timedelta(seconds=600)
    available: int = 0
    desired: int = 0
    settled: bool = False
    before_available: int = 0

    @property
    def _steps(self) -> Sequence[CanaryStep]:
        return self.steps if self.strategy is RolloutStrategy.CANARY and not self.alone else ()

    @property
    def _rolls(self) -> bool:
        return self.strategy is RolloutStrategy.ROLLING_UPDATE and not self.alone

    def next(self, place: Place, now: datetime) -> Place:
        """Where the revision is now: as far as replicas that answer and time that has passed have brought it."""
        last = len(self._steps)
        place = replace(place, step=min(place.step, last))
        if self.promoted and place.step < last:
            place = replace(place, step=last, since=now)
        while place.step < last:
            step = self._steps[place.step]
            if place.weight != step.weight:
                if not self._has(share(self.replicas, step.weight).new):
                    return place
                place = Place(place.step, step.weight, now)
            end = self.pause_end(place)
            if end is None or now < end:
                return place
            place = Place(place.step + 1, place.weight, now)
        if place.weight < 100:
            place = self._filled(place, now)
        return place

    def _filled(self, place: Place, now: datetime) -> Place:
        if self._has(self.replicas):
            return Place(place.step, 100, now)
        if not self._rolls:
            return place
        weight = min(99, -(-100 * min(self.available, self.replicas) // self.replicas))
        return place if weight == place.weight else Place(place.step, weight, now)

    def _has(self, replicas: int) -> bool:
        return self.settled and self.desired == replicas

    def arrived(self, place: Place, now: datetime) -> bool:
        """Whether it has all requests, and has had them for as long as it is judged afterwards."""
        if place.weight < 100 or place.step < len(self._steps):
            return False
        return self.alone or place.since is None or now >= place.since + self.after_switch

    def pause_end(self, place: Place) -> datetime | None:
        """When what is waited for by the clock is over; None where replicas are waited for, or a promotion."""
        if place.since is None:
            return None
        if place.step >= len(self._steps):
            return place.since + self.after_switch if place.weight == 100 else None
        step = self._steps[place.step]
        if place.weight != step.weight or step.pause_seconds is None:
            return None
        return place.since + timedelta(seconds=step.pause_seconds)

    def paused(self, place: Place) -> bool:
        """Whether it goes on only when it is promoted."""
        if place.step >= len(self._steps):
            return False
        step = self._steps[place.step]
        return place.weight == step.weight and step.pause_seconds is None

    def overdue_at(self, place: Place) -> datetime | None:
        """When replicas that a further step needs are given up; the first ones have their Deployment's own deadline."""
        waits = place.weight > 0 and place.weight < 100 and self.pause_end(place) is None and not self.paused(place)
        return place.since + self.deadline if waits and place.since is not None else None

    def counts(self, place: Place) -> Counts:
        """Replicas that each revision is to have at this place."""
        every = self.replicas
        if self.alone:
            return Counts(every, every)
        answering = min(self.available, every)
        if self._rolls:
            # one more than answer, and never fewer than there are already: a replica that fails is not given up
            new = max(min(self.desired, every), min(every, answering + 1))
            return Counts(every - answering if place.weight else every, new)
        if not self._steps:
            return Counts(every, every)
        if place.step < len(self._steps):
            asked = share(every, self._steps[place.step].weight)
            return Counts(max(asked.before, every - answering) if place.weight else every, asked.new)
        kept = share(every, self._steps[-1].weight).before if place.weight else every
        return Counts(max(kept, every - answering), every)

    def withdrawn(self, place: Place, now: datetime) -> Place:
        """A failed revision's place: its requests go back as soon as the revision before can take them."""
        if place.weight == 0:
            return place
        both = self.available + self.before_available
        weight = -(-100 * self.available // both) if both else 100
        enough = self.before_available >= self.replicas or (self.before_available > 0 and weight <= 50)
        if self.alone or enough:
            return Place(place.step, 0, now)
        return Place(place.step, max(1, weight), place.since)
