"""What the activator of a scaled-to-zero ModelDeployment needs to know: its settings, in one environment variable.

The operator writes them, `tunesmith_server.activator` reads them.
"""

from __future__ import annotations

from typing import Literal

from tunesmith_api.model import Contract

__all__ = ["ActivatorSettings"]


class ActivatorSettings(Contract):
    """Where requests go once there is a server, and how many may wait for it, how large and how long."""

    schema_version: Literal[1] = 1
    servers_url: str
    most_requests: int
    most_bytes: int
    """Of all bodies that are held together."""
    max_body_bytes: int
    hold_seconds: int
    asks_keys: bool = False
    grace_seconds: int = 60
