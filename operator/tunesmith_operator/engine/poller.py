"""Polls the progress of running jobs, the metrics of servers under judgement or scaling, and what queued jobs wait for.

The controller says whom to follow and takes the samples into its observations. Each job is polled on a schedule of its
own, and pods that keep us waiting get at most half of the connections: whatever they do, the others are heard.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Final

from tunesmith_api.reports import ProgressReport
from tunesmith_operator.core.kubernetes.resources import Key
from tunesmith_operator.core.pods.figures import Figures, Tally
from tunesmith_operator.core.pods.load import Load, heard
from tunesmith_operator.core.reconcile.progress import (
    PollTarget,
    ProgressSample,
    QuotaSample,
    QuotaTarget,
    Sample,
    ServersSample,
    ServersTarget,
    Target,
)

__all__ = ["Poller"]

Fetch = Callable[[str, int], Awaitable[ProgressReport | None]]
"""Asks host and port; None where there is no report, TimeoutError where the pod never answered."""
Figuring = Callable[[str, int], Awaitable[Figures | None]]
"""Likewise of a server's metrics."""
Asking = Callable[[str, str], Awaitable[str | None]]
"""Asks why the Job of that uid in that namespace isn't admitted; nothing where that isn't known."""
News = Callable[[Key, bool], None]
"""Told whose report has changed, and whether in more than numbers."""

log = logging.getLogger(__name__)
PROMPT_SECONDS: Final = 0.5
"""A pod that takes longer to answer is slow; it shares half of the connections with those that never answered."""
LONGEST_SECONDS: Final = 30.0
"""A pod that never answers is asked half as often each time, but no more seldom than this."""
QUOTA_SECONDS: Final = 30.0
"""From one look at what a queued job waits for to the next, once that is known: its words are no progress."""
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
        figures: Figuring | None = None,
        quota: Asking | None = None,
    ) -> None:
        self._fetch, self._figures, self._quota, self._now = fetch, figures, quota, now
        self._interval, self._chance = interval_seconds, chance or random.Random()
        self._targets: dict[Key, Target] = {}
        self._samples: dict[Key, Sample] = {}
        self._tallies: dict[Key, Tally] = {}
        self._connections = asyncio.Semaphore(connections)
        self._for_slow_ones = asyncio.Semaphore(max(1, connections // 2))
        self._polls: dict[Key, asyncio.Task[None]] = {}
        self._on_news: News | None = None

    def __len__(self) -> int:
        return len(self._targets)

    def follow(self, key: Key, target: Target | None) -> None:
        """Poll that pod, or those, for the resource from now on; None ends it."""
        if self._targets.get(key) == target:
            return
        if (poll := self._polls.pop(key, None)) is not None:
            poll.cancel()
        if target is None:
            del self._targets[key]
            self._samples.pop(key, None)
            self._tallies.pop(key, None)
            return
        self._targets[key] = target
        if isinstance(target, ServersTarget):
            self._tallies[key] = self._tallies.get(key, Tally(target.window)).moved_to(target.window)
        if self._on_news is not None:
            self._start(key, target, self._on_news)

    def sample(self, key: Key) -> Sample | None:
        """The newest report of the job, or what the servers have counted."""
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

    def _start(self, key: Key, target: Target, on_news: News) -> None:
        self._polls[key] = asyncio.create_task(self._poll(key, target, on_news), name=f"poll of {key}")

    async def _poll(self, key: Key, target: Target, on_news: News) -> None:
        loop = asyncio.get_running_loop()
        prompt, timeouts = False, 0  # nobody has earned a connection of the better half before the first answer
        while True:
            async with contextlib.nullcontext() if prompt else self._for_slow_ones, self._connections:
                began = loop.time()
                try:
                    moved = await self._ask(key, target)
                except TimeoutError:
                    moved, timeouts = None, timeouts + 1
                except Exception:
                    log.exception("a bug: the poll failed", extra={"key": str(key)})
                    moved, timeouts = None, timeouts + 1
                else:
                    timeouts = 0
                prompt = timeouts == 0 and loop.time() - began <= PROMPT_SECONDS
            if moved is not None:
                on_news(key, moved)
            # jitter keeps many operators and jobs from falling into step
            pause = self._pause(timeouts, _interval_of(target))
            if isinstance(target, QuotaTarget) and isinstance(self._samples.get(key), QuotaSample):
                pause = max(pause, QUOTA_SECONDS)
            await asyncio.sleep(pause * self._chance.uniform(0.85, 1.15))

    def _pause(self, timeouts: int, wanted: float | None = None) -> float:
        usual = max(min(wanted or self._interval, self._interval), len(self._targets) / POLLS_PER_SECOND)
        return max(usual, min(LONGEST_SECONDS, usual * 2.0 ** min(timeouts, 10)))

    async def _ask(self, key: Key, target: Target) -> bool | None:
        """Ask and keep the answer; return whether more than numbers has changed, None where nothing has."""
        if isinstance(target, ServersTarget):
            return await self._add_up(key, target)
        if isinstance(target, QuotaTarget):
            return await self._hear_kueue(key, target)
        report = await self._fetch(target.host, target.port)
        return self._take(key, target, report) if report is not None else None

    async def _add_up(self, key: Key, target: ServersTarget) -> bool | None:
        """Ask one pod after the other: a rollout takes one connection, however many pods it has."""
        found, late = dict[str, Figures](), 0
        for uid, host in target.asked.items():
            try:
                figures = await self._figures(host, target.port) if self._figures is not None else None
            except TimeoutError:
                late += 1
                continue
            if figures is not None:
                found[uid] = figures
        if late and not found:
            raise TimeoutError
        for uid, _ in target.pods:
            if uid in found:
                self._tallies[key] = self._tallies[key].heard(uid, found[uid])
        tally, before, load = self._tallies[key], self._samples.get(key), self._load(key, target, found)
        sample = ServersSample(target.window, tally.figures, tally.adapters(uid for uid, _ in target.pods), load)
        if not found and load is None:
            return None
        self._samples[key] = sample
        return True if before is None or _outline(before) != _outline(sample) else None

    async def _hear_kueue(self, key: Key, target: QuotaTarget) -> bool | None:
        """Ask Kueue, which is asked ever less often as long as it says nothing, as a pod is."""
        words = await self._quota(target.namespace, target.job_uid) if self._quota is not None else None
        if not words:
            raise TimeoutError
        sample = QuotaSample(target.job_uid, words)
        if self._samples.get(key) == sample:
            return None
        self._samples[key] = sample
        return True

    def _load(self, key: Key, target: ServersTarget, found: dict[str, Figures]) -> Load | None:
        """How much there is to do, with what was heard now. Where nobody could be asked, nothing is known now."""
        before = self._samples.get(key)
        load = before.load if isinstance(before, ServersSample) else None
        if target.load is None:
            return None
        pods = {uid: found[uid] for uid, _ in target.load.pods if uid in found}
        if not pods:
            return load
        window, asked = timedelta(seconds=target.load.window_seconds), len(target.load.pods)
        return heard(load, pods, asked, target.load.total, window, self._now())

    def _take(self, key: Key, target: PollTarget, report: ProgressReport) -> bool | None:
        """Keep the report."""
        before, alive_at, moved = self._samples.get(key), self._now(), True
        if isinstance(before, ProgressSample) and before.pod_uid == target.pod_uid:
            if before.report == report:
                return None
            if before.report.heartbeat_unix == report.heartbeat_unix:
                alive_at = before.alive_at
            moved = (before.report.state, before.report.restarts) != (report.state, report.restarts)
        self._samples[key] = ProgressSample(target.pod_uid, report, alive_at)
        return moved


def _interval_of(target: Target) -> float | None:
    return target.load.interval_seconds if isinstance(target, ServersTarget) and target.load is not None else None


def _outline(sample: Sample) -> object:
    """All of a sample that can change a decision now: what changes with time alone is looked at in its time."""
    if not isinstance(sample, ServersSample):
        return sample
    load = sample.load
    return (sample.window, sample.figures, sample.adapters, (load.in_flight, load.before) if load is not None else None)
