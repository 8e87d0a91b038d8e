"""What a server pod needs of any engine: `__main__` starts one, probes and `front` ask it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tunesmith_store.errors import Failure

__all__ = ["AHEAD", "Engine", "LocalAdapter"]

AHEAD = 2
"""Requests that an engine gets beside those that it answers at once: the next are at hand when a place falls free."""


@dataclass(frozen=True)
class LocalAdapter:
    """A LoRA adapter on this machine: what clients call it, what the engine loads, and the digest of its artefact."""

    name: str
    path: Path
    digest: str


class Engine(Protocol):
    """A loaded model behind an HTTP API on loopback: OpenAI's paths, JSON, one answer for each request.

    It stops working on an answer when the connection that asked for it is closed.
    """

    @property
    def url(self) -> str:
        """Base URL of that API, without a path."""

    @property
    def models(self) -> Mapping[str, Mapping[str, Any]]:
        """What clients may ask for → what the engine is asked with beside it; first the model without an adapter."""

    @property
    def loads_adapters(self) -> bool:
        """Whether adapters come and go in the engine that there is; another one is started where they don't."""

    def load(self, adapters: Sequence[LocalAdapter]) -> tuple[LocalAdapter, ...]:
        """Load those that it hasn't; return those that are there now, which alone are among `models`."""

    def unload_others(self) -> None:
        """Let go of adapters that are no longer among `models`."""

    def answers(self) -> bool:
        """Ask for a real answer and say whether one came."""

    def is_alive(self) -> bool:
        """Say whether its HTTP server still responds."""

    @property
    def failure(self) -> Failure | None:
        """Say why it will never answer again; None while it may."""

    def close(self) -> None:
        """Stop answering, give the memory back, and end what it has started beside this process."""

    @property
    def vocabulary(self) -> int:
        """Tokens that its model knows; 0 where the engine's own API says so."""

    @property
    def tools(self) -> bool:
        """Whether its model can be told of tools, unless the engine's own API says otherwise."""
