"""A work queue of keys: each at most once in the queue and at most once in work, failures backed off.

The watches add keys, the poller adds keys that can wait, the controller's workers take them. Used from one event loop;
no locks, no persistence: what is lost in a crash comes back with the first listing.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Callable
from typing import Final, Generic, TypeVar

__all__ = ["WorkQueue"]

K = TypeVar("K")
NEW_TURNS: Final = 3
"""Of keys that were never worked on, for each of one that was, where both wait."""
LONGEST_HOLD: Final = 20.0
"""A key that has failed is held until its backoff is over, whatever happens to it, but for no longer than this."""


class _Line(Generic[K]):
    """Keys that are ready, in the order in which they came, and keys that will be, by when."""

    def __init__(self) -> None:
        self.ready: dict[K, float] = {}
        """By key, since when."""
        self.due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._count = 0

    def add_at(self, key: K, due: float) -> bool:
        """Make the key ready then, or earlier where that was wished before; return whether it was not."""
        if due >= self.due.get(key, float("inf")):
            return False
        self.due[key] = due
        self._count += 1
        heapq.heappush(self._heap, (due, self._count, key))
        return True

    def soonest(self) -> float:
        """When the next key is due."""
        while self._heap and self.due.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else float("inf")

    def pop_due(self, now: float) -> list[K]:
        """Keys whose time has come."""
        found = []
        while self.soonest() <= now:
            _, _, key = heapq.heappop(self._heap)
            del self.due[key]
            found.append(key)
        return found


class WorkQueue(Generic[K]):
    """Keys to be worked on. `get` and `done` belong together, in a try/finally.

    Keys that can wait stand in a line of their own, behind all others. Of those, new keys and keys that were worked on
    before take turns, three to one: a flood of new objects must not keep back what becomes of those that are there, nor
    they it, and a job that hasn't begun waits for more than one whose status has.
    """

    def __init__(
        self,
        *,
        backoff_base: float = 1.0,
        backoff_cap: float = 300.0,
        jitter: float = 0.2,
        chance: random.Random | None = None,
        clock: Callable[[], float] = lambda: asyncio.get_running_loop().time(),
    ) -> None:
        self._base, self._cap, self._jitter = backoff_base, backoff_cap, jitter
        self._chance, self._now = chance or random.Random(), clock
        self._new: _Line[K] = _Line()
        self._first: _Line[K] = _Line()
        self._second: _Line[K] = _Line()
        self._known: set[K] = set()
        self._turn = 0
        self._working: dict[K, float] = {}
        self._since: dict[K, float] = {}
        self._again: dict[K, float | None] = {}
        self._failures: dict[K, int] = {}
        self._held: dict[K, float] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return sum(len(line.ready) for line in (self._new, self._first, self._second)) + len(self._again)

    def add(self, key: K, urgent: bool = True) -> None:
        """Work on the key soon; once more after the work under way, if there is any."""
        now = self._now()
        if key in self._working:
            known = self._again.get(key)
            self._again[key] = known if known is not None or not urgent else now
        elif urgent:
            self._second.ready.pop(key, None)
            self._line_of(key).ready.setdefault(key, now)
        elif key not in self._first.ready and key not in self._new.ready:
            self._second.ready.setdefault(key, now)
        self._changed.set()

    def add_after(self, key: K, seconds: float, urgent: bool = True) -> None:
        """Work on the key in so many seconds; the earliest of several wishes counts."""
        line = self._first if urgent else self._second
        if line.add_at(key, self._now() + seconds):
            self._changed.set()

    def waits(self, key: K) -> bool:
        """Whether the key comes of itself in some time, as one that can wait."""
        return key in self._second.due

    def backoff(self, key: K, at_least: float = 0.0) -> float:
        """Work on the key again after a failure, each time twice as late; return the delay in seconds.

        `at_least` is what the server asks for, within reason.
        """
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        delay = min(self._cap, self._base * 2.0 ** min(failures, 30))
        delay *= 1.0 + self._jitter * self._chance.uniform(-1.0, 1.0)
        wanted = min(at_least, self._cap)
        delay = max(wanted, delay)
        self._held[key] = self._now() + max(wanted, min(delay, LONGEST_HOLD))
        self.add_after(key, delay)
        return delay

    def holds(self, key: K) -> bool:
        """Whether what has failed for the key is not to be tried again yet, whatever has happened since."""
        return self._held.get(key, 0.0) > self._now()

    def return_held(self, key: K) -> None:
        """Work on the key when its hold ends: of two failures, the first may have been due before the second's end."""
        self.add_after(key, max(0.0, self._held.get(key, 0.0) - self._now()))

    def forget(self, key: K) -> None:
        """The key has been worked on without failure: its next backoff begins anew."""
        self._failures.pop(key, None)
        self._held.pop(key, None)

    def drop(self, key: K) -> None:
        """What the key stands for is gone: another of that name is new."""
        self._known.discard(key)

    def since(self, key: K) -> float | None:
        """For the key in work: seconds since it was added, if it was added as urgent."""
        began = self._since.get(key)
        return self._now() - began if began is not None else None

    async def get(self) -> K:
        """Wait for a key and take it into work."""
        while True:
            now = self._now()
            for due in (self._first, self._second):
                # the event loop's timers may fire a tick of the clock early
                for key in due.pop_due(now + 1e-6):
                    self.add(key, urgent=due is self._first)
            if (line := self._next_line()) is not None:
                break
            self._changed.clear()
            soonest = min(self._first.soonest(), self._second.soonest())
            try:
                # not wait_for: in Python 3.11 it forgets to be cancelled where a key comes at the same moment
                async with asyncio.timeout(None if soonest == float("inf") else soonest - now):
                    await self._changed.wait()
            except TimeoutError:
                continue
        key = next(iter(line.ready))
        began = line.ready.pop(key)
        self._working[key] = now
        self._known.add(key)
        if line is not self._second:
            self._since[key] = began
        return key

    def _line_of(self, key: K) -> _Line[K]:
        """Where a key stands that can't wait."""
        return self._first if key in self._known else self._new

    def _next_line(self) -> _Line[K] | None:
        """The line whose turn it is; None where nobody is ready."""
        lines = [line for line in (self._new, self._first) if line.ready]
        if len(lines) == 2:
            self._turn = (self._turn + 1) % (NEW_TURNS + 1)
            return self._new if self._turn else self._first
        return lines[0] if lines else self._second if self._second.ready else None

    def done(self, key: K) -> None:
        """The work on the key is over, well or not."""
        self._working.pop(key, None)
        self._since.pop(key, None)
        if key in self._again:
            urgent_since = self._again.pop(key)
            self.add(key, urgent=urgent_since is not None)
            if urgent_since is not None:
                self._line_of(key).ready[key] = urgent_since

    def longest_work(self) -> float:
        """Seconds since the longest-lasting work under way began."""
        return max((self._now() - since for since in self._working.values()), default=0.0)
