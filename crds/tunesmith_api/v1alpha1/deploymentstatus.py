"""What the operator has observed of a ModelDeployment: its status."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from tunesmith_api.model import StatusModel
from tunesmith_api.v1alpha1.adapters import AdaptersStatus
from tunesmith_api.v1alpha1.autoscaling import AutoscalingStatus
from tunesmith_api.v1alpha1.common import Conditions, OptionalTime, keyed_by
from tunesmith_api.v1alpha1.gate import Evaluation
from tunesmith_api.v1alpha1.quantization import QuantizationMethod

__all__ = ["DeploymentDisplay", "DeploymentPhase", "ModelDeploymentStatus", "Revision", "RevisionPhase"]


class DeploymentPhase(StrEnum):
    """Printed summary of the conditions."""

    PENDING = "Pending"
    QUANTIZING = "Quantizing"
    ROLLING_OUT = "RollingOut"
    PAUSED = "Paused"
    ROLLED_BACK = "RolledBack"
    WAKING = "Waking"
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
    model_digest: str = Field(default="", description="sha256 of that model; empty until it is known.")
    quantization: QuantizationMethod = Field(
        default=QuantizationMethod.NONE, description="Number format of its weights."
    )
    artifact_uri: str = Field(
        default="", alias="artifactURI", description="Folder of its quantized files; below it, until they are made."
    )
    artifact_digest: str = Field(default="", description="sha256 over those files, as recorded in their manifest.")
    artifact_size_bytes: int = Field(default=0, ge=0, description="Size of those files.")
    evaluation: Evaluation | None = Field(
        default=None, description="The comparison with the unquantized model, where there was one."
    )
    stands_in_for: str = Field(
        default="",
        description="Hash of the revision that the gate held back and that this one, of fallbackMethod, is tried for.",
    )
    bits_per_weight: str = Field(
        default="",
        description="Bits of those files for each weight of the model: what the method came to, with all it falls back to.",
    )
    memory_bytes: int = Field(
        default=0,
        ge=0,
        description="Memory that a server pod of it needs: weights, the context of all requests at once, program, prompt cache. 0: not known.",
    )
    created_time: OptionalTime = Field(default=None, description="When the revision was made.")
    weight: int = Field(default=0, ge=0, le=100, description="Percent of the requests that it is given now.")
    step_index: Annotated[int, Field(ge=0, le=20)] | None = Field(
        default=None,
        description="Which of rollout.steps it is at, counted from 0; their number: it is past them. Absent outside a rollout.",
    )
    step_time: OptionalTime = Field(
        default=None, description="When that step began, or when it was reached: when `weight` last changed."
    )


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
        default_factory=list,
        description="Accepted, ArtifactReady, QualityHeld, ChildrenApplied, Progressing, Available, Ready; AdaptersReady where there are adapters.",
    )
    current_revision: str = Field(
        default="",
        description="Name of the revision that is proven. It answers; during a rollout, revisions[].weight says how much.",
    )
    latest_revision: str = Field(
        default="", description="Name of the newest revision; differs from currentRevision during a rollout."
    )
    revisions: Annotated[list[Revision], Field(max_length=24, json_schema_extra=keyed_by("number"))] = Field(
        default_factory=list, description="The last revisions, oldest first."
    )
    adapters: AdaptersStatus = Field(
        default_factory=list, description="What has become of each entry of spec.adapters."
    )
    replicas: int = Field(default=0, ge=0, description="Server pods of the serving revision.")
    ready_replicas: int = Field(default=0, ge=0, description="Server pods that answer.")
    autoscaling: AutoscalingStatus | None = Field(
        default=None, description="How many server pods spec.autoscaling asks for, and why."
    )
    selector: str = Field(default="", description="Label selector of the server pods, for autoscalers.")
    url: str = Field(default="", description="Base URL of the OpenAI-compatible API inside the cluster.")
    display: DeploymentDisplay = Field(default_factory=DeploymentDisplay, description="Text for kubectl get.")
