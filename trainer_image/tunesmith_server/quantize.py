"""`python3 -m tunesmith_server.quantize`: the container of a revision's quantize Job.

Reads the ServingPlan, makes the artefact unless it exists already, and reports in its termination message.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from pathlib import Path

from tunesmith_api import keys
from tunesmith_api.artifacts import ModelManifest
from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.plan import ServingPlan
from tunesmith_api.reports import ModelRef, Outcome, TerminationReport
from tunesmith_api.v1alpha1.gate import Evaluation
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_server.artifact import assign_artifact, assigned_artifact, find_artifact, folder_of
from tunesmith_server.builder import ArtifactBuilder
from tunesmith_server.environment import cpu_threads, read_plan, scratch_folder, write_report
from tunesmith_server.evaluation.compare import compare
from tunesmith_server.quantizers.conversion import DISK_FULL
from tunesmith_store.errors import Failure, UserError
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
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    report, code = _attempt()
    log.info("%s: %s", report.reason, report.message)
    write_report(report)
    return int(code)


def _attempt() -> tuple[TerminationReport, ExitCode]:
    try:
        plan = read_plan(os.environ)
        store, scratch = store_of(plan), scratch_folder(os.environ)
        builder = ArtifactBuilder(plan, store, scratch, cpu_threads(os.environ))
        manifest = quantize(plan, store, builder)
        evaluation = evaluate(plan, store, builder, manifest, scratch)
    except Failure as failure:
        report = TerminationReport(outcome=Outcome.FAILED, reason=failure.reason, message=failure.message)
        return report, failure.exit_code
    except Exception as error:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            report = TerminationReport(outcome=Outcome.FAILED, reason=Reason.DISK_FULL, message=DISK_FULL)
            return report, ExitCode.STORAGE_DENIED
        log.exception("unexpected failure")
        message = f"unexpected {type(error).__name__}: {error}"
        report = TerminationReport(outcome=Outcome.FAILED, reason=Reason.QUANTIZATION_FAILED, message=message)
        return report, ExitCode.CRASHED
    uri = folder_of(plan, manifest.quantization, manifest.base_state, manifest.variant)
    model = ModelRef(
        uri=uri,
        digest=manifest.digest,
        size_bytes=manifest.size_bytes,
        base_digest=manifest.base_digest,
        bits_per_weight=manifest.bits_per_weight,
        shape=manifest.shape,
    )
    return (
        TerminationReport(
            outcome=Outcome.SUCCEEDED,
            reason=Reason.QUANTIZED,
            message=f"{keys.MODEL_MANIFEST} written to {uri}",
            model=model,
            evaluation=evaluation,
            metrics=manifest.metrics,
        ),
        ExitCode.SUCCESS,
    )


if __name__ == "__main__":
    raise SystemExit(main())
