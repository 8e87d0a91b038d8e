"""The server that answers: `spec.engine` of a ModelDeployment."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final

from pydantic import ConfigDict, Field

from tunesmith_api.model import SpecModel, cel
from tunesmith_api.v1alpha1.finetunejob import Gpu
from tunesmith_api.v1alpha1.quantization import QuantizationMethod

__all__ = ["ENGINE_METHODS", "Engine", "EngineType", "pairing_rules"]


class EngineType(StrEnum):
    """The server that answers."""

    AUTO = "Auto"
    LLAMA_CPP = "LlamaCpp"
    TRANSFORMERS = "Transformers"
    VLLM = "VLLM"


ENGINE_METHODS: Final[Mapping[EngineType, tuple[QuantizationMethod, ...]]] = {
    EngineType.LLAMA_CPP: (
        QuantizationMethod.NONE,
        QuantizationMethod.Q8_0,
        QuantizationMethod.Q6_K,
        QuantizationMethod.Q5_K_M,
        QuantizationMethod.Q4_K_M,
        QuantizationMethod.Q4_0,
        QuantizationMethod.Q3_K_M,
        QuantizationMethod.Q2_K,
    ),
    EngineType.TRANSFORMERS: (
        QuantizationMethod.NONE,
        QuantizationMethod.INT8,
        QuantizationMethod.INT8_DYNAMIC,
        QuantizationMethod.NF4,
    ),
    EngineType.VLLM: (QuantizationMethod.NONE,),
}
"""The number formats that each engine reads."""


def pairing_rules() -> list[dict[str, Any]]:
    """The CEL rules of a spec that names an engine and a method which don't go together."""
    return [
        cel(
            f"!has(self.engine) || !has(self.engine.type) || self.engine.type != '{engine}' || "
            "!has(self.quantization) || !has(self.quantization.method) || "
            f"self.quantization.method in {[QuantizationMethod.AUTO.value, *(it.value for it in methods)]}",
            f"engine.type {engine} takes quantization.method {', '.join(methods)}: choose one of them, or leave "
            "engine.type out",
        )
        for engine, methods in ENGINE_METHODS.items()
    ]


class Engine(SpecModel):
    """The server that answers."""

    type: EngineType = Field(
        default=EngineType.AUTO,
        description="LlamaCpp: text, from GGUF through llama.cpp, for CPU. VLLM: text, in an image of its own, for GPU and for CPU. Transformers: classifiers and encoders, and text as a reference. Auto: LlamaCpp or Transformers, the one that reads quantization.method and serves the FineTuneJob's task; LlamaCpp where both do.",
    )
    context_length: int = Field(
        default=2048,
        ge=64,
        le=1_048_576,
        description="Tokens of prompt and answer together, for each request. Texts that are classified or embedded are cut there.",
    )
    parallel_requests: int = Field(
        default=4,
        ge=1,
        le=256,
        description="Requests that one replica of LlamaCpp or VLLM answers at once; more wait. Transformers puts together what waits.",
    )
    gpus: int = Field(
        default=0,
        ge=0,
        le=64,
        description="GPUs of each replica of VLLM, which share the model (tensor parallel); 0 to serve on CPU.",
    )
    gpu: Gpu = Field(default_factory=Gpu, description="Which kind of GPU.")

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    "!has(self.gpus) || self.gpus == 0 || (has(self.type) && self.type == 'VLLM')",
                    "engine.gpus is for engine.type VLLM: set that, or leave gpus out (the other engines serve on CPU)",
                )
            ]
        },
    )
