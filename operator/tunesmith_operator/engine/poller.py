"""Polls the progress of running jobs, and wakes the controller when there is news."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from datetime import datetime

from tunesmith_api.reports import ProgressReport
from tunesmith_operator.core.kubernetes.resources import Key
from tunesmith_operator.core.reconcile.progress import PollTarget, ProgressSample

__all__ = ["Poller"]

Fetch = Callable[[str, int], Awaitable[ProgressReport | None]]


class Poller:
    """Holds the newest report of every followed job. `run` polls until cancelled."""

    def __init__(
        self,
        fetch: Fetch,
        on_news: Callable[[Key], None],
        now: Callable[[], datetime],
        interval_seconds: float,
        chance: random.Random | None = None,
    ) -> None:
        self._fetch, self._on_news, self._now = fetch, on_news, now
        self._interval, self._chance = interval_seconds, chance or random.Random()
        self._targets: dict[Key, PollTarget] = {}
        self._samples: dict[Key, ProgressSample] = {}

    def follow(self, key: Key, target: PollTarget | None) -> None:
        """Poll that pod for the job from now on; None ends it."""
        if target is None:
            self._targets.pop(key, None)
            self._samples.pop(key, None)
        else:
            self._targets[key] = target

    def sample(self, key: Key) -> ProgressSample | None:
        """The newest report of the job."""
        return self._samples.get(key)

    async def run(self) -> None:
        """Poll all followed jobs at once, rest, and again."""
        while True:
            await asyncio.gather(*(self._poll(key, target) for key, target in list(self._targets.items())))
            # jitter keeps many operators and jobs from falling into step
            await asyncio.sleep(self._interval * self._chance.uniform(0.85, 1.15))

    async def _poll(self, key: Key, target: PollTarget) -> None:
        report = await self._fetch(target.host, target.port)
        if report is None or self._targets.get(key) != target:
            return
        before = self._samples.get(key)
        if before is not None and before.pod_uid == target.pod_uid:
            if before.report == report:
                return
            moved = before.report.heartbeat_unix != report.heartbeat_unix
            alive_at = self._now() if moved else before.alive_at
        else:
            alive_at = self._now()
        self._samples[key] = ProgressSample(target.pod_uid, report, alive_at)
        self._on_news(key)
