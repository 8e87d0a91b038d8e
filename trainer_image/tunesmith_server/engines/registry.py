"""Starts the engine that a plan names. Called by `serving`; an engine's libraries are loaded for it alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from tunesmith_api import keys
from tunesmith_api.plan import ServingPlan
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_server.engines.base import Engine, LocalAdapter
from tunesmith_server.footprint import writable_bytes

__all__ = ["Launcher"]

Say = Callable[[str], None]
"""Takes the name of the phase that begins."""


class Launcher:
    """Starts engines of one model, one after the other."""

    def __init__(
        self, plan: ServingPlan, model: Path, threads: int, say: Say, first_port: int = keys.PORT_ENGINE
    ) -> None:
        self.plan, self.model, self.threads, self.say, self.first_port = plan, model, threads, say, first_port
        self.needs = 0
        """Memory that another engine would take of its own, as far as that is known: 0 before the first."""

    def start(self, adapters: Sequence[LocalAdapter] = ()) -> Engine:
        """Load the model with these adapters and start to answer; return when it is loaded.

        Raises:
            UserError: the engine refuses the model.
        """
        before = writable_bytes()
        engine = _STARTS[self.plan.engine](self, adapters)
        self.needs = max(1, writable_bytes() - before)
        return engine


def _llama_cpp(launcher: Launcher, adapters: Sequence[LocalAdapter]) -> Engine:
    from tunesmith_server.engines.llama_cpp import LlamaEngine
    from tunesmith_server.footprint import cache_bound, known_cache_bound

    plan, model, threads, bound = launcher.plan, launcher.model, launcher.threads, 0
    if not adapters and not launcher.needs:
        launcher.say("measuring")
        bound = cache_bound(plan, model, threads)
    elif not adapters:
        bound = known_cache_bound(launcher.needs + model.stat().st_size)
    if not launcher.needs:
        launcher.say("loading")
    # one that takes another's place can't have its port as well
    port = 0 if launcher.needs else launcher.first_port
    return LlamaEngine(plan, model, threads, port=port, cache_bytes=bound, adapters=adapters)


def _transformers(launcher: Launcher, _adapters: Sequence[LocalAdapter]) -> Engine:
    from tunesmith_server.engines.transformers import TransformersEngine

    launcher.say("loading")
    return TransformersEngine(launcher.plan, launcher.model, launcher.threads)


def _vllm(launcher: Launcher, adapters: Sequence[LocalAdapter]) -> Engine:
    from tunesmith_server.engines.vllm import VllmEngine

    launcher.say("loading")
    return VllmEngine(launcher.plan, launcher.model, launcher.threads, adapters=adapters)


_STARTS: Final[Mapping[EngineType, Callable[[Launcher, Sequence[LocalAdapter]], Engine]]] = {
    EngineType.LLAMA_CPP: _llama_cpp,
    EngineType.TRANSFORMERS: _transformers,
    EngineType.VLLM: _vllm,
}
