"""The end of a run: the tuned model written, measured as written, and published with its report. Called by `run`.

Sharded weights are gathered by all ranks together, and all evaluate the written model; the rest is rank 0's work, and
the others wait for it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tunesmith_api.artifacts import FileEntry
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.reports import ModelRef
from tunesmith_api.v1alpha1.finetunejob import SaveMode
from tunesmith_api.v1alpha1.training import Precision
from tunesmith_store.memory import give_back_free
from tunesmith_trainer import methods
from tunesmith_trainer.loop.compatibility import save_processor
from tunesmith_trainer.loop.evaluation import answers_of, evaluate_held_out
from tunesmith_trainer.loop.export import Export, describe, publish, upload, write_model
from tunesmith_trainer.loop.history import Reporter, eval_metrics
from tunesmith_trainer.loop.output_folder import check_lease
from tunesmith_trainer.loop.published import Format, choose_format, fetch_files, read_back, reader_of, release
from tunesmith_trainer.loop.run_record import FinishedRun, Shown, record_of
from tunesmith_trainer.loop.tracking import Tracker
from tunesmith_trainer.models.attention import packed_implementation
from tunesmith_trainer.tasks.base import Task

__all__ = ["FinishedRun", "Published", "finish"]

Log = Callable[[str], None]


@dataclass(frozen=True)
class Published:
    """What a run leaves for others."""

    model: ModelRef
    metrics: dict[str, float]
    """The run's own; those of the held-out data are the published model's."""


@dataclass(frozen=True)
class _Written:
    """What rank 0 has written; no format where that is an adapter alone, whose weights are those that were trained."""

    format: Format | None
    files: tuple[FileEntry, ...]
    """Those that are in object storage already, for other pods to read."""


def finish(run: FinishedRun, tracker: Tracker, report: Reporter) -> Published:
    """Write the model, measure what was written, and publish it with its report; all ranks return the same."""
    context = run.context
    folder = context.pod.scratch / "export"
    give_back_free()  # what the last step has left free is in pieces too small for a model
    gathered = run.parts.wrapped.gathered(_gathered_format(context.plan))
    written = context.group.on_first(lambda: _write(run, gathered, folder, report.log))
    if written.format is None:
        shown = _shown_as_trained(run, gathered, report.log)
    else:
        gathered = None
        shown = _measured(run, folder, written, report)
    metrics = run.metrics | (eval_metrics(shown.evaluation.metrics) if shown.evaluation else {})

    def work() -> ModelRef:
        record = record_of(run, metrics, shown, report.log)
        export = Export(context.plan, context.run_digest, run.inputs.base, record)
        describe(folder, export)
        tensorboard = context.pod.scratch / "tensorboard"
        tracker.finish(metrics, folder / "report.html")
        if tensorboard.is_dir():
            shutil.copytree(tensorboard, folder / "tensorboard", dirs_exist_ok=True)
        check_lease(context.store, context.plan, context.plan.output_uri, "spec.output.uri")
        model = publish(context.store, folder, export, there=written.files)
        report.log(f"model saved to {model.uri} ({model.size_bytes / 1e6:.0f} MB), with report.html beside it")
        return model

    return Published(context.group.on_first(work), metrics)


# ---- writing


def _gathered_format(plan: TrainingPlan) -> torch.dtype | None:
    """Return the number format to put a model together in that ranks share: at once that of the files, if it is known.

    Adapters, fake quantization and masks are worked in at full precision first, and by full precision is decided what
    rounding costs.
    """
    is_worked_in = plan.method.has_adapters or plan.method.qat is not None or plan.method.pruning is not None
    return None if is_worked_in or plan.output_dtype is not Precision.BF16 else torch.bfloat16


def _present(model: nn.Module | None) -> nn.Module:
    """Return the gathered model, which rank 0 has."""
    assert model is not None
    return model


def _write(run: FinishedRun, model: nn.Module | None, folder: Path, log: Log) -> _Written:
    """Write the adapter, the whole model, or both, as `spec.output.save` has it; on rank 0."""
    context, base, task = run.context, run.inputs.base, run.inputs.task
    plan, trained = context.plan, _present(model)
    check_lease(context.store, plan, plan.output_uri, "spec.output.uri")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if plan.publishes_adapter_only:
        methods.save_adapter(trained, folder, plan)
        save_processor(task.processor, folder)
        return _Written(None, ())
    if plan.method.has_adapters and plan.save is SaveMode.BOTH:
        methods.save_adapter(trained, folder / "adapter", plan)
    finished = methods.finished_model(trained, plan, base, task)
    give_back_free()  # weights before adapters were merged: what threads that load have taken, no other thread reuses
    chosen = choose_format(finished, plan, base, task, run.parts.removed_layers)
    if rounding := chosen.rounding():
        log(rounding)
    write_model(finished, task.processor, folder, chosen.dtype)
    if context.group.world_size <= context.pod.processes:
        return _Written(chosen, ())
    return _Written(chosen, upload(context.store, folder, plan.output_uri))


# ---- what was written


def _shown_as_trained(run: FinishedRun, gathered: nn.Module | None, log: Log) -> Shown:
    """An adapter's files hold the weights that were trained, and that were evaluated last."""
    answers = _answers(run, run.parts.bare, run.inputs.task, log)
    return Shown(run.evaluation, answers, lambda: _present(gathered))


def _answers(run: FinishedRun, model: nn.Module, task: Task, log: Log) -> list[str]:
    """Ask a model what was asked before training, if anything was."""
    if not run.state.samples_before:
        return []
    return answers_of(run.context, run.inputs, run.parts, model, task, log)


def _measured(run: FinishedRun, folder: Path, written: _Written, report: Reporter) -> Shown:
    """Read the written model on all ranks, evaluate it, and ask it what was asked before training."""
    context, inputs, parts = run.context, run.inputs, run.parts

    def whole() -> nn.Module:
        return reader_of(inputs.task).load_model(folder, dtype=torch.float32)

    if inputs.data.eval is None:
        return Shown(None, [], whole, written.format)
    release(parts.bare, parts.optimizer, parts.wrapped.is_sharded)
    if context.group.rank:  # which pod has rank 0 is Ray's choice; where the files lie already, they are only verified
        fetch_files(context.store, context.plan.output_uri, folder, written.files)
    context.group.exchange(None)  # pods fetch at their own pace
    strategy = parts.wrapped.strategy
    model, reader = read_back(
        folder, inputs.base, inputs.task, group=context.group, numerics=parts.numerics, strategy=strategy
    )

    def between(part: float) -> None:
        report.update(message=f"evaluating the saved model, {part:.0%}")

    with packed_implementation(model, parts.packed):
        evaluation = evaluate_held_out(context, inputs, parts, model, reader, between)
    report.update(eval_loss=evaluation.metrics["loss"], message="saving the tuned model")
    numbers = ", ".join(f"{name} {value:.4f}" for name, value in evaluation.metrics.items())
    report.log(f"evaluation of the saved model, read back: {numbers}")
    answers = _answers(run, model, reader, report.log)
    return Shown(evaluation, answers, whole if parts.wrapped.is_sharded else lambda: model, written.format)
