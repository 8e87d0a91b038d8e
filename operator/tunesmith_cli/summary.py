"""The outcome of a run: what was reached, where it lies, and what to do next. `run` prints them."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.reports import Outcome, TerminationReport
from tunesmith_api.v1alpha1.finetunejob import SaveMode
from tunesmith_api.v1alpha1.task import AUTO_CLASSES
from tunesmith_cli.local_paths import LocalPaths

__all__ = ["print_metrics", "print_outcome"]

BEFORE = "Before"
REPORT_FILE = "report.html"


def print_outcome(
    console: Console, plan: TrainingPlan, report: TerminationReport | None, code: int, paths: LocalPaths, command: str
) -> None:
    """Say how the run ended. `command` is what was typed, for going on."""

    def say(text: str = "") -> None:
        console.print(paths.shown(text), markup=False, highlight=False, soft_wrap=True)

    say()
    if report is not None and report.outcome is Outcome.SUCCEEDED:
        print_metrics(console, report.metrics)
        for line in _success(plan, report, paths):
            say(line)
    elif code == ExitCode.INTERRUPTED:
        for line in _stopped(report, command):
            say(line)
    else:
        for line in _failure(report, code, command):
            say(line)


def _success(plan: TrainingPlan, report: TerminationReport, paths: LocalPaths) -> Iterator[str]:
    uri = report.model.uri if report.model is not None else plan.output_uri
    folder = paths.path_of(uri)
    page = folder / REPORT_FILE if folder is not None else None
    yield f"model   {folder if folder is not None else uri}"
    if page is None or page.is_file():
        yield f"report  {page if page is not None else f'{uri}/{REPORT_FILE}'}"
    yield ""
    where = folder if folder is not None else f"a copy of {uri}"
    if plan.method.has_adapters and plan.save is SaveMode.ADAPTER:
        yield f"Next: the code that puts the adapter onto its base is in README.md of {where}."
    else:
        yield f"Next: transformers' {AUTO_CLASSES[plan.task]}.from_pretrained loads the model from {where}."


def _stopped(report: TerminationReport | None, command: str) -> Iterator[str]:
    if report is not None and report.checkpoint is not None:
        yield f"Stopped; step {report.checkpoint.step} is saved in {report.checkpoint.uri}."
        yield "To go on from there, run the same command again:"
    else:
        yield "Stopped; there was nothing to save yet. To start again:"
    yield f"  {command}"


def _failure(report: TerminationReport | None, code: int, command: str) -> Iterator[str]:
    if code == 128 + signal.SIGINT:
        yield "Killed. The same command goes on from the last checkpoint, if one was saved:"
        yield f"  {command}"
        return
    if report is None:
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        yield f"error: the trainer ended without a word ({how})"
        return
    yield f"error: {report.reason}: {report.message}"
    if report.memory is not None and report.memory.micro_batch_size > 1:
        yield f"  {command} --set spec.training.microBatchSize={report.memory.micro_batch_size // 2}"
    if report.reason is not Reason.DATASET_INVALID and report.checkpoint is not None:
        yield f"Step {report.checkpoint.step} is saved in {report.checkpoint.uri}; the same command goes on from there."


def print_metrics(console: Console, metrics: dict[str, float]) -> None:
    """Print the final numbers, each beside what it was before training."""
    pairs = {name: metrics.get(f"{name}{BEFORE}") for name in metrics if not name.endswith(BEFORE)}
    if not pairs:
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, before in sorted(pairs.items(), key=lambda pair: (pair[1] is None, pair[0])):
        table.add_row(_spaced(name), _number(before), _number(metrics[name]))
    console.print(table)
    console.print()


def _spaced(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
