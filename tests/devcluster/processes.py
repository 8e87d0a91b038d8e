"""Processes known by number and start time, so that a number that the kernel has given away again is never killed."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessId:
    """One process of this boot, seen from the machine's own PID namespace."""

    pid: int
    started: int
    """Start time in clock ticks since boot, as in /proc/PID/stat."""

    @classmethod
    def of(cls, pid: int) -> "ProcessId":
        """The process that has this number now; ``ProcessLookupError`` where there is none."""
        stat = _stat(pid)
        if stat is None:
            raise ProcessLookupError(pid)
        return cls(pid, stat[1])

    @property
    def alive(self) -> bool:
        """False for a zombie too: it holds nothing any more."""
        stat = _stat(self.pid)
        return stat is not None and stat[1] == self.started and stat[0] not in "ZX"

    def kill(self, sig: int = signal.SIGKILL) -> None:
        """Send a signal; a process that is gone is fine."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sig)


def _stat(pid: int) -> tuple[str, int] | None:
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the command in parentheses and may hold blanks and parentheses itself.
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])


def _parent(pid: int) -> int | None:
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(text[text.rindex(")") + 2 :].split()[1])


def everyone() -> Iterator[int]:
    """The numbers of all processes."""
    return (int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit())


def only_child(pid: int) -> int | None:
    """The one child of a process, or None while it has none."""
    return next((other for other in everyone() if _parent(other) == pid), None)


def innermost(pid: int, depth: int) -> ProcessId | None:
    """Follow ``depth`` generations of only children; None while one of them is missing."""
    current: int | None = pid
    for _ in range(depth):
        if current is None:
            return None
        current = only_child(current)
    if current is None:
        return None
    try:
        return ProcessId.of(current)
    except ProcessLookupError:
        return None


def with_environment(entry: str) -> Iterator[ProcessId]:
    """Every process that was started with this ``NAME=value`` in its environment."""
    wanted = entry.encode()
    for pid in everyone():
        try:
            environment = (PROC / str(pid) / "environ").read_bytes()
            if wanted in environment.split(b"\0"):
                yield ProcessId.of(pid)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue


def command_line(pid: int) -> str:
    """The command line of a process, its arguments separated by blanks; empty where it is gone."""
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def wait_until(condition: Callable[[], bool], seconds: float, every: float = 0.05) -> bool:
    """Poll a condition; False where it did not come true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(every)
    return True


def boot_id() -> str:
    """Names this boot of the machine: process numbers of another one mean nothing."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()
