"""An event loop whose time is virtual: nobody sleeps, and what would take an hour takes a moment."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualSelector(selectors.DefaultSelector):
    """Instead of waiting for the next timer, moves the clock there."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout:
            self.now += timeout
        assert timeout is not None, "the test waits for something that never happens"
        return super().select(0)


def virtually(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run it in virtual time, which begins at 0."""
    selector = VirtualSelector()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]
    try:
        return loop.run_until_complete(asyncio.wait_for(coroutine, 100_000))
    finally:
        loop.close()
