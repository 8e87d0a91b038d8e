"""What the report shows of a run: put together once its model is published. Called by `finish` on rank 0."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from tunesmith_api.reports import CheckpointRef, DatasetFacts
from tunesmith_api.v1alpha1.task import Task as TaskName
from tunesmith_trainer.checkpoint import RunState
from tunesmith_trainer.data import DataStatistics
from tunesmith_trainer.loop.assembly import Assembly
from tunesmith_trainer.loop.context import RunContext
from tunesmith_trainer.loop.evaluation import Evaluation
from tunesmith_trainer.loop.inputs import Inputs
from tunesmith_trainer.loop.published import Format
from tunesmith_trainer.report.attribution import explained
from tunesmith_trainer.report.record import (
    Checkpoint,
    Confusion,
    Data,
    Environment,
    Incident,
    IncidentKind,
    RunRecord,
    SavedModel,
    WorstExample,
    installed_versions,
)
from tunesmith_trainer.report.samples import samples
from tunesmith_trainer.tasks.base import Task

__all__ = ["FinishedRun", "Shown", "record_of"]

SHOWN = 8
"""Worst examples in the report."""
TEXT = 400


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A rank's run once its last step is taken: what is left to publish."""

    context: RunContext
    inputs: Inputs
    parts: Assembly
    state: RunState
    dataset: DatasetFacts
    metrics: dict[str, float]
    evaluation: Evaluation | None
    """The last one of the trained weights."""
    saved_step: int
    """The optimizer steps behind the weights that are saved."""
    checkpoint: CheckpointRef | None
    """The newest complete one."""


@dataclass(frozen=True)
class Shown:
    """What the report tells of the published model, besides the run's own numbers."""

    evaluation: Evaluation | None
    answers: Sequence[str]
    """To the report's prompts; on the ranks that were asked."""
    model: Callable[[], nn.Module]
    """The model in one piece, on rank 0."""
    format: Format | None = None
    """Of its files; None for an adapter."""


def record_of(run: FinishedRun, metrics: Mapping[str, float], shown: Shown, log: Callable[[str], None]) -> RunRecord:
    """Put together what the report shows; on rank 0."""
    plan, state, facts = run.context.plan, run.state, run.parts.size
    record = RunRecord.of(
        plan,
        run_digest=run.context.run_digest,
        metrics=metrics,
        history=state.history,
        evaluations=state.evaluations,
    )
    task, chosen = run.inputs.task, shown.format
    confusion = _confusion(task, shown.evaluation)
    environment = Environment(
        versions=installed_versions(),
        device=str(run.parts.numerics.device),
        workers=run.context.group.world_size,
        precision=run.parts.numerics.name,
        strategy=facts.strategy,
        trained_parameters=facts.trained_parameters,
        total_parameters=facts.parameters,
        train_seconds=round(state.train_seconds, 1),
        wall_seconds=round(time.time() - state.began_unix, 1),
    )
    newest = run.checkpoint
    return record.model_copy(
        update={
            "pipeline_tag": task.pipeline_tag,
            "higher_is_better": tuple(sorted(task.higher_is_better)),
            "data": Data.of(_statistics(run), confusion.labels if confusion else ()),
            "confusion": confusion,
            "worst": _worst(run, shown, log),
            "samples": samples(task, run.inputs.sample_rows, state.samples_before, shown.answers),
            "incidents": tuple(
                Incident(step=int(event["step"]), kind=_kind(event), message=str(event["text"]))
                for event in state.events
            ),
            "environment": environment,
            "checkpoints": (Checkpoint(step=newest.step, uri=newest.uri, best=newest.step == state.best_step),)
            if newest
            else (),
            "model": SavedModel(
                uri=plan.output_uri,
                step=run.saved_step,
                dtype=chosen.name if chosen else "",
                rounding=chosen.rounding() if chosen else "",
                metrics=shown.evaluation.metrics if shown.evaluation and chosen else None,
            ),
        }
    )


def _statistics(run: FinishedRun) -> DataStatistics:
    facts = run.dataset
    left_out = {"bad_rows": facts.bad_rows, "first_bad_row": facts.first_bad_row}
    return run.inputs.data.statistics.model_copy(update=left_out)


def _kind(event: Mapping[str, int | str]) -> IncidentKind:
    """What an event of the run's state is; before it had a kind there were only rollbacks."""
    return IncidentKind(str(event.get("kind", IncidentKind.ROLLBACK)))


def _confusion(task: Task, evaluation: Evaluation | None) -> Confusion | None:
    found = task.confusion_of(evaluation.assessment) if evaluation else None
    if found is None:
        return None
    labels, counts = found
    return Confusion(labels=tuple(labels), counts=tuple(map(tuple, counts)))


def _worst(run: FinishedRun, shown: Shown, log: Callable[[str], None]) -> tuple[WorstExample, ...]:
    """The held-out examples with the highest loss; for text classifiers with what each token said."""
    held_out = run.inputs.data.eval
    if shown.evaluation is None or held_out is None:
        return ()
    found: list[WorstExample] = []
    for outcome in shown.evaluation.assessment.outcomes:
        # a classifier's guess has its probability behind it
        if outcome.expected == outcome.predicted.partition(" (")[0] or len(found) == SHOWN:
            continue
        text, *pair = [*run.inputs.task.texts_of(held_out.row(outcome.index)).values()] or [""]
        found.append(
            WorstExample(
                text=text[:TEXT],
                text_pair=pair[0][:TEXT] if pair else None,
                expected=outcome.expected,
                predicted=outcome.predicted,
                loss=outcome.loss,
            )
        )
    if run.context.plan.task is not TaskName.SEQUENCE_CLASSIFICATION:
        return tuple(found)
    return explained(shown.model(), run.inputs.task.processor, found, log=log)
