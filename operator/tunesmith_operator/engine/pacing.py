"""When a request to the API server may be made, so that the operator never takes more of it than it was given.

The controller asks before each request. What changes what people and programs wait for (children, verdicts, events) is
urgent and waits for its turn, first come, first served. Progress never waits: it takes only what is left over, and of
the workers a quarter at most, so that an API server that takes its time is asked for less of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

__all__ = ["PROGRESS_SECONDS", "RequestPace", "TokenBucket"]

PROGRESS_SECONDS: Final = 10.0
"""From one write of a job's progress to the next, at least."""


class TokenBucket:
    """Lets `burst` through at once and `rate` per second after that."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate, self._burst = rate, float(burst)
        self._tokens, self._at = float(burst), 0.0

    def reserve(self, now: float) -> float:
        """Take a token; return how many seconds to wait for it."""
        self._tokens = self.left(now) - 1.0
        self._at = max(self._at, now)
        return max(0.0, -self._tokens / self._rate)

    def left(self, now: float) -> float:
        """Tokens that nobody has taken; negative where some wait for theirs."""
        return min(self._burst, self._tokens + max(0.0, now - self._at) * self._rate)


class RequestPace:
    """Every request to the API server takes a token."""

    def __init__(
        self,
        rate: float,
        burst: int,
        on_wait: Callable[[float], None] = lambda seconds: None,
        progress_at_once: int = 4,
    ) -> None:
        self._bucket, self._rate = TokenBucket(rate, burst), rate
        self._progress = TokenBucket(rate / 2.0, max(1, burst // 2))
        # what is urgent finds half of a burst even while all jobs report progress
        self._reserve = 1.0 + burst // 2
        self._at_once, self._under_way = progress_at_once, 0
        self._on_wait = on_wait

    async def turn(self) -> None:
        """Return when an urgent request may be made."""
        wait = self._bucket.reserve(_now())
        self._on_wait(wait)
        if wait > 0:
            await asyncio.sleep(wait)

    def spare(self) -> bool:
        """Take a token for a request that isn't urgent, if one is left over, and of half of the rate at most.

        Where that is granted, `answered` is to follow.
        """
        now = _now()
        if self._under_way >= self._at_once:
            return False
        if self._bucket.left(now) < self._reserve or self._progress.left(now) < 1.0:
            return False
        self._bucket.reserve(now)
        self._progress.reserve(now)
        self._under_way += 1
        return True

    def answered(self) -> None:
        """A request that was spared for has been answered, well or not."""
        self._under_way -= 1

    def progress_seconds(self, jobs: int) -> float:
        """From one write of a job's progress to the next, so that all of so many jobs take half of the rate at most."""
        return max(PROGRESS_SECONDS, jobs / (self._rate / 2.0))


def _now() -> float:
    return asyncio.get_running_loop().time()
