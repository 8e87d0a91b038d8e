"""FineTuneJob: bounded work that turns a model and a data set into a tuned model."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from tunesmith_api import keys
from tunesmith_api.model import (
    NO_PASSWORD_IN_URL,
    EndpointURL,
    NonNegative,
    SpecModel,
    StatusModel,
    Uri,
    WritableUri,
    cel,
)
from tunesmith_api.v1alpha1.common import (
    Image,
    NodeSelector,
    ObjectMeta,
    PodTemplate,
    Resources,
    SecretRef,
    Storage,
    Tolerations,
    name_rule,
    unseen,
)
from tunesmith_api.v1alpha1.dataset import Dataset
from tunesmith_api.v1alpha1.jobstatus import FineTuneJobStatus
from tunesmith_api.v1alpha1.method import Method
from tunesmith_api.v1alpha1.task import Classification, Generation, MaskedLanguageModel, Preference, Task, Translation
from tunesmith_api.v1alpha1.training import Parallelism, Precision, Training

__all__ = [
    "Budget",
    "Checkpoint",
    "FailurePolicy",
    "FineTuneJob",
    "FineTuneJobSpec",
    "Gpu",
    "HuggingFace",
    "Init",
    "MlflowTracking",
    "Model",
    "Output",
    "SaveMode",
    "Tracking",
    "Workers",
]

IMMUTABLE_AFTER_START = (
    "task",
    "model",
    "dataset",
    "method",
    "training",
    "parallelism",
    "classification",
    "preference",
    "maskedLM",
    "translation",
    "generation",
    "workers",
    "checkpoint",
    "output",
    "storage",
)


READ_AT_START = (
    "huggingFace",
    "tracking",
    "failurePolicy.maxRestarts",
    "failurePolicy.maxRollbacks",
    "failurePolicy.lossSpikeFactor",
    "failurePolicy.collectiveTimeoutSeconds",
)
"""Fields that pods have read by then, without any bearing on the result. The rest of the spec is followed at any time."""

ABSENT_UNLESS_GIVEN = ("classification", "preference", "maskedLM", "translation")


class Init(StrEnum):
    """Where the weights come from."""

    PRETRAINED = "Pretrained"
    RANDOM = "Random"


class Model(SpecModel):
    """The model to start from."""

    uri: Uri = Field(
        description="Folder with config.json, tokenizer files and safetensors weights: s3://bucket/key, pvc://claim/path, or hf://owner/name of a Hub model."
    )
    revision: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        default=None, description="Commit, tag or branch of a Hub model; name a commit for a run that can be repeated."
    )
    init: Init = Field(
        default=Init.PRETRAINED,
        description="Random takes only architecture and tokenizer from `uri` and draws the weights from training.seed: pre-training from scratch.",
    )


class Gpu(SpecModel):
    """Which accelerator a pod asks for."""

    resource_name: Annotated[str, Field(min_length=1, max_length=253)] = Field(
        default="nvidia.com/gpu",
        description="Extended resource that counts GPUs on your nodes, for example nvidia.com/gpu, amd.com/gpu or nvidia.com/mig-1g.10gb.",
    )


class Workers(SpecModel):
    """The pods that train. Each is one Ray node, and holds one training process or several."""

    replicas: int = Field(default=1, ge=1, le=1024, description="Number of worker pods.")
    gpus_per_worker: int = Field(
        default=0, ge=0, le=16, description="GPUs of each worker, with a training process for each; 0 trains on CPU."
    )
    processes_per_worker: int | None = Field(
        default=None,
        ge=1,
        le=16,
        description="Training processes of each worker, which share its CPUs and memory. Left out, one for each GPU, or one on CPU.",
    )
    gpu: Gpu = Field(default_factory=Gpu, description="Which kind of GPU.")
    resources: Resources = Field(
        default_factory=Resources, description="CPU and memory of each worker, for all of its processes together."
    )
    node_selector: NodeSelector = Field(default_factory=dict, description="Labels that a worker's node must have.")
    tolerations: Tolerations = Field(default_factory=list, description="Taints that workers may run beside.")
    priority_class_name: Annotated[str, Field(max_length=253)] | None = Field(
        default=None, description="PriorityClass of the worker pods."
    )
    pod_template: PodTemplate = Field(
        default_factory=PodTemplate, description="Labels, annotations and registry credentials of the worker pods."
    )
    image: Image | None = Field(
        default=None, description="Trainer image; leave it out for the one that the operator was installed with."
    )

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    "!has(self.processesPerWorker) || self.gpusPerWorker in [0, self.processesPerWorker]",
                    "each GPU has a training process: leave processesPerWorker out, or set it to gpusPerWorker",
                ),
            ]
        },
    )

    @property
    def processes(self) -> int:
        """Training processes of each worker."""
        return self.gpus_per_worker or self.processes_per_worker or 1


class Checkpoint(SpecModel):
    """Where and how often progress is saved. A job always resumes from its newest complete checkpoint."""

    uri: WritableUri = Field(
        description="Folder for the checkpoints of this job, s3://bucket/key or pvc://claim/path. It must be this job's own."
    )
    every_steps: int = Field(default=100, ge=1, le=10_000_000, description="Save every so many optimizer steps.")
    keep_last: int = Field(default=3, ge=1, le=1000, description="How many complete checkpoints are kept.")
    keep_best: bool = Field(
        default=True,
        description="Keep the checkpoint of the best evaluation too, by training.metricForBestModel. Evaluations in mid-training need training.evalSteps.",
    )


class SaveMode(StrEnum):
    """What is saved of a model with adapters."""

    MERGED = "Merged"
    ADAPTER = "Adapter"
    BOTH = "Both"


class Output(SpecModel):
    """Where the tuned model goes."""

    uri: WritableUri = Field(
        description="Folder for the tuned model (safetensors, tokenizer, model card) and its report.html: s3://bucket/key or pvc://claim/path."
    )
    overwrite: bool = Field(
        default=False,
        description="Replace the model of another run, or other files, that lie in this folder. Without it they are named and the job ends before training.",
    )
    save: SaveMode = Field(
        default=SaveMode.MERGED,
        description="With adapters: Merged is one model that any tool loads, merged in full precision; Adapter is the small PEFT adapter; Both puts the adapter into the subfolder `adapter`.",
    )
    dtype: Precision = Field(
        default=Precision.AUTO,
        description="Number format of the model's weights. Auto is the base's own, or FP32 where rounding to it would take more than a twentieth of what training changed. An adapter alone is always FP32.",
    )


class HuggingFace(SpecModel):
    """How to reach the Hugging Face Hub behind every `hf://` URI of this object."""

    endpoint_url: EndpointURL | None = Field(
        default=None, alias="endpointURL", description="A mirror of the Hub; leave it out for the Hub itself."
    )
    secret_ref: SecretRef | None = Field(
        default=None, description="Secret with the key HF_TOKEN, for private or gated repositories."
    )


class MlflowTracking(SpecModel):
    """An MLflow server."""

    tracking_uri: Annotated[
        str,
        Field(
            min_length=1,
            max_length=253,
            pattern=r"^(https?|file)://",
            json_schema_extra={"x-kubernetes-validations": [NO_PASSWORD_IN_URL]},
        ),
    ] = Field(
        alias="trackingURI", description="Address of the tracking server, for example http://mlflow.mlops.svc:5000."
    )
    experiment_name: Annotated[str, Field(min_length=1, max_length=128)] = Field(
        default="tunesmith", description="Experiment that the run belongs to; made where there is none."
    )
    secret_ref: SecretRef | None = Field(
        default=None,
        description="Secret with MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.",
    )


class Tracking(SpecModel):
    """Where the run's numbers are recorded besides status, checkpoints and report."""

    tensor_board: bool = Field(
        default=False, description="Write TensorBoard event files into the folder `tensorboard` beside the model."
    )
    mlflow: MlflowTracking | None = Field(default=None, description="Record the run on an MLflow server.")


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
    max_rollbacks: int = Field(
        default=3,
        ge=0,
        le=100,
        description="How often training goes back to the last good checkpoint after a loss spike or a loss that isn't finite, and skips the batches that led there.",
    )
    loss_spike_factor: NonNegative = Field(
        default=4.0,
        description="A loss of this many times the recent median is a spike; 0 watches for losses that aren't finite only.",
    )
    collective_timeout_seconds: int = Field(
        default=600,
        ge=10,
        le=86_400,
        description="How long workers wait for one of them in a collective operation before the group is restarted and that worker named.",
    )
    startup_timeout_seconds: int = Field(
        default=600,
        ge=5,
        le=604_800,
        description="How long a scheduled pod may fail to start (image, Secret, configuration) before the job is stopped.",
    )


class Budget(SpecModel):
    """How much a job may use before it is ended."""

    max_gpu_seconds: int | None = Field(
        default=None,
        ge=1,
        le=10_000_000_000,
        description="GPU-seconds, over all workers and restarts (status.gpuSeconds), after which the workers save a checkpoint and the job ends with reason BudgetExceeded. Leave it out for no limit.",
    )


_PROCESSES = (
    "(self.workers.gpusPerWorker > 0 ? self.workers.gpusPerWorker : "
    "has(self.workers.processesPerWorker) ? self.workers.processesPerWorker : 1)"
)
"""`Workers.processes` in CEL."""


class FineTuneJobSpec(SpecModel):
    """What to train, on what, how, and where it goes."""

    task: Task = Field(
        default=Task.CHAT_SFT,
        description="ChatSFT: conversations, loss on the assistant's tokens only (with images where the model sees). CausalLM: plain text. MaskedLM: BERT-style pre-training. SequenceClassification, TokenClassification, ImageClassification: classes. Seq2Seq: text to text. DPO: preferred answers. Reward: a score for answers.",
    )
    model: Model = Field(description="The model to start from.")
    dataset: Dataset = Field(description="What the model learns from.")
    method: Method = Field(default_factory=Method, description="Which weights are trained, and how.")
    training: Training = Field(default_factory=Training, description="The optimization.")
    parallelism: Parallelism = Field(default_factory=Parallelism, description="How a model is spread over the workers.")
    classification: Classification | None = Field(default=None, description="Settings of the classification tasks.")
    preference: Preference | None = Field(default=None, description="Settings of DPO.")
    masked_lm: MaskedLanguageModel | None = Field(default=None, alias="maskedLM", description="Settings of MaskedLM.")
    translation: Translation | None = Field(
        default=None, description="Languages of a Seq2Seq model that translates between many."
    )
    generation: Generation = Field(
        default_factory=Generation, description="How answers are generated where an evaluation reads them."
    )
    workers: Workers = Field(default_factory=Workers, description="The pods that train.")
    checkpoint: Checkpoint = Field(description="Where and how often progress is saved.")
    output: Output = Field(description="Where the tuned model goes.")
    storage: Storage = Field(default_factory=Storage, description="The object store behind the s3:// URIs.")
    hugging_face: HuggingFace = Field(
        default_factory=HuggingFace, description="The Hugging Face Hub behind the hf:// URIs."
    )
    tracking: Tracking = Field(default_factory=Tracking, description="Where the run's numbers are recorded too.")
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
    pre_running_deadline_seconds: int | None = Field(
        default=None,
        ge=1,
        le=31_536_000,
        description="Longest time that a worker's pod may wait for a node, or for room in a quota; the job then fails with what it waited for, and frees the nodes of the other workers. Leave it out to wait without limit.",
    )
    ttl_seconds_after_finished: int | None = Field(
        default=None,
        ge=0,
        le=31_536_000,
        description="Delete this object so long after it has ended; leave it out to keep it. What Git or another controller has will be created again, and start again: childrenTTLSecondsAfterFinished is for those.",
    )
    children_ttl_seconds_after_finished: int | None = Field(
        default=None,
        alias="childrenTTLSecondsAfterFinished",
        ge=0,
        le=31_536_000,
        description="Delete the Job with its pods and their logs, and the plan, so long after the end; this object stays, with its status. Leave it out to keep them as long as this object.",
    )
    budget: Budget = Field(default_factory=Budget, description="How much the job may use before it is ended.")

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    f"self.training.globalBatchSize * self.parallelism.tensorParallel >= self.workers.replicas * {_PROCESSES}",
                    "training.globalBatchSize must be at least workers.replicas times the training processes of each, divided by parallelism.tensorParallel: every process needs an example",
                ),
                cel(
                    f"self.workers.replicas * {_PROCESSES} % self.parallelism.tensorParallel == 0",
                    "parallelism.tensorParallel must divide workers.replicas times the training processes of each",
                ),
                cel(
                    f"{_PROCESSES} % self.parallelism.tensorParallel == 0 || self.parallelism.tensorParallel % {_PROCESSES} == 0",
                    "parallelism.tensorParallel must divide the training processes of a worker, or be a multiple of them: those that share layers lie side by side, in as few workers as can be",
                ),
                cel(
                    f"self.parallelism.strategy != 'HSDP' || ({_PROCESSES} > 1 && self.parallelism.tensorParallel == 1)",
                    "parallelism.strategy HSDP shares a model out over the training processes of a worker: give it several, and leave tensorParallel at 1 (it goes with FSDP)",
                ),
                cel(
                    "!has(self.classification) || self.task in ['SequenceClassification', 'TokenClassification', 'ImageClassification']",
                    "classification belongs to the classification tasks: remove it or set task",
                ),
                cel(
                    "!has(self.classification) || self.task == 'SequenceClassification' || self.classification.problemType == 'SingleLabel'",
                    "classification.problemType MultiLabel and Regression belong to task SequenceClassification",
                ),
                cel(
                    "!has(self.preference) || self.task == 'DPO'",
                    "preference belongs to task DPO: remove it or set task: DPO",
                ),
                cel(
                    "!has(self.maskedLM) || self.task == 'MaskedLM'",
                    "maskedLM belongs to task MaskedLM: remove it or set task: MaskedLM",
                ),
                cel(
                    "!has(self.translation) || self.task == 'Seq2Seq'",
                    "translation belongs to task Seq2Seq: remove it or set task: Seq2Seq",
                ),
                cel(
                    "self.model.init != 'Random' || self.task in ['CausalLM', 'MaskedLM']",
                    "model.init Random is pre-training: it needs task CausalLM or MaskedLM",
                ),
                cel(
                    "self.model.init != 'Random' || self.method.type == 'Full'",
                    "model.init Random trains all weights: set method.type: Full",
                ),
                cel(
                    "!has(self.method.distillation) || !(self.task in ['DPO', 'Reward'])",
                    "method.distillation needs a task with classes or tokens to predict: remove it for DPO and Reward",
                ),
                cel(
                    "!self.dataset.streaming || has(self.training.maxSteps)",
                    "dataset.streaming doesn't know how long the data is: set training.maxSteps",
                ),
                cel(
                    "!has(self.training.earlyStopping) || has(self.training.evalSteps)",
                    "training.earlyStopping looks at evaluations: set training.evalSteps",
                ),
                cel(
                    "!has(self.training.evalSteps) || has(self.dataset.eval) || has(self.dataset.splitPercent)",
                    "training.evalSteps needs held-out data: set dataset.eval or dataset.splitPercent",
                ),
                cel(
                    "!has(self.budget.maxGpuSeconds) || self.workers.gpusPerWorker > 0",
                    "budget.maxGpuSeconds counts GPUs, and this job asks for none: set workers.gpusPerWorker, or activeDeadlineSeconds instead",
                ),
                cel(
                    "!has(self.childrenTTLSecondsAfterFinished) || !has(self.ttlSecondsAfterFinished) || self.childrenTTLSecondsAfterFinished <= self.ttlSecondsAfterFinished",
                    "childrenTTLSecondsAfterFinished must not be longer than ttlSecondsAfterFinished, which deletes the children, too",
                ),
                cel(
                    f"!has(self.workers.podTemplate.labels) || !('{keys.LABEL_QUEUE}' in self.workers.podTemplate.labels)",
                    f"the label {keys.LABEL_QUEUE} belongs to the FineTuneJob itself (metadata.labels): on pods, each would be queued by itself",
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


def _unchanged(field: str) -> str:
    now, before = f"self.spec.{field}", f"oldSelf.spec.{field}"
    if field not in ABSENT_UNLESS_GIVEN:
        return f"{now} == {before}"
    # to read an absent field is an error in CEL, and an error refuses every write, the operator's status too
    return f"has({now}) == has({before}) && (!has({now}) || {now} == {before})"


def _immutable_rules() -> list[dict[str, Any]]:
    remedies = dict.fromkeys(
        IMMUTABLE_AFTER_START,
        "create a new FineTuneJob (and point model.uri at this one's output to go on from it)",
    ) | dict.fromkeys(
        READ_AT_START, "delete it and create it again with the same checkpoint.uri, and it goes on from its checkpoint"
    )
    return [
        cel(
            f"!has(oldSelf.status) || !has(oldSelf.status.startTime) || ({_unchanged(field)})",
            f"spec.{field} can't change once the job has started: {remedy}",
        )
        for field, remedy in remedies.items()
    ]


class FineTuneJob(StatusModel):
    """A fine-tuning run: a model, a data set and a method in; a tuned model out."""

    api_version: str = keys.API_VERSION
    kind: str = keys.FINETUNEJOB_KIND
    metadata: ObjectMeta
    spec: FineTuneJobSpec = Field(description="What to train.")
    status: FineTuneJobStatus = Field(
        default_factory=FineTuneJobStatus,
        description="What the operator has observed.",
        json_schema_extra=unseen(keys.JobCondition.SUCCEEDED),
    )

    model_config = ConfigDict(
        json_schema_extra={"x-kubernetes-validations": [name_rule(keys.FINETUNEJOB_KIND), *_immutable_rules()]},
    )
