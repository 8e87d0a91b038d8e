"""One rank's part of one checkpoint: the snapshot, which the step waits for, and its upload, which it doesn't.

On the CPU the snapshot is written straight from the model's memory to files in scratch: they cost page cache, not
memory of the process, and each snapshot is written over the one before. From a GPU it is copied to pinned memory
first, and written to files beside training. Called by `checkpointer`.
"""

from __future__ import annotations

import shutil
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from tunesmith_api.artifacts import FileEntry
from tunesmith_store.files import entry_of_bytes, sha256_of
from tunesmith_store.memory import spare_memory
from tunesmith_store.store import ObjectStore
from tunesmith_trainer.checkpoint.capacity import DiskFull, DiskUsage, disk_full, need_disk
from tunesmith_trainer.checkpoint.shards import (
    PartIndex,
    Piece,
    facts_of,
    own_pieces,
    part_name,
    plan_files,
    write_file,
)
from tunesmith_trainer.checkpoint.state import RunState, held_tensors

__all__ = ["STATE", "Snapshot", "Snapshots"]

STATE = "state.json"


@dataclass(frozen=True)
class Snapshot:
    """What one rank has to upload; training can't change it any more."""

    step: int
    folder: Path
    files: dict[str, list[Piece]]
    state: bytes
    """The run's state as JSON; empty on all ranks but 0."""
    written: bool
    """Whether the files are there; otherwise the pieces are copies in pinned memory."""


@dataclass
class Snapshots:
    """Takes and uploads the snapshots of one rank."""

    rank: int
    world_size: int
    folder: Path
    """This rank's own."""
    disk_usage: DiskUsage
    neighbours: int = 1
    """How many ranks there are in this pod: they write to its disk at the same time."""
    _pinned: dict[str, torch.Tensor] = field(default_factory=dict)

    def take(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: RunState) -> Snapshot:
        """Copy this rank's pieces of the bare model and its optimizer.

        Raises:
            DiskFull: there is no room for them.
        """
        pieces = own_pieces(held_tensors(model, optimizer), self.rank, self.world_size)
        files = plan_files(pieces, self.rank)
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in [path for path in self.folder.iterdir() if path.name not in files]:
            path.unlink()
        held = sum(path.stat().st_size for path in self.folder.iterdir())
        more = max(0, sum(piece.size_bytes for piece in pieces) - held)
        need_disk(self.folder, more * self.neighbours, self.disk_usage)
        text = state.to_json() if self.rank == 0 else b""
        snapshot = Snapshot(state.step, self.folder, files, text, written=False)
        on_gpu = next(model.parameters()).is_cuda
        return self._copied(snapshot) if on_gpu and self._has_memory_for(pieces) else self._written(snapshot)

    def _has_memory_for(self, pieces: list[Piece]) -> bool:
        """Whether the pod has memory for all ranks' pieces twice over: torch rounds pinned buffers up."""
        more = 2 * sum(piece.size_bytes for piece in pieces if piece.key not in self._pinned)
        return more * self.neighbours <= spare_memory()

    def _copied(self, snapshot: Snapshot) -> Snapshot:
        """Copy from the GPU to pinned memory, which is kept for the next time."""

        def copy(piece: Piece) -> Piece:
            kept = self._pinned.get(piece.key)
            if kept is None or (tuple(kept.shape), kept.dtype) != (piece.size, piece.dtype):
                kept = self._pinned[piece.key] = torch.empty(piece.size, dtype=piece.dtype, pin_memory=True)
            kept.copy_(piece.values(), non_blocking=True)
            return replace(piece, values=lambda: kept)

        files = {name: [copy(piece) for piece in pieces] for name, pieces in snapshot.files.items()}
        torch.cuda.synchronize()
        return replace(snapshot, files=files)

    def _written(self, snapshot: Snapshot) -> Snapshot:
        try:
            for name, pieces in snapshot.files.items():
                write_file(pieces, snapshot.folder / name)
        except OSError as error:
            self.release()
            if full := disk_full(error):
                raise full from error
            raise
        return replace(snapshot, written=True)

    def release(self) -> None:
        """Delete the files that are kept for the next snapshot to be written over."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def upload(self, snapshot: Snapshot, store: ObjectStore, uri: str, pool: Executor) -> None:
        """Upload a snapshot and, after it, its index.

        Raises:
            Failure: it could not be uploaded.
            DiskFull: it could not be written to the disk.
        """
        if not snapshot.written:
            snapshot = self._written(snapshot)
        sent = []
        for name in snapshot.files:
            path = snapshot.folder / name
            sent.append((path, pool.submit(sha256_of, path), pool.submit(store.upload, path, f"{uri}/{name}")))
        entries = []
        for path, digest, upload in sent:
            upload.result()
            entries.append(FileEntry(path=path.name, size=path.stat().st_size, sha256=digest.result()))
        if snapshot.state:
            store.put_bytes(f"{uri}/{STATE}", snapshot.state)
            entries.append(entry_of_bytes(STATE, snapshot.state))
        index = PartIndex(rank=self.rank, files=tuple(entries), pieces=facts_of(snapshot.files))
        store.put_bytes(f"{uri}/{part_name(self.rank)}", index.to_json().encode())

    def say_missing(self, reason: DiskFull, store: ObjectStore, uri: str) -> None:
        """Write an index that says why this rank saved nothing: rank 0 then makes no checkpoint of this step."""
        index = PartIndex(rank=self.rank, missing=str(reason))
        store.put_bytes(f"{uri}/{part_name(self.rank)}", index.to_json().encode())
