"""Child processes of a first process: start, reap whatever ends, kill whole trees. Used by `supervisor` and `ray_node`.

Only one place may wait for children, or exit codes get lost: so nothing here uses Popen.wait or poll.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["Children", "SignalPause"]

PR_SET_CHILD_SUBREAPER = 36


class Children:
    """All descendants of this process; orphans among them become its children."""

    def __init__(self) -> None:
        # In a pod we are pid 1 and orphans come to us anyway; outside a pod they do so because of this.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._ended: dict[int, int] = {}
        self._handles: dict[int, subprocess.Popen[bytes]] = {}

    def spawn(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path | None = None,
        stdin: int = subprocess.DEVNULL,
    ) -> int:
        """Start a process that reads from a file descriptor, and writes to a file or where we do; return its pid."""
        with contextlib.ExitStack() as stack:
            out = None if log is None else stack.enter_context(log.open("ab"))
            child = subprocess.Popen(command, env=dict(environment), stdin=stdin, stdout=out, stderr=out)
        self._handles[child.pid] = child
        return child.pid

    def reap(self) -> None:
        """Take note of every child that has ended; zombies vanish."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            self._ended[pid] = code
            if handle := self._handles.pop(pid, None):
                handle.returncode = code

    def exit_code(self, pid: int) -> int | None:
        """Return how a child ended (negative: by that signal); None while it lives."""
        self.reap()
        return self._ended.get(pid)

    def descendants(self) -> dict[int, str]:
        """Return pid and name of everything below this process."""
        parents: dict[int, tuple[int, str]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError, ValueError):
                    stat = (entry / "stat").read_text()
                    name, rest = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :].split()
                    if rest[0] != "Z":
                        parents[int(entry.name)] = (int(rest[1]), name)
        found: dict[int, str] = {}
        level = {os.getpid()}
        while level:
            level = {pid for pid, (parent, _) in parents.items() if parent in level}
            found |= {pid: parents[pid][1] for pid in level}
        return found

    def named(self, name: str) -> int | None:
        """Return the pid of the descendant of that name, if there is one."""
        return next((pid for pid, found in self.descendants().items() if found == name), None)

    def is_alive(self, pid: int) -> bool:
        """Whether a descendant still runs."""
        self.reap()
        if pid in self._ended:
            return False
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    def kill_all(self, timeout_seconds: float = 10.0) -> None:
        """End everything below this process, new children of dying ones included."""
        deadline = time.monotonic() + timeout_seconds
        while (pids := self.descendants()) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.reap()
            time.sleep(0.02)
        self.reap()


class SignalPause:
    """Pauses of the main thread that end early when a child ends, or any signal with a handler comes.

    A signal that comes between two pauses ends the next. No threading.Event: a handler that sets one may have
    interrupted the main thread inside that very Event, and then waits for its lock for ever.
    """

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        # a full buffer does no harm: the next pause ends at once anyway
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # ignored, it would wake nobody

    def wait(self, seconds: float) -> None:
        """Wait this long, or until a signal comes."""
        if select.select([self._read], [], [], seconds)[0]:
            with contextlib.suppress(BlockingIOError):
                while self._read.recv(4096):
                    pass
