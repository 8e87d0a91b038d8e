"""The model that a ModelDeployment serves, whatever it comes from.

It knows a FineTuneJob by its API type alone: the two kinds' modules don't know each other.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith_api.keys import JobCondition, Reason
from tunesmith_api.plan import CalibrationPlan, EvaluationPlan
from tunesmith_api.v1alpha1 import ConditionStatus, FineTuneJob, Storage
from tunesmith_api.v1alpha1.engine import ENGINE_METHODS, EngineType
from tunesmith_api.v1alpha1.finetunejob import SaveMode
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_api.v1alpha1.task import Task
from tunesmith_operator.core.modeldeployment.calibration import training_rows_of
from tunesmith_operator.core.modeldeployment.engines import engine_for, engines_of, servable
from tunesmith_operator.core.modeldeployment.heldout import held_out_of
from tunesmith_operator.core.status.conditions import find, holds

__all__ = ["Source", "SourceAbsent", "SourceModel", "Wanted", "of_finetunejob"]


@dataclass(frozen=True, slots=True)
class SourceModel:
    """A model that can be served. `digest` is empty where it isn't known, and so is `task`."""

    uri: str
    digest: str
    storage: Storage
    task: Task | None = None
    held_out: EvaluationPlan | None = None
    training: CalibrationPlan | None = None
    rehearsed: QuantizationMethod | None = None


@dataclass(frozen=True, slots=True)
class SourceAbsent:
    """There is no model yet, and why."""

    reason: Reason
    message: str


Source = SourceModel | SourceAbsent


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the spec says of engine and number format."""

    engine: EngineType = EngineType.AUTO
    method: QuantizationMethod = QuantizationMethod.AUTO


def of_finetunejob(
    name: str,
    namespace: str,
    job: FineTuneJob | None,
    storage: Storage | None,
    digest: str | None = None,
    wanted: Wanted | None = None,
) -> Source:
    """The result of a FineTuneJob, once it has succeeded; or the one of a digest, whatever the job does since.

    `storage` overrides the job's own. Whether a result of that digest is still there, the quantize Job sees.
    """
    if job is None:
        return SourceAbsent(
            Reason.SOURCE_NOT_FOUND,
            f"There is no FineTuneJob {name} in namespace {namespace}: create it, or correct "
            "spec.source.fineTuneJobRef.name.",
        )
    if (obstacle := _obstacle(name, job, wanted or Wanted())) is not None:
        return SourceAbsent(Reason.MODEL_INVALID, obstacle)
    model = job.status.model
    # one that is pinned is served whatever the job does since
    if model is None or (digest is None and not holds(job.status.conditions, JobCondition.SUCCEEDED)):
        summary = find(job.status.conditions, JobCondition.SUCCEEDED)
        if summary is not None and summary.status == ConditionStatus.FALSE:
            message = f"FineTuneJob {name} has failed ({summary.reason}): see kubectl describe ftj {name}."
        else:
            message = f"FineTuneJob {name} hasn't succeeded yet: its model is served as soon as it has."
        return SourceAbsent(Reason.SOURCE_NOT_READY, message)
    if model.reads_images:
        return SourceAbsent(
            Reason.MODEL_INVALID,
            f"FineTuneJob {name} has trained a model that reads images, which no engine serves: it would answer "
            f"without seeing them. Load it from {model.uri} with transformers, or name another job in "
            "spec.source.fineTuneJobRef.",
        )
    # of a result that is pinned and has been replaced since, this isn't known
    known = digest in (None, model.digest)
    return SourceModel(
        model.uri,
        digest or model.digest,
        storage or job.spec.storage,
        job.spec.task,
        held_out_of(job),
        training_rows_of(job),
        _method(model.rehearsed) if known else None,
    )


def _method(name: str | None) -> QuantizationMethod | None:
    return QuantizationMethod(name) if name in set(QuantizationMethod) else None


def _obstacle(name: str, job: FineTuneJob, wanted: Wanted) -> str | None:
    """What keeps the job's model from ever being served, known from its spec alone."""
    spec = job.spec
    if (misfit := _misfit(name, job, wanted)) is not None:
        return misfit
    if spec.method.has_adapters and spec.output.save is SaveMode.ADAPTER:
        return (
            f"FineTuneJob {name} saves the adapter alone (output.save: Adapter), which is no model to serve. Train "
            "with output.save: Merged or Both, or merge it (peft: merge_and_unload) and name the result's folder in "
            "spec.source.uri."
        )
    return None


def _misfit(name: str, job: FineTuneJob, wanted: Wanted) -> str | None:
    """Why the engine that is asked for can't serve the job's task, or not in that number format."""
    spec, serving = job.spec, engines_of(job.spec.task)
    trains = f"FineTuneJob {name} trains for task {spec.task}, whose models"
    if not serving:
        return (
            f"{trains} no engine can serve; served are those of {', '.join(sorted(servable()))}. Name another job in "
            f"spec.source.fineTuneJobRef, and load this one's model from {spec.output.uri} with transformers."
        )
    engine = engine_for(wanted.engine, wanted.method, spec.task)
    if engine not in serving:
        return f"{trains} the engine {engine} can't serve: set spec.engine.type: {serving[0]}, or leave it out."
    if wanted.method is not QuantizationMethod.AUTO and wanted.method not in ENGINE_METHODS[engine]:
        methods = ", ".join(ENGINE_METHODS[engine])
        return (
            f"{trains} are served by the engine {engine}, which can't read {wanted.method}: set "
            f"spec.quantization.method to one of {methods}, or leave it out."
        )
    return None
