"""The end of a run: the tuned model with its report and model card, published. Called by `run`.

Sharded weights are gathered by all ranks together; the rest is rank 0's work, and the others wait for it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from tunesmith_api.reports import ModelRef
from tunesmith_api.v1alpha1.finetunejob import SaveMode
from tunesmith_api.v1alpha1.task import Task as TaskName
from tunesmith_trainer import methods
from tunesmith_trainer.data import DataStatistics
from tunesmith_trainer.loop.export import Export, describe, publish, write_model
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
from tunesmith_trainer.report.samples import sample, samples
from tunesmith_trainer.tasks.base import Row

if TYPE_CHECKING:
    from tunesmith_trainer.loop.run import TrainingRun

__all__ = ["finish", "sample_before"]

SHOWN = 8
"""Worst examples in the report."""
TEXT = 400
SAMPLES = 3
SAMPLE_SECONDS = 20.0


def sample_before(run: TrainingRun) -> None:
    """Ask the model a few held-out questions before its first step; the report sets the answers beside those after."""
    run.state.samples_before = _answers(run)


def finish(run: TrainingRun, metrics: dict[str, float]) -> ModelRef:
    """Export on rank 0 while the others wait; all return the same model."""
    samples_after = _answers(run) if run.state.samples_before else []
    gathered = run.parts.wrapped.gathered(_gathered_format(run))

    def work() -> ModelRef:
        assert gathered is not None
        record = _record(run, gathered, metrics, samples_after)
        folder = run.pod.scratch / "export"
        _write(run, gathered, folder)
        export = Export(run.plan, run.run_digest, run.inputs.base, record)
        describe(folder, export)
        tensorboard = run.pod.scratch / "tensorboard"
        run.tracker.finish(metrics, folder / "report.html")
        if tensorboard.is_dir():
            shutil.copytree(tensorboard, folder / "tensorboard", dirs_exist_ok=True)
        model = publish(run.store, folder, export)
        run.report.log(f"model saved to {model.uri} ({model.size_bytes / 1e6:.0f} MB), with report.html beside it")
        return model

    return run.group.first(work)


def _gathered_format(run: TrainingRun) -> torch.dtype | None:
    """Return the number format to put a model together in that ranks share: at once that of the files, if possible.

    Adapters, rehearsed rounding and masks are worked in at full precision first, and classifiers have to explain
    themselves.
    """
    plan = run.plan
    is_worked_in = plan.method.has_adapters or plan.method.qat is not None or plan.method.pruning is not None
    return None if is_worked_in or plan.task is TaskName.SEQUENCE_CLASSIFICATION else stored_dtype(run.inputs.base)


def _write(run: TrainingRun, model: nn.Module, folder: Path) -> None:
    """Write the adapter, the whole model, or both, as `spec.output.save` has it."""
    plan, base = run.plan, run.inputs.base
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if plan.method.has_adapters and plan.save is not SaveMode.MERGED:
        target = folder if plan.save is SaveMode.ADAPTER else folder / "adapter"
        methods.save_adapter(model, target, plan)
        if plan.save is SaveMode.ADAPTER:
            run.task.processor.save_pretrained(folder)
            return
    write_model(methods.finished_model(model, plan, base, run.task), run.task.processor, folder, stored_dtype(base))


def _record(run: TrainingRun, model: nn.Module, metrics: dict[str, float], samples_after: Sequence[str]) -> RunRecord:
    """Put together what the report shows."""
    plan, state, facts = run.plan, run.state, run.parts.facts
    record = RunRecord.of(
        plan, run_digest=run.run_digest, metrics=metrics, history=state.history, evaluations=state.evaluations
    )
    confusion = _confusion(run)
    environment = Environment(
        versions=installed_versions(),
        device=str(run.parts.numerics.device),
        workers=run.group.world_size,
        precision=run.parts.numerics.name,
        strategy=facts.strategy,
        trained_parameters=facts.trained_parameters,
        total_parameters=facts.parameters,
        train_seconds=round(state.train_seconds, 1),
        wall_seconds=round(time.time() - state.began_unix, 1),
    )
    newest = run.checkpointer.newest
    return record.model_copy(
        update={
            "pipeline_tag": run.task.pipeline_tag,
            "higher_is_better": tuple(sorted(run.task.higher_is_better)),
            "data": Data.of(_statistics(run), confusion.labels if confusion else ()),
            "confusion": confusion,
            "worst": _worst(run, model),
            "samples": samples(run.task, _sample_rows(run), run.state.samples_before, samples_after),
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


def _statistics(run: TrainingRun) -> DataStatistics:
    facts = run.dataset_facts
    left_out = {"bad_rows": facts.bad_rows, "first_bad_row": facts.first_bad_row}
    return run.inputs.prepared.statistics.model_copy(update=left_out)


def _kind(event: Mapping[str, int | str]) -> IncidentKind:
    """What an event of the run's state is; before it had a kind there were only rollbacks."""
    return IncidentKind(str(event.get("kind", IncidentKind.ROLLBACK)))


def _confusion(run: TrainingRun) -> Confusion | None:
    if run.last_evaluation is None:
        return None
    found = run.task.confusion_of(run.last_evaluation.assessment)
    if found is None:
        return None
    labels, counts = found
    return Confusion(labels=tuple(labels), counts=tuple(map(tuple, counts)))


def _worst(run: TrainingRun, model: nn.Module) -> tuple[WorstExample, ...]:
    """The held-out examples with the highest loss; for text classifiers with what each token said."""
    held_out = run.inputs.prepared.eval
    if run.last_evaluation is None or held_out is None:
        return ()
    found: list[WorstExample] = []
    for outcome in run.last_evaluation.assessment.outcomes:
        # a classifier's guess has its probability behind it
        if outcome.expected == outcome.predicted.partition(" (")[0] or len(found) == SHOWN:
            continue
        text, *pair = [*run.task.texts_of(held_out.row(outcome.index)).values()] or [""]
        found.append(
            WorstExample(
                text=text[:TEXT],
                text_pair=pair[0][:TEXT] if pair else None,
                expected=outcome.expected,
                predicted=outcome.predicted,
                loss=outcome.loss,
            )
        )
    if run.plan.task is not TaskName.SEQUENCE_CLASSIFICATION:
        return tuple(found)
    return explained(model, run.task.processor, found, log=run.report.log)


def _answers(run: TrainingRun) -> list[str]:
    """What the model now says to a few held-out prompts: asked on rank 0, or on all ranks where they share it out."""
    rows, shared = _sample_rows(run), run.parts.wrapped.is_sharded
    if not rows or (run.group.rank and not shared):
        return []
    group = run.group if shared else None
    return sample(run.parts.bare, run.task, rows, budget_seconds=SAMPLE_SECONDS, group=group, log=run.report.log)


def _sample_rows(run: TrainingRun) -> list[Row]:
    held_out = run.inputs.prepared.eval
    return [] if held_out is None else [held_out.row(index) for index in range(min(SAMPLES, len(held_out)))]
