"""The engine of a server pod with its adapters, and how another takes its place when they change. Used by `__main__`.

llama.cpp loads adapters when it loads the model. So one with the new set is started beside the one that answers, from
the same file, which the kernel holds in memory once. Requests move over when it has answered; the first ends when it
has none left. Where memory doesn't suffice for two, requests wait until one has gone and the other is there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from tunesmith_api.adapters import ServedAdapter
from tunesmith_api.keys import Reason
from tunesmith_api.plan import ServingPlan
from tunesmith_server.engines.base import Engine, LocalAdapter
from tunesmith_server.engines.registry import Launcher
from tunesmith_server.front.fields import Limits
from tunesmith_server.front.server import Front
from tunesmith_store.errors import Failure, Retryable, UserError
from tunesmith_store.memory import spare_memory

__all__ = ["Serving"]

log = logging.getLogger("tunesmith.server")

LOOK_SECONDS = 1.0
"""From one look at the list of adapters to the next."""
AGAIN_SECONDS = 30.0
"""An adapter whose files could not be had is tried again after so long."""
MARGIN = 96 << 20
"""Memory that is left free beside two engines."""


class Serving:
    """One engine at a time, but for the moments in which another takes over."""

    def __init__(self, plan: ServingPlan, launcher: Launcher) -> None:
        self._plan = plan
        self._launcher = launcher
        self._engine: Engine | None = None
        self._adapters: tuple[LocalAdapter, ...] = ()
        self._refused: tuple[LocalAdapter, ...] | None = None
        """What the engine could not load: to try it again would only stop requests."""
        self._lost = False

    def start(self, adapters: Sequence[LocalAdapter]) -> Engine:
        """Load the model with its adapters, or without them where the engine refuses these; return when it is loaded.

        Raises:
            UserError: the engine refuses the model.
        """
        try:
            engine = self._launcher.start(adapters)
        except UserError as error:
            if not adapters:
                raise
            log.error("the adapters can't be loaded, the model is served without them: %s", error.message)
            self._refused = tuple(adapters)
            engine = self._launcher.start(())
        self._engine, self._adapters = engine, tuple(it for it in adapters if it.name in engine.models)
        return engine

    def limits_of(self, engine: Engine) -> Limits:
        """What the front allows: requests for the model and for its adapters, and how each is put to the engine."""
        models = engine.models
        return Limits(
            tuple(models),
            self._plan.context_length,
            self._plan.api.max_tokens,
            engine.vocabulary,
            engine.tools,
            engine=self._plan.engine,
            asked=models,
        )

    @property
    def digests(self) -> dict[str, str]:
        """Name → digest of the adapters that are served."""
        return {it.name: it.digest for it in self._adapters}

    @property
    def failure(self) -> Failure | None:
        """Say why there will be no answer any more; None while there may."""
        return self._engine.failure if self._engine is not None else None

    def close(self) -> None:
        """End the engine that answers."""
        if self._engine is not None:
            self._engine.close()

    def is_alive(self) -> bool:
        """Say whether the engine responds; while one makes room for another, nothing is wrong."""
        engine = self._engine
        return not self._lost and (engine is None or engine.is_alive())

    def change(self, adapters: Sequence[LocalAdapter], front: Front) -> None:
        """Serve these adapters from now on, and no others.

        Raises:
            Failure: the engine can't load them; the ones before are served on.
        """
        before, started = self._engine, time.monotonic()
        if before is None or tuple(adapters) in (self._adapters, self._refused):
            return
        if before.loads_adapters:
            self._load(before, adapters, front)
            return
        beside = spare_memory() - MARGIN >= self._launcher.needs
        if not beside:
            log.info("not enough memory for two engines: requests wait for the one with other adapters")
            front.hold()
            self._engine = None
            before.close()
        try:
            engine = self._proven(adapters)
        except Failure:
            self._refused = tuple(adapters)
            if not beside:
                self._back(front)
            raise
        self._engine, self._adapters = engine, tuple(adapters)
        front.serve(engine.url, self.limits_of(engine), self.digests)
        if beside:
            before.close()
        names = ", ".join(self.digests) or "none"
        log.info("adapters served: %s (after %.1f s)", names, time.monotonic() - started)

    def _load(self, engine: Engine, adapters: Sequence[LocalAdapter], front: Front) -> None:
        """Have the engine that there is load those that it hasn't, and let go of others when nobody asks them."""
        started, there = time.monotonic(), engine.load(adapters)
        if there == self._adapters:
            return
        self._adapters = there
        front.serve(engine.url, self.limits_of(engine), self.digests)
        engine.unload_others()
        log.info("adapters served: %s (after %.1f s)", ", ".join(self.digests) or "none", time.monotonic() - started)

    def _proven(self, adapters: Sequence[LocalAdapter]) -> Engine:
        engine = self._launcher.start(adapters)
        if not engine.answers():
            engine.close()
            raise Retryable("the model is loaded with other adapters but gives no answer", Reason.SERVER_FAILED)
        return engine

    def _back(self, front: Front) -> None:
        """Load again what was served; where not even that can be done, the pod has to start anew."""
        self._lost = True
        engine = self._engine = self._launcher.start(self._adapters)
        front.serve(engine.url, self.limits_of(engine), self.digests)
        self._lost = False

    def follow(
        self,
        wanted: Callable[[], tuple[ServedAdapter, ...] | None],
        fetch: Callable[[Sequence[ServedAdapter]], list[LocalAdapter]],
        front: Front,
    ) -> None:
        """Look at the list from now on, in a thread of its own, and load what it says; where there is none, nothing."""
        threading.Thread(target=self._follow, args=(wanted, fetch, front), name="adapters", daemon=True).start()

    def _follow(
        self,
        wanted: Callable[[], tuple[ServedAdapter, ...] | None],
        fetch: Callable[[Sequence[ServedAdapter]], list[LocalAdapter]],
        front: Front,
    ) -> None:
        tried: tuple[ServedAdapter, ...] = ()
        next_try = 0.0
        while True:
            asked = wanted()
            if (
                asked is not None
                and {it.name: it.digest for it in asked} != self.digests
                and (asked != tried or time.monotonic() >= next_try)
            ):
                tried, next_try = asked, time.monotonic() + AGAIN_SECONDS
                try:
                    self.change(fetch(asked), front)
                except Failure as failure:
                    log.error("adapters can't be changed: %s: %s", failure.reason, failure.message)
                except Exception:
                    log.exception("adapters can't be changed")
            time.sleep(LOOK_SECONDS)
