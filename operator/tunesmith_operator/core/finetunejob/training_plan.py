"""Spec → TrainingPlan: every default resolved, every number a number."""

from __future__ import annotations

from tunesmith_api.plan import OptimizationPlan, TrainingPlan
from tunesmith_api.v1alpha1 import FineTuneJob
from tunesmith_api.v1alpha1.task import Classification, MaskedLanguageModel, Preference
from tunesmith_api.v1alpha1.training import Training
from tunesmith_operator.core.finetunejob.observed import child_name, service_name
from tunesmith_operator.core.pods.spec import storage_plan
from tunesmith_operator.core.text import cores

__all__ = ["training_plan"]


def _optimization(training: Training) -> OptimizationPlan:
    """The same fields under the same names."""
    return OptimizationPlan.model_validate({name: getattr(training, name) for name in OptimizationPlan.model_fields})


def training_plan(job: FineTuneJob, attempt: int) -> TrainingPlan:
    """Everything that the pods of one attempt need to know."""
    spec, meta, failure = job.spec, job.metadata, job.spec.failure_policy
    return TrainingPlan(
        name=meta.name,
        namespace=meta.namespace,
        uid=meta.uid,
        attempt=attempt,
        task=spec.task,
        model_uri=spec.model.uri.rstrip("/"),
        model_revision=spec.model.revision,
        model_init=spec.model.init,
        dataset=spec.dataset,
        method=spec.method,
        classification=spec.classification or Classification(),
        preference=spec.preference or Preference(),
        masked_lm=spec.masked_lm or MaskedLanguageModel(),
        translation=spec.translation,
        generation=spec.generation,
        training=_optimization(spec.training),
        strategy=spec.parallelism.strategy,
        tensor_parallel=spec.parallelism.tensor_parallel,
        replicas=spec.workers.replicas,
        gpus_per_worker=spec.workers.gpus_per_worker,
        processes_per_worker=spec.workers.processes,
        cpus_per_worker=cores(spec.workers.resources.cpu),
        max_restarts=failure.max_restarts,
        max_rollbacks=failure.max_rollbacks,
        loss_spike_factor=failure.loss_spike_factor,
        collective_timeout_seconds=failure.collective_timeout_seconds,
        head_host=f"{child_name(job, attempt)}-0.{service_name(job)}",
        checkpoint_uri=spec.checkpoint.uri.rstrip("/"),
        checkpoint_every_steps=spec.checkpoint.every_steps,
        checkpoint_keep_last=spec.checkpoint.keep_last,
        checkpoint_keep_best=spec.checkpoint.keep_best,
        output_uri=spec.output.uri.rstrip("/"),
        output_overwrite=spec.output.overwrite,
        save=spec.output.save,
        output_dtype=spec.output.dtype,
        tracking=spec.tracking,
        storage=storage_plan(spec.storage),
        hub_endpoint_url=spec.hugging_face.endpoint_url,
    )
