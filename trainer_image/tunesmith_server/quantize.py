"""`python3 -m tunesmith_server.quantize`: the container of a revision's quantize Job.

Reads the ServingPlan, makes the artefact unless it exists already, and reports in its termination message.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from tunesmith_api import keys
from tunesmith_api.artifacts import ModelManifest
from tunesmith_api.keys import Reason
from tunesmith_api.plan import ServingPlan
from tunesmith_api.reports import ModelRef, Outcome, TerminationReport
from tunesmith_api.v1alpha1.gate import Evaluation
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_server.artifact import assign_artifact, assigned_artifact, find_artifact, folder_of
from tunesmith_server.builder import ArtifactBuilder
from tunesmith_server.environment import cpu_threads, read_plan, scratch_folder
from tunesmith_server.evaluation.compare import compare
from tunesmith_server.jobs import run_job
from tunesmith_store.errors import UserError
from tunesmith_store.router import store_of
from tunesmith_store.store import ObjectStore

__all__ = ["evaluate", "main", "quantize"]

log = logging.getLogger("tunesmith.quantize")


def quantize(plan: ServingPlan, store: ObjectStore, builder: ArtifactBuilder) -> ModelManifest:
    """Make the artefact of a plan, or find it made; return its manifest.

    Raises:
        Failure: sorted by what helps; see `tunesmith_store.errors`.
    """
    reference = assigned_artifact(store, plan)
    if reference is not None and (done := find_artifact(store, reference.uri)) and done.digest == reference.digest:
        log.info("%s has its artefact at %s", plan.revision, reference.uri)
        return done
    artifact = builder.artifact(plan.quantization)
    if reference is not None and artifact.manifest.digest != reference.digest:
        message = (
            f"the artefact of {plan.revision} at {reference.uri} is gone, and the model at {plan.model_uri} has "
            "changed since: restore one of the two, or start a new revision"
        )
        raise UserError(Reason.MODEL_INVALID, message)
    assign_artifact(store, plan, artifact.uri, artifact.manifest)
    return artifact.manifest


def evaluate(
    plan: ServingPlan, store: ObjectStore, builder: ArtifactBuilder, manifest: ModelManifest, scratch: Path
) -> Evaluation | None:
    """Compare the artefact with the unquantized model; None where the plan doesn't ask for it.

    Raises:
        Failure: sorted by what helps; see `tunesmith_store.errors`.
    """

    def bring(method: QuantizationMethod) -> Path:
        if builder.state != manifest.base_state:
            message = (
                f"the model at {plan.model_uri} has changed since the artefact of {plan.revision} was made, so there "
                "is nothing to compare that with: restore the model, or start a new revision"
            )
            raise UserError(Reason.MODEL_INVALID, message)
        return builder.local(method, manifest.variant if method is plan.quantization else "")

    uri = folder_of(plan, manifest.quantization, manifest.base_state, manifest.variant)
    return compare(plan, store, uri, manifest, bring, scratch, cpu_threads(os.environ))


def main() -> int:
    """Quantize as the mounted plan says; return the exit code."""
    return run_job(_attempt, log)


def _attempt() -> TerminationReport:
    plan = read_plan(os.environ)
    store, scratch = store_of(plan), scratch_folder(os.environ)
    builder = ArtifactBuilder(plan, store, scratch, cpu_threads(os.environ))
    manifest = quantize(plan, store, builder)
    evaluation = evaluate(plan, store, builder, manifest, scratch)
    uri = folder_of(plan, manifest.quantization, manifest.base_state, manifest.variant)
    model = ModelRef(
        uri=uri,
        digest=manifest.digest,
        size_bytes=manifest.size_bytes,
        base_digest=manifest.base_digest,
        bits_per_weight=manifest.bits_per_weight,
        shape=manifest.shape,
    )
    return TerminationReport(
        outcome=Outcome.SUCCEEDED,
        reason=Reason.QUANTIZED,
        message=f"{keys.MODEL_MANIFEST} written to {uri}",
        model=model,
        evaluation=evaluation,
        metrics=manifest.metrics,
    )


if __name__ == "__main__":
    raise SystemExit(main())
