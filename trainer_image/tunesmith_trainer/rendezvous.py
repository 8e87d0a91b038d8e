"""Where rank 0 listens: picked in its process, told to all others by Ray Train's controller. Light: ranks import it."""

from __future__ import annotations

import os
import socket

from tunesmith_api import keys

__all__ = ["address", "announce", "pick"]

VARIABLE = "TUNESMITH_GROUP_ADDRESS"


def pick() -> str:
    """Return "ip:port" of a free port of this pod; run in rank 0's process."""
    ip = os.environ[keys.ENV_POD_IP]
    with socket.socket() as probe:
        probe.bind((ip, 0))
        return f"{ip}:{probe.getsockname()[1]}"


def announce(where: str) -> None:
    """Remember rank 0's address; run in every rank's process."""
    os.environ[VARIABLE] = where


def address() -> str:
    """Return what was announced to this process."""
    return os.environ[VARIABLE]
