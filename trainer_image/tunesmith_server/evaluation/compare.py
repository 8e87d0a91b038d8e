"""The comparison of a plan's artefact with its unquantized model: found, or made and kept. Called by `quantize`.

Beside the artefact stands a folder for each set of rows, `evaluation-<digest>/`, with the figures and a page. It is
named by all that decides the figures but the machine, so what is there needs no second evaluation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ValidationError

from tunesmith_api.artifacts import ModelManifest
from tunesmith_api.keys import Reason
from tunesmith_api.model import digest_of
from tunesmith_api.plan import EvaluationPlan, ServingPlan
from tunesmith_api.v1alpha1.gate import Evaluation
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_server.evaluation.figures import Candidate, figures_of
from tunesmith_server.evaluation.interview import Answers, Task
from tunesmith_server.evaluation.page import page_of
from tunesmith_server.evaluation.rows import Row, draw, read_rows
from tunesmith_server.process import run_module
from tunesmith_store.errors import UserError
from tunesmith_store.store import NotFound, ObjectStore

__all__ = ["FIGURES_FILE", "REPORT_FILE", "compare"]

log = logging.getLogger("tunesmith.quantize")

FIGURES_FILE = "evaluation.json"
REPORT_FILE = "quantization-report.html"
WAY = 1
"""Counts up when the same models and rows begin to give other figures on purpose."""


def compare(
    plan: ServingPlan,
    store: ObjectStore,
    uri: str,
    manifest: ModelManifest,
    file_of: Callable[[QuantizationMethod], Path],
    scratch: Path,
    threads: int,
) -> Evaluation | None:
    """Return the figures of the artefact at `uri`; None where the plan asks for none.

    `file_of` brings the file of a method to this machine; it is asked only where the figures must be made.

    Raises:
        Failure: sorted by what helps; see `tunesmith_store.errors`.
    """
    if plan.evaluation is None:
        return None
    everything, digest = read_rows(store, plan.evaluation)
    folder = f"{uri.rstrip('/')}/evaluation-{_name(plan, manifest, digest)}"
    if known := _known(store, folder):
        log.info("%s is evaluated already", uri)
        return known
    rows = draw(everything, plan.evaluation)
    candidates = _candidates(plan, rows, file_of, scratch, threads)
    found = figures_of(rows, *candidates, digest).model_copy(update={"report_uri": f"{folder}/{REPORT_FILE}"})
    if rows and not found.examples:
        message = f"none of {len(rows)} rows fits into engine.contextLength {plan.context_length}: raise it"
        raise UserError(Reason.DATASET_INVALID, message)
    page = page_of(plan, found, rows, *candidates)
    store.put_bytes(f"{folder}/{REPORT_FILE}", page.encode())
    store.put_bytes(f"{folder}/{FIGURES_FILE}", _json(found))
    return found


def _name(plan: ServingPlan, manifest: ModelManifest, digest: str) -> str:
    asked = plan.evaluation or EvaluationPlan()
    how = [asked.max_examples, asked.seed, asked.messages_field, plan.context_length, plan.parallel_requests, WAY]
    how += [field for field in (asked.text_field, asked.text_pair_field, asked.label_field) if field is not None]
    return digest_of([manifest.digest, digest, *how])[:16]


def _known(store: ObjectStore, folder: str) -> Evaluation | None:
    try:
        return Evaluation.model_validate_json(store.get_bytes(f"{folder}/{FIGURES_FILE}"))
    except (NotFound, ValidationError):
        return None


def _json(document: BaseModel) -> bytes:
    return document.model_dump_json(by_alias=True, exclude_none=True).encode()


def _candidates(
    plan: ServingPlan,
    rows: list[Row],
    file_of: Callable[[QuantizationMethod], Path],
    scratch: Path,
    threads: int,
) -> tuple[Candidate, Candidate]:
    """Ask the unquantized and the quantized model, one after the other; one that is both is asked once."""
    found: dict[QuantizationMethod, Candidate] = {}
    for method in (QuantizationMethod.NONE, plan.quantization):
        if method not in found:
            model = file_of(method)
            log.info("asking %s about %d rows", method, len(rows))
            answers = _answers(plan, model, rows, scratch / f"answers-{method.value}.json", threads)
            found[method] = Candidate(answers, _size(model))
    return found[QuantizationMethod.NONE], found[plan.quantization]


def _answers(plan: ServingPlan, model: Path, rows: list[Row], output: Path, threads: int) -> Answers:
    run_module(
        "tunesmith_server.evaluation.answers",
        [str(model), str(threads), str(output)],
        Task(plan=plan, rows=tuple(rows)).to_json(),
        output,
        out_of_memory="comparing it with the unquantized model ran out of memory: raise spec.resources.memory above "
        "the size of the unquantized model, or leave out spec.evaluation and spec.gate",
    )
    return Answers.from_json(output.read_text())


def _size(model: Path) -> int:
    """Bytes of a file, or of a folder's files."""
    return sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) or model.stat().st_size
