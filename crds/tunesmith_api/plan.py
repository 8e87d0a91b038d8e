"""What the operator writes and a pod reads: fully resolved plans, mounted as JSON.

`tunesmith_operator.core` builds them from a spec; `tunesmith_trainer` and `tunesmith_server` obey them. A pod never
sees the custom resource itself, so a running job can't change under its feet.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunesmith_api.model import Contract, digest_of
from tunesmith_api.v1alpha1.finetunejob import LrSchedulerType, MethodType, Precision, Task
from tunesmith_api.v1alpha1.modeldeployment import EngineType, QuantizationMethod

__all__ = ["LoraPlan", "OptimizationPlan", "ServingPlan", "StoragePlan", "TrainingPlan"]


class StoragePlan(Contract):
    """How to reach the object store. Credentials come by environment, never by plan."""

    endpoint_url: str | None = Field(default=None, alias="endpointURL")
    region: str = "us-east-1"


class LoraPlan(Contract):
    """Low-rank adapters."""

    r: int
    alpha: int
    dropout: float
    target_modules: tuple[str, ...]


class OptimizationPlan(Contract):
    """The optimization, numbers resolved."""

    num_train_epochs: int
    max_steps: int | None = None
    learning_rate: float
    lr_scheduler_type: LrSchedulerType
    warmup_ratio: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    global_batch_size: int
    micro_batch_size: int
    max_length: int
    precision: Precision
    eval_steps: int | None = None
    logging_steps: int = 1
    seed: int


class TrainingPlan(Contract):
    """Everything that one attempt of a FineTuneJob needs to know."""

    schema_version: Literal[1] = 1
    name: str
    namespace: str
    uid: str
    attempt: int = 1
    task: Task
    model_uri: str
    train_uri: str
    eval_uri: str | None = None
    messages_column: str = "messages"
    method: MethodType
    lora: LoraPlan | None = None
    training: OptimizationPlan
    replicas: int
    gpus_per_worker: int = 0
    cpus_per_worker: float = 1.0
    max_restarts: int = 10
    head_host: str
    checkpoint_uri: str
    checkpoint_every_steps: int
    checkpoint_keep_last: int
    output_uri: str
    storage: StoragePlan = Field(default_factory=StoragePlan)

    @property
    def digest(self) -> str:
        """Digest of what decides the loss curve: a checkpoint of another digest is not resumed from.

        Placement, worker count, micro-batch, restarts, retention and the attempt number are left out: the curve does
        not depend on them.
        """
        document = self.model_dump(
            mode="json",
            by_alias=True,
            include={"task", "model_uri", "train_uri", "messages_column", "method", "lora", "training"},
        )
        document["training"].pop("microBatchSize")
        document["training"].pop("loggingSteps")
        document["training"].pop("evalSteps")
        return digest_of(document)


class ServingPlan(Contract):
    """Everything that the quantize Job and the server pods of one revision need to know."""

    schema_version: Literal[1] = 1
    name: str
    namespace: str
    uid: str
    revision: str
    model_uri: str
    model_digest: str = ""
    quantization: QuantizationMethod
    engine: EngineType
    context_length: int
    parallel_requests: int
    artifact_uri: str
    storage: StoragePlan = Field(default_factory=StoragePlan)
