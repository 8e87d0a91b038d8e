"""Whether the kernel killed something in this pod for want of memory: the killed can't tell, so `supervisor` asks."""

from __future__ import annotations

from pathlib import Path

__all__ = ["memory_limit", "memory_limit_bytes", "oom_kills"]

EVENTS = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def _read(paths: tuple[Path, ...]) -> str:
    for path in paths:
        try:
            return path.read_text()
        except OSError:
            continue
    return ""


def oom_kills() -> int:
    """Return how many processes of this container the kernel has killed for want of memory (cgroup v1 or v2)."""
    for line in _read(EVENTS).splitlines():
        name, _, value = line.partition(" ")
        if name == "oom_kill":
            return int(value)
    return 0


def memory_limit_bytes() -> int:
    """Return the container's memory limit in bytes; 0 where there is none."""
    text = _read(LIMITS).strip()
    return int(text) if text.isdigit() and int(text) <= 1 << 60 else 0


def memory_limit() -> str:
    """Return the container's memory limit for people, "unlimited" where there is none."""
    limit = memory_limit_bytes()
    return f"{limit / 2**30:.2f} GiB" if limit else "unlimited"
