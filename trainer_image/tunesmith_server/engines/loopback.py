"""What engines share: an HTTP API on this pod's loopback, which the pod itself asks first. Base of their classes."""

from __future__ import annotations

import json
import logging
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith_server.engines.base import LocalAdapter
from tunesmith_store.errors import Failure

__all__ = ["LoopbackEngine"]

log = logging.getLogger("tunesmith.server")

FIRST_ANSWER_SECONDS = 120
ALIVE_SECONDS = 2


class LoopbackEngine:
    """One model, answering on loopback. Subclasses set `url` and `models`, and load it."""

    url: str
    models: Mapping[str, Mapping[str, Any]]
    vocabulary: int = 0
    tools: bool = True
    loads_adapters: bool = False

    @property
    def failure(self) -> Failure | None:
        """None: what is inside this process fails with it."""
        return None

    def close(self) -> None:
        """What is inside this process ends with it."""

    def load(self, adapters: Sequence[LocalAdapter]) -> tuple[LocalAdapter, ...]:
        """Load none: another engine is started with them (`loads_adapters`)."""
        return ()

    def unload_others(self) -> None:
        """Let go of none."""

    def first_answer(self, path: str, body: dict[str, Any]) -> Any:
        """What the model answers to a small request; None where it doesn't."""
        try:
            return json.loads(self._request(path, json.dumps(body).encode(), FIRST_ANSWER_SECONDS))
        except (OSError, ValueError) as error:
            log.warning("the model did not answer: %s", error)
            return None

    def is_alive(self) -> bool:
        """Say whether the HTTP server still responds."""
        try:
            self._request("/health", None, ALIVE_SECONDS)
        except OSError:
            return False
        return True

    def _request(self, path: str, body: bytes | None, timeout: float) -> str:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data=body, headers=headers)  # noqa: S310 - our own loopback URL
        with urllib.request.urlopen(request, timeout=timeout) as response:  # noqa: S310 - our own loopback URL
            text: str = response.read().decode()
        return text
