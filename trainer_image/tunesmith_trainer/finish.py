"""The end of a run: the tuned model written, measured as written, and published with its report. Called by `loop`.

Sharded weights are gathered by all ranks together, and all evaluate the written model; the rest is rank 0's work, and
the others wait for it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from tunesmith_api.artifacts import FileEntry
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.reports import ModelRef
from tunesmith_api.v1alpha1.finetunejob import SaveMode
from tunesmith_api.v1alpha1.task import Task as TaskName
from tunesmith_api.v1alpha1.training import Precision
from tunesmith_trainer import methods
from tunesmith_trainer.attention import packed_implementation
from tunesmith_trainer.data import DataStatistics
from tunesmith_trainer.evaluate import Evaluation, evaluate
from tunesmith_trainer.export import Export, describe, publish, upload, write_model
from tunesmith_trainer.published import Format, choose_format, fetch_files, read_back, reader_of, release
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
from tunesmith_trainer.tasks.base import Row, Task

if TYPE_CHECKING:
    from tunesmith_trainer.loop import TrainingRun

__all__ = ["eval_metrics", "finish", "sample_before"]

SHOWN = 8
"""Worst examples in the report."""
TEXT = 400
SAMPLES = 3
SAMPLE_SECONDS = 20.0


def sample_before(run: TrainingRun) -> None:
    """Ask the model a few held-out questions before its first step; the report sets the answers beside those after."""
    run.state.samples_before = _answers(run, run.parts.bare, run.task)


@dataclass(frozen=True)
class _Written:
    """What rank 0 has written; None where that is an adapter alone, whose weights are those that were trained."""

    format: Format | None
    files: tuple[FileEntry, ...]


@dataclass(frozen=True)
class _Shown:
    """What the report tells of the published model, besides its record."""

    evaluation: Evaluation | None
    answers: list[str]
    model: Callable[[], nn.Module]
    """The model in one piece, on rank 0."""


def finish(run: TrainingRun, metrics: dict[str, float]) -> tuple[ModelRef, dict[str, float]]:
    """Write the model, measure what was written, and publish it with its report; all ranks return the same.

    `metrics` are the run's own; those of the held-out data are replaced by the published model's.
    """
    folder = run.pod.scratch / "export"
    gathered = run.parts.wrapped.gathered(_gathered_format(run.plan))
    written = run.group.first(lambda: _write(run, gathered, folder))
    if written.format is None:
        answers = _answers(run, run.parts.bare, run.task) if run.state.samples_before else []
        shown = _Shown(run.last_evaluation, answers, lambda: _present(gathered))
    else:
        gathered = None
        shown = _measured(run, folder, written)
    if shown.evaluation is not None:
        metrics = metrics | eval_metrics(shown.evaluation.metrics)

    def work() -> ModelRef:
        export = Export(run.plan, run.run_digest, run.inputs.base, _record(run, metrics, shown, written.format))
        describe(folder, export)
        tensorboard = run.pod.scratch / "tensorboard"
        run.tracker.finish(metrics, folder / "report.html")
        if tensorboard.is_dir():
            shutil.copytree(tensorboard, folder / "tensorboard", dirs_exist_ok=True)
        model = publish(run.store, folder, export, there=written.files)
        run.report.log(f"model saved to {model.uri} ({model.size_bytes / 1e6:.0f} MB), with report.html beside it")
        return model

    return run.group.first(work), metrics


def eval_metrics(found: Mapping[str, float], suffix: str = "") -> dict[str, float]:
    """Return an evaluation's numbers by the names that the job's metrics have."""
    return {f"eval{name[0].upper()}{name[1:]}{suffix}": value for name, value in found.items() if name != "step"}


def _present(model: nn.Module | None) -> nn.Module:
    assert model is not None
    return model


# ---- writing


def _gathered_format(plan: TrainingPlan) -> torch.dtype | None:
    """Return the number format to put a model together in that ranks share: at once that of the files, if it is known.

    Adapters, rehearsed rounding and masks are worked in at full precision first, and by full precision is decided what
    rounding costs.
    """
    is_worked_in = plan.method.has_adapters or plan.method.qat is not None or plan.method.pruning is not None
    return None if is_worked_in or plan.output_dtype is not Precision.BF16 else torch.bfloat16


def _write(run: TrainingRun, model: nn.Module | None, folder: Path) -> _Written:
    """Write the adapter, the whole model, or both, as `spec.output.save` has it; on rank 0."""
    plan, base = run.plan, run.inputs.base
    trained = _present(model)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if plan.publishes_adapter_only:
        methods.save_adapter(trained, folder, plan)
        run.task.processor.save_pretrained(folder)
        return _Written(None, ())
    if plan.method.has_adapters and plan.save is SaveMode.BOTH:
        methods.save_adapter(trained, folder / "adapter", plan)
    finished = methods.finished_model(trained, plan, base, run.task)
    chosen = choose_format(finished, plan, base, run.task, run.parts.prepared.removed_layers)
    if chosen.told():
        run.report.log(chosen.told())
    write_model(finished, run.task.processor, folder, chosen.dtype)
    if run.group.world_size <= run.pod.processes:
        return _Written(chosen, ())
    return _Written(chosen, upload(run.store, folder, plan.output_uri))


# ---- what was written


def _measured(run: TrainingRun, folder: Path, written: _Written) -> _Shown:
    """Read the written model on all ranks, evaluate it, and ask it what was asked before training."""
    parts, plan, held_out = run.parts, run.plan, run.inputs.prepared.eval
    if held_out is None:
        return _Shown(None, [], lambda: _whole(run, folder))
    release(parts.bare, parts.optimizer, parts.wrapped.is_sharded)
    if run.pod.index:
        fetch_files(run.store, plan.output_uri, folder, written.files)
    # pods fetch at their own pace
    run.group.meet(None)
    strategy = parts.wrapped.strategy
    model, reader = read_back(
        folder, run.inputs.base, run.task, group=run.group, numerics=parts.numerics, strategy=strategy
    )
    with packed_implementation(model, parts.packed):
        evaluation = evaluate(
            reader,
            model,
            held_out,
            held_out.lengths[: plan.training.max_eval_samples].tolist(),
            group=run.group,
            autocast=parts.numerics.autocast,
            packed=parts.packed,
            data_rank=parts.wrapped.dp_rank,
            data_ranks=parts.wrapped.dp_size,
            lockstep=parts.wrapped.is_sharded,
            between=lambda part: run.report.update(message=f"evaluating the saved model, {part:.0%}"),
        )
    run.report.update(eval_loss=evaluation.metrics["loss"], message="saving the tuned model")
    numbers = ", ".join(f"{name} {value:.4f}" for name, value in evaluation.metrics.items())
    run.report.log(f"evaluation of the saved model, read back: {numbers}")
    answers = _answers(run, model, reader) if run.state.samples_before else []
    return _Shown(evaluation, answers, lambda: _whole(run, folder) if parts.wrapped.is_sharded else model)


def _whole(run: TrainingRun, folder: Path) -> nn.Module:
    return reader_of(run.task).load_model(folder, dtype=torch.float32)


# ---- the record


def _record(run: TrainingRun, metrics: dict[str, float], shown: _Shown, chosen: Format | None) -> RunRecord:
    """Put together what the report shows."""
    plan, state, facts = run.plan, run.state, run.parts.facts
    record = RunRecord.of(
        plan, run_digest=run.run_digest, metrics=metrics, history=state.history, evaluations=state.evaluations
    )
    confusion = _confusion(run.task, shown.evaluation)
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
            "worst": _worst(run, shown),
            "samples": samples(run.task, _sample_rows(run), run.state.samples_before, shown.answers),
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
                rounding=chosen.told() if chosen else "",
                metrics=shown.evaluation.metrics if shown.evaluation and chosen else None,
            ),
        }
    )


def _statistics(run: TrainingRun) -> DataStatistics:
    facts = run.dataset_facts
    left_out = {"bad_rows": facts.bad_rows, "first_bad_row": facts.first_bad_row}
    return run.inputs.prepared.statistics.model_copy(update=left_out)


def _kind(event: Mapping[str, int | str]) -> IncidentKind:
    """What an event of the run's state is; before it had a kind there were only rollbacks."""
    return IncidentKind(str(event.get("kind", IncidentKind.ROLLBACK)))


def _confusion(task: Task, evaluation: Evaluation | None) -> Confusion | None:
    found = task.confusion_of(evaluation.assessment) if evaluation else None
    if found is None:
        return None
    labels, counts = found
    return Confusion(labels=tuple(labels), counts=tuple(map(tuple, counts)))


def _worst(run: TrainingRun, shown: _Shown) -> tuple[WorstExample, ...]:
    """The held-out examples with the highest loss; for text classifiers with what each token said."""
    held_out = run.inputs.prepared.eval
    if shown.evaluation is None or held_out is None:
        return ()
    found: list[WorstExample] = []
    for outcome in shown.evaluation.assessment.outcomes:
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
    return explained(shown.model(), run.task.processor, found, log=run.report.log)


def _answers(run: TrainingRun, model: nn.Module, task: Task) -> list[str]:
    """What a model says to a few held-out prompts: asked on rank 0, or on all ranks where they share it out."""
    rows, shared = _sample_rows(run), run.parts.wrapped.is_sharded
    if not rows or (run.group.rank and not shared):
        return []
    group = run.group if shared else None
    return sample(model, task, rows, budget_seconds=SAMPLE_SECONDS, group=group, log=run.report.log)


def _sample_rows(run: TrainingRun) -> list[Row]:
    held_out = run.inputs.prepared.eval
    return [] if held_out is None else [held_out.row(index) for index in range(min(SAMPLES, len(held_out)))]
