"""One operator acts at a time: by a Lease, which the leader renews and the others wait for.

The shell holds it before it watches anything.

The rules are those of Kubernetes' own components (client-go's leader election): clocks of different machines are never
compared, only how long a Lease has stayed the same by one's own; the leader gives up before others may take over.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from tunesmith_operator.adapters.errors import ClusterError
from tunesmith_operator.core.kubernetes.manifest import JSON

__all__ = ["Leadership", "LeadershipLost", "LeaseClient"]

log = logging.getLogger(__name__)
LEASE_SECONDS: Final = 12.0
"""A leader that hasn't renewed for so long may be replaced."""
RENEW_SECONDS: Final = 8.0
"""A leader that couldn't renew for so long stops to act."""
RETRY_SECONDS: Final = 2.0


class LeadershipLost(Exception):
    """Another operator may act by now; this process has to end."""


class LeaseClient(Protocol):
    """The Lease in the cluster; `adapters.lease` provides it."""

    async def read(self) -> JSON | None:
        """The Lease; None where there is none."""

    async def write(self, spec: JSON, version: str | None) -> JSON:
        """Create it (version None) or replace what has that version; returns it as stored.

        Raises:
            ClusterError: it has changed meanwhile, or it didn't work.
        """


@dataclass(frozen=True, slots=True)
class _Seen:
    """A Lease, and when it was first seen like this."""

    spec: JSON
    version: str
    at: float

    @property
    def holder(self) -> str:
        return str(self.spec.get("holderIdentity") or "")

    def expired(self, now: float) -> bool:
        """Whether its holder, if any, hasn't renewed it in the time that it promised."""
        return not self.holder or now >= self.at + float(self.spec.get("leaseDurationSeconds") or LEASE_SECONDS)


class Leadership:
    """This process's claim."""

    def __init__(
        self,
        lease: LeaseClient,
        identity: str,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        chance: random.Random | None = None,
    ) -> None:
        self._lease, self.identity, self._now = lease, identity, now
        self._chance = chance or random.Random()
        self._seen: _Seen | None = None
        self._renewed, self._unsure = float("-inf"), True

    def holds(self) -> bool:
        """Whether nobody else can have taken over yet: asked before every write."""
        return _clock() < self._renewed + RENEW_SECONDS

    async def acquire(self) -> None:
        """Wait until this process leads."""
        waiting_for = None
        while not await self._try():
            holder = self._seen.holder if self._seen is not None else ""
            if holder != waiting_for:
                log.info("standing by: %s leads", holder or "nobody yet")
                waiting_for = holder
            await asyncio.sleep(RETRY_SECONDS * self._chance.uniform(0.8, 1.2))
        log.info("leading as %s", self.identity)

    async def keep(self) -> None:
        """Renew until that fails for too long.

        Raises:
            LeadershipLost: it did, or somebody else has taken the Lease.
        """
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            if await self._try():
                continue
            if self._seen is not None and self._seen.holder != self.identity:
                self._renewed = float("-inf")
                raise LeadershipLost(f"{self._seen.holder or 'nobody'} holds the Lease")
            if not self.holds():
                raise LeadershipLost(f"the Lease couldn't be renewed for {RENEW_SECONDS:.0f} s")

    async def release(self) -> None:
        """Let another take over at once, where this process leads."""
        if not self.holds() or self._seen is None:
            return
        self._renewed = float("-inf")
        try:
            await self._lease.write({**self._seen.spec, "holderIdentity": ""}, self._seen.version)
        except ClusterError as error:
            log.warning("the Lease couldn't be released: %s", error)

    async def _try(self) -> bool:
        """Take or renew the Lease; whether that worked."""
        began = _clock()
        try:
            if self._unsure:
                self._observe(await self._lease.read())
            if self._seen is not None and self._seen.holder != self.identity and not self._seen.expired(_clock()):
                return False
            stored = await self._lease.write(self._claim(), self._seen.version if self._seen is not None else None)
        except ClusterError as error:
            log.warning("the Lease: %s", error)
            self._unsure = True
            return False
        self._observe(stored)
        # a leader knows what it wrote: it reads the Lease only where a write has failed
        self._renewed, self._unsure = began, False
        return True

    def _observe(self, found: JSON | None) -> None:
        if found is None:
            self._seen = None
            return
        version, spec = str(found["metadata"].get("resourceVersion", "")), dict(found.get("spec") or {})
        if self._seen is None or self._seen.version != version:
            self._seen = _Seen(spec, version, _clock())

    def _claim(self) -> JSON:
        moment = self._now().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        before: dict[str, Any] = self._seen.spec if self._seen is not None else {}
        mine = before.get("holderIdentity") == self.identity
        return {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": round(LEASE_SECONDS),
            "acquireTime": before.get("acquireTime", moment) if mine else moment,
            "renewTime": moment,
            "leaseTransitions": int(before.get("leaseTransitions") or 0) + (0 if mine or not before else 1),
        }


def _clock() -> float:
    return asyncio.get_running_loop().time()
