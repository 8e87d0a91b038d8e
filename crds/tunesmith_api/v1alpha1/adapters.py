"""LoRA adapters beside the served model: `spec.adapters` of a ModelDeployment, and what its status says of them."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Final

from pydantic import ConfigDict, Field

from tunesmith_api.model import SpecModel, StatusModel, WritableUri, cel
from tunesmith_api.v1alpha1.common import keyed_by
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_api.v1alpha1.source import FineTuneJobRef

__all__ = [
    "ADAPTER_ENGINES",
    "MOST_ADAPTERS",
    "Adapter",
    "AdapterName",
    "AdapterPhase",
    "AdapterStatus",
    "Adapters",
    "AdaptersStatus",
    "adapter_rules",
    "name_of_the_base",
]

MOST_ADAPTERS: Final = 32
ADAPTER_ENGINES: Final = (EngineType.LLAMA_CPP, EngineType.VLLM)
"""The engines that serve adapters."""

AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$", min_length=1, max_length=63)]


class Adapter(SpecModel):
    """One LoRA adapter of the served model."""

    name: AdapterName = Field(description="What clients put into `model` to be answered by it.")
    fine_tune_job_ref: FineTuneJobRef | None = Field(
        default=None,
        description=(
            "The FineTuneJob whose adapter is served: one of the served model, with output.save Adapter or Both. It is "
            "read with `storage`, as the served model is."
        ),
    )
    uri: WritableUri | None = Field(
        default=None,
        description="Folder with adapter_config.json and adapter_model.safetensors: s3://bucket/key or pvc://claim/path.",
    )
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$", max_length=64)] | None = Field(
        default=None,
        description=(
            "Serve the adapter at `uri` only if it has this digest (status.adapters[].digest); leave it out to take what "
            "lies there when the adapter is added."
        ),
    )

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel("has(self.fineTuneJobRef) != has(self.uri)", "an adapter takes either fineTuneJobRef or uri"),
                cel(
                    "!has(self.digest) || has(self.uri)",
                    "digest goes with uri; that of a FineTuneJob's result is fineTuneJobRef.digest",
                ),
            ]
        },
    )


Adapters = Annotated[list[Adapter], Field(max_length=MOST_ADAPTERS, json_schema_extra=keyed_by("name"))]


def adapter_rules() -> list[dict[str, Any]]:
    """The CEL rules of a spec that names adapters and an engine that serves none."""
    engines = [EngineType.AUTO.value, *(it.value for it in ADAPTER_ENGINES)]
    return [
        cel(
            "!has(self.adapters) || size(self.adapters) == 0 || !has(self.engine) || !has(self.engine.type) || "
            f"self.engine.type in {engines}",
            f"adapters are served by engine.type {' or '.join(ADAPTER_ENGINES)} only: choose that, or leave engine.type "
            "out",
        )
    ]


def name_of_the_base() -> dict[str, Any]:
    """The CEL rule of a ModelDeployment whose adapter would take the name of the model itself."""
    return cel(
        "!has(self.spec.adapters) || self.spec.adapters.all(it, it.name != self.metadata.name)",
        "an adapter can't have the ModelDeployment's own name, by which clients reach the model without adapters: "
        "choose another",
    )


class AdapterPhase(StrEnum):
    """How far an adapter has come."""

    PENDING = "Pending"
    CONVERTING = "Converting"
    LOADING = "Loading"
    SERVED = "Served"
    FAILED = "Failed"


class AdapterStatus(StatusModel):
    """One entry of spec.adapters, as the revision that answers has it."""

    name: str = Field(description="Name in spec.adapters.")
    phase: AdapterPhase = Field(default=AdapterPhase.PENDING, description="How far it has come.")
    reason: str = Field(default="", description="Stable reason why it isn't served.")
    message: str = Field(default="", description="What happened and what to do, for people.")
    uri: str = Field(default="", description="Folder that it was read from.")
    digest: str = Field(default="", description="sha256 of the adapter there; empty until it is known.")
    artifact_uri: str = Field(
        default="",
        alias="artifactURI",
        description="Folder of the files that the servers load; empty until they are made.",
    )
    artifact_digest: str = Field(default="", description="sha256 over those files, as recorded in their manifest.")
    revision: str = Field(default="", description="Name of the revision whose servers have it.")


AdaptersStatus = Annotated[list[AdapterStatus], Field(max_length=MOST_ADAPTERS, json_schema_extra=keyed_by("name"))]
