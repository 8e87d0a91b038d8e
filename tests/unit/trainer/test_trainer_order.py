"""Which examples a step sees."""

import math

from hypothesis import given
from hypothesis import strategies as st

from tunesmith_trainer.data import order
from tunesmith_trainer.tasks.base import Example

sizes = st.integers(1, 60)


@given(examples=st.integers(1, 200), batch=sizes, seed=st.integers(0, 99), epoch=st.integers(0, 3))
def test_every_epoch_sees_every_example_once(examples, batch, seed, epoch):
    per_epoch = order.steps_per_epoch(examples, batch)
    seen = [
        index
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)
        for index in order.global_batch(step, examples=examples, global_batch_size=batch, seed=seed)
    ]
    assert sorted(seen) == list(range(examples))


@given(examples=st.integers(1, 200), batch=sizes, world=st.integers(1, 7), step=st.integers(0, 50))
def test_ranks_share_a_batch_without_gap_or_overlap(examples, batch, world, step):
    whole = order.global_batch(step, examples=examples, global_batch_size=batch, seed=1)
    parts = [index for rank in range(world) for index in order.share_of(whole, rank, world)]
    assert sorted(parts) == sorted(whole)


lengths = st.lists(st.integers(1, 50), max_size=40).map(sorted)


@given(lengths=lengths, size=st.integers(1, 9), packed=st.booleans())
def test_micro_batches_hold_all_examples_and_stay_within_their_memory(lengths, size, packed):
    parts = order.micro_batches([Example({}, length, 1.0) for length in lengths], size, 50, packed)
    assert [example.length for part in parts for example in part] == lengths
    for part in parts:
        tokens = sum(example.length for example in part)
        assert part
        assert (tokens if packed else len(part) * max(example.length for example in part)) <= size * 50


@given(lengths=lengths, size=st.integers(1, 9))
def test_short_examples_share_a_micro_batch(lengths, size):
    parts = order.micro_batches([Example({}, length, 1.0) for length in lengths], size, 50, True)
    assert len(parts) <= max(1, math.ceil(len(lengths) / size))


def test_a_set_gives_each_epoch_its_own_order_and_tells_which_epoch_it_is():
    class Set(list):
        def get(self, index, epoch=0):
            return Example({"letter": self[index], "asked": epoch}, 1, 1.0)

    drawn = order.SetOrder(Set("abcdef"), 4, 3)
    assert drawn.steps_per_epoch == 2
    steps = [[example for rank in range(2) for example in drawn.share(step, rank, 2)] for step in range(4)]
    for epoch in range(2):
        features = [example.features for step in steps[2 * epoch : 2 * epoch + 2] for example in step]
        assert sorted(feature["letter"] for feature in features) == list("abcdef")
        assert {feature["asked"] for feature in features} == {epoch}
    assert drawn.cursor(3).epoch == 1


@given(examples=st.integers(1, 200), batch=sizes, steps=st.integers(0, 60))
def test_the_cursor_counts_the_examples_seen(examples, batch, steps):
    cursor = order.cursor_at(steps, examples=examples, global_batch_size=batch)
    seen = sum(
        len(order.global_batch(step, examples=examples, global_batch_size=batch, seed=0)) for step in range(steps)
    )
    assert cursor.examples_seen == seen
    assert cursor.epoch * order.steps_per_epoch(examples, batch) + cursor.step_in_epoch == steps


def test_epochs_and_seeds_differ_and_are_stable():
    def first(seed, step):
        return order.global_batch(step, examples=10, global_batch_size=10, seed=seed)

    assert len({first(0, 0), first(0, 1), first(1, 0), first(1, 1)}) == 4
    # a changed order would make old checkpoints resume on other data
    assert first(42, 0) == (5, 7, 2, 1, 6, 4, 8, 9, 3, 0)


def test_max_steps_wins_over_epochs():
    assert order.total_steps(10, 4, epochs=3, max_steps=None) == 9
    assert order.total_steps(10, 4, epochs=3, max_steps=5) == 5


def test_step_seeds_differ_by_seed_step_and_rank():
    seeds = {order.step_seed(seed, step, rank) for seed in range(3) for step in range(3) for rank in range(3)}
    assert len(seeds) == 27
