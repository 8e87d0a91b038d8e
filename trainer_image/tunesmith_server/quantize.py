"""`python3 -m tunesmith_server.quantize`: the container of a revision's quantize Job.

Reads the ServingPlan, makes the artefact unless it exists already, and reports in its termination message.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path

from tunesmith_api import keys
from tunesmith_api.artifacts import ModelManifest, files_digest
from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.plan import ServingPlan
from tunesmith_api.reports import ModelRef, Outcome, TerminationReport
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_server.artifact import MODEL_FILE, fetch_artifact, find_artifact, find_manifest, publish_artifact
from tunesmith_server.convert import to_gguf
from tunesmith_server.environment import cpu_threads, read_plan, scratch_folder, write_report
from tunesmith_server.evaluation.compare import compare
from tunesmith_store.errors import Failure, UserError
from tunesmith_store.files import entries_below, fetch_model
from tunesmith_store.store import ObjectStore, S3Store

__all__ = ["main", "quantize"]

log = logging.getLogger("tunesmith.quantize")


def quantize(plan: ServingPlan, store: ObjectStore, scratch: Path) -> ModelManifest:
    """Make the artefact of a plan, or find it made; return its manifest.

    Raises:
        Failure: sorted by what helps; see `tunesmith_store.errors`.
    """
    started = time.monotonic()
    source = find_manifest(store, plan.model_uri)
    if source and plan.model_digest and source.digest != plan.model_digest:
        message = (
            f"the model at {plan.model_uri} has changed since revision {plan.revision} was made: "
            f"its digest is {source.digest[:12]}, not {plan.model_digest[:12]}"
        )
        raise UserError(Reason.MODEL_INVALID, message)
    if source and (done := find_artifact(store, plan, source.digest)):
        log.info("%s is made already", plan.artifact_uri)
        return done
    log.info("downloading %s", plan.model_uri)
    folder = fetch_model(store, plan.model_uri, scratch / "model")
    base_digest = source.digest if source else files_digest(entries_below(folder))
    if done := find_artifact(store, plan, base_digest):
        log.info("%s is made already", plan.artifact_uri)
        return done
    downloaded = time.monotonic()
    log.info("converting to %s", plan.quantization)
    output = scratch / "artifact"
    to_gguf(folder, output / MODEL_FILE, plan.quantization)
    shutil.rmtree(folder, ignore_errors=True)
    converted = time.monotonic()
    log.info("uploading %d MB to %s", (output / MODEL_FILE).stat().st_size // 1_000_000, plan.artifact_uri)
    metrics = {"downloadSeconds": round(downloaded - started, 2), "convertSeconds": round(converted - downloaded, 2)}
    return publish_artifact(store, plan, output, base_digest, metrics)


def file_of(plan: ServingPlan, store: ObjectStore, scratch: Path, method: QuantizationMethod) -> Path:
    """Bring the artefact, or the unquantized model that it is compared with, to this machine."""
    if method is plan.quantization:
        return fetch_artifact(store, plan, scratch / "artifact")
    output = scratch / "unquantized" / MODEL_FILE
    to_gguf(fetch_model(store, plan.model_uri, scratch / "model"), output, method)
    return output


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
        store, scratch = S3Store(plan.storage), scratch_folder(os.environ)
        manifest = quantize(plan, store, scratch)
        bring = partial(file_of, plan, store, scratch)
        evaluation = compare(plan, store, plan.artifact_uri, manifest, bring, scratch, cpu_threads(os.environ))
    except Failure as failure:
        report = TerminationReport(outcome=Outcome.FAILED, reason=failure.reason, message=failure.message)
        return report, failure.exit_code
    except Exception as error:
        log.exception("unexpected failure")
        message = f"unexpected {type(error).__name__}: {error}"
        report = TerminationReport(outcome=Outcome.FAILED, reason=Reason.QUANTIZATION_FAILED, message=message)
        return report, ExitCode.CRASHED
    model = ModelRef(uri=plan.artifact_uri, digest=manifest.digest, size_bytes=manifest.size_bytes)
    return (
        TerminationReport(
            outcome=Outcome.SUCCEEDED,
            reason=Reason.QUANTIZED,
            message=f"{keys.MODEL_MANIFEST} written to {plan.artifact_uri}",
            model=model,
            evaluation=evaluation,
            metrics=manifest.metrics,
        ),
        ExitCode.SUCCESS,
    )


if __name__ == "__main__":
    raise SystemExit(main())
