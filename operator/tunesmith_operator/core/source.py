"""The model that a ModelDeployment serves, whatever it comes from.

The engine's store makes it; so neither kind's modules know the other's.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith_api.keys import JobCondition, Reason
from tunesmith_api.v1alpha1 import ConditionStatus, FineTuneJob, Storage
from tunesmith_operator.core.conditions import find, holds

__all__ = ["Source", "SourceAbsent", "SourceModel", "of_finetunejob"]


@dataclass(frozen=True, slots=True)
class SourceModel:
    """A model that can be served. `digest` is empty where it isn't known."""

    uri: str
    digest: str
    storage: Storage


@dataclass(frozen=True, slots=True)
class SourceAbsent:
    """There is no model yet, and why."""

    reason: Reason
    message: str


Source = SourceModel | SourceAbsent


def of_finetunejob(name: str, namespace: str, job: FineTuneJob | None, storage: Storage | None) -> Source:
    """The result of a FineTuneJob, once it has succeeded. `storage` overrides the job's own."""
    if job is None:
        return SourceAbsent(
            Reason.SOURCE_NOT_FOUND,
            f"There is no FineTuneJob {name} in namespace {namespace}: create it, or correct "
            "spec.source.fineTuneJobRef.name.",
        )
    if not holds(job.status.conditions, JobCondition.SUCCEEDED) or job.status.model is None:
        summary = find(job.status.conditions, JobCondition.SUCCEEDED)
        if summary is not None and summary.status == ConditionStatus.FALSE:
            message = f"FineTuneJob {name} has failed ({summary.reason}): see kubectl describe ftj {name}."
        else:
            message = f"FineTuneJob {name} hasn't succeeded yet: its model is served as soon as it has."
        return SourceAbsent(Reason.SOURCE_NOT_READY, message)
    return SourceModel(job.status.model.uri, job.status.model.digest, storage or job.spec.storage)
