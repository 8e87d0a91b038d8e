"""FineTuneJob: bounded work that turns a model and a data set into a tuned model."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

from tunesmith_api import keys
from tunesmith_api.model import DecimalString, S3Uri, SpecModel, StatusModel, cel
from tunesmith_api.v1alpha1.common import (
    Condition,
    Image,
    NodeSelector,
    ObjectMeta,
    Resources,
    Storage,
    Tolerations,
    name_rule,
)

__all__ = ["FineTuneJob", "FineTuneJobSpec", "FineTuneJobStatus", "JobPhase", "LrSchedulerType", "MethodType", "Task"]

IMMUTABLE_AFTER_START = ("task", "model", "dataset", "method", "training", "workers", "checkpoint", "output", "storage")


class Task(StrEnum):
    """What the model learns to do."""

    CHAT_SFT = "ChatSFT"


class MethodType(StrEnum):
    """Which weights are trained."""

    FULL = "Full"
    LORA = "LoRA"


class LrSchedulerType(StrEnum):
    """How the learning rate moves after warm-up, by its Hugging Face name."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


class Precision(StrEnum):
    """Number format of the forward and backward pass."""

    AUTO = "Auto"
    BF16 = "BF16"
    FP32 = "FP32"


class Model(SpecModel):
    """The model to start from."""

    uri: S3Uri = Field(
        description="Folder with config.json, tokenizer files and safetensors weights, for example s3://models/smollm2-135m-instruct."
    )


class DatasetFile(SpecModel):
    """One file of examples."""

    uri: S3Uri = Field(description="A JSON Lines file, one example on each line.")


class Columns(SpecModel):
    """Which field of a row holds what."""

    messages: Annotated[str, Field(min_length=1, max_length=128)] = Field(
        default="messages", description="ChatSFT: field with the list of {role, content} messages."
    )


class Dataset(SpecModel):
    """What the model learns from."""

    train: DatasetFile = Field(description="Examples to train on.")
    eval: DatasetFile | None = Field(
        default=None,
        description="Held-out examples: evaluated before the first step, every `training.evalSteps` and at the end.",
    )
    columns: Columns = Field(default_factory=Columns, description="Names of the fields in a row.")


class LoraConfig(SpecModel):
    """Low-rank adapters, with PEFT's names."""

    r: int = Field(default=16, ge=1, le=1024, description="Rank of the adapter matrices.")
    alpha: int = Field(
        default=32, ge=1, le=4096, description="Scale of the adapters: they are multiplied by alpha / r."
    )
    dropout: DecimalString = Field(
        default="0",
        description="Dropout before the adapters, from 0 to below 1.",
        json_schema_extra={"x-kubernetes-validations": [cel("double(self) < 1.0", "dropout must be below 1")]},
    )
    target_modules: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=128)]],
        Field(
            min_length=1, max_length=32, json_schema_extra={"x-kubernetes-list-type": "set", "default": ["all-linear"]}
        ),
    ] = Field(
        default_factory=lambda: ["all-linear"],
        description="Names of the layers that get an adapter; `all-linear` means every linear layer but the output head.",
    )


class Method(SpecModel):
    """How the weights are trained."""

    type: MethodType = Field(
        default=MethodType.LORA,
        description="LoRA trains small adapters and merges them at the end; Full trains all weights.",
    )
    lora: LoraConfig | None = Field(
        default=None,
        description="Settings of method LoRA; leave it out for PEFT's usual ones (r 16, alpha 32, all linear layers).",
    )

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        frozen=True,
        extra="forbid",
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    "!has(self.lora) || self.type == 'LoRA'",
                    "method.lora belongs to method.type LoRA: remove it or set type: LoRA",
                )
            ]
        },
    )


class Training(SpecModel):
    """The optimization, with the names of Hugging Face TrainingArguments."""

    num_train_epochs: int = Field(
        default=1, ge=1, le=1000, description="Passes over the training data; ignored where maxSteps is given."
    )
    max_steps: int | None = Field(
        default=None,
        ge=1,
        le=100_000_000,
        description="Optimizer steps in all; leave it out to derive them from numTrainEpochs.",
    )
    learning_rate: DecimalString = Field(
        default="2e-4",
        description="Peak learning rate, for example 2e-4 (LoRA) or 2e-5 (Full).",
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    "double(self) > 0.0 && double(self) < 1.0",
                    "learningRate must lie between 0 and 1, for example 2e-4",
                )
            ]
        },
    )
    lr_scheduler_type: LrSchedulerType = Field(
        default=LrSchedulerType.COSINE, description="How the learning rate falls after warm-up."
    )
    warmup_ratio: DecimalString = Field(
        default="0.03",
        description="Part of all steps over which the learning rate rises from 0 to its peak.",
        json_schema_extra={
            "x-kubernetes-validations": [cel("double(self) <= 1.0", "warmupRatio is a part of all steps: at most 1")]
        },
    )
    weight_decay: DecimalString = Field(
        default="0", description="AdamW weight decay; biases and norms are left out of it."
    )
    adam_beta1: DecimalString = Field(
        default="0.9",
        description="AdamW's first beta.",
        json_schema_extra={"x-kubernetes-validations": [cel("double(self) < 1.0", "adamBeta1 must be below 1")]},
    )
    adam_beta2: DecimalString = Field(
        default="0.999",
        description="AdamW's second beta.",
        json_schema_extra={"x-kubernetes-validations": [cel("double(self) < 1.0", "adamBeta2 must be below 1")]},
    )
    adam_epsilon: DecimalString = Field(default="1e-8", description="AdamW's epsilon.")
    max_grad_norm: DecimalString = Field(
        default="1.0", description="Gradients are scaled down to this norm; 0 leaves them alone."
    )
    global_batch_size: int = Field(
        default=32,
        ge=1,
        le=1_000_000,
        description="Examples per optimizer step over all workers. The result does not depend on how many workers share it.",
    )
    micro_batch_size: int = Field(
        default=8,
        ge=1,
        le=65_536,
        description="Examples that one worker computes at once; the rest of its share is accumulated.",
    )
    max_length: int = Field(
        default=1024, ge=8, le=1_048_576, description="Tokens per example; longer ones are cut at the end."
    )
    precision: Precision = Field(
        default=Precision.AUTO, description="Auto is BF16 where the hardware has it, else FP32."
    )
    eval_steps: int | None = Field(
        default=None,
        ge=1,
        description="Evaluate every so many steps; leave it out to evaluate at the start and the end only.",
    )
    logging_steps: int = Field(default=1, ge=1, le=1_000_000, description="Record the loss every so many steps.")
    seed: int = Field(default=42, ge=0, le=2_147_483_647, description="Seed of data order, adapters and dropout.")


class Gpu(SpecModel):
    """Which accelerator a worker asks for."""

    resource_name: Annotated[str, Field(min_length=1, max_length=253)] = Field(
        default="nvidia.com/gpu",
        description="Extended resource that counts GPUs on your nodes, for example nvidia.com/gpu, amd.com/gpu or nvidia.com/mig-1g.10gb.",
    )


class Workers(SpecModel):
    """The pods that train. Each is one Ray node and one training process."""

    replicas: int = Field(default=1, ge=1, le=1024, description="Number of worker pods.")
    gpus_per_worker: int = Field(default=0, ge=0, le=1, description="GPUs of each worker: 1, or 0 to train on CPU.")
    gpu: Gpu = Field(default_factory=Gpu, description="Which kind of GPU.")
    resources: Resources = Field(default_factory=Resources, description="CPU and memory of each worker.")
    node_selector: NodeSelector = Field(default_factory=dict, description="Labels that a worker's node must have.")
    tolerations: Tolerations = Field(default_factory=list, description="Taints that workers may run beside.")
    priority_class_name: Annotated[str, Field(max_length=253)] | None = Field(
        default=None, description="PriorityClass of the worker pods."
    )
    image: Image | None = Field(
        default=None, description="Trainer image; leave it out for the one that the operator was installed with."
    )


class Checkpoint(SpecModel):
    """Where and how often progress is saved. A job always resumes from its newest complete checkpoint."""

    uri: S3Uri = Field(description="Folder for the checkpoints of this job. It must be this job's own.")
    every_steps: int = Field(default=100, ge=1, le=10_000_000, description="Save every so many optimizer steps.")
    keep_last: int = Field(default=3, ge=1, le=1000, description="How many complete checkpoints are kept.")


class Output(SpecModel):
    """Where the tuned model goes."""

    uri: S3Uri = Field(description="Folder for the tuned model: safetensors, tokenizer, chat template and model card.")


class FailurePolicy(SpecModel):
    """How much is tried before the job is called failed."""

    backoff_limit: int = Field(
        default=3,
        ge=0,
        le=100,
        description="Crashes of worker pods that are retried, over all workers together; evictions and preemptions don't count.",
    )
    max_restarts: int = Field(
        default=10,
        ge=0,
        le=1000,
        description="Restarts of the training group after a lost or crashed process inside living pods.",
    )
    startup_timeout_seconds: int = Field(
        default=600,
        ge=5,
        le=604_800,
        description="How long a scheduled pod may fail to start (image, Secret, configuration) before the job is stopped.",
    )


class FineTuneJobSpec(SpecModel):
    """What to train, on what, how, and where it goes."""

    task: Task = Field(
        default=Task.CHAT_SFT,
        description="ChatSFT: supervised fine-tuning on conversations, loss on the assistant's tokens only.",
    )
    model: Model = Field(description="The model to start from.")
    dataset: Dataset = Field(description="What the model learns from.")
    method: Method = Field(default_factory=Method, description="Which weights are trained, and how.")
    training: Training = Field(default_factory=Training, description="The optimization.")
    workers: Workers = Field(default_factory=Workers, description="The pods that train.")
    checkpoint: Checkpoint = Field(description="Where and how often progress is saved.")
    output: Output = Field(description="Where the tuned model goes.")
    storage: Storage = Field(default_factory=Storage, description="The object store behind the s3:// URIs.")
    failure_policy: FailurePolicy = Field(
        default_factory=FailurePolicy, description="How much is tried before giving up."
    )
    suspend: bool = Field(
        default=False,
        description="True stops the workers after a checkpoint and frees their nodes; false goes on from there.",
    )
    active_deadline_seconds: int | None = Field(
        default=None, ge=1, le=31_536_000, description="Longest time that the job may be active; it fails after that."
    )
    ttl_seconds_after_finished: int | None = Field(
        default=None,
        ge=0,
        le=31_536_000,
        description="Delete this object so long after it has ended; leave it out to keep it.",
    )

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        frozen=True,
        extra="forbid",
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    "self.training.globalBatchSize >= self.workers.replicas",
                    "training.globalBatchSize must be at least workers.replicas: every worker needs an example",
                ),
                cel(
                    "self.checkpoint.uri != self.output.uri", "checkpoint.uri and output.uri must be different folders"
                ),
                cel(
                    "self.output.uri != self.model.uri",
                    "output.uri must not be model.uri: the model to start from would be overwritten",
                ),
            ]
        },
    )


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
    last_heartbeat_time: str | None = Field(
        default=None,
        description="When the trainer last reported, as of this status.",
        json_schema_extra={"format": "date-time"},
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


class Attempt(StatusModel):
    """One child Job."""

    number: int = Field(ge=1, description="1 for the first.")
    job_name: str = Field(description="Name of the child Job.")
    outcome: Literal["Running", "Succeeded", "Failed", "Suspended"] = Field(
        default="Running", description="How it stands."
    )
    reason: str = Field(default="", description="Stable reason of the outcome.")
    end_step: int | None = Field(default=None, ge=0, description="Optimizer steps done when it ended.")
    start_time: str | None = Field(
        default=None, description="When the child Job started.", json_schema_extra={"format": "date-time"}
    )
    completion_time: str | None = Field(
        default=None, description="When it ended.", json_schema_extra={"format": "date-time"}
    )


class FineTuneJobStatus(StatusModel):
    """What the operator has observed."""

    observed_generation: int = Field(
        default=0, ge=0, description="The metadata.generation whose children were all applied."
    )
    phase: JobPhase = Field(default=JobPhase.PENDING, description="Printed summary; conditions are authoritative.")
    conditions: Annotated[
        list[Condition],
        Field(
            max_length=16, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
        ),
    ] = Field(
        default_factory=list, description="Accepted, ChildrenApplied, WorkersReady, CheckpointAvailable, Succeeded."
    )
    progress: Progress | None = Field(default=None, description="How far training is.")
    display: JobDisplay = Field(default_factory=JobDisplay, description="Text for kubectl get.")
    workers: WorkerCounts = Field(default_factory=WorkerCounts, description="The worker pods.")
    restarts: int = Field(default=0, ge=0, description="Times that training was resumed after a loss, in all attempts.")
    attempts: Annotated[
        list[Attempt],
        Field(
            max_length=20, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["number"]}
        ),
    ] = Field(default_factory=list, description="The child Jobs so far, oldest first.")
    checkpoint: CheckpointStatus | None = Field(default=None, description="The newest complete checkpoint.")
    model: ModelStatus | None = Field(default=None, description="The tuned model, once there is one.")
    metrics: Annotated[dict[str, str], Field(max_length=64)] = Field(
        default_factory=dict, description="Final metrics by name, for example evalLoss and evalLossBefore."
    )
    start_time: str | None = Field(
        default=None,
        description="When the first attempt started; from then on the spec's training fields are immutable.",
        json_schema_extra={"format": "date-time"},
    )
    completion_time: str | None = Field(
        default=None, description="When the job ended.", json_schema_extra={"format": "date-time"}
    )


def _immutable_rules() -> list[dict[str, Any]]:
    return [
        cel(
            f"!has(oldSelf.status) || !has(oldSelf.status.startTime) || self.spec.{field} == oldSelf.spec.{field}",
            f"spec.{field} can't change once the job has started: create a new FineTuneJob (and point model.uri at this one's output to go on from it)",
        )
        for field in IMMUTABLE_AFTER_START
    ]


class FineTuneJob(StatusModel):
    """A fine-tuning run: a model, a data set and a method in; a tuned model out."""

    api_version: str = keys.API_VERSION
    kind: str = keys.FINETUNEJOB_KIND
    metadata: ObjectMeta
    spec: FineTuneJobSpec = Field(description="What to train.")
    status: FineTuneJobStatus = Field(default_factory=FineTuneJobStatus, description="What the operator has observed.")

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        frozen=True,
        extra="ignore",
        json_schema_extra={"x-kubernetes-validations": [name_rule(keys.FINETUNEJOB_KIND), *_immutable_rules()]},
    )
