"""One of this package's modules as a process of its own, which gives its memory back and says in words what it refuses.

`evaluation` and `calibration` start them, and answer in them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tunesmith_api.keys import ExitCode, Reason
from tunesmith_store.errors import Failure, UserError

__all__ = ["answer_for", "run_module"]

KILLED = -9


def run_module(
    module: str,
    arguments: list[str],
    task: str,
    output: Path,
    *,
    out_of_memory: str,
    environment: Mapping[str, str] = {},
) -> None:
    """Run a module until it has written `output`; `task` is its stdin.

    Raises:
        UserError: it refuses what it was given, or `out_of_memory`.
        RuntimeError: it failed.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    output.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        input=task,
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        errors="replace",
    )
    if done.returncode == 0 and output.is_file():
        return
    last = "".join([line for line in done.stderr.splitlines() if line.strip()][-1:])
    if done.returncode == KILLED or "can't allocate memory" in last:
        raise UserError(Reason.OUT_OF_MEMORY, out_of_memory, ExitCode.OUT_OF_MEMORY)
    reason, _, message = last.partition(": ")
    if done.returncode == ExitCode.INVALID_INPUT and reason in set(Reason):
        raise UserError(Reason(reason), message)
    raise RuntimeError(f"{module} failed: {last or f'exit status {done.returncode}'}")


def answer_for(work: Callable[[], None]) -> int:
    """Do the work of such a process; return its exit status."""
    try:
        work()
    except Failure as failure:
        message = " ".join(failure.message.split())
        print(f"{failure.reason}: {message}", file=sys.stderr, flush=True)
        return int(failure.exit_code)
    return 0
