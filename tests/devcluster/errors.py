"""What can go wrong with a local cluster, in the words a caller can act upon."""

from collections.abc import Sequence


class UnsupportedMachine(RuntimeError):
    """This machine cannot run such a cluster; the message says what is missing and what to do. Tests skip on it."""


class ClusterFailed(RuntimeError):
    """A part of the cluster died or was not ready in time; the message ends with the tail of its log."""


class CommandFailed(RuntimeError):
    """A command ended with a status other than 0; the message holds what it wrote to standard error."""

    def __init__(self, argv: Sequence[str], status: int, stdout: str, stderr: str) -> None:
        super().__init__(f"{' '.join(argv)} ended with status {status}: {stderr.strip() or stdout.strip()}")
        self.status = status
        self.stdout = stdout
        self.stderr = stderr
