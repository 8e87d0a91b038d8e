"""Polls the progress of running jobs, and says when there is news.

The controller says whom to follow and takes the samples into its observations. Each job is polled on a schedule of its
own, and pods that keep us waiting get at most half of the connections: whatever they do, the others are heard.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Final

from tunesmith_api.reports import ProgressReport
from tunesmith_operator.core.kubernetes.resources import Key
from tunesmith_operator.core.reconcile.progress import PollTarget, ProgressSample

__all__ = ["Poller"]

Fetch = Callable[[str, int], Awaitable[ProgressReport | None]]
"""Asks host and port; None where there is no report, TimeoutError where the pod never answered."""
News = Callable[[Key, bool], None]
"""Told whose report has changed, and whether in more than numbers."""

log = logging.getLogger(__name__)
PROMPT_SECONDS: Final = 0.5
"""A pod that takes longer to answer is slow; it shares half of the connections with those that never answered."""
LONGEST_SECONDS: Final = 30.0
"""A pod that never answers is asked half as often each time, but no more seldom than this."""
POLLS_PER_SECOND: Final = 200.0
"""All jobs together are polled no oftener: with more than this times the interval, each waits longer for its turn."""


class Poller:
    """Holds the newest report of every followed job. `run` polls until cancelled."""

    def __init__(
        self,
        fetch: Fetch,
        now: Callable[[], datetime],
        interval_seconds: float,
        chance: random.Random | None = None,
        connections: int = 64,
    ) -> None:
        self._fetch, self._now = fetch, now
        self._interval, self._chance = interval_seconds, chance or random.Random()
        self._targets: dict[Key, PollTarget] = {}
        self._samples: dict[Key, ProgressSample] = {}
        self._connections = asyncio.Semaphore(connections)
        self._for_slow_ones = asyncio.Semaphore(max(1, connections // 2))
        self._polls: dict[Key, asyncio.Task[None]] = {}
        self._on_news: News | None = None

    def __len__(self) -> int:
        return len(self._targets)

    def follow(self, key: Key, target: PollTarget | None) -> None:
        """Poll that pod for the job from now on; None ends it."""
        if self._targets.get(key) == target:
            return
        if (poll := self._polls.pop(key, None)) is not None:
            poll.cancel()
        if target is None:
            del self._targets[key]
            self._samples.pop(key, None)
            return
        self._targets[key] = target
        if self._on_news is not None:
            self._start(key, target, self._on_news)

    def sample(self, key: Key) -> ProgressSample | None:
        """The newest report of the job."""
        return self._samples.get(key)

    async def run(self, on_news: News) -> None:
        """Poll all followed jobs, each in its own time."""
        self._on_news = on_news
        for key, target in self._targets.items():
            self._start(key, target, on_news)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._on_news = None
            for poll in self._polls.values():
                poll.cancel()
            self._polls.clear()

    def _start(self, key: Key, target: PollTarget, on_news: News) -> None:
        self._polls[key] = asyncio.create_task(self._poll(key, target, on_news), name=f"poll of {key}")

    async def _poll(self, key: Key, target: PollTarget, on_news: News) -> None:
        loop = asyncio.get_running_loop()
        prompt, timeouts = False, 0  # nobody has earned a connection of the better half before the first answer
        while True:
            async with contextlib.nullcontext() if prompt else self._for_slow_ones, self._connections:
                began = loop.time()
                try:
                    report = await self._fetch(target.host, target.port)
                except TimeoutError:
                    report, timeouts = None, timeouts + 1
                except Exception:
                    log.exception("a bug: the poll failed", extra={"key": str(key)})
                    report, timeouts = None, timeouts + 1
                else:
                    timeouts = 0
                prompt = timeouts == 0 and loop.time() - began <= PROMPT_SECONDS
            if report is not None and (moved := self._take(key, target, report)) is not None:
                on_news(key, moved)
            # jitter keeps many operators and jobs from falling into step
            await asyncio.sleep(self._pause(timeouts) * self._chance.uniform(0.85, 1.15))

    def _pause(self, timeouts: int) -> float:
        usual = max(self._interval, len(self._targets) / POLLS_PER_SECOND)
        return max(usual, min(LONGEST_SECONDS, usual * 2.0 ** min(timeouts, 10)))

    def _take(self, key: Key, target: PollTarget, report: ProgressReport) -> bool | None:
        """Keep the report; return whether more than numbers has changed, None where nothing has."""
        before, alive_at, moved = self._samples.get(key), self._now(), True
        if before is not None and before.pod_uid == target.pod_uid:
            if before.report == report:
                return None
            if before.report.heartbeat_unix == report.heartbeat_unix:
                alive_at = before.alive_at
            moved = (before.report.state, before.report.restarts) != (report.state, report.restarts)
        self._samples[key] = ProgressSample(target.pod_uid, report, alive_at)
        return moved
