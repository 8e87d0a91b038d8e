"""The optimization, with the names of Hugging Face TrainingArguments, and how it is spread over workers."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from tunesmith_api.model import NonNegative, SpecModel, cel

__all__ = ["EarlyStopping", "LrSchedulerType", "Optim", "Parallelism", "Precision", "Strategy", "Training"]


class LrSchedulerType(StrEnum):
    """How the learning rate moves after warm-up, by its Hugging Face name."""

    COSINE = "cosine"
    COSINE_WITH_RESTARTS = "cosine_with_restarts"
    LINEAR = "linear"
    CONSTANT = "constant"
    CONSTANT_WITH_WARMUP = "constant_with_warmup"
    WARMUP_STABLE_DECAY = "warmup_stable_decay"


class Optim(StrEnum):
    """The optimizer, by its Hugging Face name."""

    ADAMW_TORCH = "adamw_torch"
    ADAMW_8BIT = "adamw_8bit"
    SGD = "sgd"


class Precision(StrEnum):
    """Number format of the forward and backward pass."""

    AUTO = "Auto"
    BF16 = "BF16"
    FP16 = "FP16"
    FP32 = "FP32"


class Strategy(StrEnum):
    """How a model is spread over the training processes."""

    AUTO = "Auto"
    DDP = "DDP"
    FSDP = "FSDP"
    HSDP = "HSDP"

    @property
    def is_sharded(self) -> bool:
        """Whether processes share out weights, gradients and optimizer state."""
        return self in {Strategy.FSDP, Strategy.HSDP}


class EarlyStopping(SpecModel):
    """Stop once the held-out metric no longer improves."""

    patience: int = Field(
        default=3, ge=1, le=1000, description="Evaluations without improvement before training stops."
    )
    min_delta: NonNegative = Field(default=0.0, description="Smallest change that counts as an improvement.")


class Parallelism(SpecModel):
    """How a model is spread over the workers."""

    strategy: Strategy = Field(
        default=Strategy.AUTO,
        description="DDP: a copy of the model in each training process. FSDP: weights, gradients and optimizer state are shared out over all of them (FSDP2). HSDP: they are over those of a worker, and each worker has a copy. Auto takes DDP where the memory estimate says that a copy fits.",
    )
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Training processes that share each layer's matrices, by the model's own plan in transformers. A divisor of those of a worker keeps them within it.",
    )


def _below_one(name: str, default: float, description: str) -> Any:
    rule = cel("self < 1.0", f"{name} must be below 1")
    return Field(default=default, description=description, json_schema_extra={"x-kubernetes-validations": [rule]})


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
    learning_rate: NonNegative = Field(
        default=2e-4,
        description="Peak learning rate, for example 2e-4 (LoRA) or 2e-5 (Full).",
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    "self > 0.0 && self < 1.0",
                    "learningRate must lie between 0 and 1, for example 2e-4",
                )
            ]
        },
    )
    lr_scheduler_type: LrSchedulerType = Field(
        default=LrSchedulerType.COSINE, description="How the learning rate falls after warm-up."
    )
    num_cycles: int = Field(default=1, ge=1, le=1000, description="Cycles of cosine_with_restarts.")
    decay_ratio: NonNegative = Field(
        default=0.1,
        description="Part of all steps over which warmup_stable_decay falls to 0 at the end.",
        json_schema_extra={
            "x-kubernetes-validations": [cel("self <= 1.0", "decayRatio is a part of all steps: at most 1")]
        },
    )
    warmup_ratio: NonNegative = Field(
        default=0.03,
        description="Part of all steps over which the learning rate rises from 0 to its peak; constant has no warm-up.",
        json_schema_extra={
            "x-kubernetes-validations": [cel("self <= 1.0", "warmupRatio is a part of all steps: at most 1")]
        },
    )
    optim: Optim = Field(
        default=Optim.ADAMW_TORCH,
        description="adamw_torch (fused where the hardware has it), adamw_8bit (bitsandbytes: a quarter of the optimizer's memory), or sgd.",
    )
    weight_decay: NonNegative = Field(default=0.0, description="Weight decay; biases and norms are left out of it.")
    adam_beta1: NonNegative = _below_one("adamBeta1", 0.9, "AdamW's first beta; momentum of sgd.")
    adam_beta2: NonNegative = _below_one("adamBeta2", 0.999, "AdamW's second beta.")
    adam_epsilon: NonNegative = Field(default=1e-8, description="AdamW's epsilon.")
    max_grad_norm: NonNegative = Field(
        default=1.0, description="Gradients are scaled down to this norm; 0 leaves them alone."
    )
    label_smoothing_factor: NonNegative = _below_one(
        "labelSmoothingFactor", 0.0, "Part of the probability that is spread over all classes or tokens."
    )
    dropout: Annotated[NonNegative | None, Field()] = Field(
        default=None,
        description="Every dropout of the model is set to this; leave it out for the model's own.",
        json_schema_extra={"x-kubernetes-validations": [cel("self < 1.0", "dropout must be below 1")]},
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
        description="Examples of maxLength that one worker computes at once; the rest of its share is accumulated. It bounds memory and does not change the result.",
    )
    max_length: int = Field(
        default=1024,
        ge=8,
        le=1_048_576,
        description="Tokens per example; longer ones are cut at the end (CausalLM: cut into several).",
    )
    packing: bool = Field(
        default=True,
        description="Compute without padding where the model allows: examples are laid end to end and never see each other. The result is the same.",
    )
    group_by_length: bool = Field(
        default=True,
        description="Where there is padding, put examples of like length into a micro-batch. The result is the same.",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Compute activations again in the backward pass: less memory for about a third more time.",
    )
    precision: Precision = Field(
        default=Precision.AUTO, description="Auto is BF16 where the hardware has it, else FP32."
    )
    eval_steps: int | None = Field(
        default=None,
        ge=1,
        description="Evaluate every so many steps; leave it out to evaluate at the start and the end only.",
    )
    max_eval_samples: int | None = Field(
        default=None,
        ge=1,
        le=100_000_000,
        description="Evaluate at most so many held-out examples; leave it out for all.",
    )
    metric_for_best_model: Annotated[str, Field(min_length=1, max_length=64)] = Field(
        default="loss",
        description="Held-out metric that decides which checkpoint is best, for example loss, accuracy or f1.",
    )
    load_best_model_at_end: bool = Field(
        default=False, description="Save the model of the best evaluation instead of the last step's."
    )
    early_stopping: EarlyStopping | None = Field(
        default=None, description="Stop once metricForBestModel no longer improves. Needs evalSteps."
    )
    logging_steps: int = Field(default=1, ge=1, le=1_000_000, description="Record the loss every so many steps.")
    seed: int = Field(default=42, ge=0, le=2_147_483_647, description="Seed of data order, adapters and dropout.")
