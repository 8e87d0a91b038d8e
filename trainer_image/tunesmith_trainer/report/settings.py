"""A plan's settings as flat text: for the report's table and for MLflow's parameters.

Names are those of the FineTuneJob's spec, so that what a report says can be copied into the next manifest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.method import Method
from tunesmith_api.v1alpha1.task import Task

__all__ = ["method_name", "settings_of"]

CLASSIFIERS = {Task.SEQUENCE_CLASSIFICATION, Task.TOKEN_CLASSIFICATION, Task.IMAGE_CLASSIFICATION}


def settings_of(plan: TrainingPlan) -> dict[str, str]:
    """Return spec field (`training.learningRate`) → value as text, in the order of the spec; absent values left out."""
    document: dict[str, object] = {
        "task": plan.task.value,
        "model": {"uri": plan.model_uri, "revision": plan.model_revision, "init": plan.model_init.value},
        "dataset": plan.dataset.model_dump(
            mode="json", by_alias=True, exclude_none=True, exclude={"train": {"inline"}, "eval": {"inline"}}
        ),
        "method": plan.method.model_dump(mode="json", by_alias=True, exclude_none=True),
        "training": plan.training.model_dump(
            mode="json",
            by_alias=True,
            exclude_none=True,
            exclude=None if plan.training.max_steps is None else {"num_train_epochs"},  # it decided nothing
        ),
        "parallelism": {"strategy": plan.strategy.value, "tensorParallel": plan.tensor_parallel},
    }
    if plan.task in CLASSIFIERS:
        document["classification"] = plan.classification.model_dump(mode="json", by_alias=True)
    if plan.task is Task.DPO:
        document["preference"] = plan.preference.model_dump(mode="json", by_alias=True)
    if plan.task is Task.MASKED_LM:
        document["maskedLM"] = plan.masked_lm.model_dump(mode="json", by_alias=True)
    if plan.translation is not None:
        document["translation"] = plan.translation.model_dump(mode="json", by_alias=True)
    document["generation"] = plan.generation.model_dump(mode="json", by_alias=True)
    document["workers"] = {
        "replicas": plan.replicas,
        "gpusPerWorker": plan.gpus_per_worker,
        "processesPerWorker": plan.processes_per_worker,
    }
    document["checkpoint"] = {"uri": plan.checkpoint_uri, "everySteps": plan.checkpoint_every_steps}
    document["output"] = {"uri": plan.output_uri, "save": plan.save.value, "dtype": plan.output_dtype.value}
    return dict(_flatten(document, ""))


def method_name(method: Method) -> str:
    """Return a short name of the method and its options, for example `Full with pruning`."""
    options = {
        "quantization-aware training": method.qat,
        "pruning": method.pruning,
        "distillation": method.distillation,
    }
    names = [name for name, option in options.items() if option is not None]
    return f"{method.type.value} with {' and '.join(names)}" if names else method.type.value


def _flatten(document: Mapping[str, object], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in document.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        elif value is not None and value != []:
            yield f"{prefix}{name}", _text(value)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
