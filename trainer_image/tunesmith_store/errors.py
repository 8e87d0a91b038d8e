"""How a pod's work can fail, sorted by what helps: another spec, or another try.

Raised by the store, the trainer and the quantizer; their main programs turn them into exit codes and reasons.
"""

from __future__ import annotations

import errno
from typing import Any

from tunesmith_api.keys import ExitCode, Reason

__all__ = ["FULL", "Failure", "Retryable", "UserError", "is_disk_full"]

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Numbers of the errors by which the kernel says that a disk is full."""


class Failure(Exception):
    """Base of what is raised on purpose. Survives pickling: it crosses from a training rank to the driver."""

    def __init__(self, reason: Reason, message: str, exit_code: ExitCode) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), dict(self.__dict__))


def _rebuild(kind: type[Failure], state: dict[str, Any]) -> Failure:
    error = kind.__new__(kind)
    Exception.__init__(error, state["message"])
    error.__dict__.update(state)
    return error


class UserError(Failure):
    """The spec, the data, the model or the size of the machine is at fault: a retry can't help."""

    def __init__(self, reason: Reason, message: str, exit_code: ExitCode = ExitCode.INVALID_INPUT) -> None:
        super().__init__(reason, message, exit_code)


class Retryable(Failure):
    """A peer, a network or a store was lost: training goes on from the newest checkpoint."""

    def __init__(
        self, message: str, reason: Reason = Reason.WORKER_CRASHED, exit_code: ExitCode = ExitCode.CRASHED
    ) -> None:
        super().__init__(reason, message, exit_code)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that a disk of this machine is full. Libraries tell it in errors of their own, too."""
    if isinstance(error, Failure):
        return False
    code = error.errno if isinstance(error, OSError) else None
    return code in FULL or "No space left on device" in str(error)
