"""A work queue of keys: each at most once in the queue and at most once in work, failures backed off, the whole paced.

The watches add keys, the controller's workers take them. Used from one event loop; no locks, no persistence: what is
lost in a crash comes back with the first listing.
"""

from __future__ import annotations

import asyncio
import random
from typing import Generic, TypeVar

__all__ = ["TokenBucket", "WorkQueue"]

K = TypeVar("K")


class TokenBucket:
    """Lets `burst` through at once and `rate` per second after that."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate, self._burst = rate, float(burst)
        self._tokens, self._at = float(burst), 0.0

    def reserve(self, now: float) -> float:
        """Take a token; return how many seconds to wait for it."""
        self._tokens = min(self._burst, self._tokens + max(0.0, now - self._at) * self._rate)
        self._at = max(self._at, now)
        self._tokens -= 1.0
        return max(0.0, -self._tokens / self._rate)


class WorkQueue(Generic[K]):
    """Keys to be worked on. `get` and `done` belong together, in a try/finally."""

    def __init__(
        self,
        *,
        rate: float = 20.0,
        burst: int = 40,
        backoff_base: float = 1.0,
        backoff_cap: float = 300.0,
        jitter: float = 0.2,
        chance: random.Random | None = None,
    ) -> None:
        self._bucket = TokenBucket(rate, burst)
        self._base, self._cap, self._jitter = backoff_base, backoff_cap, jitter
        self._chance = chance or random.Random()
        self._ready: dict[K, None] = {}
        self._due: dict[K, float] = {}
        self._working: dict[K, float] = {}
        self._again: set[K] = set()
        self._failures: dict[K, int] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._ready) + len(self._again)

    def add(self, key: K) -> None:
        """Work on the key soon; once more after the work under way, if there is any."""
        if key in self._working:
            self._again.add(key)
        else:
            self._ready[key] = None
        self._changed.set()

    def add_after(self, key: K, seconds: float) -> None:
        """Work on the key in so many seconds; the earliest of several wishes counts."""
        due = _now() + seconds
        if due < self._due.get(key, float("inf")):
            self._due[key] = due
            self._changed.set()

    def backoff(self, key: K, at_least: float = 0.0) -> float:
        """Work on the key again after a failure, each time twice as late; return the delay in seconds."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        delay = min(self._cap, self._base * 2.0 ** min(failures, 30))
        delay = max(at_least, delay * (1.0 + self._jitter * self._chance.uniform(-1.0, 1.0)))
        self.add_after(key, delay)
        return delay

    def forget(self, key: K) -> None:
        """The key has been worked on without failure: its next backoff begins anew."""
        self._failures.pop(key, None)

    async def get(self) -> K:
        """Wait for a key and take it into work."""
        while True:
            now = _now()
            for key in [key for key, due in self._due.items() if due <= now]:
                del self._due[key]
                self.add(key)
            if self._ready:
                break
            self._changed.clear()
            soonest = min(self._due.values(), default=None)
            try:
                # not wait_for: in Python 3.11 it forgets to be cancelled where a key comes at the same moment
                async with asyncio.timeout(None if soonest is None else soonest - now):
                    await self._changed.wait()
            except TimeoutError:
                continue
        key = next(iter(self._ready))
        del self._ready[key]
        self._working[key] = now
        try:
            await asyncio.sleep(self._bucket.reserve(now))
        except asyncio.CancelledError:
            self.done(key)
            raise
        self._working[key] = _now()
        return key

    def done(self, key: K) -> None:
        """The work on the key is over, well or not."""
        self._working.pop(key, None)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def longest_work(self) -> float:
        """Seconds since the longest-lasting work under way began."""
        return max((_now() - since for since in self._working.values()), default=0.0)


def _now() -> float:
    return asyncio.get_running_loop().time()
