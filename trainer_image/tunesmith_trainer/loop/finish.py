"""The end of a run: the tuned model with its report and model card, published. Called by `run`.

Sharded weights are gathered by all ranks together; the rest is rank 0's work, and the others wait for it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tunesmith_api.reports import CheckpointRef, DatasetFacts, ModelRef
from tunesmith_api.v1alpha1.finetunejob import SaveMode
from tunesmith_api.v1alpha1.task import Task as TaskName
from tunesmith_trainer import methods
from tunesmith_trainer.checkpoint import RunState
from tunesmith_trainer.data import DataStatistics
from tunesmith_trainer.loop.assembly import Assembly
from tunesmith_trainer.loop.context import RunContext
from tunesmith_trainer.loop.evaluation import Evaluation
from tunesmith_trainer.loop.export import Export, describe, publish, write_model
from tunesmith_trainer.loop.inputs import Inputs
from tunesmith_trainer.loop.tracking import Tracker
from tunesmith_trainer.models.loading import stored_dtype
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

__all__ = ["FinishedRun", "finish"]

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
    """Of the weights that are saved."""
    answers: Sequence[str]
    """What they answer to the report's prompts; on the ranks that were asked."""
    saved_step: int
    """The optimizer steps behind them."""
    checkpoint: CheckpointRef | None
    """The newest complete one."""


def finish(run: FinishedRun, tracker: Tracker, log: Callable[[str], None]) -> ModelRef:
    """Export on rank 0 while the others wait; all return the same model."""
    context = run.context
    gathered = run.parts.wrapped.gathered(_gathered_format(run))

    def work() -> ModelRef:
        assert gathered is not None
        record = _record(run, gathered, log)
        folder = context.pod.scratch / "export"
        _write(run, gathered, folder)
        export = Export(context.plan, context.run_digest, run.inputs.base, record)
        describe(folder, export)
        tensorboard = context.pod.scratch / "tensorboard"
        tracker.finish(run.metrics, folder / "report.html")
        if tensorboard.is_dir():
            shutil.copytree(tensorboard, folder / "tensorboard", dirs_exist_ok=True)
        model = publish(context.store, folder, export)
        log(f"model saved to {model.uri} ({model.size_bytes / 1e6:.0f} MB), with report.html beside it")
        return model

    return context.group.on_first(work)


def _gathered_format(run: FinishedRun) -> torch.dtype | None:
    """Return the number format to put a model together in that ranks share: at once that of the files, if possible.

    Adapters, fake quantization and masks are worked in at full precision first, and classifiers have to explain
    themselves.
    """
    plan = run.context.plan
    is_worked_in = plan.method.has_adapters or plan.method.qat is not None or plan.method.pruning is not None
    return None if is_worked_in or plan.task is TaskName.SEQUENCE_CLASSIFICATION else stored_dtype(run.inputs.base)


def _write(run: FinishedRun, model: nn.Module, folder: Path) -> None:
    """Write the adapter, the whole model, or both, as `spec.output.save` has it."""
    plan, base = run.context.plan, run.inputs.base
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if plan.method.has_adapters and plan.save is not SaveMode.MERGED:
        target = folder if plan.save is SaveMode.ADAPTER else folder / "adapter"
        methods.save_adapter(model, target, plan)
        if plan.save is SaveMode.ADAPTER:
            run.inputs.task.processor.save_pretrained(folder)
            return
    write_model(
        methods.finished_model(model, plan, base, run.inputs.task),
        run.inputs.task.processor,
        folder,
        stored_dtype(base),
    )


def _record(run: FinishedRun, model: nn.Module, log: Callable[[str], None]) -> RunRecord:
    """Put together what the report shows."""
    plan, state, facts = run.context.plan, run.state, run.parts.size
    record = RunRecord.of(
        plan,
        run_digest=run.context.run_digest,
        metrics=run.metrics,
        history=state.history,
        evaluations=state.evaluations,
    )
    confusion = _confusion(run)
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
            "pipeline_tag": run.inputs.task.pipeline_tag,
            "higher_is_better": tuple(sorted(run.inputs.task.higher_is_better)),
            "data": Data.of(_statistics(run), confusion.labels if confusion else ()),
            "confusion": confusion,
            "worst": _worst(run, model, log),
            "samples": samples(run.inputs.task, run.inputs.sample_rows, run.state.samples_before, run.answers),
            "incidents": tuple(
                Incident(step=int(event["step"]), kind=_kind(event), message=str(event["text"]))
                for event in state.events
            ),
            "environment": environment,
            "checkpoints": (Checkpoint(step=newest.step, uri=newest.uri, best=newest.step == state.best_step),)
            if newest
            else (),
            "model": SavedModel(uri=plan.output_uri, step=run.saved_step),
        }
    )


def _statistics(run: FinishedRun) -> DataStatistics:
    facts = run.dataset
    left_out = {"bad_rows": facts.bad_rows, "first_bad_row": facts.first_bad_row}
    return run.inputs.data.statistics.model_copy(update=left_out)


def _kind(event: Mapping[str, int | str]) -> IncidentKind:
    """What an event of the run's state is; before it had a kind there were only rollbacks."""
    return IncidentKind(str(event.get("kind", IncidentKind.ROLLBACK)))


def _confusion(run: FinishedRun) -> Confusion | None:
    if run.evaluation is None:
        return None
    found = run.inputs.task.confusion_of(run.evaluation.assessment)
    if found is None:
        return None
    labels, counts = found
    return Confusion(labels=tuple(labels), counts=tuple(map(tuple, counts)))


def _worst(run: FinishedRun, model: nn.Module, log: Callable[[str], None]) -> tuple[WorstExample, ...]:
    """The held-out examples with the highest loss; for text classifiers with what each token said."""
    held_out = run.inputs.data.eval
    if run.evaluation is None or held_out is None:
        return ()
    found: list[WorstExample] = []
    for outcome in run.evaluation.assessment.outcomes:
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
    return explained(model, run.inputs.task.processor, found, log=log)
