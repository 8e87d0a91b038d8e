"""What a server pod needs of any engine: `__main__` starts one; probes, drain and the quality gate ask it."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Engine"]


class Engine(Protocol):
    """A loaded model behind an HTTP API of this process."""

    @property
    def url(self) -> str:
        """Base URL of that API, without a path."""

    def answers(self) -> bool:
        """Ask for a real answer and say whether one came."""

    def is_alive(self) -> bool:
        """Say whether its HTTP server still responds."""

    def requests_in_flight(self) -> int:
        """Return how many requests are answered or wait."""
