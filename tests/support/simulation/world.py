"""One simulated cluster with one operator in it, in virtual time. Tests say what goes wrong, and users' steps."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import datetime, timedelta
from typing import Any

from support.fakecluster import FakeCluster
from support.fakewatch import FakeSource
from support.make import CONFIG, NOW
from support.simulation.client import Client, Fault, Journal, Request
from support.simulation.kubernetes import Kubernetes
from tunesmith_api.reports import ProgressReport
from tunesmith_operator.adapters.metrics import Metrics
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.kubernetes.resources import Key
from tunesmith_operator.core.pods.figures import Figures
from tunesmith_operator.engine.clock import SteadyClock
from tunesmith_operator.engine.controller import Controller
from tunesmith_operator.engine.informer import Informer
from tunesmith_operator.engine.pacing import RequestPace
from tunesmith_operator.engine.poller import Poller
from tunesmith_operator.engine.store import WATCHED, Store
from tunesmith_operator.engine.workqueue import WorkQueue

JSON = dict[str, Any]
DOWN_SECONDS = 5.0


class Simulation:
    """Use `async with simulation.running()`. `crash_at` counts writes; each entry crashes the operator once."""

    def __init__(self, seed: int = 1, config: Config = CONFIG) -> None:
        self.chance = random.Random(seed)
        self.cluster, self.config = FakeCluster(), config
        self.cluster.cascade = False
        self.source = FakeSource(self.cluster, page_size=50)
        self.source.stream_seconds = 400.0
        self.kubernetes = Kubernetes(self.cluster, self._stamp, lambda: self._true_time().timestamp())
        self.journal = Journal()
        self.jump = timedelta()
        """How far the operator's clock is off."""
        self.fault: Callable[[Request], Fault | None] = lambda request: None
        self.crash_at: set[int] = set()
        self.on_boot: Callable[[], None] = lambda: None
        self.boots = 0
        self.bugs: list[str] = []
        self.reconciles: dict[Key, list[float]] = defaultdict(list)
        self.disturbances: list[Coroutine[Any, Any, None]] = []
        """What goes on beside it all, from the start to the end."""

    # --- time ---

    def _true_time(self) -> datetime:
        return NOW + timedelta(seconds=asyncio.get_running_loop().time())

    def _stamp(self) -> str:
        return self._true_time().strftime("%Y-%m-%dT%H:%M:%SZ")

    # --- the operator ---

    def _assemble(self, client: Client) -> tuple[Controller, list[Informer]]:
        clock = SteadyClock(lambda: (self._true_time() + self.jump).timestamp(), asyncio.get_running_loop().time)
        now = clock.now

        async def fetch(host: str, port: int) -> ProgressReport | None:
            await asyncio.sleep(0.01)
            return self.kubernetes.progress(host)

        def chance() -> random.Random:
            return random.Random(self.chance.random())

        config = self.config
        queue: WorkQueue[Key] = WorkQueue(chance=chance())

        async def figures(host: str, port: int) -> Figures | None:
            await asyncio.sleep(0.01)
            return self.kubernetes.figures(host)

        poller = Poller(fetch, now, config.poll_interval_seconds, chance(), figures=figures)
        store = Store(poller.sample, queue.add)
        controller = Controller(
            store=store, cluster=client, recorder=client, queue=queue, pace=RequestPace(config.qps, config.burst), poller=poller, metrics=Metrics(), config=config, now=now,
            new_token=lambda: "token",
        )  # fmt: skip
        process = controller.process

        async def counted(key: Key) -> None:
            self.reconciles[key].append(asyncio.get_running_loop().time())
            await process(key)

        controller.process = counted  # type: ignore[method-assign]
        return controller, [Informer(self.source, store, resource, chance=chance()) for resource in WATCHED]

    async def _live(self) -> None:
        """Boot the operator; when it crashes, boot it again."""
        while True:
            self.boots += 1
            self.on_boot()
            client = Client(self.cluster, self.journal, self.chance, lambda it: self.fault(it), self._crashes)
            controller, informers = self._assemble(client)
            controller.start()
            tasks = [asyncio.create_task(informer.run()) for informer in informers]
            crash = asyncio.create_task(client.dead.wait())
            try:
                done, _ = await asyncio.wait([crash, *tasks], return_when=asyncio.FIRST_COMPLETED)
                if crash not in done:
                    self.bugs.append(f"an informer has ended: {done}")
            finally:
                client.dead.set()
                mine = [*tasks, crash, *controller._tasks]
                for task in mine:
                    task.cancel()
                _, left = await asyncio.wait(mine, timeout=10.0)
                self.bugs += [f"a task goes on although it was cancelled: {task}" for task in left]
            await asyncio.sleep(DOWN_SECONDS)

    def _crashes(self) -> bool:
        number = len(self.journal.writes)
        if number in self.crash_at:
            self.crash_at.discard(number)
            return True
        return False

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Cluster and operator are at work."""
        handler = _Bugs(self.bugs)
        log = logging.getLogger("tunesmith_operator")
        before = (log.level, log.propagate)
        log.addHandler(handler)
        log.setLevel(logging.ERROR)
        log.propagate = False
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: self.bugs.append(str(context)))
        works = (self.kubernetes.run(), self._live(), *self.disturbances)
        tasks = [asyncio.create_task(work) for work in works]
        try:
            yield
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            log.removeHandler(handler)
            log.setLevel(before[0])
            log.propagate = before[1]

    # --- users ---

    def status(self, kind: str, name: str) -> JSON:
        """The status of a custom resource; empty where there is none."""
        return (self.cluster.get(kind, name) or {}).get("status", {})

    def condition(self, kind: str, name: str, type_: str) -> tuple[str, str]:
        """(status, reason) of a condition."""
        found = [it for it in self.status(kind, name).get("conditions", ()) if it["type"] == type_]
        return (found[0]["status"], found[0]["reason"]) if found else ("", "")

    def delete(self, kind: str, name: str) -> None:
        """A user deletes it; the garbage collector follows."""
        raw = self.cluster.get(kind, name)
        assert raw is not None
        self.journal.deleted_at[raw["metadata"]["uid"]] = asyncio.get_running_loop().time()
        self.cluster.remove(kind, "ml", name, cascade=False)

    async def until(self, what: str, holds: Callable[[], bool], seconds: float = 30_000.0) -> None:
        """Wait for it in virtual time."""
        end = asyncio.get_running_loop().time() + seconds
        while not holds():
            if asyncio.get_running_loop().time() > end:
                raise Stalled(f"{what} didn't come about in {seconds:.0f} s")
            await asyncio.sleep(1.0)

    def hottest_minute(self) -> int:
        """Most reconciles of one key within a minute."""
        most = 0
        for times in self.reconciles.values():
            begin = 0
            for end, moment in enumerate(times):
                while moment - times[begin] > 60.0:
                    begin += 1
                most = max(most, end - begin + 1)
        return most


class Stalled(AssertionError):
    """Something that users wait for doesn't come."""


class _Bugs(logging.Handler):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self._found.append(f"{record.getMessage()}: {record.exc_info[1]!r}")
        else:
            self._found.append(record.getMessage())
