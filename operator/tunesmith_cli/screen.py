"""What a person sees of a run: log lines, and below them a bar with step, loss, speed and time left.

Where the output is no terminal, plain lines instead. `run` feeds it.
"""

from __future__ import annotations

import re
import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from tunesmith_api.reports import ProgressReport, TrainerState

__all__ = ["Screen", "open_screen"]

STEP_LINE = re.compile(r"^step \d+/\d+ ")
NUMBERS = re.compile(r"\d+")
PLAIN_INTERVAL_SECONDS = 15.0
DRAWINGS_PER_SECOND = 4
"""On the cores that train."""

_PHASES = {
    TrainerState.STARTING: "starting",
    TrainerState.PREPARING: "preparing",
    TrainerState.TRAINING: "training",
    TrainerState.EVALUATING: "evaluating",
    TrainerState.SAVING: "saving",
    TrainerState.FINISHED: "done",
    TrainerState.FAILED: "failed",
}


class Screen(Protocol):
    """Takes what is to be seen."""

    def line(self, text: str) -> None:
        """A log line."""

    def report(self, report: ProgressReport) -> None:
        """How far it is."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def open_screen(console: Console) -> Screen:
    """A bar on a terminal, else plain lines."""
    return _Bar(console) if console.is_terminal else _Lines(console)


def phase_of(report: ProgressReport) -> str:
    """What is being done, in a few words."""
    again = report.restarts and report.state is TrainerState.STARTING
    return report.message or ("starting again" if again else _PHASES[report.state])


def numbers_of(report: ProgressReport) -> str:
    """Step, loss, held-out loss, speed and time left, as far as they are known."""
    parts = [f"{report.global_step}/{report.max_steps}"] if report.max_steps else []
    for name, value in (("loss", report.loss), ("eval", report.eval_loss)):
        parts += [f"{name} {value:.4g}"] if value is not None else []
    if report.tokens_per_second:
        parts.append(f"{report.tokens_per_second:,.0f} tokens/s")
    if report.eta_seconds and report.state is TrainerState.TRAINING:
        parts.append(f"{_short(report.eta_seconds)} left")
    return "  ".join(parts)


def _short(seconds: int) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class _Bar:
    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=console,
            refresh_per_second=DRAWINGS_PER_SECOND,
        )
        self._task = self._progress.add_task("starting", total=None, numbers="")
        self._progress.start()

    def line(self, text: str) -> None:
        if not STEP_LINE.match(text):  # the bar says that already
            self._progress.console.print(text, markup=False, highlight=False)

    def report(self, report: ProgressReport) -> None:
        self._progress.update(
            self._task,
            description=phase_of(report),
            total=report.max_steps or None,
            completed=report.global_step,
            numbers=numbers_of(report),
        )

    def close(self) -> None:
        self._progress.stop()


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._doing = ""
        self._began = self._said = time.monotonic()

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._said = time.monotonic()

    def line(self, text: str) -> None:
        self._print(text)

    def report(self, report: ProgressReport) -> None:
        doing = NUMBERS.sub("", phase_of(report))  # "evaluating, 45%" is no news after "evaluating, 40%"
        if doing != self._doing:
            self._doing, self._began = doing, time.monotonic()
            self._print(phase_of(report))
        elif time.monotonic() - self._said > PLAIN_INTERVAL_SECONDS:
            so_far = numbers_of(report) or f"for {_short(round(time.monotonic() - self._began))}"
            self._print(f"{phase_of(report)}  {so_far}")

    def close(self) -> None:
        """Lines leave nothing behind."""
