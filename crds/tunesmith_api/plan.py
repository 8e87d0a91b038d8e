"""What the operator writes and a pod reads: fully resolved plans, mounted as JSON.

`tunesmith_operator.core` builds them from a spec; `tunesmith_trainer` and `tunesmith_server` obey them. A pod never
sees the custom resource itself, so a running job can't change under its feet.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from tunesmith_api.adapters import AdapterPlan
from tunesmith_api.model import Contract, digest_of
from tunesmith_api.v1alpha1.api import Api
from tunesmith_api.v1alpha1.common import AddressingStyle
from tunesmith_api.v1alpha1.dataset import Dataset
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_api.v1alpha1.finetunejob import Init, SaveMode, Tracking
from tunesmith_api.v1alpha1.method import Method
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_api.v1alpha1.task import Classification, Generation, MaskedLanguageModel, Preference, Task, Translation
from tunesmith_api.v1alpha1.training import EarlyStopping, LrSchedulerType, Optim, Precision, Strategy

__all__ = ["CalibrationPlan", "EvaluationPlan", "OptimizationPlan", "ServingPlan", "StoragePlan", "TrainingPlan"]


class StoragePlan(Contract):
    """How to reach the object store. Credentials come by environment, never by plan."""

    endpoint_url: str | None = Field(default=None, alias="endpointURL")
    region: str = "us-east-1"
    addressing_style: AddressingStyle = AddressingStyle.AUTO


class OptimizationPlan(Contract):
    """The optimization, numbers resolved. Fields mean what they mean in `spec.training`."""

    num_train_epochs: int
    max_steps: int | None = None
    learning_rate: float
    lr_scheduler_type: LrSchedulerType
    num_cycles: int = 1
    decay_ratio: float = 0.1
    warmup_ratio: float
    optim: Optim = Optim.ADAMW_TORCH
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    label_smoothing_factor: float = 0.0
    dropout: float | None = None
    global_batch_size: int
    micro_batch_size: int
    max_length: int
    packing: bool = True
    group_by_length: bool = True
    gradient_checkpointing: bool = False
    precision: Precision
    eval_steps: int | None = None
    max_eval_samples: int | None = None
    metric_for_best_model: str = "loss"
    load_best_model_at_end: bool = False
    early_stopping: EarlyStopping | None = None
    logging_steps: int = 1
    seed: int


_CURVE = {
    "task",
    "model_uri",
    "model_revision",
    "model_init",
    "dataset",
    "method",
    "classification",
    "preference",
    "masked_lm",
    "translation",
    "training",
}
_NOT_CURVE = (
    "microBatchSize",
    "loggingSteps",
    "evalSteps",
    "maxEvalSamples",
    "packing",
    "groupByLength",
    "gradientCheckpointing",
    "metricForBestModel",
    "loadBestModelAtEnd",
    "earlyStopping",
)


class TrainingPlan(Contract):
    """Everything that one attempt of a FineTuneJob needs to know."""

    schema_version: Literal[1] = 1
    name: str
    namespace: str
    uid: str
    attempt: int = 1
    task: Task
    model_uri: str
    model_revision: str | None = None
    model_init: Init = Init.PRETRAINED
    dataset: Dataset
    method: Method
    classification: Classification = Field(default_factory=Classification)
    preference: Preference = Field(default_factory=Preference)
    masked_lm: MaskedLanguageModel = Field(default_factory=MaskedLanguageModel)
    translation: Translation | None = None
    generation: Generation = Field(default_factory=Generation)
    training: OptimizationPlan
    strategy: Strategy = Strategy.AUTO
    tensor_parallel: int = 1
    replicas: int
    gpus_per_worker: int = 0
    processes_per_worker: int = 1
    """Training processes of a pod; with GPUs as many as it has of them."""
    cpus_per_worker: float = 1.0
    max_restarts: int = 10
    max_rollbacks: int = 3
    loss_spike_factor: float = 4.0
    collective_timeout_seconds: int = 600
    head_host: str
    checkpoint_uri: str
    checkpoint_every_steps: int
    checkpoint_keep_last: int
    checkpoint_keep_best: bool = True
    output_uri: str
    output_overwrite: bool = False
    save: SaveMode = SaveMode.MERGED
    output_dtype: Precision = Precision.AUTO
    tracking: Tracking = Field(default_factory=Tracking)
    storage: StoragePlan = Field(default_factory=StoragePlan)
    hub_endpoint_url: str | None = Field(default=None, alias="hubEndpointURL")

    @property
    def curve(self) -> dict[str, Any]:
        """What decides the loss curve.

        Placement, worker count, micro-batch, restarts, retention and the attempt number are left out: the curve does
        not depend on them.
        """
        document = self.model_dump(mode="json", by_alias=True, include=_CURVE, exclude_none=True)
        for name in _NOT_CURVE:
            document["training"].pop(name, None)
        document["dataset"].pop("cacheUri", None)
        return document

    @property
    def digest(self) -> str:
        """Digest of what decides the loss curve: a checkpoint of another digest is not resumed from."""
        return digest_of(self.curve)

    @property
    def world_size(self) -> int:
        """Training processes of all pods together."""
        return self.replicas * self.processes_per_worker

    @property
    def publishes_adapter_only(self) -> bool:
        """Whether the output folder gets an adapter and no whole model."""
        return self.method.has_adapters and self.save is SaveMode.ADAPTER

    @property
    def output_form(self) -> str:
        """How the model is written, which the digest doesn't know: another form of the same run has to be written."""
        return f"{self.save} {self.output_dtype}" if self.method.has_adapters else f"{self.output_dtype}"

    @property
    def tokens_uri(self) -> str:
        """Folder for tokenized data."""
        return (self.dataset.cache_uri or f"{self.checkpoint_uri.rstrip('/')}/tokens").rstrip("/")


class EvaluationPlan(Contract):
    """What the quantized model is compared by. Without rows only size, speed and memory are."""

    uri: str | None = None
    inline: str | None = None
    messages_field: str = "messages"
    text_field: str | None = None
    text_pair_field: str | None = None
    label_field: str | None = None
    max_examples: int = 200
    seed: int = 0


class CalibrationPlan(Contract):
    """The texts that the importance matrix is computed from."""

    uri: str | None = None
    inline: str | None = None
    messages_field: str = "messages"
    text_field: str = "text"
    max_examples: int = 128
    seed: int = 0


class ServingPlan(Contract):
    """Everything that the quantize Job and the server pods of one revision need to know.

    `artifact_uri` is the folder below which artefacts lie, each in one named by method and source.
    """

    schema_version: Literal[1] = 1
    name: str
    namespace: str
    uid: str
    revision: str
    model_uri: str
    model_digest: str = ""
    model_revision: str | None = None
    quantization: QuantizationMethod
    engine: EngineType
    context_length: int
    parallel_requests: int
    gpus: int = 0
    lora: bool = False
    """Whether vLLM is started so that it can load adapters."""
    api: Api = Field(default_factory=Api)
    artifact_uri: str
    evaluation: EvaluationPlan | None = None
    adapter: AdapterPlan | None = None
    calibration: CalibrationPlan | None = None
    ignore: tuple[str, ...] = ()
    storage: StoragePlan = Field(default_factory=StoragePlan)
    hub_endpoint_url: str | None = Field(default=None, alias="hubEndpointURL")
