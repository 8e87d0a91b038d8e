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
        on_news: Callable[[Key], None],
        now: Callable[[], datetime],
        interval_seconds: float,
        chance: random.Random | None = None,
        connections: int = 64,
    ) -> None:
        self._fetch, self._on_news, self._now = fetch, on_news, now
        self._interval, self._chance = interval_seconds, chance or random.Random()
        self._targets: dict[Key, PollTarget] = {}
        self._samples: dict[Key, ProgressSample] = {}
        self._connections = asyncio.Semaphore(connections)
        self._for_slow_ones = asyncio.Semaphore(max(1, connections // 2))
        self._polls: dict[Key, asyncio.Task[None]] = {}
        self._running = False

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
        if self._running:
            self._start(key, target)

    def sample(self, key: Key) -> ProgressSample | None:
        """The newest report of the job."""
        return self._samples.get(key)

    async def run(self) -> None:
        """Poll all followed jobs, each in its own time."""
        self._running = True
        for key, target in self._targets.items():
            self._start(key, target)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._running = False
            for poll in self._polls.values():
                poll.cancel()
            self._polls.clear()

    def _start(self, key: Key, target: PollTarget) -> None:
        self._polls[key] = asyncio.create_task(self._poll(key, target), name=f"poll of {key}")

    async def _poll(self, key: Key, target: PollTarget) -> None:
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
            if report is not None:
                self._heard(key, target, report)
            # jitter keeps many operators and jobs from falling into step
            await asyncio.sleep(self._pause(timeouts) * self._chance.uniform(0.85, 1.15))

    def _pause(self, timeouts: int) -> float:
        usual = max(self._interval, len(self._targets) / POLLS_PER_SECOND)
        return max(usual, min(LONGEST_SECONDS, usual * 2.0 ** min(timeouts, 10)))

    def _heard(self, key: Key, target: PollTarget, report: ProgressReport) -> None:
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
