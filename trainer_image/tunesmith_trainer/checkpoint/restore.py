"""One rank's restore: fetch what it needs of a checkpoint, verified, and only then put it into model and optimizer.

Ranks of one pod share what they fetch: a file is downloaded by whoever gets to it first, and appears under its digest
once it is verified. Called by `checkpointer`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from tunesmith_api.artifacts import CheckpointManifest, FileEntry
from tunesmith_store.errors import Retryable
from tunesmith_store.files import copy_hashed, locked
from tunesmith_store.store import NotFound, ObjectStore
from tunesmith_trainer.checkpoint.capacity import DiskFull, DiskUsage, disk_full, need_disk
from tunesmith_trainer.checkpoint.optimizer_state import restore_state
from tunesmith_trainer.checkpoint.shards import PartIndex, Reading, Whole, part_name, plan_reading, wholes_of
from tunesmith_trainer.checkpoint.snapshot import STATE
from tunesmith_trainer.checkpoint.state import RunState, is_optimizer_key, trained_parameters, trained_tensors

__all__ = ["Damaged", "Fetched", "Source", "fetch"]

T = TypeVar("T")


class Damaged(Exception):
    """A checkpoint lacks something or holds something else than its manifest says: the one before is used."""


@dataclass(frozen=True)
class Fetched:
    """A checkpoint whose files are here and right."""

    state: RunState
    _reading: Reading
    _paths: dict[str, Path]
    _wholes: dict[str, Whole]

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> RunState:
        """Fill the tensors of the model and, where the optimizer is given, its state; return the run's."""
        for name, tensor in trained_tensors(model).items():
            self._reading.read(name, self._paths, tensor)
        if optimizer is not None:
            keys: dict[str, list[str]] = {}
            for key in filter(is_optimizer_key, self._wholes):
                keys.setdefault(key.rpartition(":")[0], []).append(key)
            for name, parameter in trained_parameters(model).items():
                # one parameter after the other, and the old state first: there is never a second copy of all
                optimizer.state.pop(parameter, None)
                if state := {key.rpartition(":")[2]: self._read(key, parameter) for key in keys.get(name, ())}:
                    restore_state(optimizer, parameter, state)
        return self.state

    def _read(self, key: str, parameter: nn.Parameter) -> torch.Tensor:
        """Read one part of a parameter's state."""
        tensor = _like(parameter, self._wholes[key])
        self._reading.read(key, self._paths, tensor)
        return tensor


def _like(parameter: nn.Parameter, whole: Whole) -> torch.Tensor:
    """Make a tensor for one part of a parameter's state, sharded as the parameter is where it has its shape."""
    if whole.shape and whole.shape == tuple(parameter.shape):
        return torch.empty_like(parameter.detach(), dtype=whole.dtype)
    return torch.empty(whole.shape, dtype=whole.dtype)


@dataclass(frozen=True)
class Source:
    """One checkpoint in object storage and the local folder for its files."""

    store: ObjectStore
    uri: str
    manifest: CheckpointManifest
    folder: Path
    """Shared by the ranks of a pod."""
    pool: Executor

    def get(self, names: Sequence[str]) -> dict[str, Path]:
        """Fetch files, several at once.

        Raises:
            Damaged: one is missing or not what the manifest says.
            Failure: the store can't be read.
        """
        entries = {entry.path: entry for entry in self.manifest.files}
        if unknown := [name for name in names if name not in entries]:
            raise Damaged(f"{unknown[0]} is not in its manifest")
        return dict(zip(names, self.pool.map(lambda name: self._get(entries[name]), names), strict=True))

    def _get(self, entry: FileEntry) -> Path:
        path = self.folder / entry.sha256
        with locked(self.folder / f"{entry.sha256}.lock"):
            if not path.exists():
                part = self.folder / f"{entry.sha256}.part"
                try:
                    digest = copy_hashed(self.store, f"{self.uri}/{entry.path}", entry.size, part)
                except NotFound as error:
                    raise Damaged(f"{entry.path} is missing") from error
                if digest != entry.sha256:
                    part.unlink()
                    raise Damaged(f"{entry.path} is not what its digest says")
                part.replace(path)
        return path

    def size_of(self, names: Sequence[str]) -> int:
        """Return the bytes of those files that are not here yet."""
        wanted = set(names)
        return sum(
            entry.size
            for entry in self.manifest.files
            if entry.path in wanted and not (self.folder / entry.sha256).exists()
        )


def fetch(
    source: Source,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    *,
    first: float,
    disk_usage: DiskUsage = shutil.disk_usage,
) -> Fetched:
    """Fetch what this rank needs to fill the bare model and, where it is given, its optimizer. Neither is changed.

    `first` (0 to 1) says where in the list of files to begin: ranks of a pod that begin at different files share the
    work.

    Raises:
        Damaged: the checkpoint can't be used.
        Failure: it can't be read, there is no room on the disk, or it is another model's.
    """
    indices = [part_name(rank) for rank in range(source.manifest.world_size)]
    small = source.get([STATE, *indices])
    parts = _parsed(lambda: [PartIndex.from_json(small[name].read_bytes()) for name in indices])
    state = _parsed(lambda: RunState.from_json(small[STATE].read_bytes()))
    wholes = _parsed(lambda: wholes_of(parts))
    tensors = trained_tensors(model)
    if set(tensors) != {key for key in wholes if not is_optimizer_key(key)}:
        raise Retryable("the checkpoint's weights are not this model's")
    if optimizer is not None:
        tensors |= _stand_ins(trained_parameters(model), wholes)
    reading = _parsed(lambda: plan_reading(parts, tensors))
    names = reading.files
    start = int(first * len(names))
    try:
        need_disk(source.folder, source.size_of(names), disk_usage)
        paths = source.get([*names[start:], *names[:start]])
    except (DiskFull, OSError) as error:
        full = error if isinstance(error, DiskFull) else disk_full(error)
        if full is None:
            raise
        raise full.refused(f"fetch the checkpoint of step {source.manifest.step}") from error
    return Fetched(state, reading, paths, wholes)


def _stand_ins(parameters: Mapping[str, nn.Parameter], wholes: Mapping[str, Whole]) -> dict[str, torch.Tensor]:
    """Return, by key, tensors shaped and sharded like the optimizer's, to plan by; those take no memory of their own.

    Raises:
        Damaged: the checkpoint holds state of a parameter that the model doesn't have.
    """
    found = {}
    for key, whole in wholes.items():
        if is_optimizer_key(key):
            parameter = parameters.get(key.rpartition(":")[0])
            if parameter is None:
                raise Damaged(f"{key} belongs to no trained parameter")
            alike = whole.shape == tuple(parameter.shape)
            found[key] = parameter.detach() if alike else _like(parameter, whole)
    return found


def _parsed(make: Callable[[], T]) -> T:
    try:
        return make()
    except ValueError as error:
        raise Damaged(str(error)) from error
