"""Can this machine run the demo? Called first, so that nobody waits for a no."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

MIN_MEMORY_GIB = 10
MIN_DISK_GIB = 15


def shortcomings() -> list[str]:
    """What is missing and what to do, one sentence each; empty where the demo can run."""
    if sys.platform != "linux":
        return [
            "it is not Linux: run the demo in a Linux virtual machine, or install the chart on a cluster you have (README.md)"
        ]
    found = []
    if os.geteuid() != 0:
        found.append("containers and network namespaces need root: run `sudo make demo`")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if memory < MIN_MEMORY_GIB:
        found.append(f"it has {memory:.0f} GiB of memory and the demo takes {MIN_MEMORY_GIB}: use a larger machine")
    cache = Path(os.environ.get("TUNESMITH_CACHE") or Path.home())
    free = shutil.disk_usage(cache if cache.exists() else Path.home()).free / 2**30
    if free < MIN_DISK_GIB:
        found.append(
            f"{cache} has {free:.0f} GiB free and the demo takes {MIN_DISK_GIB}: set TUNESMITH_CACHE to a larger disk"
        )
    return found
