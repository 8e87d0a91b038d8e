"""Whether the kernel killed something in this pod for want of memory: the killed can't tell, so `supervisor` asks."""

from __future__ import annotations

from pathlib import Path

__all__ = ["oom_kills"]

EVENTS = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))


def oom_kills() -> int:
    """Return how many processes of this container the kernel has killed for want of memory (cgroup v1 or v2)."""
    for path in EVENTS:
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
    return 0
