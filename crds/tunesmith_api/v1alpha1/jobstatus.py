"""What the operator reports of a FineTuneJob."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from tunesmith_api.model import StatusModel
from tunesmith_api.v1alpha1.common import Conditions, OptionalTime, keyed_by

__all__ = [
    "Attempt",
    "CheckpointStatus",
    "DatasetStatus",
    "FineTuneJobStatus",
    "JobDisplay",
    "JobPhase",
    "ModelStatus",
    "Progress",
    "WorkerCounts",
]


class JobPhase(StrEnum):
    """Printed summary of the conditions."""

    PENDING = "Pending"
    STARTING = "Starting"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    SAVING = "Saving"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class Progress(StatusModel):
    """How far training is. Numbers that aren't whole are text."""

    global_step: int = Field(default=0, ge=0, description="Optimizer steps done.")
    max_steps: int = Field(default=0, ge=0, description="Optimizer steps in all.")
    percent: int = Field(default=0, ge=0, le=100, description="globalStep of maxSteps.")
    epoch: str = Field(default="0", description="Passes over the data done.")
    loss: str | None = Field(default=None, description="Training loss per token at the last recorded step.")
    eval_loss: str | None = Field(
        default=None, description="Loss per token on the held-out data at its last evaluation."
    )
    learning_rate: str | None = Field(default=None, description="Learning rate of the last step.")
    grad_norm: str | None = Field(default=None, description="Gradient norm of the last step, before clipping.")
    tokens_per_second: str | None = Field(default=None, description="Tokens processed per second over all workers.")
    eta_seconds: int | None = Field(default=None, ge=0, description="Estimated seconds until the last step.")
    last_heartbeat_time: OptionalTime = Field(
        default=None, description="When the trainer last reported, as of this status."
    )


class JobDisplay(StatusModel):
    """Text for `kubectl get`. Programs read the other fields."""

    progress: str = Field(default="", description="Percent done.")
    step: str = Field(default="", description="Steps done / steps in all.")
    loss: str = Field(default="", description="Training loss.")
    eta: str = Field(default="", description="Time left.")
    workers: str = Field(default="", description="Workers ready / desired.")


class WorkerCounts(StatusModel):
    """The worker pods."""

    desired: int = Field(default=0, ge=0, description="Pods wanted.")
    ready: int = Field(default=0, ge=0, description="Pods running and ready.")


class CheckpointStatus(StatusModel):
    """The newest complete checkpoint."""

    step: int = Field(ge=0, description="Optimizer steps it holds.")
    uri: str = Field(description="Its folder.")


class ModelStatus(StatusModel):
    """The tuned model."""

    uri: str = Field(description="Its folder.")
    digest: str = Field(description="sha256 over its files, as recorded in its manifest.")
    size_bytes: int = Field(default=0, ge=0, description="Size of all its files.")
    rehearsed: str | None = Field(
        default=None, description="The number format that QAT rehearsed: served with quantization.method Auto."
    )
    reads_images: bool | None = Field(default=None, description="True: it reads images beside text.")


class DatasetStatus(StatusModel):
    """What the data turned out to hold."""

    train_examples: int = Field(default=0, ge=0, description="Examples to train on.")
    eval_examples: int = Field(default=0, ge=0, description="Held-out examples.")
    bad_rows: int = Field(default=0, ge=0, description="Rows left out since they can't be used (onBadRow: Skip).")
    first_bad_row: str = Field(default="", description="The first of them: file, line and what is wrong.")
    duplicates: int = Field(default=0, ge=0, description="Rows left out by deduplication.")
    truncated: int = Field(default=0, ge=0, description="Training examples that training.maxLength cut.")
    learned_tokens: int = Field(
        default=0, ge=0, description="ChatSFT, CausalLM: tokens of the training data that the loss counts."
    )
    learned_turns: int = Field(default=0, ge=0, description="ChatSFT: turns of the assistant that are learned.")
    unlearned_turns: int = Field(
        default=0,
        ge=0,
        description="ChatSFT: turns of the assistant that are not learned, since maxLength cuts them off, the chat template hides them, or their weight is 0.",
    )
    first_example: str = Field(
        default="",
        description="ChatSFT, CausalLM: the first training example as the model reads it, what is learned in ⟦ ⟧.",
    )


class Attempt(StatusModel):
    """One child Job."""

    number: int = Field(ge=1, description="1 for the first.")
    job_name: str = Field(description="Name of the child Job.")
    outcome: Literal["Running", "Succeeded", "Failed", "Suspended"] = Field(
        default="Running", description="How it stands."
    )
    reason: str = Field(default="", description="Stable reason of the outcome.")
    end_step: int | None = Field(default=None, ge=0, description="Optimizer steps done when it ended.")
    start_time: OptionalTime = Field(default=None, description="When the child Job started.")
    completion_time: OptionalTime = Field(default=None, description="When it ended.")


class FineTuneJobStatus(StatusModel):
    """What the operator has observed."""

    observed_generation: int = Field(
        default=0,
        ge=0,
        description="The metadata.generation whose children were all applied, that was refused, or, after the end, that was last seen.",
    )
    phase: JobPhase = Field(default=JobPhase.PENDING, description="Printed summary; conditions are authoritative.")
    conditions: Conditions = Field(
        default_factory=list, description="Accepted, ChildrenApplied, WorkersReady, CheckpointAvailable, Succeeded."
    )
    progress: Progress | None = Field(default=None, description="How far training is.")
    display: JobDisplay = Field(default_factory=JobDisplay, description="Text for kubectl get.")
    workers: WorkerCounts = Field(default_factory=WorkerCounts, description="The worker pods.")
    restarts: int = Field(default=0, ge=0, description="Times that training was resumed after a loss, in all attempts.")
    attempts: Annotated[list[Attempt], Field(max_length=20, json_schema_extra=keyed_by("number"))] = Field(
        default_factory=list, description="The child Jobs so far, oldest first."
    )
    gpu_seconds: int | None = Field(
        default=None,
        ge=0,
        description="GPU-seconds that the job's pods have used, restarts and all: each pod counts from its node to its end, times the GPUs that it asks for. Absent where it asks for none.",
    )
    gpu_seconds_time: OptionalTime = Field(default=None, description="Until when `gpuSeconds` counts.")
    dataset: DatasetStatus | None = Field(default=None, description="What the data turned out to hold.")
    checkpoint: CheckpointStatus | None = Field(default=None, description="The newest complete checkpoint.")
    model: ModelStatus | None = Field(default=None, description="The tuned model, once there is one.")
    metrics: Annotated[dict[str, str], Field(max_length=64)] = Field(
        default_factory=dict, description="Final metrics by name, for example evalLoss and evalLossBefore."
    )
    start_time: OptionalTime = Field(
        default=None,
        description="When the first attempt started; from then on the spec's training fields are immutable.",
    )
    completion_time: OptionalTime = Field(
        default=None,
        description="When the job ended; from then on nothing about it changes but `observedGeneration`, and no field of the spec counts but `ttlSecondsAfterFinished` and `childrenTTLSecondsAfterFinished`.",
    )
