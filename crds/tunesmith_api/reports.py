"""What a pod tells the operator: live progress by HTTP, the result in its termination message."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from tunesmith_api.artifacts import ModelShape
from tunesmith_api.keys import Reason
from tunesmith_api.model import Contract, Metrics
from tunesmith_api.v1alpha1.gate import Evaluation

__all__ = [
    "MAX_TERMINATION_BYTES",
    "CheckpointRef",
    "DatasetFacts",
    "MemoryFacts",
    "ModelRef",
    "Outcome",
    "ProgressReport",
    "TerminationReport",
    "TrainerState",
]

MAX_TERMINATION_BYTES = 4096
"""The kubelet keeps no more of a termination message."""


class TrainerState(StrEnum):
    """What the trainer is doing."""

    STARTING = "Starting"
    PREPARING = "Preparing"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    SAVING = "Saving"
    FINISHED = "Finished"
    FAILED = "Failed"


class CheckpointRef(Contract):
    """A complete checkpoint."""

    step: int
    uri: str


class ModelRef(Contract):
    """A complete model or quantized artefact in object storage."""

    uri: str
    digest: str
    size_bytes: int
    base_digest: str = ""
    rehearsed: str | None = None
    reads_images: bool | None = None
    bits_per_weight: float | None = None
    shape: ModelShape | None = None


class DatasetFacts(Contract):
    """What the data turned out to hold; the same fields as `status.dataset`."""

    train_examples: int = 0
    eval_examples: int = 0
    bad_rows: int = 0
    first_bad_row: str = ""
    duplicates: int = 0
    truncated: int = 0
    learned_tokens: int = 0
    learned_turns: int = 0
    unlearned_turns: int = 0
    first_example: str = ""


class MemoryFacts(Contract):
    """What halving the micro-batch needs to know after running out of memory."""

    micro_batch_size: int
    peak_bytes: int
    limit_bytes: int = Field(
        default=0, description="Memory of the GPU, or the container's limit; 0 where there is none."
    )


class ProgressReport(Contract):
    """Served as JSON by the supervisor of worker 0 at PATH_PROGRESS, polled by the operator."""

    schema_version: Literal[1] = 1
    attempt: int = 1
    state: TrainerState = TrainerState.STARTING
    message: str = ""
    reason: str = Field(default="", description="What keeps the trainer from getting on, a `Reason`; mostly empty.")
    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: int | None = None
    restarts: int = 0
    rollbacks: int = 0
    workers_joined: int = 0
    dataset: DatasetFacts | None = None
    checkpoint: CheckpointRef | None = None
    heartbeat_unix: float = Field(default=0.0, description="Unix time of the trainer's last sign of life.")
    phase_seconds: dict[str, float] = Field(
        default_factory=dict, description="Seconds spent so far per start-up phase, from the supervisor's start."
    )


class Outcome(StrEnum):
    """How a container ended."""

    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    INTERRUPTED = "Interrupted"


class TerminationReport(Contract):
    """Written to the termination log by the trainer's supervisor and by the quantize Job; at most 4096 bytes."""

    schema_version: Literal[1] = 1
    outcome: Outcome
    reason: Reason
    message: str = ""
    attempt: int = 1
    global_step: int = 0
    max_steps: int = 0
    restarts: int = 0
    checkpoint: CheckpointRef | None = None
    model: ModelRef | None = None
    evaluation: Evaluation | None = None
    dataset: DatasetFacts | None = None
    memory: MemoryFacts | None = None
    metrics: Metrics = Field(default_factory=dict)
    phase_seconds: dict[str, float] = Field(default_factory=dict)

    def to_bounded_json(self) -> str:
        """Serialize to at most MAX_TERMINATION_BYTES bytes: the message is shortened first, then extras are dropped."""
        text = self.to_json()
        excess = len(text.encode()) - MAX_TERMINATION_BYTES
        if excess <= 0:
            return text
        # one character can take up to 6 bytes in JSON (\u escapes): cut by bytes of the encoded message, generously
        keep = max(0, len(self.message) - excess - 16)
        shorter = self.model_copy(update={"message": self.message[:keep] + "…"})
        text = shorter.to_json()
        if len(text.encode()) <= MAX_TERMINATION_BYTES:
            return text
        dataset = self.dataset and self.dataset.model_copy(update={"first_example": ""})
        update: dict[str, object] = {
            "message": self.message[:200],
            "metrics": {},
            "phase_seconds": {},
            "dataset": dataset,
        }
        return self.model_copy(update=update).to_json()
