"""The time of day without its jumps. The shell gives it to whatever compares times.

A clock that is set forward by hours makes every deadline pass at once: jobs that are just starting would be stopped for
good. So time goes on steadily, and another time of day is believed once it has stayed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

__all__ = ["BELIEVED_SECONDS", "SteadyClock"]

TOLERANCE_SECONDS: Final = 2.0
BELIEVED_SECONDS: Final = 300.0
"""How long a clock that was set must agree with itself before it is followed."""


class SteadyClock:
    """`now` follows the wall clock where that runs on, and not where it has just jumped."""

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._steady = wall, steady
        self._offset = wall() - steady()
        self._other, self._since = self._offset, steady()

    def now(self) -> datetime:
        """The time of day."""
        at = self._steady()
        offset = self._wall() - at
        if abs(offset - self._other) > TOLERANCE_SECONDS:
            self._other, self._since = offset, at
        near = abs(offset - self._offset) <= TOLERANCE_SECONDS
        if near or at - self._since >= BELIEVED_SECONDS:
            self._offset = offset
        return datetime.fromtimestamp(at + self._offset, UTC)
