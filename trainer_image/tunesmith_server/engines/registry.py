"""Starts the engine that a plan names. Called by `__main__`; an engine's libraries are loaded for it alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from tunesmith_api.plan import ServingPlan
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_server.engines.base import Engine

__all__ = ["start_engine"]

Say = Callable[[str], None]
"""Takes the name of the phase that begins."""


def start_engine(plan: ServingPlan, model: Path, threads: int, say: Say) -> Engine:
    """Load the model and start to answer; return when it is loaded.

    Raises:
        UserError: the engine refuses the model.
    """
    return _STARTS[plan.engine](plan, model, threads, say)


def _llama_cpp(plan: ServingPlan, model: Path, threads: int, say: Say) -> Engine:
    from tunesmith_server.engines.llama_cpp import LlamaEngine
    from tunesmith_server.footprint import cache_bound

    say("measuring")
    bound = cache_bound(plan, model, threads)
    say("loading")
    return LlamaEngine(plan, model, threads, cache_bytes=bound)


def _transformers(plan: ServingPlan, model: Path, threads: int, say: Say) -> Engine:
    from tunesmith_server.engines.transformers import TransformersEngine

    say("loading")
    return TransformersEngine(plan, model, threads)


def _vllm(plan: ServingPlan, model: Path, threads: int, say: Say) -> Engine:
    from tunesmith_server.engines.vllm import VllmEngine

    say("loading")
    return VllmEngine(plan, model, threads)


_STARTS: Final[Mapping[EngineType, Callable[[ServingPlan, Path, int, Say], Engine]]] = {
    EngineType.LLAMA_CPP: _llama_cpp,
    EngineType.TRANSFORMERS: _transformers,
    EngineType.VLLM: _vllm,
}
