"""The server that answers: `spec.engine` of a ModelDeployment."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from tunesmith_api.model import SpecModel

__all__ = ["Engine", "EngineType"]


class EngineType(StrEnum):
    """The server that answers."""

    LLAMA_CPP = "LlamaCpp"


class Engine(SpecModel):
    """The server that answers."""

    type: EngineType = Field(default=EngineType.LLAMA_CPP, description="LlamaCpp: GGUF through llama.cpp, for CPU.")
    context_length: int = Field(
        default=2048, ge=64, le=1_048_576, description="Tokens of prompt and answer together, for each request."
    )
    parallel_requests: int = Field(
        default=4, ge=1, le=256, description="Requests that one replica answers at once; more wait."
    )
