"""What people see: one progress bar per phase, or plain lines where nobody watches a terminal. Keeps each phase's seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Phase:
    """A phase under way."""

    def __init__(self, screen: Screen, name: str, task: TaskID | None, total: float | None) -> None:
        self._screen, self._name, self._task = screen, name, task
        self._total, self._done, self._last = total, 0.0, ""

    def say(self, detail: str) -> None:
        """Show what the phase is doing."""
        if detail == self._last:
            return
        self._last = detail
        if self._task is None:
            self._screen.line(f"  {detail}")
        else:
            self._screen.bars.update(self._task, detail=detail)

    def advance_to(self, done: float, total: float | None = None) -> None:
        """Move the bar."""
        self._done, self._total = done, total or self._total
        if self._task is not None:
            self._screen.bars.update(self._task, completed=done, total=self._total)

    def tick(self) -> None:
        """Move the bar by one."""
        self.advance_to(self._done + 1)


class Screen:
    """The terminal."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.seconds: dict[str, float] = {}
        self.started = time.monotonic()
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<34}"),
            BarColumn(30),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}"),
        )
        self.bars = Progress(*columns, console=self.console, disable=not self.console.is_terminal)

    def __enter__(self) -> Screen:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def line(self, text: str = "") -> None:
        """Print a line above the bars."""
        if self.console.is_terminal:
            self.bars.console.print(text, markup=False)
        else:
            print(f"[{time.monotonic() - self.started:6.1f}s] {text}" if text else "", flush=True)

    @contextmanager
    def phase(self, key: str, title: str, total: float | None = None) -> Iterator[Phase]:
        """Show a bar for a phase and record its seconds under `key`."""
        started = time.monotonic()
        task = self.bars.add_task(title, total=total, detail="") if self.console.is_terminal else None
        if task is None:
            self.line(title)
        phase = Phase(self, title, task, total)
        yield phase
        self.seconds[key] = round(time.monotonic() - started, 1)
        if task is not None:
            self.bars.update(task, total=1, completed=1, detail="done")
            self.bars.stop_task(task)
        else:
            self.line(f"{title}: {self.seconds[key]} s")
