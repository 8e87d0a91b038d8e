"""ModelDeployment: long-running service of a model, quantized first, rolled out by revisions."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from tunesmith_api import keys
from tunesmith_api.model import DnsLabel, S3Uri, SpecModel, StatusModel, cel
from tunesmith_api.v1alpha1.common import (
    Conditions,
    Image,
    NodeSelector,
    ObjectMeta,
    OptionalTime,
    Resources,
    Storage,
    Tolerations,
    keyed_by,
    name_rule,
    unseen,
)

__all__ = [
    "DeploymentPhase",
    "EngineType",
    "ModelDeployment",
    "ModelDeploymentSpec",
    "ModelDeploymentStatus",
    "QuantizationMethod",
    "RevisionPhase",
]


class QuantizationMethod(StrEnum):
    """Number format of the served weights."""

    NONE = "None"
    Q8_0 = "Q8_0"


class EngineType(StrEnum):
    """The server that answers."""

    LLAMA_CPP = "LlamaCpp"


class FineTuneJobRef(SpecModel):
    """A FineTuneJob in the same namespace."""

    name: DnsLabel = Field(description="Name of the FineTuneJob. Its model is served once it has succeeded.")


class Source(SpecModel):
    """The model to serve: from a FineTuneJob, or any folder."""

    fine_tune_job_ref: FineTuneJobRef | None = Field(
        default=None,
        description="The FineTuneJob whose result is served. Its storage settings are used unless `storage` is given here.",
    )
    uri: S3Uri | None = Field(
        default=None, description="Folder with config.json, tokenizer files and safetensors weights."
    )

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel("has(self.fineTuneJobRef) != has(self.uri)", "source takes either fineTuneJobRef or uri")
            ]
        },
    )


class Quantization(SpecModel):
    """How the weights are made smaller before they are served."""

    method: QuantizationMethod = Field(
        default=QuantizationMethod.Q8_0,
        description="Q8_0: 8 bits per weight, half the memory of 16-bit weights at no measurable loss. None: 16-bit weights.",
    )


class Engine(SpecModel):
    """The server that answers."""

    type: EngineType = Field(default=EngineType.LLAMA_CPP, description="LlamaCpp: GGUF through llama.cpp, for CPU.")
    context_length: int = Field(
        default=2048, ge=64, le=1_048_576, description="Tokens of prompt and answer together, for each request."
    )
    parallel_requests: int = Field(
        default=4, ge=1, le=256, description="Requests that one replica answers at once; more wait."
    )


class Rollout(SpecModel):
    """How a new revision takes over. The old one serves until the new one has proven itself."""

    progress_deadline_seconds: int = Field(
        default=600,
        ge=10,
        le=86_400,
        description="How long a new revision may take to become available before it is given up.",
    )


class ModelDeploymentSpec(SpecModel):
    """Which model to serve, and how."""

    source: Source = Field(description="The model to serve.")
    quantization: Quantization = Field(default_factory=Quantization, description="How the weights are made smaller.")
    engine: Engine = Field(default_factory=Engine, description="The server that answers.")
    replicas: int = Field(default=1, ge=0, le=1000, description="Number of server pods.")
    resources: Resources = Field(
        default_factory=Resources,
        description="CPU and memory of each server pod; the server uses as many threads as it has cores.",
    )
    artifacts_uri: S3Uri | None = Field(
        default=None,
        alias="artifactsURI",
        description="Folder for the quantized files; leave it out for `quantized/` below the model.",
    )
    storage: Storage | None = Field(
        default=None, description="The object store behind the s3:// URIs; leave it out to use that of the FineTuneJob."
    )
    rollout: Rollout = Field(default_factory=Rollout, description="How a new revision takes over.")
    revision_history_limit: int = Field(default=5, ge=1, le=20, description="How many past revisions the status lists.")
    node_selector: NodeSelector = Field(default_factory=dict, description="Labels that a server pod's node must have.")
    tolerations: Tolerations = Field(default_factory=list, description="Taints that server pods may run beside.")
    image: Image | None = Field(
        default=None, description="Server image; leave it out for the one that the operator was installed with."
    )

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    "!has(self.source.uri) || has(self.storage)",
                    "source.uri needs storage: say where that s3:// URI lives (storage.endpointURL, or storage: {} for AWS)",
                )
            ]
        },
    )


class DeploymentPhase(StrEnum):
    """Printed summary of the conditions."""

    PENDING = "Pending"
    QUANTIZING = "Quantizing"
    ROLLING_OUT = "RollingOut"
    READY = "Ready"
    DEGRADED = "Degraded"
    FAILED = "Failed"


class RevisionPhase(StrEnum):
    """How far a revision has come."""

    QUANTIZING = "Quantizing"
    ROLLING_OUT = "RollingOut"
    ACTIVE = "Active"
    RETIRED = "Retired"
    FAILED = "Failed"


class Revision(StatusModel):
    """One model, quantized one way, on one engine. Immutable."""

    number: int = Field(ge=1, description="Counts up from 1.")
    name: str = Field(description="Name of its Deployment: <name>-r<number>.")
    hash: str = Field(
        description="Digest of what makes the revision: model, quantization, engine, server image and resources."
    )
    phase: RevisionPhase = Field(description="How far it has come.")
    reason: str = Field(default="", description="Stable reason of a failure.")
    message: str = Field(default="", description="What happened, for people.")
    model_uri: str = Field(default="", alias="modelURI", description="Folder of the model it was made from.")
    model_digest: str = Field(default="", description="sha256 of that model; empty where it isn't known.")
    quantization: QuantizationMethod = Field(
        default=QuantizationMethod.NONE, description="Number format of its weights."
    )
    artifact_uri: str = Field(default="", alias="artifactURI", description="Folder of its quantized files.")
    artifact_digest: str = Field(default="", description="sha256 over those files, as recorded in their manifest.")
    artifact_size_bytes: int = Field(default=0, ge=0, description="Size of those files.")
    created_time: OptionalTime = Field(default=None, description="When the revision was made.")


class DeploymentDisplay(StatusModel):
    """Text for `kubectl get`. Programs read the other fields."""

    ready: str = Field(default="", description="Replicas ready / desired.")
    quantization: str = Field(default="", description="Number format of the serving revision.")


class ModelDeploymentStatus(StatusModel):
    """What the operator has observed."""

    observed_generation: int = Field(
        default=0, ge=0, description="The metadata.generation whose children were all applied."
    )
    phase: DeploymentPhase = Field(
        default=DeploymentPhase.PENDING, description="Printed summary; conditions are authoritative."
    )
    conditions: Conditions = Field(
        default_factory=list, description="Accepted, ArtifactReady, ChildrenApplied, Progressing, Available, Ready."
    )
    current_revision: str = Field(default="", description="Name of the revision that answers.")
    latest_revision: str = Field(
        default="", description="Name of the newest revision; differs from currentRevision during a rollout."
    )
    revisions: Annotated[list[Revision], Field(max_length=24, json_schema_extra=keyed_by("number"))] = Field(
        default_factory=list, description="Revisions so far, oldest first."
    )
    replicas: int = Field(default=0, ge=0, description="Server pods of the serving revision.")
    ready_replicas: int = Field(default=0, ge=0, description="Server pods that answer.")
    selector: str = Field(default="", description="Label selector of the server pods, for autoscalers.")
    url: str = Field(default="", description="Base URL of the OpenAI-compatible API inside the cluster.")
    display: DeploymentDisplay = Field(default_factory=DeploymentDisplay, description="Text for kubectl get.")


class ModelDeployment(StatusModel):
    """A served model: quantized, rolled out, answering."""

    api_version: str = keys.API_VERSION
    kind: str = keys.MODELDEPLOYMENT_KIND
    metadata: ObjectMeta
    spec: ModelDeploymentSpec = Field(description="Which model to serve, and how.")
    status: ModelDeploymentStatus = Field(
        default_factory=ModelDeploymentStatus,
        description="What the operator has observed.",
        json_schema_extra=unseen(keys.DeploymentCondition.READY),
    )

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                name_rule(keys.MODELDEPLOYMENT_KIND),
                # one that was there before this rule has a status, which must be possible to write
                cel(
                    "has(self.status) || !self.metadata.name.endsWith('-workers')",
                    "metadata.name of a ModelDeployment can't end in -workers: its Service would have the name of that of "
                    "a FineTuneJob; choose another name",
                ),
            ]
        },
    )
