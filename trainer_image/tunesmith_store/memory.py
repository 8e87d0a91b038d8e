"""The memory of this container: how much it may take, what of that is left, who was killed for it.

Used by the trainer and the server. Standard library only: a pod's first process asks.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

__all__ = [
    "give_back_free",
    "memory_limit",
    "memory_limit_bytes",
    "oom_kills",
    "own_bytes",
    "peak_resident_bytes",
    "spare_memory",
]

# cgroup v2, then v1
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
EVENTS = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))
STATISTICS = (Path("/sys/fs/cgroup/memory.stat"), Path("/sys/fs/cgroup/memory/memory.stat"))


def memory_limit_bytes() -> int:
    """Return the container's memory limit in bytes; 0 where there is none."""
    text = _read(LIMITS).strip()
    return int(text) if text.isdigit() and int(text) <= 1 << 60 else 0


def memory_limit() -> str:
    """Return the container's memory limit for people, "unlimited" where there is none."""
    limit = memory_limit_bytes()
    return f"{limit / 2**30:.2f} GiB" if limit else "unlimited"


def own_bytes(figure: str) -> int:
    """Return a figure of this process from /proc/self/status (VmRSS, VmData, RssAnon), 0 where the kernel has none."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{figure}:")), 0)


def peak_resident_bytes() -> int:
    """Return the most that this process has held in memory so far.

    Not getrusage's ru_maxrss: a program that is started inherits it from the process that starts it, however large.
    """
    return own_bytes("VmHWM")


def give_back_free() -> None:
    """Give the kernel back what is free in this process's heap: glibc keeps it below whatever is in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc only
        trim(0)


def spare_memory() -> int:
    """Return the bytes of host memory that this container may still take."""
    spare = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            spare = int(line.split()[1]) * 1024
    limit = memory_limit_bytes()
    return min(spare, max(0, limit - _container_memory())) if limit else spare


def oom_kills() -> int:
    """Return how many processes of this container the kernel has killed for want of memory: the killed can't tell."""
    lines = _read(EVENTS).splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _container_memory() -> int:
    """Return what the container holds and the kernel can't take back."""
    lines = dict(line.split() for line in _read(STATISTICS).splitlines())
    return int(lines.get("anon") or lines.get("total_rss") or 0)


def _read(paths: tuple[Path, ...]) -> str:
    for path in paths:
        try:
            return path.read_text()
        except OSError:
            continue
    return ""
