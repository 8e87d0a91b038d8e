"""Whether there is room: a checkpoint must not fill the disk.

Used by `checkpointer` before it writes a snapshot and before it fetches a checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tunesmith_api.keys import Reason
from tunesmith_store.errors import FULL, UserError

__all__ = ["DiskFull", "DiskUsage", "disk_full", "need_disk"]

MARGIN_BYTES = 1 << 30
MARGIN_SHARE = 0.05
"""A gibibyte stays free, or a twentieth of a disk smaller than 20 GiB: others write there too."""


class Usage(Protocol):
    """What is asked of `shutil.disk_usage`."""

    @property
    def total(self) -> int:
        """Bytes of the file system."""

    @property
    def free(self) -> int:
        """Bytes that may still be written."""


DiskUsage = Callable[[Path], Usage]


class DiskFull(Exception):
    """There is no room; the text says how much is needed and how much is there."""

    def refused(self, purpose: str) -> UserError:
        """Return what to raise where the run can't do without."""
        message = f"no room on the pod's disk to {purpose}: {self}; give the pod more ephemeral storage"
        return UserError(Reason.DISK_FULL, message)


def need_disk(folder: Path, needed: int, usage: DiskUsage = shutil.disk_usage) -> None:
    """Make sure that `needed` bytes fit onto the disk of `folder`, and some are left.

    Raises:
        DiskFull: they don't.
    """
    found = usage(folder)
    margin = min(MARGIN_BYTES, int(found.total * MARGIN_SHARE))
    if needed + margin > found.free:
        raise DiskFull(
            f"{needed / 1e6:,.0f} MB are needed and {margin / 1e6:,.0f} MB must stay free, but only "
            f"{found.free / 1e6:,.0f} of {found.total / 1e6:,.0f} MB are free at {folder}"
        )


def disk_full(error: OSError) -> DiskFull | None:
    """Return the DiskFull that an error of the operating system means, if it means that."""
    return DiskFull(str(error)) if error.errno in FULL else None
