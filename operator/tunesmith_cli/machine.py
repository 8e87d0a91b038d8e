"""What this machine has for a run: cores, GPUs, free ports, a trainer, and a folder for temporary files."""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tunesmith_api.v1alpha1 import FineTuneJobSpec
from tunesmith_cli.errors import Refused

__all__ = ["Scratch", "check_gpus", "check_trainer", "cores", "free_ports", "gpus", "scratch_folder"]

SHORT_FOLDER = Path("/tmp")  # noqa: S108 - only links to folders of this program are created there
MAX_SCRATCH = 30
"""Longest path of the scratch folder, in bytes: Ray's sockets lie 72 below it, and Linux allows 107."""
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
DEVICES = Path("/dev")


@dataclass
class Scratch:
    """Where one run keeps its temporary files."""

    folder: Path
    short: Path
    """The same by a path that is short enough for Ray's sockets."""
    kept: bool = False


def check_trainer() -> None:
    """Say what is missing before anything is started.

    Raises:
        Refused: the trainer isn't installed here.
    """
    wanted = ("tunesmith_trainer", "torch", "ray", "transformers")
    absent = [name for name in wanted if find_spec(name) is None]
    if absent:
        missing = ", ".join(absent)
        raise Refused(
            f"the trainer isn't installed here ({missing}): in Tunesmith's checkout, pip install '.[cli]'", code=1
        )


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def gpus(environ: Mapping[str, str] = os.environ) -> int:
    """GPUs that a child of this process would see; found without a driver library."""
    if "CUDA_VISIBLE_DEVICES" in environ:
        return len([name for name in environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip() not in ("", "-1")])
    if NVIDIA_GPUS.is_dir():
        return len(list(NVIDIA_GPUS.iterdir()))
    return len([path for path in DEVICES.glob("nvidia*") if re.fullmatch(r"nvidia[0-9]+", path.name)])


def check_gpus(spec: FineTuneJobSpec, found: int) -> None:
    """See that there are as many GPUs as the workers ask for.

    Raises:
        Refused: there are fewer.
    """
    replicas, each = spec.workers.replicas, spec.workers.gpus_per_worker
    if replicas * each <= found:
        return
    number = f"{each} GPUs" if each > 1 else "1 GPU"
    if each <= found:
        fewer = f"Use fewer (--set spec.workers.replicas={found // each}), or the CPU"
    elif found:
        fewer = f"Use fewer (--set spec.workers.replicas=1 --set spec.workers.gpusPerWorker={found}), or the CPU"
    else:
        fewer = "Use the CPU"
    raise Refused(
        f"spec.workers: {replicas} replicas with {number} each; this machine has {found}. {fewer} "
        "(--set spec.workers.gpusPerWorker=0): the result is the same"
    )


def free_ports(count: int) -> list[int]:
    """So many ports of the loopback that nobody listens on."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


@contextmanager
def scratch_folder(work_dir: Path | None) -> Iterator[Scratch]:
    """Make a new folder for one run's temporary files, below `work_dir` or where temporary files go.

    It is removed at the end. Where it has been marked as kept, its files stay, and folders go: those are copies.

    Raises:
        Refused: it can't be created.
    """
    parent = work_dir.expanduser().absolute() if work_dir is not None else Path(tempfile.gettempdir())
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="ts-", dir=parent))
    except OSError as error:
        raise Refused(f"--work-dir {parent}: {error.strerror}") from error
    link = SHORT_FOLDER / f"{folder.name}-{os.getpid()}" if len(os.fsencode(folder)) > MAX_SCRATCH else None
    if link is not None:
        link.symlink_to(folder)
    scratch = Scratch(folder, link or folder)
    try:
        yield scratch
    finally:
        if link is not None:
            link.unlink(missing_ok=True)
        for path in [path for path in folder.iterdir() if path.is_dir()] if scratch.kept else [folder]:
            shutil.rmtree(path, ignore_errors=True)
