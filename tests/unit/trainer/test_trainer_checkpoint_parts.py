"""Pieces of tensors: every value is saved by exactly one rank, and any pieces make up the whole again."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tunesmith_trainer.checkpoint import shards
from tunesmith_trainer.checkpoint.shards import (
    PartIndex,
    Piece,
    facts_of,
    own_pieces,
    plan_files,
    plan_reading,
    write_file,
)
from tunesmith_trainer.checkpoint.state import Held


def held(tensors):
    return {key: Held(tensor, tensor.dtype, lambda tensor=tensor: tensor) for key, tensor in tensors.items()}


sizes = st.lists(st.integers(1, 500), min_size=1, max_size=30)


@given(sizes=sizes, world_size=st.integers(1, 9))
def test_every_tensor_is_saved_once_and_no_rank_gets_much_more_than_its_share(sizes, world_size):
    tensors = {f"t{number}": torch.zeros(size) for number, size in enumerate(sizes)}
    dealt = [own_pieces(held(tensors), rank, world_size) for rank in range(world_size)]
    keys = [piece.key for pieces in dealt for piece in pieces]
    assert sorted(keys) == sorted(tensors)
    loads = [sum(piece.size_bytes for piece in pieces) for pieces in dealt]
    assert max(loads) - min(loads) <= 4 * max(sizes), "the difference is at most one tensor"


def test_ranks_deal_the_same_whatever_the_order():
    tensors = {name: torch.zeros(8) for name in "cabd"}
    turned = dict(sorted(tensors.items()))
    for rank in range(3):
        first, second = own_pieces(held(tensors), rank, 3), own_pieces(held(turned), rank, 3)
        assert {piece.key for piece in first} == {piece.key for piece in second}


def test_the_values_are_not_copied():
    tensors = {"t": torch.zeros(8)}
    assert own_pieces(held(tensors), 0, 1)[0].values().data_ptr() == tensors["t"].data_ptr()


def piece(key, tensor, shape=None, offset=None):
    offset = tuple(offset or (0,) * tensor.ndim)
    return Piece(key, tensor.dtype, tuple(shape or tensor.shape), offset, tuple(tensor.shape), lambda: tensor)


def test_weights_and_optimizer_go_to_files_of_their_own_of_bounded_size(monkeypatch):
    monkeypatch.setattr(shards, "FILE_BYTES", 100)
    pieces = [piece(name, torch.zeros(15)) for name in ("a", "a:x", "b", "b:x", "c")]  # 60 bytes each
    pieces.append(piece("d", torch.zeros(200)))
    files = plan_files(pieces, 3)
    assert {name: [item.key for item in inside] for name, inside in files.items()} == {
        "weights-00003-00000.safetensors": ["a"], "weights-00003-00001.safetensors": ["b"],
        "weights-00003-00002.safetensors": ["c"], "weights-00003-00003.safetensors": ["d"],
        "optimizer-00003-00000.safetensors": ["a:x"], "optimizer-00003-00001.safetensors": ["b:x"],
    }  # fmt: skip


def test_anybody_can_read_the_files(tmp_path):
    tensors = {
        "half": torch.randn(3, 4, dtype=torch.bfloat16),
        "turned": torch.randn(3, 4).t(),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "one": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
    }
    write_file(own_pieces(held(tensors), 0, 1), tmp_path / "f.safetensors")
    found = load_file(tmp_path / "f.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(("before", "after"), [(9, 1000), (1000, 9), (64, 64)])
def test_a_file_is_written_over_the_one_before(tmp_path, before, after):
    path = tmp_path / "f.safetensors"
    for size in (before, after):
        tensors = {"a": torch.randn(size), "b": torch.randn(size).half()}
        write_file(own_pieces(held(tensors), 0, 1), path)
        inode = path.stat().st_ino
    found = load_file(path)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    write_file(own_pieces(held(tensors), 0, 1), path)
    assert path.stat().st_ino == inode


def write_part(folder, rank, pieces):
    files = plan_files(pieces, rank)
    for name, inside in files.items():
        write_file(inside, folder / name)
    return PartIndex(rank=rank, pieces=facts_of(files))


@st.composite
def boxes(draw):
    """A shape of one to three dimensions and a cut of it into boxes, as (offset, size)."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    found = [([], [])]
    for length in shape:
        edges = sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=2))})
        spans = list(itertools.pairwise(edges))
        found = [([*at, start], [*size, end - start]) for at, size in found for start, end in spans]
    return shape, found


@settings(deadline=None, max_examples=40)
@given(cut=boxes(), kind=st.sampled_from([torch.float32, torch.float16, torch.uint8]))
def test_pieces_of_any_cut_make_up_the_whole(tmp_path_factory, cut, kind):
    shape, cut = cut
    folder = tmp_path_factory.mktemp("cut")
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape).to(kind)
    indices = []
    for rank, (offset, size) in enumerate(cut):
        box = tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))
        indices.append(write_part(folder, rank, [piece("t", whole[box], shape, offset)]))
    found = torch.zeros(shape, dtype=kind)
    reading = plan_reading(indices, {"t": found})
    reading.read("t", {name: folder / name for name in reading.files}, found)
    assert torch.equal(found, whole)


def test_a_shard_that_was_saved_twice_is_read_once(tmp_path):
    whole = torch.arange(6.0)
    indices = [write_part(tmp_path, rank, [piece("t", whole)]) for rank in range(2)]
    found = torch.zeros(6)
    reading = plan_reading(indices, {"t": found})
    assert len(reading.files) == 1
    reading.read("t", {name: tmp_path / name for name in reading.files}, found)
    assert torch.equal(found, whole)


def test_only_files_with_something_wanted_are_read(tmp_path):
    tensors = {"a": torch.ones(2), "a:moment": torch.ones(2)}
    indices = [write_part(tmp_path, rank, own_pieces(held(tensors), rank, 2)) for rank in range(2)]
    assert plan_reading(indices, {"a": torch.zeros(2)}).files == ["weights-00000-00000.safetensors"]


def test_weights_of_another_type_are_turned_into_the_models(tmp_path):
    indices = [write_part(tmp_path, 0, [piece("t", torch.tensor([1.5, 2.5], dtype=torch.bfloat16))])]
    found = torch.zeros(2)
    reading = plan_reading(indices, {"t": found})
    reading.read("t", {name: tmp_path / name for name in reading.files}, found)
    assert found.tolist() == [1.5, 2.5]


@pytest.mark.parametrize(
    ("pieces", "wanted", "complaint"),
    [
        ([piece("t", torch.zeros(2), (4,), (0,))], torch.zeros(4), "2 of 4 values"),
        ([piece("t", torch.zeros(4))], torch.zeros(5), "[Ss]ize"),
        ([piece("u", torch.zeros(4))], torch.zeros(4), "Missing key"),
    ],
)
def test_an_index_without_all_that_is_wanted_is_refused(pieces, wanted, complaint):
    index = PartIndex(rank=0, pieces=facts_of({"f": pieces}))
    with pytest.raises(ValueError, match=complaint):
        plan_reading([index], {"t": wanted})
