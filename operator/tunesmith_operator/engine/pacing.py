"""When a request to the API server may be made, so that the operator never takes more of it than it was given.

The controller asks before each request. What changes what people and programs wait for (children, verdicts, events) is
urgent and waits for its turn, first come, first served. Progress never waits: it takes only what is left over.
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

    def __init__(self, rate: float, burst: int, on_wait: Callable[[float], None] = lambda seconds: None) -> None:
        self._bucket, self._rate = TokenBucket(rate, burst), rate
        self._progress = TokenBucket(rate / 2.0, max(1, burst // 2))
        # what is urgent finds half of a burst even while all jobs report progress
        self._reserve = 1.0 + burst // 2
        self._on_wait = on_wait

    async def turn(self) -> None:
        """Return when an urgent request may be made."""
        wait = self._bucket.reserve(_now())
        self._on_wait(wait)
        if wait > 0:
            await asyncio.sleep(wait)

    def spare(self) -> bool:
        """Take a token for a request that isn't urgent, if one is left over, and of half of the rate at most."""
        now = _now()
        if self._bucket.left(now) < self._reserve or self._progress.left(now) < 1.0:
            return False
        self._bucket.reserve(now)
        self._progress.reserve(now)
        return True

    def progress_seconds(self, jobs: int) -> float:
        """From one write of a job's progress to the next, so that all of so many jobs take half of the rate at most."""
        return max(PROGRESS_SECONDS, jobs / (self._rate / 2.0))


def _now() -> float:
    return asyncio.get_running_loop().time()
