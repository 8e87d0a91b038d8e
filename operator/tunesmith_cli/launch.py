"""The trainer's supervisor as a child process: its environment is a pod's, with all workers in one pod.

`run` starts it, asks it for progress, signals it to stop, and kills it with everything below it if it has to.
"""

from __future__ import annotations

import ctypes
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from tunesmith_api import keys
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.reports import ProgressReport, TerminationReport

__all__ = ["HOST", "Trainer", "environment_of"]

HOST = "127.0.0.1"
PR_SET_PDEATHSIG = 1
USER_FILES = {"AWS_SHARED_CREDENTIALS_FILE": ".aws/credentials", "AWS_CONFIG_FILE": ".aws/config"}
HUB_TOKEN_FILE = ".cache/huggingface/token"  # noqa: S105 - a path


def environment_of(
    plan: TrainingPlan, scratch: Path, volumes: Path, cores: int, ports: tuple[int, int], environ: Mapping[str, str]
) -> dict[str, str]:
    """What the supervisor finds: this process's environment, and a pod's variables.

    The trainer's HOME is scratch, so that credentials in files of the user's own are named to it.
    """
    home = Path(environ.get("HOME") or Path.home())
    own = {name: str(home / path) for name, path in USER_FILES.items() if (home / path).is_file()}
    with suppress(OSError):
        own[keys.HUB_SECRET_KEYS[0]] = (home / HUB_TOKEN_FILE).read_text().strip()
    progress_port, ray_port = ports
    pod = {
        keys.ENV_WORKER_INDEX: "0",
        keys.ENV_POD_IP: HOST,
        keys.ENV_POD_NAME: plan.name,
        keys.ENV_RAY_TOKEN: secrets.token_hex(16),
        keys.ENV_PLAN: str(scratch / keys.PLAN_FILE),
        keys.ENV_SCRATCH: str(scratch),
        keys.ENV_TERMINATION_LOG: str(scratch / "termination.json"),
        keys.ENV_VOLUMES: str(volumes),
        keys.ENV_CPU_LIMIT: str(1000 * cores),
        keys.ENV_PROCESSES: str(plan.world_size),
        keys.ENV_PROGRESS_PORT: str(progress_port),
        keys.ENV_RAY_PORT: str(ray_port),
        "PYTHONUNBUFFERED": "1",
    }
    if search := environ.get("PYTHONPATH"):  # the supervisor works in another folder
        pod["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in search.split(os.pathsep) if entry)
    return {**own, **environ, **pod}


def _end_with_parent() -> None:
    """In the child: receive SIGTERM when the command line itself is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


@dataclass
class Trainer:
    """A running supervisor."""

    process: subprocess.Popen[str]
    log_file: Path
    termination_file: Path
    progress_port: int
    _lines: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)
    _reader: threading.Thread | None = None

    @classmethod
    def start(cls, environment: Mapping[str, str], folder: Path) -> Trainer:
        """Start it in a session of its own: Ctrl-C at the terminal is for the command line, which passes it on."""
        log_file = folder / "trainer.log"
        with log_file.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tunesmith_trainer"],
                env=dict(environment),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                errors="replace",
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        port = int(environment[keys.ENV_PROGRESS_PORT])
        trainer = cls(process, log_file, Path(environment[keys.ENV_TERMINATION_LOG]), port)
        trainer._reader = threading.Thread(target=trainer._read, name="trainer's output", daemon=True)
        trainer._reader.start()
        return trainer

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.log_file.open("a") as log:
            for line in self.process.stdout:
                log.write(line)
                log.flush()
                self._lines.put(line.rstrip("\n"))

    def lines(self) -> list[str]:
        """What it has printed for people since the last call."""
        found = []
        with suppress(queue.Empty):
            while True:
                found.append(self._lines.get_nowait())
        return found

    def progress(self) -> ProgressReport | None:
        """Ask how far it is; None while it doesn't answer."""
        # no proxy of the environment: it is this very machine
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://{HOST}:{self.progress_port}{keys.PATH_PROGRESS}", timeout=2) as answer:
                return ProgressReport.from_json(answer.read())
        except (OSError, ValidationError):
            return None

    def exit_code(self) -> int | None:
        """How it ended; None while it runs."""
        return self.process.poll()

    def finish(self) -> None:
        """Read the rest of its output; after its end."""
        if self._reader is not None:
            self._reader.join(timeout=5)

    def report(self) -> TerminationReport | None:
        """The termination report that it left, if it left one."""
        try:
            return TerminationReport.from_json(self.termination_file.read_bytes())
        except (OSError, ValidationError):
            return None

    def stop(self) -> None:
        """Have it save a checkpoint and end."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and everything below it at once."""
        with suppress(ProcessLookupError):
            # it would start again what is killed first
            self.process.send_signal(signal.SIGSTOP)
        for pid in (*_descendants(self.process.pid), self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def _descendants(root: int) -> list[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, ValueError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found: list[int] = []
    level = {root}
    while level := {pid for pid, parent in parents.items() if parent in level}:
        found += level
    return found
