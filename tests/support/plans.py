"""Plans for tests of the trainer: small, complete, changed where a test cares."""

from __future__ import annotations

from typing import Any

from tunesmith_api.plan import OptimizationPlan, TrainingPlan
from tunesmith_api.v1alpha1.dataset import Dataset
from tunesmith_api.v1alpha1.method import Method

__all__ = ["dataset", "optimization", "training_plan"]


def optimization(**changes: Any) -> OptimizationPlan:
    """Eight examples a step, two at once, in full precision."""
    values = {
        "num_train_epochs": 1, "learning_rate": 1e-2, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "weight_decay": 0.01,
        "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "global_batch_size": 8, "micro_batch_size": 2,
        "max_length": 64, "precision": "FP32", "seed": 7,
    }  # fmt: skip
    return OptimizationPlan(**(values | changes))


def dataset(train: str = "s3://bucket/train.jsonl", held_out: str | None = None, **changes: Any) -> Dataset:
    """A data set of one or two files; other fields by their names in the spec."""
    values: dict[str, Any] = {"train": {"uri": train}, **changes}
    if held_out:
        values["eval"] = {"uri": held_out}
    return Dataset.model_validate(values)


def training_plan(base: str = "s3://bucket", **changes: Any) -> TrainingPlan:
    """A plan whose URIs lie below `base`. `method` and `training` may be given by name or as plain values."""
    method = changes.pop("method", "Full")
    if isinstance(method, str):
        method = {"type": method, **({"lora": {"r": 4, "alpha": 8}} if method != "Full" else {})}
    training = changes.pop("training", {})
    values = {
        "name": "job", "namespace": "ml", "uid": "u-1", "task": "ChatSFT", "model_uri": f"{base}/model",
        "dataset": dataset(f"{base}/train.jsonl", f"{base}/eval.jsonl"), "replicas": 1, "head_host": "10.77.0.1",
        "checkpoint_uri": f"{base}/checkpoints", "checkpoint_every_steps": 4, "checkpoint_keep_last": 2, "output_uri": f"{base}/tuned",
        "method": method if isinstance(method, Method) else Method.model_validate(method),
        "training": training if isinstance(training, OptimizationPlan) else optimization(**training),
    }  # fmt: skip
    return TrainingPlan(**(values | changes))
