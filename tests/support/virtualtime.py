"""An event loop whose time is virtual: nobody sleeps, and an hour takes a moment."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
MOST_ROUNDS = 100_000
"""Of the loop at one moment: more are a task that never waits."""


class VirtualSelector(selectors.DefaultSelector):
    """Instead of waiting for the next timer, moves the clock there."""

    now = 0.0
    _rounds = 0

    def select(self, timeout: float | None = None) -> Any:
        """Nothing but timers is waited for."""
        self._rounds = 0 if timeout else self._rounds + 1
        assert self._rounds < MOST_ROUNDS, "time stands still: something goes round without ever waiting"
        # each round takes a moment, as on a machine: whoever waits for less than the clock can tell gets on
        self.now += (timeout or 0.0) + 1e-7
        assert timeout is not None, "the test waits for something that never happens"
        return super().select(0)


def virtually(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run it to its end."""
    selector = VirtualSelector()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]
    loop._clock_resolution = 0.0  # no timer goes off early
    try:
        return loop.run_until_complete(asyncio.wait_for(coroutine, 1_000_000))
    finally:
        loop.close()
