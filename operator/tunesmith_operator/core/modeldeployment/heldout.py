"""The held-out rows that a revision is evaluated on: those that the spec names, else those of the FineTuneJob.

`source` and `template` ask for them. Only API types are known here.
"""

from __future__ import annotations

from typing import Protocol

from tunesmith_api.plan import EvaluationPlan
from tunesmith_api.v1alpha1 import FineTuneJob, ModelDeployment
from tunesmith_api.v1alpha1.dataset import DataFormat
from tunesmith_api.v1alpha1.engine import ENGINE_METHODS, EngineType
from tunesmith_api.v1alpha1.task import ProblemType, Task
from tunesmith_operator.core.modeldeployment.engines import engine_for, method_for
from tunesmith_operator.core.reconcile.rules import Violation

__all__ = ["Evaluated", "cannot_be_evaluated", "evaluation_plan", "held_out_of"]


class Evaluated(Protocol):
    """What is asked of a source."""

    @property
    def task(self) -> Task | None:
        """What the model was trained for, where that is known."""

    @property
    def held_out(self) -> EvaluationPlan | None:
        """The rows that its FineTuneJob holds out."""


_COMPARED = frozenset({Task.CHAT_SFT, Task.CAUSAL_LM, Task.DPO, Task.SEQUENCE_CLASSIFICATION})
_OTHER_FORMATS = (".csv", ".tsv", ".parquet", ".txt")


def held_out_of(job: FineTuneJob) -> EvaluationPlan | None:
    """The rows that the job holds out, where they are of a kind that the quantize Job can read."""
    rows, columns = job.spec.dataset.eval, job.spec.dataset.columns
    if rows is None or not _is_compared(job) or rows.format not in (DataFormat.AUTO, DataFormat.JSONL):
        return None
    fields: dict[str, str | None] = {"messages_field": columns.messages}
    if job.spec.task is Task.SEQUENCE_CLASSIFICATION:
        pair = columns.text_pair
        fields |= {"text_field": columns.text, "text_pair_field": pair, "label_field": columns.label}
    if rows.inline is not None:
        return EvaluationPlan(inline=rows.inline, **fields)
    if rows.uri is None or not rows.uri.startswith("s3://") or rows.uri.lower().endswith(_OTHER_FORMATS):
        return None
    return EvaluationPlan(uri=rows.uri, **fields)


def _is_compared(job: FineTuneJob) -> bool:
    if job.spec.task is Task.SEQUENCE_CLASSIFICATION:
        classes = job.spec.classification
        return classes is None or classes.problem_type is ProblemType.SINGLE_LABEL
    return job.spec.task is Task.CHAT_SFT


def evaluation_plan(deployment: ModelDeployment, held_out: EvaluationPlan | None) -> EvaluationPlan | None:
    """What the quantize Job compares by; None where neither an evaluation nor a gate is asked for.

    The limits of the gate are no part of it: they are judged by what was found out.
    """
    spec, asked = deployment.spec, deployment.spec.evaluation
    if asked is None:
        return (held_out or EvaluationPlan()) if spec.gate is not None else None
    rows = EvaluationPlan(uri=asked.dataset) if asked.dataset is not None else held_out or EvaluationPlan()
    return rows.model_copy(update={"max_examples": asked.max_examples, "seed": asked.seed})


def cannot_be_evaluated(deployment: ModelDeployment, source: Evaluated) -> Violation | None:
    """What is asked for takes rows that can't be read, or an engine that can't be asked."""
    spec = deployment.spec
    if spec.evaluation is None and spec.gate is None:
        return None
    fallback = spec.gate.fallback_method if spec.gate is not None else None
    for method in (spec.quantization.method, fallback or spec.quantization.method):
        engine = engine_for(spec.engine.type, method, source.task)
        if engine is EngineType.VLLM:
            return Violation(
                "spec.evaluation and spec.gate compare a quantized model with the unquantized one, which alone the "
                "engine VLLM serves: leave them out"
            )
        if method_for(method, engine) not in ENGINE_METHODS[engine]:
            return Violation(
                f"spec.evaluation and spec.gate compare models as served, and the engine {engine} doesn't serve this "
                f"one as {method}: name another method"
            )
    if source.task is not None and source.task not in _COMPARED:
        return Violation(
            "spec.evaluation and spec.gate compare language models and classifiers of texts, and the model is for "
            f"task {source.task}: leave them out"
        )
    return _rows_missing(deployment, source.held_out)


def _rows_missing(deployment: ModelDeployment, held_out: EvaluationPlan | None) -> Violation | None:
    spec = deployment.spec
    dataset = spec.evaluation.dataset if spec.evaluation is not None else None
    if dataset is not None:
        if not dataset.lower().endswith(_OTHER_FORMATS):
            return None
        return Violation(
            f"spec.evaluation.dataset {dataset} is no JSON Lines: convert it to chat rows, or texts with "
            "classes, in a .jsonl file"
        )
    needed = spec.evaluation is not None or (spec.gate is not None and spec.gate.needs_rows)
    if held_out is not None or not needed:
        return None
    what = "evaluation" if spec.evaluation is not None else "gate"
    return Violation(
        f"spec.{what} takes held-out rows, and the FineTuneJob has no dataset.eval of chat rows, or of texts "
        "with one class each, as JSON Lines in s3:// or inline: name some in spec.evaluation.dataset"
    )
