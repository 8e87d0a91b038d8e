"""Which engine serves a task, in which number format, where the spec leaves it open. Asked by `source`, `template`."""

from __future__ import annotations

from typing import Final

from tunesmith_api.v1alpha1.engine import ENGINE_METHODS, EngineType
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_api.v1alpha1.task import Task

__all__ = ["engine_for", "engines_of", "method_for", "rehearsed_for_nothing", "servable"]

_TEXT_TASKS: Final = frozenset({Task.CHAT_SFT, Task.CAUSAL_LM, Task.DPO})
"""Tasks whose models go on with a text."""
_SERVED: Final = {
    EngineType.LLAMA_CPP: _TEXT_TASKS,
    EngineType.TRANSFORMERS: _TEXT_TASKS
    | {
        Task.MASKED_LM,
        Task.SEQUENCE_CLASSIFICATION,
        Task.TOKEN_CLASSIFICATION,
        Task.IMAGE_CLASSIFICATION,
    },
    EngineType.VLLM: _TEXT_TASKS,
}
_DEFAULT_METHODS: Final = {
    EngineType.LLAMA_CPP: QuantizationMethod.Q8_0,
    EngineType.TRANSFORMERS: QuantizationMethod.NONE,
    EngineType.VLLM: QuantizationMethod.NONE,
}


def engines_of(task: Task) -> list[EngineType]:
    """The engines that serve models of a task, the one that is chosen first at the beginning."""
    return [engine for engine, tasks in _SERVED.items() if task in tasks]


def servable() -> frozenset[Task]:
    """The tasks whose models some engine serves."""
    return frozenset().union(*_SERVED.values())


def engine_for(asked: EngineType, method: QuantizationMethod, task: Task | None) -> EngineType:
    """The engine that serves: what the spec says, or the first that reads the method and serves the task."""
    if asked is not EngineType.AUTO:
        return asked
    candidates = list(_SERVED) if task is None else engines_of(task)
    reading = [it for it in candidates if method is QuantizationMethod.AUTO or method in ENGINE_METHODS[it]]
    return (reading or candidates)[0]


def method_for(
    asked: QuantizationMethod, engine: EngineType, rehearsed: QuantizationMethod | None = None
) -> QuantizationMethod:
    """The number format of the served weights: the spec's, else what was rehearsed, else the engine's usual one."""
    if asked is not QuantizationMethod.AUTO:
        return asked
    return rehearsed if rehearsed in ENGINE_METHODS[engine] else _DEFAULT_METHODS[engine]


def rehearsed_for_nothing(
    asked: QuantizationMethod, engine: EngineType, rehearsed: QuantizationMethod | None
) -> str | None:
    """What to say of a model that is served in another format than it was trained for."""
    served = method_for(asked, engine, rehearsed)
    if rehearsed is None or served is rehearsed:
        return None
    if rehearsed in ENGINE_METHODS[engine]:
        remedy = f"set quantization.method: {rehearsed}, or leave it out"
    else:
        able = next(it for it, methods in ENGINE_METHODS.items() if rehearsed in methods)
        remedy = f"engine {engine} can't read that; engine.type: {able} can"
    return f"The model has rehearsed {rehearsed} (method.qat of its FineTuneJob) and is served as {served}: {remedy}."
