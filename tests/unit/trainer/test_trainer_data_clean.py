"""Deduplication and the split depend on each row's content, and on nothing else."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith_trainer.data.clean import DIGEST_BYTES, row_digest, select
from tunesmith_trainer.tasks.base import BadRow

rows = st.lists(st.fixed_dictionaries({"text": st.text("abc", max_size=3)}), max_size=40)


def digests(rows):
    return np.frombuffer(b"".join(map(row_digest, rows)), np.uint64).reshape(-1, DIGEST_BYTES // 8)


def content(rows, numbers):
    return [rows[number]["text"] for number in numbers]


@settings(deadline=None)
@given(rows=rows, more=rows, percent=st.integers(1, 50), seed=st.integers())
def test_a_row_stays_on_its_side_when_the_data_grows_or_is_put_in_another_order(rows, more, percent, seed):
    before = select(digests(rows), None, percent, False)
    grown = rows + more
    random.Random(seed).shuffle(grown)
    after = select(digests(grown), None, percent, False)
    assert set(content(rows, before.train)) <= set(content(grown, after.train))
    assert set(content(rows, before.held_out)) <= set(content(grown, after.held_out))
    assert not set(content(grown, after.train)) & set(content(grown, after.held_out))
    assert sorted([*after.train, *after.held_out]) == list(range(len(grown)))
    assert after.duplicates == 0


@settings(deadline=None)
@given(percent=st.integers(1, 50), more=st.integers(1, 49))
def test_a_larger_part_holds_out_all_that_a_smaller_one_does(percent, more):
    rows = [{"text": str(number)} for number in range(200)]
    small, large = (select(digests(rows), None, part, False).held_out for part in (percent, percent + more))
    assert set(small) <= set(large)


def test_the_part_that_is_held_out_is_about_what_was_asked_for():
    rows = [{"text": str(number)} for number in range(20_000)]
    assert len(select(digests(rows), None, 10, False).held_out) == pytest.approx(2000, abs=150)


@settings(deadline=None)
@given(train=rows, held_out=rows)
def test_exact_deduplication_keeps_the_first_of_each_and_none_that_is_held_out(train, held_out):
    chosen = select(digests(train), digests(held_out), None, True)
    seen = {row["text"] for row in held_out}
    expected = []
    for number, row in enumerate(train):
        if row["text"] not in seen:
            seen.add(row["text"])
            expected.append(number)
    assert list(chosen.train) == expected
    assert chosen.duplicates == len(train) - len(expected)
    everything = select(digests(train), digests(held_out), None, False)
    assert len(everything.train) == len(train)


@settings(deadline=None)
@given(rows=rows, percent=st.integers(1, 50))
def test_splitting_and_deduplicating_at_once(rows, percent):
    chosen = select(digests(rows), None, percent, True)
    assert len({*content(rows, chosen.train)}) == len(chosen.train)
    assert len(chosen.train) + len(chosen.held_out) + chosen.duplicates == len(rows)


@settings(deadline=None)
@given(st.dictionaries(st.text("ab", max_size=2), st.lists(st.integers() | st.text("é\u2028", max_size=2))))
def test_the_order_of_fields_does_not_count_that_of_values_does(row):
    assert row_digest(dict(reversed(row.items()))) == row_digest(row)
    for name, value in row.items():
        if list(reversed(value)) != value:
            assert row_digest(row | {name: list(reversed(value))}) != row_digest(row)


def test_half_a_character_is_a_bad_row():
    with pytest.raises(BadRow, match="lone surrogate"):
        row_digest({"text": "\ud800"})
