"""The API server's audit log: who asked for what, from the server itself rather than from a client's own account."""

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata"}],
}


def write_policy(path: Path) -> Path:
    """A policy that records the metadata of every request."""
    path.write_text(json.dumps(POLICY) + "\n")
    return path


def events(log: Path, since: datetime.datetime | None) -> Iterator[dict[str, Any]]:
    """The events of the log, oldest first, of requests received at ``since`` (an aware time) or later."""
    try:
        lines = log.read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return
    for line in lines:
        if not line.endswith("\n"):
            return  # still being written
        event: dict[str, Any] = json.loads(line)
        if since is None or datetime.datetime.fromisoformat(event["requestReceivedTimestamp"]) >= since:
            yield event
