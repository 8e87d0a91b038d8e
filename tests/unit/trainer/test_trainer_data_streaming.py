"""Data that is read while training: a pure function of (seed, step), for any number of workers, from any step on."""

import json
import re
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.plans import dataset, training_plan
from tunesmith_api.v1alpha1.task import Classification
from tunesmith_store.errors import Retryable, UserError
from tunesmith_store.volumes import VolumeStore
from tunesmith_trainer import data
from tunesmith_trainer.data.rows import RawRow
from tunesmith_trainer.data.streaming import ShuffledRows, StreamingOrder
from tunesmith_trainer.tasks import task_for
from tunesmith_trainer.tasks.base import Example

BASE = "pvc://b"


def example(epoch, number, raw):
    return [Example({"input_ids": [number], "epoch": epoch}, 1, 1.0)]


def order_of(count, batch, buffer=5, seed=7, encode=example):
    def read():
        return (RawRow(f"line {number}", b"{}") for number in range(count))

    return StreamingOrder(ShuffledRows(read, "data", seed, buffer), encode, batch)


def numbers(examples):
    return [example.features["input_ids"][0] for example in examples]


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 30), batch=st.integers(1, 12), buffer=st.integers(1, 40), seed=st.integers(0, 99))
def test_every_epoch_gives_every_row_once_and_in_another_order(count, batch, buffer, seed):
    order = order_of(count, batch, buffer, seed)
    seen = [number for step in range(3 * count) for number in numbers(order.share(step, 0, 1))]
    order.close()
    epochs = [seen[start : start + count] for start in range(0, len(seen) - count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 9 and buffer > 9:
        assert len({tuple(epoch) for epoch in epochs[:4]}) > 1


@settings(deadline=None, max_examples=50)
@given(
    count=st.integers(1, 30),
    batch=st.integers(1, 9),
    world=st.integers(1, 5),
    step=st.integers(0, 20),
    buffer=st.integers(1, 9),
)
def test_a_step_is_the_same_for_any_number_of_workers_and_wherever_training_comes_from(
    count, batch, world, step, buffer
):
    one = order_of(count, batch, buffer)
    expected = [numbers(one.share(earlier, 0, 1)) for earlier in range(step + 1)][step]
    one.close()
    shares = []
    for rank in range(world):
        order = order_of(count, batch, buffer)
        shares.append(numbers(order.share(step, rank, world)))
        order.close()
    assert [expected[rank::world] for rank in range(world)] == shares


def test_a_rank_encodes_its_own_rows_only_and_passes_over_the_rest():
    encoded = []

    def encode(epoch, number, raw):
        encoded.append(number)
        return example(epoch, number, raw)

    order = order_of(1000, 8, encode=encode)
    own = numbers(order.share(50, 1, 4))
    assert len(own) == 2
    order.close()
    assert len(encoded) <= 2 * 4  # the step itself, and those that are encoded ahead
    assert encoded[:2] == own


def test_going_back_and_asking_twice():
    order = order_of(100, 8)
    steps = [numbers(order.share(step, 0, 1)) for step in range(5)]
    assert numbers(order.share(4, 0, 1)) == steps[4]
    assert [numbers(order.share(step, 0, 1)) for step in (1, 2, 3)] == steps[1:4]
    order.close()
    alive = [thread.name for thread in threading.enumerate() if thread.name == "data" and thread.is_alive()]
    assert len(alive) <= 2  # each ends within a moment


def test_the_next_steps_are_encoded_while_training_computes():
    done = threading.Event()

    def encode(epoch, number, raw):
        if number == 7:
            done.set()
        return example(epoch, number, raw)

    order = order_of(8, 4, buffer=1, encode=encode)
    order.share(0, 0, 1)
    assert done.wait(5)
    order.close()


def test_where_training_stands():
    order = order_of(20, 8)
    assert order.steps_per_epoch is None
    assert order.cursor(2).model_dump() == {"epoch": 0, "step_in_epoch": 2, "examples_seen": 16}
    for step in range(6):
        order.share(step, 0, 1)
    order.close()
    assert order.cursor(5).model_dump() == {"epoch": 2, "step_in_epoch": 0, "examples_seen": 40}


def test_a_late_epoch_is_found_without_reading_those_before():
    reads = []

    def read():
        reads.append(1)
        return (RawRow(f"line {number}", b"{}") for number in range(10))

    rows = ShuffledRows(read, "data", 7, 3)
    epoch, number, _ = next(rows.start(10 * 1000 + 3))
    assert epoch == 1000
    assert len(reads) == 2
    expected = list(order_of(10, 1, 3)._rows._epoch(1000))[3]
    assert number == expected[0]


@pytest.mark.parametrize("error", [Retryable("the store is gone"), UserError("DatasetInvalid", "line 3 is bad")])
def test_what_goes_wrong_while_reading_is_raised_where_the_step_is_asked_for(error):
    def read():
        yield RawRow("line 1", b"{}")
        raise error

    order = StreamingOrder(ShuffledRows(read, "data", 7, 3), example, 4)
    with pytest.raises(type(error), match=error.message):
        order.share(0, 0, 1)


def test_no_rows():
    with pytest.raises(UserError, match="it has no rows"):
        order_of(0, 4).share(0, 0, 1)


# ---- by a plan


@pytest.fixture
def store(tmp_path):
    (tmp_path / "volumes" / "b").mkdir(parents=True)
    store = VolumeStore(tmp_path / "volumes")
    store.put_bytes(f"{BASE}/model/tokenizer.json", b"{}")
    return store


@pytest.fixture
def prepare(store, tokenizer, tmp_path):
    def run(held_out=None, task="CausalLM", rows=None, plan=None, **changes):
        rows = rows if rows is not None else [{"text": f"row {number}"} for number in range(50)]
        store.put_bytes(f"{BASE}/train.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        settings = dataset(f"{BASE}/train.jsonl", held_out, streaming=True, shuffleBufferSize=10, **changes)
        plan = training_plan(BASE, task=task, dataset=settings, **(plan or {}))
        made = task_for(plan)
        made.processor = tokenizer
        return data.prepare(plan, made, store, tmp_path / "scratch", writer=True, log=lambda *lines: None)

    return run


def test_a_streamed_set_is_encoded_while_training_and_the_held_out_one_before(store, prepare, tokenizer):
    store.put_bytes(f"{BASE}/eval.jsonl", b'{"text": "held out"}\n')
    found = prepare(f"{BASE}/eval.jsonl")
    assert len(found.train) == 0
    assert len(found.eval) == 1
    assert found.statistics.train is None
    assert found.facts.eval_examples == 1
    assert found.facts.first_example == "⟦row 0</s>⟧"
    shares = [found.stream.share(0, rank, 2) for rank in (0, 1)]
    decoded = {tokenizer.decode(e.features["input_ids"], skip_special_tokens=True) for share in shares for e in share}
    assert len(decoded) == 8
    assert decoded <= {f"row {number}" for number in range(50)}
    assert [example.epoch for example in found.stream.share(7, 0, 1)] == [1] * 8  # 56 rows of 50 are behind
    found.stream.close()


def test_augmentation_and_bad_rows_while_streaming(prepare):
    rows = [{"text": "one two three four five six"}, {"body": "x"}] * 4
    found = prepare(rows=rows, augmentation={"wordDropout": 0.5}, onBadRow="Skip")
    lengths, left_out = set(), []
    for step in range(4):
        lengths |= {example.length for example in found.stream.share(step, 0, 1)}
        left_out.append(found.stream.left_out)
    found.stream.close()
    assert len(lengths) > 2
    # a step takes all eight rows: the later ones are epochs that meet the same bad rows again
    assert [found.count for found in left_out] == [4, 0, 0, 0]
    assert re.search(r"line [2468] has no field 'text'", left_out[0].first)


def test_a_bad_row_in_the_middle_of_training_ends_the_job(prepare):
    rows = [{"text": "a"}] * 30 + [{"body": "x"}]
    found = prepare(rows=rows)
    with pytest.raises(UserError, match="line 31 has no field"):
        [found.stream.share(step, 0, 1) for step in range(8)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": []}, "it has no rows"),
        ({"rows": [{"body": "x"}], "onBadRow": "Skip"}, "none of its first 1 rows can be used"),
        ({"rows": [{"body": "x"}]}, "line 1 has no field"),
        ({"deduplication": "Exact"}, r"spec\.dataset\.deduplication"),
        ({"task": "SequenceClassification", "rows": [{"text": "a", "label": "b"}]}, r"spec\.classification\.labels"),
        (
            {
                "task": "SequenceClassification",
                "rows": [{"text": "a", "label": "b"}],
                "plan": {"classification": Classification(labels=["b", "c"], class_weights="Balanced")},
            },
            "Balanced counts the classes first",
        ),
    ],
)
def test_what_streaming_can_not_do_is_said_before_training(prepare, changes, words):
    with pytest.raises(UserError, match=words):
        prepare(**changes)
