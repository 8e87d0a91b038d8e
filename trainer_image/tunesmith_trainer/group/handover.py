"""From Ray's process to the one that trains. Light on imports: Ray's end of it needs no torch. Used by `driver`.

Ray Train places a worker of its own for each rank, watches it and restarts it. That worker only holds one end of a
socket; at the other end trains a process that the supervisor has started at the same time as Ray, so that importing
torch and transformers and fetching the model take no time of their own. Each ends when the other does.
"""

from __future__ import annotations

import os
import re
import socket
import time
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

from tunesmith_api import keys
from tunesmith_store.errors import Retryable
from tunesmith_trainer.pod.environment import PodEnvironment

__all__ = [
    "Answer",
    "Assignment",
    "ProcessLost",
    "announce_address",
    "assign",
    "hand_over",
    "last_words",
    "pick_address",
]

POLL_SECONDS = 0.05
WAIT_SECONDS = 60.0
"""For a training process that is being started anew."""
ADDRESS_VARIABLE = "TUNESMITH_GROUP_ADDRESS"
"""Where rank 0 listens: picked in its process, told to all others by Ray Train's controller."""
_WARNING = re.compile(r"\S+:\d+: \w*Warning: ")
"""Of Python's `warnings`; the line of source follows, indented."""


@dataclass(frozen=True)
class Assignment:
    """What Ray Train has decided about one rank."""

    rank: int
    world_size: int
    address: str
    """Where rank 0 listens, "host:port"."""
    run_digest: str


@dataclass(frozen=True)
class Answer:
    """How it went: a result, or an error to raise."""

    result: dict[str, Any] | None = None
    error: BaseException | None = None


class ProcessLost(Retryable):
    """The training process ended without an answer: killed, or a crash below Python."""


def hand_over(run_digest: str) -> dict[str, Any]:
    """Have a training process of this pod train as the rank that Ray Train has given to this worker.

    Returns:
        Its result.

    Raises:
        ProcessLost: it ended, or doesn't start.
        Exception: whatever training raised.
    """
    from ray.train import get_context

    context = get_context()
    assignment = Assignment(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        address=_announced_address(),
        run_digest=run_digest,
    )
    return assign(PodEnvironment.read(), context.get_local_rank(), assignment)


def assign(pod: PodEnvironment, number: int, assignment: Assignment) -> dict[str, Any]:
    """Give training process `number` its assignment and wait for its result. Raises as `hand_over` does."""
    try:
        with _connected(pod.training_socket(number)) as connection:
            connection.send(assignment)
            answer: Answer = connection.recv()
    except (EOFError, OSError) as error:
        message = f"{pod.name_of(assignment.rank)} ended unexpectedly{last_words(pod.training_log(number))}"
        raise ProcessLost(message) from error
    if answer.error is not None:
        raise answer.error
    return answer.result or {}


def _connected(path: Path) -> Connection[Any, Any]:
    """Connect to a process that waits or still imports; the supervisor sees to it that there is one."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return Client(str(path), "AF_UNIX")
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline:
                raise
        time.sleep(POLL_SECONDS)


def last_words(log: Path) -> str:
    """The last line that a process has written, as the end of a sentence. Python's warnings aren't what it died of."""
    said, is_warned = "", False
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        is_source, is_warned = is_warned and line.startswith("  "), _WARNING.match(line) is not None
        if line.strip() and not is_source and not is_warned:
            said = line.strip()
    return f"; it said last: {said[:300]}" if said else ""


def pick_address() -> str:
    """Return "ip:port" of a free port of this pod; run in rank 0's process."""
    ip = os.environ[keys.ENV_POD_IP]
    with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET) as probe:
        probe.bind((ip, 0))
        port = probe.getsockname()[1]
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def announce_address(where: str) -> None:
    """Remember rank 0's address; run in every rank's process."""
    os.environ[ADDRESS_VARIABLE] = where


def _announced_address() -> str:
    """Return what was announced to this process."""
    return os.environ[ADDRESS_VARIABLE]
