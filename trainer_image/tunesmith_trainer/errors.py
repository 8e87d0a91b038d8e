"""The ways to end that only training has; the others are in `tunesmith_store.errors`."""

from __future__ import annotations

from pathlib import Path

from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.reports import CheckpointRef, MemoryFacts
from tunesmith_store.errors import Failure, Retryable, UserError

__all__ = ["Interrupted", "OutOfMemory", "SmallerMicroBatch", "StopRequested", "full_disk"]


class OutOfMemory(UserError):
    """A worker needs more memory than there is; with the numbers that halving the micro-batch needs."""

    def __init__(self, message: str, memory: MemoryFacts) -> None:
        super().__init__(Reason.OUT_OF_MEMORY, message, ExitCode.OUT_OF_MEMORY)
        self.memory = memory


class SmallerMicroBatch(Retryable):
    """A worker ran out of memory while it trained: the group goes on with half the micro-batch, to the same result."""

    def __init__(self, message: str) -> None:
        super().__init__(message, Reason.OUT_OF_MEMORY)


class Interrupted(Failure):
    """A pod of the group got SIGTERM; a checkpoint was saved where there was anything to save."""

    def __init__(self, checkpoint: CheckpointRef | None) -> None:
        saved = f"saved step {checkpoint.step} to {checkpoint.uri}" if checkpoint else "nothing to save yet"
        super().__init__(Reason.INTERRUPTED, f"a worker was told to stop: {saved}", ExitCode.INTERRUPTED)
        self.checkpoint = checkpoint


class StopRequested(Exception):
    """Some pod of the group got SIGTERM; known to all ranks at the same point. `run` saves, and raises Interrupted."""


def full_disk(folder: Path, error: BaseException) -> UserError:
    """Return what to raise where the pod's own disk is full: to start anew on it would end the same."""
    message = (
        f"no room left on the pod's disk, in {folder}: {error}; give the pods more ephemeral storage, or a local run "
        "another --work-dir"
    )
    return UserError(Reason.DISK_FULL, message)
