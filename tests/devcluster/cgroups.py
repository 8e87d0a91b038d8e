"""The cgroups of a cluster's nodes: one root per node, in every hierarchy of version 1 or in the one of version 2."""

import contextlib
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from devcluster.processes import wait_until
from devcluster.spec import MAX_NODES

ROOT = Path("/sys/fs/cgroup")
GONE_SECONDS = 5.0


def name(identifier: str, node: int) -> str:
    """Name of a node's root cgroup."""
    return f"tunesmith-{identifier}-n{node}"


def hierarchies() -> list[Path]:
    """Mount points of the hierarchies that the kubelet uses."""
    if (ROOT / "cgroup.controllers").exists():
        return [ROOT]
    return sorted(entry for entry in ROOT.iterdir() if (entry / "tasks").exists() and not entry.is_symlink())


def make(identifier: str, node: int) -> str:
    """Make a node's root cgroup everywhere and return its name."""
    made = name(identifier, node)
    for hierarchy in hierarchies():
        if hierarchy == ROOT:
            # All of them, or the kubelet does not take the cgroup for one; singly, for one may be refused.
            for controller in (ROOT / "cgroup.controllers").read_text().split():
                with contextlib.suppress(OSError):
                    (ROOT / "cgroup.subtree_control").write_text(f"+{controller}")
        (hierarchy / made).mkdir(exist_ok=True)
        for setting in ("cpuset.cpus", "cpuset.mems"):
            # Version 1 starts these empty, and no process can enter a cpuset without processors.
            if hierarchy != ROOT and (hierarchy / setting).exists():
                (hierarchy / made / setting).write_text((hierarchy / setting).read_text())
    return made


def pod_processes(identifier: str, node: int, pod_uid: str) -> list[int]:
    """Numbers, as the machine sees them, of all processes of a pod on a node."""
    first = hierarchies()[0]
    pids: list[int] = []
    for folder, _, _ in os.walk(first / name(identifier, node)):
        if f"pod{pod_uid}" in folder:
            with contextlib.suppress(OSError):
                pids += [int(line) for line in (Path(folder) / "cgroup.procs").read_text().split()]
    return pids


def remove(identifier: str, nodes: Iterable[int] = range(1, MAX_NODES + 1)) -> None:
    """Remove the empty cgroups of a cluster's nodes.

    In every hierarchy: where both versions are mounted, runc makes its own in the ``unified`` one too.
    """
    for hierarchy in (ROOT, *(entry for entry in ROOT.iterdir() if entry.is_dir())):
        for node in nodes:
            root = hierarchy / name(identifier, node)
            if root.exists():
                wait_until(partial(_removed, root), GONE_SECONDS, every=0.1)


def _removed(root: Path) -> bool:
    for folder, _, _ in os.walk(root, topdown=False):
        with contextlib.suppress(OSError):
            Path(folder).rmdir()
    return not root.exists()
