"""Rows of every source and format; what is wrong with one is named by file and line, or left out and counted."""

import base64
import csv
import datetime
import decimal
import io
import json
import threading

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from support.plans import training_plan
from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1.dataset import Columns, DataFormat, Dataset, DatasetSource, OnBadRow
from tunesmith_api.v1alpha1.task import Classification, ProblemType, Task
from tunesmith_store.errors import Retryable, UserError
from tunesmith_store.volumes import VolumeStore
from tunesmith_trainer.data.image_loader import ImageLoader
from tunesmith_trainer.data.rows import NOT_UTF8, BadRows, RowChecker, columns_of, parse, to_json
from tunesmith_trainer.data.sources import open_source
from tunesmith_trainer.tasks import task_for
from tunesmith_trainer.tasks.base import BadRow

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
PNG = b"\x89PNG\r\n"


@pytest.fixture
def store(tmp_path):
    (tmp_path / "volumes" / "b").mkdir(parents=True)
    return VolumeStore(tmp_path / "volumes")


def lines(*rows):
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def read(store, uri="pvc://b/train.jsonl", task=Task.CAUSAL_LM, policy=OnBadRow.FAIL, form=DataFormat.AUTO, **plan):
    """The usable rows of a source, and what became of the bad ones."""
    source = DatasetSource(uri=uri, format=form)
    plan = training_plan(task=task, dataset=Dataset(train=source, columns=plan.pop("columns", Columns())), **plan)
    bad = BadRows(policy)
    checker = RowChecker(task_for(plan), columns_of(plan), ImageLoader(store), bad)
    found = list(checker.usable(open_source(source, plan, store, "spec.dataset.train").rows()))
    return found, bad


def texts(found):
    return [row["text"] for _, row in found]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{oops", "is not valid JSON"),
        (b"[1]", "is not a JSON object but list"),
        (b'{"messages": "\xff"}', "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        ({"text": "x"}, "has no field 'messages' (its fields: text); set spec.dataset.columns.messages"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message"),
    ],
)
def test_a_bad_row_names_file_and_line_what_is_wrong_and_the_remedy(store, line, words):
    store.put_bytes("pvc://b/train.jsonl", lines(CHAT, b"", line, CHAT))
    with pytest.raises(UserError) as caught:
        read(store, task=Task.CHAT_SFT)
    assert caught.value.reason is Reason.DATASET_INVALID
    assert caught.value.message.startswith("pvc://b/train.jsonl line 3 ")
    assert words in caught.value.message
    assert "spec.dataset.onBadRow: Skip" in caught.value.message
    found, bad = read(store, task=Task.CHAT_SFT, policy=OnBadRow.SKIP)
    assert [where for where, _ in found] == ["pvc://b/train.jsonl line 1", "pvc://b/train.jsonl line 4"]
    assert bad.count == 1
    assert bad.first.startswith("pvc://b/train.jsonl line 3 ")
    assert len(bad.first) <= 300


def test_only_the_tasks_columns_are_kept_and_they_may_have_other_names(store):
    store.put_bytes("pvc://b/x.jsonl", lines({"body": "hello", "id": 7}))
    found, _ = read(store, "pvc://b/x.jsonl", columns=Columns(text="body"))
    assert [row for _, row in found] == [{"body": "hello"}]


def test_a_byte_order_mark_and_other_line_ends_are_no_trouble(store):
    store.put_bytes("pvc://b/x.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b\\u2028c"}')
    assert texts(read(store, "pvc://b/x.jsonl")[0]) == ["a", "b\u2028c"]


def test_json_files_hold_a_list_or_lines(store):
    store.put_bytes("pvc://b/x.json", b'  [{"text": "a"},\n {"text": "b"}, 3]')
    with pytest.raises(UserError, match=r"x\.json item 3 is no object but int"):
        read(store, "pvc://b/x.json")
    assert texts(read(store, "pvc://b/x.json", policy=OnBadRow.SKIP)[0]) == ["a", "b"]
    store.put_bytes("pvc://b/y.json", lines({"text": "a"}, {"text": "b"}))
    assert texts(read(store, "pvc://b/y.json")[0]) == ["a", "b"]
    store.put_bytes("pvc://b/z.json", b'[{"text": "a"}')
    with pytest.raises(UserError, match="a list of objects, or one object on each line"):
        read(store, "pvc://b/z.json", policy=OnBadRow.SKIP)


@settings(deadline=None)
@given(cells=st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=5), tabs=st.booleans())
def test_whatever_a_csv_writer_writes_is_read_back(tmp_path_factory, cells, tabs):
    root = tmp_path_factory.mktemp("csv")
    cells = [tuple("".join(c for c in cell if not 0xD800 <= ord(c) < 0xE000) for cell in pair) for pair in cells]
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t" if tabs else ",", lineterminator="\r\n")
    writer.writerows([("text", "more"), *cells])
    (root / "b").mkdir()
    (root / "b" / f"x.{'tsv' if tabs else 'csv'}").write_bytes(text.getvalue().encode())
    found, bad = read(VolumeStore(root), f"pvc://b/x.{'tsv' if tabs else 'csv'}", policy=OnBadRow.SKIP)
    assert texts(found) == [cell for cell, _ in cells if cell.strip()]
    assert bad.count == sum(not cell.strip() for cell, _ in cells)


def test_a_bad_csv_row_names_the_line_that_it_begins_on(store):
    data = b'text,label\n"two\nlines",x\n\xff\xfe,x\nshort\n\nlast,x\n'
    store.put_bytes("pvc://b/x.csv", data)
    found, bad = read(store, "pvc://b/x.csv", policy=OnBadRow.SKIP)
    assert [where for where, _ in found] == ["pvc://b/x.csv line 2", "pvc://b/x.csv line 7"]
    assert bad.count == 2
    assert bad.first == f"pvc://b/x.csv line 4 {NOT_UTF8}"
    store.put_bytes("pvc://b/x.csv", b"text,label\nshort\n")
    with pytest.raises(UserError, match="line 2 has 1 cells where the header has 2"):
        read(store, "pvc://b/x.csv")
    store.put_bytes("pvc://b/x.csv", b"text,text\na,b\n")
    with pytest.raises(UserError, match="two columns named 'text'"):
        read(store, "pvc://b/x.csv")


def test_a_csv_file_writes_lists_as_json_and_numbers_as_text(store):
    store.put_bytes("pvc://b/x.csv", b'tokens,tags\n"[""a"",""b""]","[""X"",""Y""]"\n')
    found, _ = read(store, "pvc://b/x.csv", task=Task.TOKEN_CLASSIFICATION)
    assert found[0].row == {"tokens": ["a", "b"], "tags": ["X", "Y"]}
    store.put_bytes("pvc://b/y.csv", b"text,label\n5,3.5\n")
    regression = Classification(problem_type=ProblemType.REGRESSION)
    found, _ = read(store, "pvc://b/y.csv", task=Task.SEQUENCE_CLASSIFICATION, classification=regression)
    assert found[0].row == {"text": "5", "label": 3.5}


def put_parquet(store, uri, table, **options):
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, **options)
    store.put_bytes(uri, buffer.getvalue())


def test_parquet_is_read_by_column_and_row_group(store, monkeypatch):
    table = pyarrow.table({"text": [f"t{n}" for n in range(2000)], "wide": ["x" * 5000] * 2000})
    put_parquet(store, "pvc://b/x.parquet", table, row_group_size=300, compression="none", use_dictionary=False)
    read_bytes = []
    original = store.get_range
    monkeypatch.setattr(store, "get_range", lambda *call: read_bytes.append(call[2]) or original(*call))
    found, _ = read(store, "pvc://b/x.parquet")
    assert texts(found) == [f"t{n}" for n in range(2000)]
    assert found[1999].where == "pvc://b/x.parquet row 2000"
    whole = store.head("pvc://b/x.parquet").size
    assert whole > 9_000_000
    assert sum(read_bytes) < whole / 2


def test_a_parquet_file_without_the_column_lists_those_that_it_has(store):
    put_parquet(store, "pvc://b/x.parquet", pyarrow.table({"body": ["a"], "id": [1]}))
    with pytest.raises(UserError, match=r"x\.parquet row 1 has no field 'text' \(its fields: body, id\)"):
        read(store, "pvc://b/x.parquet")


def test_a_broken_parquet_file_is_named_and_a_lost_store_is_not_its_fault(store, monkeypatch):
    store.put_bytes("pvc://b/x.parquet", b"PAR1 nothing of the kind")
    with pytest.raises(UserError, match=r"x\.parquet can't be read as Parquet"):
        read(store, "pvc://b/x.parquet")
    put_parquet(store, "pvc://b/x.parquet", pyarrow.table({"text": ["a"]}))

    def lost(*call):
        raise Retryable("the store is gone")

    monkeypatch.setattr(store, "get_range", lost)
    with pytest.raises(Retryable):
        read(store, "pvc://b/x.parquet")


def test_a_text_file_has_a_row_on_each_line_that_is_not_blank(store):
    store.put_bytes("pvc://b/x.txt", b"one \r\n\n  \ntwo\n\xff\nthree")
    found, bad = read(store, "pvc://b/x.txt", policy=OnBadRow.SKIP)
    assert texts(found) == ["one ", "two", "three"]
    assert bad.first.startswith("pvc://b/x.txt line 5 is not valid UTF-8")


def test_a_folder_is_read_in_the_order_of_its_names_and_other_files_are_passed_over(store):
    for name, text in (
        ("b.jsonl", "2"),
        ("a.txt", "1"),
        ("sub/c.jsonl", "3"),
        (".hidden.jsonl", "x"),
        ("_tmp/d.jsonl", "x"),
    ):
        store.put_bytes(f"pvc://b/data/{name}", text.encode() if name.endswith("txt") else lines({"text": text}))
    store.put_bytes("pvc://b/data/README.md", b"# data")
    assert texts(read(store, "pvc://b/data")[0]) == texts(read(store, "pvc://b/data/")[0]) == ["1", "2", "3"]
    assert texts(read(store, "pvc://b/data", form=DataFormat.TEXT)[0]) == ["1"]


def test_parts_without_an_extension_need_a_format(store):
    store.put_bytes("pvc://b/data/part-00000", lines({"text": "1"}))
    store.put_bytes("pvc://b/data/_SUCCESS", b"")
    store.put_bytes("pvc://b/one", lines({"text": "1"}))
    for uri in ("pvc://b/data", "pvc://b/one"):
        with pytest.raises(UserError, match=r"spec\.dataset\.train\.uri: .*set spec\.dataset\.train\.format") as caught:
            read(store, uri)
        assert caught.value.reason is Reason.DATASET_INVALID
        assert texts(read(store, uri, form=DataFormat.JSONL)[0]) == ["1"]


def test_nothing_there(store):
    for uri in ("pvc://b/none.jsonl", "pvc://b/nothing", "pvc://b"):
        with pytest.raises(UserError, match="does not exist; upload it or correct the URI") as caught:
            read(store, uri)
        assert caught.value.reason is Reason.DATASET_NOT_FOUND


def test_rows_in_the_manifest_itself(store):
    plan = training_plan(task=Task.CAUSAL_LM)
    source = open_source(DatasetSource(inline='{"text": "a"}\n\n{"text": "b"}'), plan, store, "spec.dataset.train")
    assert [(raw.where, parse(raw)["text"]) for raw in source.rows()] == [
        ("spec.dataset.train.inline line 1", "a"),
        ("spec.dataset.train.inline line 3", "b"),
    ]


@pytest.mark.parametrize(
    "cell",
    [
        "images/one.png",
        PNG,
        {"bytes": PNG, "path": None},
        {"bytes": None, "path": "images/one.png"},
        base64.b64encode(PNG).decode(),
        "data:image/png;base64," + base64.b64encode(PNG).decode(),
    ],
)
def test_an_image_is_base64_text_wherever_it_comes_from(store, cell):
    store.put_bytes("pvc://b/data/images/one.png", PNG)
    load = ImageLoader(store).load
    expected = base64.b64encode(PNG).decode()
    assert load(cell, "pvc://b/data") == expected
    assert load([cell, cell], "pvc://b/data") == [expected, expected]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("none.png", "pvc://b/data/none.png does not exist"),
        ("../x.png", "below the data file's folder"),
        ("/x.png", "below"),
    ],
)
def test_an_image_that_is_not_there_is_a_bad_row(store, path, words):
    with pytest.raises(BadRow, match="names the image file") as caught:
        ImageLoader(store).load(path, "pvc://b/data")
    assert words in str(caught.value)
    with pytest.raises(BadRow, match="there is no folder"):
        ImageLoader(store).load("x.png", "")


def test_what_json_lacks_becomes_text_or_a_number():
    day = datetime.date(2026, 1, 2)
    assert json.loads(to_json({"a": b"x", "b": day, "c": decimal.Decimal("1.5")})) == {
        "a": "eA==", "b": "2026-01-02", "c": 1.5,
    }  # fmt: skip
    with pytest.raises(BadRow, match="type complex"):
        to_json({"a": 1j})


def test_images_that_are_fetched_side_by_side_stay_in_order(store, monkeypatch):
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    store.put_bytes("pvc://b/data/one.png", buffer.getvalue())
    rows = [{"image": "one.png" if number % 10 else "none.png", "label": str(number)} for number in range(100)]
    store.put_bytes("pvc://b/data/train.jsonl", lines(*rows))
    together, original = [], store.get_bytes
    gate = threading.Barrier(4, timeout=20)

    def slow(uri):
        if len(together) < 4:
            together.append(uri)
            gate.wait()  # passed by four at once only
        return original(uri)

    monkeypatch.setattr(store, "get_bytes", slow)
    plan = training_plan(task="ImageClassification")
    bad = BadRows(OnBadRow.SKIP)
    checker = RowChecker(task_for(plan), columns_of(plan), ImageLoader(store), bad)
    source = open_source(DatasetSource(uri="pvc://b/data"), plan, store, "spec.dataset.train")
    found = list(checker.usable(source.rows(), threads=4))
    assert [row["label"] for _, row in found] == [str(number) for number in range(100) if number % 10]
    assert (bad.count, bad.first[:30]) == (10, "pvc://b/data/train.jsonl line ")
    assert "line 1 names the image file 'none.png'" in bad.first
