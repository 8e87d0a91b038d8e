"""The model that a ModelDeployment serves, whatever it comes from.

It knows a FineTuneJob by its API type alone: the two kinds' modules don't know each other.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith_api.keys import JobCondition, Reason
from tunesmith_api.plan import EvaluationPlan
from tunesmith_api.v1alpha1 import ConditionStatus, FineTuneJob, Storage
from tunesmith_api.v1alpha1.finetunejob import SaveMode
from tunesmith_api.v1alpha1.task import Task
from tunesmith_operator.core.modeldeployment.heldout import held_out_of
from tunesmith_operator.core.status.conditions import find, holds

__all__ = ["Source", "SourceAbsent", "SourceModel", "of_finetunejob"]


@dataclass(frozen=True, slots=True)
class SourceModel:
    """A model that can be served. `digest` is empty where it isn't known."""

    uri: str
    digest: str
    storage: Storage
    held_out: EvaluationPlan | None = None


@dataclass(frozen=True, slots=True)
class SourceAbsent:
    """There is no model yet, and why."""

    reason: Reason
    message: str


Source = SourceModel | SourceAbsent

_TEXT_TASKS = frozenset({Task.CHAT_SFT, Task.CAUSAL_LM, Task.DPO})
"""Tasks whose models go on with a text, which is what the servers do."""


def of_finetunejob(name: str, namespace: str, job: FineTuneJob | None, storage: Storage | None) -> Source:
    """The result of a FineTuneJob, once it has succeeded. `storage` overrides the job's own."""
    if job is None:
        return SourceAbsent(
            Reason.SOURCE_NOT_FOUND,
            f"There is no FineTuneJob {name} in namespace {namespace}: create it, or correct "
            "spec.source.fineTuneJobRef.name.",
        )
    if (obstacle := _obstacle(name, job)) is not None:
        return SourceAbsent(Reason.MODEL_INVALID, obstacle)
    if not holds(job.status.conditions, JobCondition.SUCCEEDED) or job.status.model is None:
        summary = find(job.status.conditions, JobCondition.SUCCEEDED)
        if summary is not None and summary.status == ConditionStatus.FALSE:
            message = f"FineTuneJob {name} has failed ({summary.reason}): see kubectl describe ftj {name}."
        else:
            message = f"FineTuneJob {name} hasn't succeeded yet: its model is served as soon as it has."
        return SourceAbsent(Reason.SOURCE_NOT_READY, message)
    model = job.status.model
    return SourceModel(model.uri, model.digest, storage or job.spec.storage, held_out_of(job))


def _obstacle(name: str, job: FineTuneJob) -> str | None:
    """What keeps the job's model from ever being served, known from its spec alone."""
    spec = job.spec
    if spec.task not in _TEXT_TASKS:
        return (
            f"FineTuneJob {name} trains for task {spec.task}, whose models the engine LlamaCpp can't serve; it serves "
            f"those of {', '.join(sorted(_TEXT_TASKS))}. Name another job in spec.source.fineTuneJobRef, and load this "
            f"one's model from {spec.output.uri} with transformers."
        )
    if spec.method.has_adapters and spec.output.save is SaveMode.ADAPTER:
        return (
            f"FineTuneJob {name} saves the adapter alone (output.save: Adapter), which is no model to serve. Train "
            "with output.save: Merged or Both, or merge it (peft: merge_and_unload) and name the result's folder in "
            "spec.source.uri."
        )
    if not spec.output.uri.startswith("s3://"):
        return (
            f"FineTuneJob {name} saves its model in {spec.output.uri}, and servers read s3:// only. Train with an "
            "s3:// output.uri, or copy that folder to one and name it in spec.source.uri."
        )
    return None
