"""Where each of `spec.adapters` comes from: a folder, or what a FineTuneJob leaves. Used by `observed`, `adapters`.

It knows a FineTuneJob by its API type alone, as `source` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith_api.keys import JobCondition, Reason
from tunesmith_api.v1alpha1 import FineTuneJob
from tunesmith_api.v1alpha1.adapters import Adapter
from tunesmith_api.v1alpha1.finetunejob import SaveMode
from tunesmith_api.v1alpha1.method import MethodType
from tunesmith_operator.core.modeldeployment.source import SourceAbsent
from tunesmith_operator.core.status.conditions import holds

__all__ = ["AdapterSource", "job_names", "source_of"]


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """An adapter that is there. `digest` is empty where it isn't known."""

    uri: str
    digest: str = ""


def source_of(
    adapter: Adapter, namespace: str, job: Callable[[str], FineTuneJob | None]
) -> AdapterSource | SourceAbsent:
    """The adapter of an entry, or why there is none."""
    reference = adapter.fine_tune_job_ref
    if reference is None:
        return AdapterSource((adapter.uri or "").rstrip("/"), adapter.digest or "")
    name, found = reference.name, job(reference.name)
    if found is None:
        message = f"there is no FineTuneJob {name} in namespace {namespace}: create it, or correct fineTuneJobRef.name"
        return SourceAbsent(Reason.SOURCE_NOT_FOUND, message)
    if (obstacle := _obstacle(name, found)) is not None:
        return SourceAbsent(Reason.ADAPTER_INVALID, obstacle)
    model = found.status.model
    if model is None or (reference.digest is None and not holds(found.status.conditions, JobCondition.SUCCEEDED)):
        message = f"FineTuneJob {name} hasn't succeeded yet: its adapter is served as soon as it has"
        return SourceAbsent(Reason.SOURCE_NOT_READY, message)
    return AdapterSource(model.uri.rstrip("/"), reference.digest or model.digest)


def _obstacle(name: str, job: FineTuneJob) -> str | None:
    """What keeps the job from ever leaving an adapter that can be served, known from its spec alone."""
    method = job.spec.method
    if not method.has_adapters:
        return f"FineTuneJob {name} trains by method {method.type}, which leaves no adapter: name it in spec.source"
    if method.type is MethodType.DORA:
        return (
            f"FineTuneJob {name} trains a DoRA adapter, which engines can't apply to a model that they serve: train "
            "with method.type LoRA or QLoRA, or serve its merged model as spec.source"
        )
    if job.spec.output.save is SaveMode.MERGED:
        return (
            f"FineTuneJob {name} saves the merged model alone (output.save: Merged): train with output.save: Adapter "
            "or Both"
        )
    return None


def job_names(spec: Mapping[str, Any]) -> Iterable[str]:
    """Names of the FineTuneJobs that a spec's adapters come from, as it was written."""
    entries = spec.get("adapters")
    for entry in entries if isinstance(entries, list) else ():
        reference = entry.get("fineTuneJobRef") if isinstance(entry, Mapping) else None
        name = reference.get("name") if isinstance(reference, Mapping) else None
        if isinstance(name, str) and name:
            yield name
