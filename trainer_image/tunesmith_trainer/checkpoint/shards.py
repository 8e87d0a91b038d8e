"""Who saves which piece of a tensor, and how pieces become files and tensors again on any number of ranks.

Every rank writes its own pieces as safetensors files with an index of them. Tensors that all ranks hold (DDP) are
shared out by size; of sharded ones (FSDP, tensor parallelism: DTensors) each rank writes its own shard. A reader looks
up, with the planner of torch.distributed.checkpoint, which pieces overlap with what it holds itself; so a checkpoint
doesn't depend on how many ranks wrote it, nor on the strategy. torch's own file format is a pickle: ours is not.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import safe_open
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.tensor import DTensor, Replicate

from tunesmith_api.artifacts import FileEntry
from tunesmith_api.model import Contract
from tunesmith_trainer.checkpoint.state import Held, is_optimizer_key

__all__ = [
    "PartIndex",
    "Piece",
    "PieceFacts",
    "Reading",
    "Whole",
    "facts_of",
    "own_pieces",
    "part_name",
    "plan_files",
    "plan_reading",
    "wholes_of",
    "write_file",
]

FILE_BYTES = 128 << 20
"""Files are closed once they hold this much: several travel at once, and reading maps no more than one into memory."""


DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Names of the safetensors format."""


@dataclass(frozen=True)
class Whole:
    """Type and shape of a tensor over all ranks, as a checkpoint holds it."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A rectangular slice of a tensor, held by this rank."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    """Where the slice begins in the whole tensor."""
    size: tuple[int, ...]
    """Of the slice."""
    values: Callable[[], torch.Tensor]
    """Returns the slice: a plain tensor, which may share the model's or the optimizer's memory."""

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.size) * self.dtype.itemsize


class PieceFacts(Contract):
    """Where one piece is and what it is part of."""

    key: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]


class PartIndex(Contract):
    """`part-00000.json`: what one rank has put into a checkpoint. It is written after the files that it names."""

    rank: int
    missing: str = Field(default="", description="Why this rank saved nothing; there is no checkpoint then.")
    files: tuple[FileEntry, ...] = ()
    pieces: tuple[PieceFacts, ...] = ()


def part_name(rank: int) -> str:
    """Return the file name of a rank's index."""
    return f"part-{rank:05d}.json"


# ---- writing


def own_pieces(tensors: Mapping[str, Held], rank: int, world_size: int) -> list[Piece]:
    """Return the pieces that this rank has to save. Over all ranks, every value is saved once.

    Tensors that are not sharded are dealt out, the largest first, each to the rank that has least so far: a pure
    function of their sizes, so ranks agree without a word.
    """
    load = [0] * world_size
    owner: dict[str, int] = {}
    plain = [(_bytes(held), key) for key, held in tensors.items() if not isinstance(held.like, DTensor)]
    for size, key in sorted(plain, key=lambda item: (-item[0], item[1])):
        owner[key] = min(range(world_size), key=lambda other: (load[other], other))
        load[owner[key]] += size
    pieces: list[Piece] = []
    for key, held in tensors.items():
        shape = tuple(held.like.shape)
        if not isinstance(held.like, DTensor):
            if owner[key] == rank:
                pieces.append(Piece(key, held.dtype, shape, (0,) * len(shape), shape, held.values))
        elif _saves_shard(key, held.like, rank, world_size):
            chunk = held.like.__create_chunk_list__()[0]
            if chunk.sizes.numel():  # a rank may hold nothing of a small tensor
                local = partial(_local, held.values)
                pieces.append(Piece(key, held.dtype, shape, tuple(chunk.offsets), tuple(chunk.sizes), local))
    return pieces


def _bytes(held: Held) -> int:
    return held.like.numel() * held.dtype.itemsize


def _local(values: Callable[[], Any]) -> torch.Tensor:
    local: torch.Tensor = values().to_local()
    return local


def _saves_shard(key: str, tensor: DTensor, rank: int, world_size: int) -> bool:
    """Whether this rank, of all that hold the same shard, is the one to save it. Tensors are spread over them."""
    mesh = tensor.device_mesh
    place = mesh.get_coordinate()
    if place is None:
        return False
    turn = zlib.crc32(key.encode())
    for dimension, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            if place[dimension] != turn % mesh.size(dimension):
                return False
            turn //= mesh.size(dimension)
    return _replica(mesh.mesh.flatten().tolist(), rank, world_size) == turn % (world_size // mesh.size())


def _replica(members: Sequence[int], rank: int, world_size: int) -> int:
    """Number the meshes that hold the same shards; `members` are the global ranks of this one.

    A mesh smaller than the world is one of several that differ in what they are fed (tensor parallelism within data
    parallelism). Its ranks lie at a regular distance.
    """
    if len(members) == world_size:
        return 0
    members = sorted(members)
    stride = members[1] - members[0] if len(members) > 1 else 1
    return members[0] // (stride * len(members)) * stride + members[0] % stride


def plan_files(pieces: Iterable[Piece], rank: int) -> dict[str, list[Piece]]:
    """Put pieces into files, those of the model not with those of its optimizer, none much larger than FILE_BYTES."""
    files: dict[str, list[Piece]] = {}
    for kind, wanted in (("weights", False), ("optimizer", True)):
        number, held = 0, 0
        for piece in pieces:
            if is_optimizer_key(piece.key) is not wanted:
                continue
            if held and held + piece.size_bytes > FILE_BYTES:
                number, held = number + 1, 0
            files.setdefault(f"{kind}-{rank:05d}-{number:05d}.safetensors", []).append(piece)
            held += piece.size_bytes
    return files


def write_file(pieces: Iterable[Piece], path: Path) -> None:
    """Write pieces as safetensors to one file, over what it held. One after the other, and without a copy on the CPU.

    The library's `save_file` begins with an empty file. The step waits for this, and memory that the kernel still has
    of the file is written four times as fast as memory that it has to find first.
    """
    pieces = sorted(pieces, key=lambda piece: -piece.dtype.itemsize)  # so that all are aligned, as the format has it
    header, end = {}, 0
    for piece in pieces:
        begin, end = end, end + piece.size_bytes
        header[piece.key] = {"dtype": DTYPES[piece.dtype], "shape": piece.size, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            values = piece.values().to("cpu").contiguous().reshape(-1)
            file.write(memoryview(values.view(torch.uint8).numpy()))
        file.truncate()


def facts_of(files: Mapping[str, Iterable[Piece]]) -> tuple[PieceFacts, ...]:
    """Describe the pieces in the files of a part."""
    return tuple(
        PieceFacts(
            key=piece.key,
            file=name,
            dtype=str(piece.dtype).removeprefix("torch."),
            shape=piece.shape,
            offset=piece.offset,
            size=piece.size,
        )
        for name, pieces in files.items()
        for piece in pieces
    )


# ---- reading


def wholes_of(parts: Iterable[PartIndex]) -> dict[str, Whole]:
    """Return type and shape of all tensors of a checkpoint.

    Raises:
        ValueError: a type is unknown.
    """
    wholes: dict[str, Whole] = {}
    for part in parts:
        for piece in part.pieces:
            dtype = getattr(torch, piece.dtype, None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{piece.key} is of the unknown type {piece.dtype}")
            wholes[piece.key] = Whole(dtype, piece.shape)
    return wholes


@dataclass(frozen=True)
class Reading:
    """What one rank has to read to fill its tensors."""

    _planner: DefaultLoadPlanner
    _items: dict[str, dict[str, list[ReadItem]]]
    """By key, then by file."""
    _open: dict[Path, Any] = field(default_factory=dict)
    """The file that was read last: opening it anew for each tensor would cost more than reading the small ones."""

    @property
    def files(self) -> list[str]:
        """Names of the files that hold something of what is wanted."""
        return sorted({name for items in self._items.values() for name in items})

    def read(self, key: str, paths: Mapping[str, Path], into: torch.Tensor) -> None:
        """Read what this rank holds of one tensor; `into` has the shape and layout that the plan was made for."""
        planned, self._planner.state_dict[key] = self._planner.state_dict[key], into
        for name, items in self._items.get(key, {}).items():
            file = self._opened(paths[name])
            for item in items:
                spans = zip(item.storage_offsets, item.lengths, strict=True)
                region = tuple(slice(start, start + length) for start, length in spans)
                values = file.get_slice(key)[region] if region else file.get_tensor(key)
                self._planner.resolve_tensor(item).copy_(values)
        self._planner.state_dict[key] = planned

    def _opened(self, path: Path) -> Any:
        if path not in self._open:
            self._open.clear()
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path]


def plan_reading(parts: Iterable[PartIndex], tensors: Mapping[str, torch.Tensor]) -> Reading:
    """Find the pieces that overlap with what this rank holds of tensors that are shaped and sharded like these.

    Raises:
        ValueError: the checkpoint lacks a tensor or a piece of one, or a shape is another one.
    """
    chunks: dict[str, dict[tuple[int, ...], ChunkStorageMetadata]] = {}
    homes: dict[tuple[str, tuple[int, ...]], str] = {}
    parts = list(parts)
    for part in parts:
        for piece in part.pieces:
            chunk = ChunkStorageMetadata(offsets=torch.Size(piece.offset), sizes=torch.Size(piece.size))
            chunks.setdefault(piece.key, {})[piece.offset] = chunk
            homes[piece.key, piece.offset] = piece.file
    metadata = Metadata(
        {
            key: TensorStorageMetadata(
                TensorProperties(dtype=whole.dtype), torch.Size(whole.shape), list(chunks[key].values())
            )
            for key, whole in wholes_of(parts).items()
        }
    )
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), metadata)
    try:
        plan = planner.create_local_plan()
    except RuntimeError as error:  # a missing key
        raise ValueError(str(error)) from error
    items: dict[str, dict[str, list[ReadItem]]] = {}
    found = dict.fromkeys(tensors, 0)
    for item in plan.items:
        index: MetadataIndex = item.storage_index
        home = homes[index.fqn, tuple(index.offset or ())]
        items.setdefault(index.fqn, {}).setdefault(home, []).append(item)
        found[index.fqn] += item.lengths.numel()
    for key, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if found[key] != local.numel():
            raise ValueError(f"{key}: {found[key]} of {local.numel()} values are there")
    return Reading(planner, items)
