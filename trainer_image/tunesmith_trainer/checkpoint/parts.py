"""Who saves which piece of a tensor, and how pieces become files and tensors again on any number of ranks.

Every rank writes its own pieces as safetensors files with an index of them. Tensors that all ranks hold (DDP) are
shared out by size; of sharded ones (FSDP, tensor parallelism: DTensors) each rank writes its own shard. A reader looks
up, with the planner of torch.distributed.checkpoint, which pieces overlap with what it holds itself; so a checkpoint
doesn't depend on how many ranks wrote it, nor on the strategy. torch's own file format is a pickle: ours is not.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
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
from tunesmith_trainer.checkpoint.state import Numbers, Whole, is_optimizer_key

__all__ = [
    "PartIndex",
    "Piece",
    "PieceFacts",
    "Reading",
    "facts_of",
    "own_pieces",
    "part_name",
    "plan_files",
    "plan_reading",
    "wholes_of",
    "write_file",
]

FILE_BYTES = 256 << 20
"""Files are closed once they hold this much: several travel at once, and reading maps no more than one into memory."""


@dataclass(frozen=True)
class Piece:
    """A box out of a tensor, held by this rank."""

    key: str
    tensor: torch.Tensor
    """Its values: a plain tensor that shares the model's or the optimizer's memory."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    """Where the box begins in the whole tensor."""

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return self.tensor.numel() * self.tensor.element_size()


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
    numbers: Numbers = Field(default_factory=dict)


def part_name(rank: int) -> str:
    """Return the file name of a rank's index."""
    return f"part-{rank:05d}.json"


# ---- writing


def own_pieces(tensors: Mapping[str, torch.Tensor], rank: int, world_size: int) -> list[Piece]:
    """Return the pieces that this rank has to save. Over all ranks, every value is saved once.

    Tensors that are not sharded are dealt out, the largest first, each to the rank that has least so far: a pure
    function of their sizes, so ranks agree without a word.
    """
    pieces: list[Piece] = []
    load = [0] * world_size
    plain = [(key, tensor) for key, tensor in tensors.items() if not isinstance(tensor, DTensor)]
    owner: dict[str, int] = {}
    for key, tensor in sorted(plain, key=lambda item: (-item[1].numel() * item[1].element_size(), item[0])):
        owner[key] = min(range(world_size), key=lambda other: (load[other], other))
        load[owner[key]] += tensor.numel() * tensor.element_size()
    for key, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            if _saves_shard(key, tensor, rank, world_size):
                chunk = tensor.__create_chunk_list__()[0]
                pieces.append(Piece(key, tensor.to_local(), tuple(tensor.shape), tuple(chunk.offsets)))
        elif owner[key] == rank:
            pieces.append(Piece(key, tensor, tuple(tensor.shape), (0,) * tensor.ndim))
    # a rank may hold nothing of a small tensor
    return [piece for piece in pieces if piece.tensor.numel() or not all(piece.shape)]


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
    """Put pieces into files: those of the model and those of its optimizer apart, none much larger than FILE_BYTES."""
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
    """Write pieces to one file. Values that are in the CPU's memory are not copied on the way."""
    save_file({piece.key: piece.tensor.to("cpu").contiguous() for piece in pieces}, path)


def facts_of(files: Mapping[str, Iterable[Piece]]) -> tuple[PieceFacts, ...]:
    """Describe the pieces in the files of a part."""
    return tuple(
        PieceFacts(
            key=piece.key,
            file=name,
            dtype=str(piece.tensor.dtype).removeprefix("torch."),
            shape=piece.shape,
            offset=piece.offset,
            size=tuple(piece.tensor.shape),
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

    planner: DefaultLoadPlanner
    items: dict[str, list[ReadItem]]
    """By file."""

    def read(self, name: str, path: Path) -> None:
        """Copy what is wanted out of one file into the tensors."""
        with safe_open(path, framework="pt") as file:
            for item in self.items[name]:
                values = file.get_slice(item.storage_index.fqn)
                box = tuple(
                    slice(start, start + length)
                    for start, length in zip(item.storage_offsets, item.lengths, strict=True)
                )
                self.planner.resolve_tensor(item).copy_(values[box] if box else file.get_tensor(item.storage_index.fqn))


def plan_reading(parts: Iterable[PartIndex], tensors: Mapping[str, torch.Tensor]) -> Reading:
    """Find the pieces that overlap with what this rank holds of the tensors.

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
    items: dict[str, list[ReadItem]] = {}
    found = dict.fromkeys(tensors, 0)
    for item in plan.items:
        index: MetadataIndex = item.storage_index
        items.setdefault(homes[index.fqn, tuple(index.offset or ())], []).append(item)
        found[index.fqn] += item.lengths.numel()
    for key, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if found[key] != local.numel():
            raise ValueError(f"{key}: {found[key]} of {local.numel()} values are there")
    return Reading(planner, items)
