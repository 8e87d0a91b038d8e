"""What a run has cost: requests from the API server's audit log, memory and CPU from /proc, counters from /metrics."""

from __future__ import annotations

import json
import os
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

__all__ = ["AuditLog", "Request", "Usage", "counter", "percentile", "scraped", "usage", "writes"]

WRITES = frozenset({"create", "update", "patch", "delete", "deletecollection"})
TICKS = os.sysconf("SC_CLK_TCK")


class Request(NamedTuple):
    """One answered request."""

    done: float
    """Unix time of the answer."""
    user: str
    """Name of the ServiceAccount, or of the user."""
    verb: str
    what: str
    """Resource, with its subresource after a slash."""
    namespace: str
    name: str
    code: int
    path: str


class AuditLog:
    """Reads the audit log from where it was left."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0

    def skip(self) -> None:
        """Forget what has been so far."""
        self._at = self._path.stat().st_size

    def read(self) -> Iterator[Request]:
        """Everything answered since the last reading."""
        with self._path.open("rb") as log:
            log.seek(self._at)
            for line in log:
                if not line.endswith(b"\n"):
                    return  # still being written
                self._at += len(line)
                yield _request(json.loads(line))


def _request(event: dict[str, object]) -> Request:
    target: dict[str, str] = event.get("objectRef") or {}  # type: ignore[assignment]
    user = str(event["user"]["username"])  # type: ignore[index]
    what = "/".join(filter(None, (target.get("resource", ""), target.get("subresource", ""))))
    return Request(
        datetime.fromisoformat(str(event["stageTimestamp"])).timestamp(),
        user.removeprefix("system:serviceaccount:").partition(":")[2] or user,
        str(event["verb"]),
        what,
        target.get("namespace", ""),
        target.get("name", ""),
        int((event.get("responseStatus") or {}).get("code", 0)),  # type: ignore[attr-defined]
        str(event["requestURI"]),
    )


def writes(requests: Iterable[Request], user: str) -> Counter[str]:
    """That user's requests that write, by what they write."""
    return Counter(f"{it.verb} {it.what}" for it in requests if it.user == user and it.verb in WRITES)


@dataclass(frozen=True)
class Usage:
    """What a process has used so far."""

    cpu_seconds: float
    rss_mib: float
    peak_mib: float


def usage(pid: int) -> Usage:
    """Of that process, its threads included."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    ticks = stat[stat.rindex(")") + 2 :].split()[11:13]
    found = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    mib: Callable[[str], float] = lambda name: int(found[name].split()[0]) / 1024  # noqa: E731
    return Usage(sum(map(int, ticks)) / TICKS, mib("VmRSS"), mib("VmHWM"))


def scraped(port: int) -> dict[str, float]:
    """All samples of a /metrics page: name with labels → value. Empty while it can't be read."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return {}
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line and line[0] != "#"}


def counter(samples: dict[str, float], name: str) -> float:
    """The sum of a counter over its labels."""
    return sum(value for key, value in samples.items() if key.partition("{")[0] == name)


def percentile(values: list[float], part: float) -> float:
    """The smallest value that so large a part doesn't exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, int(len(ordered) * part + 0.999999) - 1))]
