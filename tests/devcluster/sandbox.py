"""Namespaces as a box for processes: one for a cluster, and one inside it for each of its nodes.

The first process of a box (``devtool init``) is process 1 of its PID namespace. When it ends, the kernel kills every
process of the box, including boxes inside it; mounts and network interfaces go with the last of them. A box without
``keep`` also ends when its owner dies, however it dies: init watches a pipe whose other end only the owner has.

Processes are started through nsenter(1), which stays as their parent outside the box.
"""

import contextlib
import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from devcluster.errors import ClusterFailed
from devcluster.processes import ProcessId, innermost, wait_until

T = TypeVar("T")
CLONE_NEWNET = 0x40000000
LOG_TAIL_LINES = 25
MARK = "TUNESMITH_DEVCLUSTER"
"""Environment variable that every process of a cluster carries, with the cluster's id."""


@dataclass
class Process:
    """A running program of a box."""

    name: str
    log: Path
    wrapper: ProcessId
    """The nsenter(1) outside: it ends with the program."""
    inner: ProcessId
    """The program itself."""
    popen: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    argv: tuple[str, ...] = ()

    @property
    def alive(self) -> bool:
        """Whether the program still runs."""
        if self.popen is not None:
            self.popen.poll()  # reaps it
        return self.inner.alive

    def stop(self, sig: int, seconds: float = 10.0) -> None:
        """Signal the program and wait until it is gone."""
        self.inner.kill(sig)
        wait_until(lambda: not self.alive, seconds)

    def tail(self) -> str:
        """The last lines of its log."""
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
        return ""

    def wait_ready(self, ready: Callable[[], bool], seconds: float) -> None:
        """Poll until ``ready``; ``ClusterFailed`` with the log's tail where the program died or took too long."""
        if not wait_until(lambda: not self.alive or ready(), seconds):
            raise ClusterFailed(f"{self.name} was not ready within {seconds:.0f} s; its log ends:\n{self.tail()}")
        if not self.alive:
            raise ClusterFailed(f"{self.name} died; its log ends:\n{self.tail()}")


@dataclass
class Sandbox:
    """A box, known by its first process."""

    cluster_id: str
    init: ProcessId
    popen: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def command(self, argv: Sequence[str], *, pid: bool = False, mount: bool = True, net: bool = True) -> list[str]:
        """An argument list that runs ``argv`` inside; with ``pid`` it dies with the box."""
        flags = [flag for flag, on in (("--pid", pid), ("--mount", mount), ("--net", net)) if on]
        return ["nsenter", f"--target={self.init.pid}", *flags, "--", *argv]

    def environment(self) -> dict[str, str]:
        """This process's environment with the cluster's mark."""
        return dict(os.environ) | {MARK: self.cluster_id}

    def spawn(self, name: str, argv: Sequence[str], log: Path, *, path: str = "", fds: Sequence[int] = ()) -> Process:
        """Start a long-running program that dies with the box; its output is appended to ``log``."""
        environment = self.environment()
        if path:
            environment["PATH"] = f"{path}:{environment.get('PATH', '')}"
        with log.open("ab") as output:
            popen = subprocess.Popen(
                self.command(argv, pid=True),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=fds,
                start_new_session=True,
            )
        return Process(name, log, ProcessId.of(popen.pid), _settled(popen, 1, name, log), popen, tuple(argv))

    def run(self, argv: Sequence[str], *, stdin: str | None = None, mount: bool = True) -> str:
        """Run a short command inside and return its output; ``ClusterFailed`` where it fails."""
        done = subprocess.run(
            self.command(argv, mount=mount),
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            env=self.environment(),
        )
        if done.returncode:
            raise ClusterFailed(f"`{' '.join(argv)}` ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
        return done.stdout

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in a thread that has entered the box's network: sockets it opens are inside."""
        result = _Outcome[T]()

        def work() -> None:
            try:
                with Path(f"/proc/{self.init.pid}/ns/net").open("rb") as namespace:
                    libc = ctypes.CDLL(None, use_errno=True)
                    if libc.setns(namespace.fileno(), CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), "setns")
                result.value = function()
            except BaseException as error:
                result.error = error

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join()
        if result.error is not None:
            raise result.error
        assert result.value is not None
        return result.value

    def forward(self, devtool: str, target: str, log: Path, port: int = 0) -> tuple[int, Process]:
        """Make ``target`` (HOST:PORT inside) reachable at 127.0.0.1:<returned port> of the machine."""
        with socket.create_server(("127.0.0.1", port)) as listener:
            listener.set_inheritable(True)
            descriptor = listener.fileno()
            argv = [devtool, "relay", f"-listen-fd={descriptor}", f"-to={target}"]
            relay = self.spawn(f"relay to {target}", argv, log, fds=[descriptor])
            return listener.getsockname()[1], relay

    def destroy(self, seconds: float = 15.0) -> None:
        """End the box and everything in it; a box that is gone is fine."""
        self.init.kill()
        if not wait_until(lambda: not self.init.alive, seconds):
            raise ClusterFailed(f"process {self.init.pid}, first of cluster {self.cluster_id}, does not end")
        if self.popen is not None:
            self.popen.wait(seconds)


@dataclass
class _Outcome(Generic[T]):
    value: T | None = None
    error: BaseException | None = None


def create(
    cluster_id: str,
    devtool: str,
    log: Path,
    *,
    inside: Sandbox | None = None,
    init_arguments: Sequence[str] = (),
    fds: Sequence[int] = (),
) -> Sandbox:
    """Make a box: a cluster's, with a network of its own, or a node's ``inside`` that of its cluster.

    ``fds`` are kept open by the first process as long as it lives (locks, and the pipe to watch).
    """
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--propagation=private"]
    unshare += [] if inside else ["--net"]
    argv = [*unshare, "--", devtool, "init", *init_arguments]
    depth = 1
    if inside is not None:
        argv = inside.command(argv, pid=True)
        depth = 2
    with log.open("ab") as errors:
        popen = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=dict(os.environ) | {MARK: cluster_id},
            pass_fds=fds,
            start_new_session=True,
        )
    assert popen.stdout is not None
    with popen.stdout as said:
        if said.readline() != b"ready\n":
            popen.wait()
            raise ClusterFailed(f"the namespaces could not be made: {log.read_text(errors='replace')[-2000:]}")
    return Sandbox(cluster_id, _settled(popen, depth, "init", log), popen)


def _settled(popen: subprocess.Popen[bytes], depth: int, name: str, log: Path) -> ProcessId:
    """The program that the wrappers started, once they have."""
    found: list[ProcessId] = []

    def look() -> bool:
        inner = innermost(popen.pid, depth)
        found[:] = [inner] if inner else []
        return bool(found) or popen.poll() is not None

    if not wait_until(look, 10.0, every=0.005) or not found:
        raise ClusterFailed(f"{name} did not start; its log ends:\n{log.read_text(errors='replace')[-2000:]}")
    return found[0]
