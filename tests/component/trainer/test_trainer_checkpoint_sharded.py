"""One format for every strategy: what any ranks have saved, any other ranks restore, and training goes on the same."""

import numpy as np
import pytest
from sharded import Setup, run_ranks

from tunesmith_api.keys import Reason


@pytest.fixture
def setup_of(object_store, bucket, tmp_path):
    def make(strategy="DDP", world_size=2, **options):
        return Setup(
            strategy, world_size, f"{bucket}/checkpoints", str(tmp_path), object_store.environment(), **options
        )

    return make


def assert_same(first, second, tolerance):
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_allclose(first[key], second[key], rtol=tolerance, atol=tolerance, err_msg=key)


CROSSINGS = [
    (("DDP", 1), ("DDP", 2)),
    (("DDP", 2), ("DDP", 1)),
    (("DDP", 2), ("FSDP", 2)),
    (("FSDP", 2), ("DDP", 1)),
    (("FSDP", 2), ("FSDP", 3)),
    (("FSDP", 3), ("TP", 2)),
    (("TP", 2), ("FSDP", 2)),
    (("FSDP+TP", 4), ("DDP", 2)),
    (("HSDP", 4), ("FSDP+TP", 4)),
    (("HSDP", 4), ("FSDP", 3)),
    (("FSDP", 2), ("HSDP", 4)),
]


@pytest.mark.parametrize(("before", "after"), CROSSINGS, ids=lambda side: f"{side[0]}{side[1]}")
def test_what_one_strategy_saves_another_restores(forks, setup_of, before, after):
    saved = run_ranks(forks, setup_of(*before, save=True, after=1))
    assert [found.error for found in saved] == [None] * before[1]
    restored = run_ranks(forks, setup_of(*after, restore=True, after=1, seed=1))
    for found in restored:
        assert found.error is None
        assert found.restored == 2
        assert_same(found.saved, saved[0].saved, 0)
        assert_same(found.after, saved[0].after, 2e-4)


@pytest.mark.parametrize(
    ("before", "after"), [(("DDP", 2), ("FSDP", 2)), (("FSDP", 2), ("DDP", 1)), (("DDP", 1), ("DDP", 1))]
)
def test_8_bit_state_crosses_over_too(forks, setup_of, before, after):
    pytest.importorskip("bitsandbytes")
    saved = run_ranks(forks, setup_of(*before, save=True, after=1, optimizer="adamw_8bit"))
    assert [found.error for found in saved] == [None] * before[1]
    restored = run_ranks(forks, setup_of(*after, restore=True, after=1, seed=1, optimizer="adamw_8bit"))
    weights = [key for key in saved[0].saved if ":" not in key]
    for found in restored:
        assert found.error is None
        assert found.restored == 2
        for key in weights:
            np.testing.assert_array_equal(found.saved[key], saved[0].saved[key], err_msg=key)
        # 8 bits with another block's scale: near, not equal, unless the shards are the same
        for key in found.saved.keys() - weights:
            scale = np.abs(saved[0].saved[key]).max()
            limit = 0 if before[0] == after[0] else 0.02 * scale
            np.testing.assert_allclose(found.saved[key], saved[0].saved[key], rtol=0, atol=limit, err_msg=key)


@pytest.mark.parametrize(("strategy", "world_size"), [("DDP", 2), ("FSDP", 2), ("HSDP", 4)])
def test_every_rank_saves_its_share_and_nothing_twice(forks, setup_of, object_store, strategy, world_size):
    setup = setup_of(strategy, world_size, save=True)
    saved = run_ranks(forks, setup)
    assert saved[0].newest == 2
    assert all(found.written for found in saved)
    sizes = [sum(len(object_store.get_bytes(uri)) for uri in found.written) for found in saved]
    values = sum(array.nbytes for array in saved[0].saved.values())
    assert values < sum(sizes) < 1.5 * values, "headers come on top"
    assert max(sizes) < 1.5 * min(sizes)


def test_ranks_of_a_pod_share_what_they_fetch(forks, setup_of):
    run_ranks(forks, setup_of(save=True))
    restored = run_ranks(forks, setup_of(restore=True))
    read = [uri for found in restored for uri in found.read]
    assert len(read) == len(set(read)) == 7, "two parts of two files and an index each, and the state"
    assert all(found.restored == 2 for found in restored)


def test_a_rank_fetches_only_the_parts_that_it_needs(forks, setup_of, tmp_path):
    run_ranks(forks, setup_of("FSDP", 2, save=True))
    restored = run_ranks(forks, setup_of("FSDP", 2, restore=True))
    tensors = [uri for found in restored for uri in found.read if uri.endswith(".safetensors")]
    assert sorted(uri.rpartition("/")[2].split("-")[1] for uri in tensors) == ["00000"] * 2 + ["00001"] * 2


def test_a_crash_after_the_parts_and_before_the_manifest_leaves_no_checkpoint(forks, setup_of):
    torn = run_ranks(forks, setup_of(save=True, trouble="no-manifest"))
    assert all(found.written for found in torn)
    restored = run_ranks(forks, setup_of(restore=True))
    assert [found.restored for found in restored] == [None, None]


def test_what_fails_on_one_rank_is_raised_on_all(forks, setup_of):
    found = run_ranks(forks, setup_of(save=True, trouble="rank-1-fails"))
    assert [str(item.error) for item in found] == ["rank 1 may not write"] * 2
    assert {item.error.reason for item in found} == {Reason.STORAGE_UNWRITABLE}


def test_one_full_disk_means_no_checkpoint_and_training_goes_on(forks, setup_of):
    found = run_ranks(forks, setup_of(save=True, trouble="rank-1-full", after=1))
    assert [item.error for item in found] == [None, None]
    assert [item.newest for item in found] == [None, None]
    assert any("disk of rank 1" in line for line in found[0].lines)
    assert run_ranks(forks, setup_of(restore=True))[0].restored is None
