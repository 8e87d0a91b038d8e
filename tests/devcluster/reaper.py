"""Removes clusters: the one that is asked for, and what clusters left behind whose owner was killed.

Everything here may run twice, at any moment, and on any half-made cluster. The namespaces have mostly cleaned up by
themselves (``sandbox.py``); what outlives them is a folder, empty cgroups and processes started in the network alone.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from devcluster import paths, state
from devcluster.cgroups import remove
from devcluster.errors import ClusterFailed
from devcluster.processes import ProcessId, wait_until, with_environment
from devcluster.sandbox import MARK

GONE_SECONDS = 15.0
HALF_MADE_SECONDS = 60.0


def reap() -> list[str]:
    """Remove every cluster whose owner is dead and that was not to be kept. Returns their ids."""
    with paths.locked(paths.cache() / "reaper.lock"):
        return [identifier for identifier, alive in _clusters() if not alive and remove_cluster(identifier)]


def _clusters() -> Iterator[tuple[str, bool]]:
    if not paths.clusters().is_dir():
        return
    for folder in sorted(paths.clusters().iterdir()):
        found = state.read(folder)
        if found is not None:
            yield folder.name, found.running
        else:
            # No state yet: made this very moment, or its maker was killed before the first write.
            with contextlib.suppress(FileNotFoundError):
                yield folder.name, time.time() - folder.stat().st_mtime < HALF_MADE_SECONDS


def remove_cluster(identifier: str) -> bool:
    """End a cluster's processes and remove what it left; True where there was something."""
    folder = paths.clusters() / identifier
    found = state.read(folder)
    existed = folder.exists()
    if found is not None and found.init is not None:
        found.init.kill()
    _kill_marked(identifier)
    remove(identifier)
    _remove_folder(folder)
    return existed


def _kill_marked(identifier: str) -> None:
    """Kill what carries the cluster's mark, until nothing does any more."""
    left: list[ProcessId] = []

    def none_left() -> bool:
        marked = with_environment(f"{MARK}={identifier}")
        left[:] = [process for process in marked if process.alive and process.pid != os.getpid()]
        for process in left:
            process.kill()
        return not left

    if not wait_until(none_left, GONE_SECONDS, every=0.1):
        raise ClusterFailed(f"processes {[process.pid for process in left]} of cluster {identifier} do not end")


def _remove_folder(folder: Path) -> None:
    # All mounts were private to namespaces that are gone. One that is still there is nothing of ours to delete into.
    mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    inside = [mount for mount in mounted if Path(mount).is_relative_to(folder)]
    if inside:
        raise ClusterFailed(f"{inside[0]} is still mounted: unmount it, then remove {folder}")
    shutil.rmtree(folder, ignore_errors=True)
