"""What can go wrong with a request, by kinds: the engine treats each differently."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["AlreadyExists", "ClusterError", "Expired", "Gone", "Invalid", "Rejected", "Transient", "classify"]


class ClusterError(Exception):
    """A request to the API server failed. The text is for people."""


class Rejected(ClusterError):
    """The API server refuses this very request: it will again until something changes."""


class AlreadyExists(ClusterError):
    """There is an object of that name."""


class Invalid(Rejected):
    """The object itself breaks its schema or a rule, whoever sends it."""


class Gone(ClusterError):
    """The object, or the namespace around it, is gone or on its way out: nothing is left to do."""


class Expired(ClusterError):
    """A list or a watch can't be continued from where it was: it has to begin anew."""


class Transient(ClusterError):
    """It may work the next time. `retry_after` is in seconds, where the server asks for patience."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def classify(code: int, body: bytes | str, retry_after: str | None = None) -> ClusterError:
    """The error for an answer of the API server with that HTTP status code."""
    status = _status(body)
    message = str(status.get("message") or f"HTTP {code}")
    causes = (status.get("details") or {}).get("causes") or ()
    if code == 404 or any(cause.get("reason") == "NamespaceTerminating" for cause in causes):
        return Gone(message)
    if code == 410:
        return Expired(message)
    if code == 422 and any(cause.get("field") == "metadata.uid" for cause in causes):
        return Gone(f"another object has its name by now ({message})")
    if code == 429 or code >= 500:
        patience = float(retry_after) if retry_after is not None and retry_after.isdecimal() else None
        return Transient(message, patience)
    if code == 401:
        return Transient(f"the operator's credentials are not accepted: {message}")
    if code == 409:
        # also a ResourceQuota or another version of the object that somebody else has written at the same moment
        return AlreadyExists(message) if status.get("reason") == "AlreadyExists" else Transient(message)
    return Invalid(message) if code == 422 else Rejected(message)


def _status(body: bytes | str) -> dict[str, Any]:
    try:
        parsed = json.loads(body)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}
