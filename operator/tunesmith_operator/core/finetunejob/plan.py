"""Spec → TrainingPlan: every default resolved, every number a number."""

from __future__ import annotations

from tunesmith_api.plan import LoraPlan, OptimizationPlan, StoragePlan, TrainingPlan
from tunesmith_api.v1alpha1 import FineTuneJob, Storage
from tunesmith_api.v1alpha1.finetunejob import LoraConfig, MethodType, Training
from tunesmith_operator.core.finetunejob.observed import child_name, service_name
from tunesmith_operator.core.text import cores

__all__ = ["storage_plan", "training_plan"]


def storage_plan(storage: Storage) -> StoragePlan:
    """The part of the storage settings that isn't secret."""
    return StoragePlan(endpoint_url=storage.endpoint_url, region=storage.region)


def _optimization(training: Training) -> OptimizationPlan:
    return OptimizationPlan(
        num_train_epochs=training.num_train_epochs,
        max_steps=training.max_steps,
        learning_rate=float(training.learning_rate),
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_ratio=float(training.warmup_ratio),
        weight_decay=float(training.weight_decay),
        adam_beta1=float(training.adam_beta1),
        adam_beta2=float(training.adam_beta2),
        adam_epsilon=float(training.adam_epsilon),
        max_grad_norm=float(training.max_grad_norm),
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        max_length=training.max_length,
        precision=training.precision,
        eval_steps=training.eval_steps,
        logging_steps=training.logging_steps,
        seed=training.seed,
    )


def _lora(job: FineTuneJob) -> LoraPlan | None:
    if job.spec.method.type is not MethodType.LORA:
        return None
    lora = job.spec.method.lora or LoraConfig()
    return LoraPlan(r=lora.r, alpha=lora.alpha, dropout=float(lora.dropout), target_modules=tuple(lora.target_modules))


def training_plan(job: FineTuneJob, attempt: int) -> TrainingPlan:
    """Everything that the pods of one attempt need to know."""
    spec, meta = job.spec, job.metadata
    return TrainingPlan(
        name=meta.name,
        namespace=meta.namespace,
        uid=meta.uid,
        attempt=attempt,
        task=spec.task,
        model_uri=spec.model.uri.rstrip("/"),
        train_uri=spec.dataset.train.uri,
        eval_uri=spec.dataset.eval.uri if spec.dataset.eval is not None else None,
        messages_column=spec.dataset.columns.messages,
        method=spec.method.type,
        lora=_lora(job),
        training=_optimization(spec.training),
        replicas=spec.workers.replicas,
        gpus_per_worker=spec.workers.gpus_per_worker,
        cpus_per_worker=cores(spec.workers.resources.cpu),
        max_restarts=spec.failure_policy.max_restarts,
        head_host=f"{child_name(job, attempt)}-0.{service_name(job)}",
        checkpoint_uri=spec.checkpoint.uri.rstrip("/"),
        checkpoint_every_steps=spec.checkpoint.every_steps,
        checkpoint_keep_last=spec.checkpoint.keep_last,
        output_uri=spec.output.uri.rstrip("/"),
        storage=storage_plan(spec.storage),
    )
