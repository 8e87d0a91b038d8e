"""Examples on disk come back as they went in, by number, however many files and types they needed."""

import errno

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith_api.v1alpha1.dataset import OnBadRow
from tunesmith_trainer.data import arrow_files, examples
from tunesmith_trainer.data.arrow_files import PartReader, PartWriter
from tunesmith_trainer.data.examples import ExampleSet, ExampleWriter
from tunesmith_trainer.data.rows import BadRows, Located
from tunesmith_trainer.data.table import RowTable, write_rows
from tunesmith_trainer.tasks.base import Example


def written(folder, examples, name="train"):
    with ExampleWriter(folder, name) as writer:
        for row, example in enumerate(examples):
            writer.add(example, row, 0)
    return ExampleSet(folder, name, RowTable(folder, "rows"))


def whole(low=-(2**31), high=2**31 - 1):
    return st.integers(low, high)


features = st.fixed_dictionaries(
    {"input_ids": st.lists(whole(), max_size=5)},
    optional={
        "label": whole(),
        "score": st.floats(allow_nan=False),
        "name": st.text(),
        "wide": st.lists(whole(-(2**62), 2**62), max_size=3),
        "nested": st.lists(st.lists(st.floats(allow_nan=False), max_size=2), max_size=3),
    },
)
example_lists = st.lists(st.tuples(features, whole(0, 99), st.floats(0, 9), st.booleans()), max_size=30)


@settings(deadline=None, max_examples=60)
@given(drawn=example_lists, batch=st.integers(1, 7), part_bytes=st.sampled_from([1, 4000, 1 << 20]))
def test_whatever_is_written_is_read_back(tmp_path_factory, drawn, batch, part_bytes):
    expected = [Example(features, length, units, cut) for features, length, units, cut in drawn]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "BATCH_EXAMPLES", batch)
        patch.setattr(arrow_files.PartWriter.__init__, "__defaults__", (part_bytes,))
        found = written(tmp_path_factory.mktemp("set"), expected)
    assert len(found) == len(expected)
    assert [found.get(index) for index in range(len(found))] == expected
    assert found.lengths.tolist() == [example.length for example in expected]
    assert found.lengths.dtype == np.int32
    assert found.column("truncated").tolist() == [example.truncated for example in expected]


@settings(deadline=None)
@given(
    arrays=st.lists(
        st.one_of(st.none(), st.tuples(st.lists(st.integers(0, 3), max_size=3), st.sampled_from(["u1", "<f4", "<i8"]))),
        min_size=1,
        max_size=6,
    )
)
def test_numpy_arrays_keep_type_and_shape(tmp_path_factory, arrays):
    expected = [np.arange(int(np.prod(a[0])), dtype=a[1]).reshape(a[0]) if a else None for a in arrays]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "BATCH_EXAMPLES", 1)
        found = written(
            tmp_path_factory.mktemp("set"),
            [Example({} if array is None else {"pixels": array}, 1, 1.0) for array in expected],
        )
    for index, array in enumerate(expected):
        read = found.get(index).features.get("pixels")
        if array is None:
            assert read is None
        else:
            np.testing.assert_array_equal(read, array)
            assert (read.dtype, read.flags.writeable) == (array.dtype, True)


def test_token_numbers_take_four_bytes(tmp_path):
    written(tmp_path, [Example({"input_ids": list(range(1000))}, 1000, 1.0) for _ in range(100)])
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 400_000 < size < 420_000


def test_no_such_example(tmp_path):
    empty = ExampleSet(tmp_path, "train", RowTable(tmp_path, "rows"))
    assert len(empty) == len(empty.lengths) == 0
    for index in (0, -1):
        with pytest.raises(IndexError):
            empty.get(index)


def test_a_set_that_broke_off_holds_no_half_batch(tmp_path):
    def break_off():
        with ExampleWriter(tmp_path, "train") as writer:
            writer.add(Example({"a": [1]}, 1, 1.0), 0, 0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        break_off()
    assert len(PartReader(tmp_path, "train")) == 0


def test_rows_come_back_by_number_with_their_place(tmp_path):
    rows = [Located(f"x line {number}", {"text": f"é{number}", "n": [number]}) for number in range(3000)]
    digests = write_rows(tmp_path, "rows", rows, BadRows(OnBadRow.FAIL))
    assert digests.shape == (3000, 2)
    table = RowTable(tmp_path, "rows")
    assert len(table) == 3000
    for number in (0, 1023, 1024, 2999):
        assert table.row(number) == rows[number].row
        assert table.where(number) == rows[number].where


def test_a_row_that_can_not_be_written_is_a_bad_row(tmp_path):
    bad = BadRows(OnBadRow.SKIP)
    rows = [Located("line 1", {"text": "\ud800"}), Located("line 2", {"text": "b"}), Located("line 3", {"x": 1j})]
    assert len(write_rows(tmp_path, "rows", rows, bad)) == 1
    assert (bad.count, bad.first[:6]) == (2, "line 1")


def test_a_table_is_opened_when_it_is_needed_and_fetched_before(tmp_path):
    asked = []
    table = RowTable(tmp_path, "rows", lambda: asked.append(1))
    write_rows(tmp_path, "rows", [Located("line 1", {"text": "a"})], BadRows(OnBadRow.FAIL))
    assert asked == []
    assert table.row(0) == table.row(0) == {"text": "a"}
    assert asked == [1]


def test_a_full_disk_is_an_error_that_says_so(tmp_path):
    (tmp_path / "x-00000.arrow").symlink_to("/dev/full")
    writer = PartWriter(tmp_path, "x")
    with pytest.raises(OSError, match="No space left") as caught:
        writer.write(pyarrow.record_batch({"c": pyarrow.array(range(100_000))}))
    assert caught.value.errno == errno.ENOSPC


def test_another_schema_begins_another_file(tmp_path):
    with PartWriter(tmp_path, "x") as writer:
        for column in (pyarrow.array([1]), pyarrow.array([2]), pyarrow.array(["a"])):
            writer.write(pyarrow.record_batch({"c": column}))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["x-00000.arrow", "x-00001.arrow"]
    assert len(PartReader(tmp_path, "x")) == 3
