"""Kinds of faults between operator and API server. Each prepares a simulation; all chance comes from its seed."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Final

from support.fakewatch import Log
from support.simulation.client import Fault, Request
from support.simulation.world import Simulation
from tunesmith_operator.adapters.errors import ClusterError, Rejected, Transient, classify
from tunesmith_operator.core.kubernetes.resources import Resource

Disturbance = Callable[[Simulation, random.Random], None]
LIKELIHOOD: Final = 0.3
RELIST: Final = 2200.0
"""Whatever a watch has missed is known after this long."""


def _answer(code: int, reason: str = "", retry_after: str | None = None) -> ClusterError:
    return classify(code, json.dumps({"message": f"injected {code}", "reason": reason}), retry_after)


def _reset() -> ClusterError:
    return Transient("the API server can't be reached: connection reset by peer")


def _failing(error: Callable[[random.Random], ClusterError], late: bool = False) -> Disturbance:
    """Any request fails, now and then."""

    def disturb(it: Simulation, chance: random.Random) -> None:
        it.fault = lambda request: Fault(error(chance), late) if chance.random() < LIKELIHOOD else None

    return disturb


def first_of_each(it: Simulation, chance: random.Random) -> None:
    """The first three requests of each verb and kind fail, in each of the ways in turn."""
    seen: Counter[tuple[str, str]] = Counter()
    ways = [(_answer(500), False), (_reset(), True), (_answer(504), True), (_answer(409, "Conflict"), False)]
    chance.shuffle(ways)

    def fault(request: Request) -> Fault | None:
        seen[request[:2]] += 1
        count = seen[request[:2]]
        return Fault(*ways[count % len(ways)]) if count <= 3 else None

    it.fault = fault


def gone_410(it: Simulation, chance: random.Random) -> None:
    """The past is forgotten again and again, and with it the place of every watch."""

    async def compact() -> None:
        while True:
            await asyncio.sleep(chance.uniform(2, 12))
            it.source.compact()
            it.source.cut()

    it.disturbances.append(compact())


def _delivered(change: Callable[[Log, random.Random], Log], delay: float = 0.0, patience: float = 2.0) -> Disturbance:
    def disturb(it: Simulation, chance: random.Random) -> None:
        it.source.deliver = lambda changes: change(changes, chance)
        it.source.delay = lambda: chance.uniform(0, delay) if delay else 0.0
        it.journal.ghost_patience = patience

    return disturb


def _shuffled(changes: Log, chance: random.Random) -> Log:
    return chance.sample(changes, len(changes))


def _thinned(changes: Log, chance: random.Random) -> Log:
    return [change for change in changes if chance.random() > 0.1]


def broken_streams(it: Simulation, chance: random.Random) -> None:
    """Streams end at any moment, and begin anew only now and then."""

    async def cut() -> None:
        while True:
            await asyncio.sleep(chance.uniform(1, 10))
            it.source.cut()

    it.source.fail = lambda verb, resource, namespace: _answer(503) if chance.random() < LIKELIHOOD else None
    it.journal.ghost_patience = 200.0
    it.disturbances.append(cut())


def older_view(it: Simulation, chance: random.Random) -> None:
    """The operator dies a few times, and finds an API server that is behind when it comes back."""
    it.crash_at = {chance.randrange(2, 58) for _ in range(3)}
    it.journal.ghost_patience = 30.0

    async def later() -> None:
        await asyncio.sleep(20.0)
        it.source.catch_up()

    def boot() -> None:
        if it.boots > 1:
            it.source.until = max(102, it.cluster.version - chance.randrange(1, 25))
            waiting.append(asyncio.create_task(later()))

    waiting: list[asyncio.Task[None]] = []
    it.on_boot = boot


def clock_jumps(it: Simulation, chance: random.Random) -> None:
    """The operator's clock is set forward and back by hours."""

    async def jump() -> None:
        while True:
            await asyncio.sleep(chance.uniform(1, 20))
            it.jump = timedelta(hours=chance.choice((-3, 0, 0, 3)), seconds=chance.uniform(-30, 30))

    it.disturbances.append(jump())


def permissions(it: Simulation, chance: random.Random) -> None:
    """What the operator may read, write, or both, is taken from it for a while, and given back."""
    it.journal.ghost_patience = 400.0
    withdrawn = {"read": False, "write": False}

    async def withdraw() -> None:
        await asyncio.sleep(chance.uniform(0, 5))
        while True:
            which = chance.choice((("read",), ("write",), ("read", "write")))
            withdrawn.update(dict.fromkeys(which, True))
            it.source.cut()
            await asyncio.sleep(chance.uniform(5, 120))
            withdrawn.update(dict.fromkeys(which, False))
            await asyncio.sleep(chance.uniform(5, 60))

    def read(verb: str, resource: Resource, namespace: str | None) -> ClusterError | None:
        return Rejected(f"may not {verb} {resource.plural} at {chance.random()}") if withdrawn["read"] else None

    def write(request: Request) -> Fault | None:
        refused = Rejected(f"may not {request.verb} {request.kind} at {chance.random()}")
        return Fault(refused) if withdrawn["write"] else None

    it.source.fail, it.fault = read, write
    it.disturbances.append(withdraw())


def everything(it: Simulation, chance: random.Random) -> None:
    """Crashes, late answers, doubled and late events and lost watches together."""
    gone_410(it, chance)
    it.crash_at = {chance.randrange(2, 58) for _ in range(3)}
    it.source.deliver = lambda changes: [*changes, *changes]
    it.source.delay = lambda: chance.uniform(0, 3)
    it.journal.ghost_patience = 30.0
    it.fault = lambda request: Fault(_reset(), chance.random() < 0.5) if chance.random() < 0.15 else None


KINDS: Final[dict[str, Disturbance]] = {
    "conflict_409": _failing(lambda chance: _answer(409, "Conflict")),
    "too_many_requests_429": _failing(lambda chance: _answer(429, retry_after=str(chance.randrange(1, 15)))),
    "error_500": _failing(lambda chance: _answer(500)),
    "timeout_504": _failing(lambda chance: _answer(504)),
    "reset_connection": _failing(lambda chance: _reset()),
    "timeout_after_the_write": _failing(lambda chance: _answer(504), late=True),
    "first_of_each_verb": first_of_each,
    "gone_410": gone_410,
    "events_missed": _delivered(_thinned, patience=RELIST),
    "events_doubled": _delivered(lambda changes, chance: [*changes, *changes]),
    "events_reordered": _delivered(_shuffled, 3.0, 8.0),
    "events_delayed": _delivered(lambda changes, chance: changes, 10.0, 15.0),
    "broken_streams": broken_streams,
    "older_view": older_view,
    "clock_jumps": clock_jumps,
    "permissions_withdrawn": permissions,
    "everything": everything,
}
