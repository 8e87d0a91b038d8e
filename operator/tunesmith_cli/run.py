"""`tunesmith run`: a FineTuneJob through the trainer on this machine, from the manifest to the outcome."""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console

from tunesmith_api.keys import PLAN_FILE, ExitCode, Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.reports import Outcome
from tunesmith_api.v1alpha1 import FineTuneJob
from tunesmith_cli import machine
from tunesmith_cli.launch import HOST, Trainer, environment_of
from tunesmith_cli.local_paths import LocalPaths
from tunesmith_cli.manifest import apply_override, checked_job, read_manifest
from tunesmith_cli.screen import Screen, open_screen
from tunesmith_cli.summary import print_outcome
from tunesmith_operator.core.finetunejob.training_plan import training_plan

__all__ = ["Options", "train"]

POLL_SECONDS = 0.2
PROGRESS_SECONDS = 1.0
"""From one request for numbers to the next: they cost CPU that training could use."""
LOG_TAIL_LINES = 8
_OUTCOME_PREFIXES = tuple(f"{outcome}: " for outcome in Outcome)
"""Begin the supervisor's last line, which the summary says better."""
KILLED = 128 + signal.SIGINT
"""Exit code of a run that was not allowed to save first, as shells have it."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line."""

    source: str
    settings: Sequence[str] = ()
    volumes: Sequence[str] = ()
    work_dir: Path | None = None

    def command(self) -> str:
        """The command that asks for the same again."""
        parts = ["tunesmith", "run", "-f", self.source]
        for option, values in (("--set", self.settings), ("--volume", self.volumes)):
            for value in values:
                parts += [option, value]
        parts += ["--work-dir", str(self.work_dir)] if self.work_dir is not None else []
        return shlex.join(parts)


def train(options: Options, console: Console) -> int:
    """Train; return the exit code of the trainer.

    Raises:
        Refused: the manifest or this machine won't do; nothing has been started.
    """
    paths = LocalPaths(options.volumes)
    job = _job(options, paths)
    machine.check_gpus(job.spec, machine.gpus())
    machine.check_trainer()
    plan = local_plan(job)
    with machine.scratch_folder(options.work_dir) as scratch:
        paths.link(scratch.folder / "volumes")
        (scratch.folder / PLAN_FILE).write_text(plan.to_json())
        first, second = machine.free_ports(2)
        environment = environment_of(
            plan, scratch.short, scratch.short / "volumes", machine.cores(), (first, second), os.environ
        )
        trainer = Trainer.start(environment, scratch.short)
        code = _follow(trainer, open_screen(console), paths)
        print_outcome(console, plan, trainer.report(), code, paths, options.command())
        if _is_bug(trainer, code):
            scratch.kept = True
            log = scratch.folder / trainer.log_file.name
            tail = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
            console.print(*tail, f"log: {log}", sep="\n", markup=False, highlight=False, soft_wrap=True)
    return code


def _is_bug(trainer: Trainer, code: int) -> bool:
    """Whether the run ended for a reason that no input explains: then the log says more than the report."""
    if code in (ExitCode.SUCCESS, ExitCode.INTERRUPTED, KILLED):
        return False
    report = trainer.report()
    return report is None or report.reason is Reason.WORKER_CRASHED


def _job(options: Options, paths: LocalPaths) -> FineTuneJob:
    document = read_manifest(options.source)
    base = Path.cwd() if options.source == "-" else Path(options.source).absolute().parent
    paths.localize(document, base)
    for setting in options.settings:
        apply_override(document, setting)
    paths.localize(document, Path.cwd())
    return checked_job(document, paths)


def local_plan(job: FineTuneJob) -> TrainingPlan:
    """The plan that the operator would write, for one "pod" that holds all workers."""
    return training_plan(job, attempt=1).model_copy(update={"head_host": HOST})


def _follow(trainer: Trainer, screen: Screen, paths: LocalPaths) -> int:
    """Show how it goes until the trainer has ended; return its exit code."""
    with _signals() as asked:
        try:
            asked_to_save = killed = False
            next_report = time.monotonic()
            while (code := trainer.exit_code()) is None:
                _show_lines(trainer, screen, paths)
                if time.monotonic() >= next_report:
                    next_report = time.monotonic() + PROGRESS_SECONDS
                    if (report := trainer.progress()) is not None:
                        screen.report(report)
                if asked.count and not asked_to_save:
                    asked_to_save = True
                    screen.line("stopping: a checkpoint is saved first; Ctrl-C again kills the run without it")
                    trainer.stop()
                if asked.count > 1 and not killed:
                    killed = True
                    trainer.kill()
                time.sleep(POLL_SECONDS)
            trainer.finish()
            _show_lines(trainer, screen, paths)
            return KILLED if killed else code
        finally:
            screen.close()
            if trainer.exit_code() is None:
                trainer.kill()


def _show_lines(trainer: Trainer, screen: Screen, paths: LocalPaths) -> None:
    for line in trainer.lines():
        if not line.startswith(_OUTCOME_PREFIXES):
            screen.line(paths.shown(line))


@dataclass
class _Asked:
    """How often this process was asked to stop."""

    count: int = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


@contextmanager
def _signals() -> Iterator[_Asked]:
    """Count Ctrl-C and the like instead of dying of them."""
    asked = _Asked()
    before = {number: signal.signal(number, asked.note) for number in STOP_SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
