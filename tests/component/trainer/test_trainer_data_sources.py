"""Data from real places: an S3 store, a Hub through `datasets`, WordNet through nltk, translation models, processes."""

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import boto3
import pyarrow
import pytest
from pyarrow import parquet

from support.hubserver import TOKEN, running_hub
from support.plans import dataset, training_plan
from tunesmith_api.keys import Reason
from tunesmith_api.plan import StoragePlan
from tunesmith_api.v1alpha1.dataset import Dataset, OnBadRow
from tunesmith_store.errors import Retryable, UserError
from tunesmith_store.router import store_of
from tunesmith_trainer import data
from tunesmith_trainer.data import encoder, splits, wordnet
from tunesmith_trainer.data.examples import ExampleSet
from tunesmith_trainer.data.rows import BadRows, Located, parse
from tunesmith_trainer.data.sources import open_sources
from tunesmith_trainer.data.table import RowTable, write_rows
from tunesmith_trainer.tasks import task_for


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def texts(count, start=0):
    return [{"text": f"row {number} " + "word " * (number % 5)} for number in range(start, start + count)]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def prepare(tokenizer, tmp_path):
    pods = iter(range(100))

    def run(plan, writer=True, log=lambda *lines: None):
        task = task_for(plan)
        task.processor = tokenizer
        return data.prepare(plan, task, store_of(plan), tmp_path / f"pod-{next(pods)}", writer=writer, log=log)

    return run


def rows_of(found):
    return [found.row(index) for index in range(len(found))]


# ---- S3


@pytest.fixture
def in_s3(object_store, bucket, monkeypatch):
    """Makes plans for a bucket with a model and some data."""
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    for name, value in object_store.credentials.environment().items():
        monkeypatch.setenv(name, value)
    object_store.put_text("{}", f"{bucket}/model/tokenizer.json")
    object_store.put_json_lines(texts(40), f"{bucket}/data/a.jsonl")
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(texts(3000, 40)), buffer, row_group_size=1000)
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"{bucket.removeprefix('s3://')}.parquet"
    path.write_bytes(buffer.getvalue())
    object_store.put_file(path, f"{bucket}/data/b.parquet")
    path.unlink()
    object_store.put_text("text,label\nheld out,1\n", f"{bucket}/eval.csv")

    def plan(**changes):
        storage = StoragePlan(endpoint_url=object_store.endpoint_url)
        values = {"task": "CausalLM", "dataset": dataset(f"{bucket}/data", f"{bucket}/eval.csv"), "storage": storage}
        return training_plan(bucket, **(values | changes))

    return plan


def test_a_folder_in_s3_is_read_and_its_tokens_are_cached_there(in_s3, prepare, object_store, bucket):
    first = prepare(in_s3())
    assert rows_of(first.train) == texts(3040)
    assert rows_of(first.eval) == [{"text": "held out"}]
    names = {uri.rpartition("/")[2] for uri in object_store.list_keys(f"{bucket}/checkpoints/tokens")}
    assert {"manifest.json", "train-000-00000.arrow", "rows-train-00000.arrow"} <= names
    second = prepare(in_s3(), writer=False)
    assert [second.train.get(index) for index in range(0, 3040, 100)] == [
        first.train.get(index) for index in range(0, 3040, 100)
    ]
    assert second.train.row(3039) == texts(3040)[3039]


def test_a_cache_that_may_not_be_written_costs_time_and_no_more(in_s3, prepare, object_store, monkeypatch):
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it remembers the keys
    for name, value in object_store.read_only.environment().items():
        monkeypatch.setenv(name, value)
    said = []
    assert len(prepare(in_s3(), log=said.append).train) == 3040
    assert said[0].startswith("the tokens can't be cached at s3://")


def test_what_is_not_in_s3_is_named(in_s3, prepare, bucket):
    with pytest.raises(UserError, match="does not exist") as caught:
        prepare(in_s3(dataset=dataset(f"{bucket}/nothing.jsonl")))
    assert caught.value.reason is Reason.DATASET_NOT_FOUND
    with pytest.raises(UserError, match="does not exist"):
        prepare(in_s3(dataset=dataset("s3://no-such-bucket-anywhere/x.jsonl")))


def test_streaming_from_s3_continues_anywhere(in_s3, prepare, bucket):
    settings = dataset(f"{bucket}/data", streaming=True, shuffleBufferSize=100)
    stream = prepare(in_s3(dataset=settings)).stream
    straight = [stream.share(step, 0, 1) for step in range(12)]
    stream.close()
    resumed = prepare(in_s3(dataset=settings)).stream
    assert resumed.share(11, 0, 1) == straight[11]
    resumed.close()


# ---- the Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", datasets.config.HF_ENDPOINT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr("tunesmith_store.hub.PAUSES", (0.0,))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "")
    with running_hub() as server:
        yield server


def read(hub, task="CausalLM", streaming=False, **source):
    settings = Dataset.model_validate({"train": source, "streaming": streaming})
    plan = training_plan(task=task, dataset=settings, hub_endpoint_url=hub.url)
    opened, _ = open_sources(plan, store_of(plan))
    return [(raw.where, parse(raw)) for raw in opened.rows()]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_of_a_hub_data_set_is_read_in_order(hub, streaming):
    hub.dataset("o/d").push({"train.jsonl": lines(*texts(700)), "test.jsonl": lines({"text": "held out"})})
    found = read(hub, streaming=streaming, uri="hf://o/d")
    assert [row for _, row in found] == texts(700)
    assert found[699][0] == "hf://o/d row 700"
    assert read(hub, streaming=streaming, uri="hf://datasets/o/d", split="test")[0][1] == {"text": "held out"}
    assert read(hub, streaming=streaming, uri="hf://o/d/test.jsonl")[0][1] == {"text": "held out"}


def as_parquet(rows, features):
    import datasets

    buffer = io.BytesIO()
    datasets.Dataset.from_list(rows, features=features).to_parquet(buffer)
    return buffer.getvalue()


def test_numbers_of_classes_become_their_names(hub):
    from datasets import ClassLabel, Features, List, Value

    kinds = ClassLabel(names=["negative", "positive"])
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": -1}]
    features = Features({"text": Value("string"), "label": kinds})
    hub.dataset("o/c").push({"data/train-00000-of-00001.parquet": as_parquet(rows, features)})
    found = read(hub, "SequenceClassification", uri="hf://o/c")
    assert [row["label"] for _, row in found] == ["positive", None]
    features = Features({"tokens": List(Value("string")), "tags": List(kinds)})
    hub.dataset("o/t").push({"data/train.parquet": as_parquet([{"tokens": ["a", "b"], "tags": [1, 0]}], features)})
    assert read(hub, "TokenClassification", uri="hf://o/t")[0][1]["tags"] == ["positive", "negative"]


@pytest.mark.parametrize("streaming", [False, True])
def test_images_come_with_their_bytes(hub, streaming):
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    hub.dataset("o/i").push({"train/cat/1.png": buffer.getvalue(), "train/dog/2.png": buffer.getvalue()})
    found = [row for _, row in read(hub, "ImageClassification", streaming, uri="hf://o/i")]
    assert [row["label"] for row in found] == ["cat", "dog"]
    assert [row["image"]["bytes"] for row in found] == [buffer.getvalue()] * 2


def test_a_configuration_and_a_revision(hub):
    card = "---\nconfigs:\n- config_name: a\n  data_files: a.jsonl\n- config_name: b\n  data_files: b.jsonl\n---\n"
    files = {"README.md": card.encode(), "a.jsonl": lines({"text": "A"}), "b.jsonl": lines({"text": "B"})}
    old = hub.dataset("o/d").push(files)
    hub.dataset("o/d").push(files | {"b.jsonl": lines({"text": "new"})})
    assert read(hub, uri="hf://o/d", config="b")[0][1] == {"text": "new"}
    assert read(hub, uri="hf://o/d", config="b", revision=old)[0][1] == {"text": "B"}
    with pytest.raises(UserError, match=r"\['a', 'b'\].*check spec\.dataset\.train\.config"):
        read(hub, uri="hf://o/d")


@pytest.mark.parametrize(
    ("files", "source", "words"),
    [
        ({"train.jsonl": b'{"text": "a"}\n'}, {"split": "nope"}, 'Unknown split "nope"'),
        ({"train.jsonl": b'{"text": "a"}\n{oops\n'}, {}, "can't be loaded: JSON parse error"),
        ({"README.md": b"nothing"}, {}, "holds no data files"),
        ({"train.jsonl": b'{"text": "a"}\n'}, {"revision": "v9"}, "no revision 'v9'"),
    ],
)
def test_what_is_wrong_with_a_hub_data_set_is_said(hub, files, source, words):
    hub.dataset("o/d").push(files)
    with pytest.raises(UserError, match=words):
        read(hub, uri="hf://o/d", **source)


def test_private_and_gated_data_sets_need_a_token(hub, monkeypatch):
    for name in ("private", "gated"):
        hub.dataset(f"o/{name}").push({"train.jsonl": lines({"text": "a"})})
        setattr(hub.dataset(f"o/{name}"), name, True)
        with pytest.raises(UserError, match=r"spec\.huggingFace\.secretRef") as caught:
            read(hub, uri=f"hf://o/{name}")
        assert caught.value.reason is Reason.DATASET_NOT_FOUND
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("private", "gated"):
        assert read(hub, uri=f"hf://o/{name}")[0][1] == {"text": "a"}


def test_a_hub_that_does_not_answer_can_be_tried_again(hub):
    hub.dataset("o/d").push({"train.jsonl": lines({"text": "a"})})
    hub.failing = 10_000
    with pytest.raises(Retryable):
        read(hub, uri="hf://o/d")


def test_a_hub_data_set_is_prepared_and_cached_by_its_commit(hub, in_s3, prepare):
    hub.dataset("o/d").push({"train.jsonl": lines(*texts(30))})
    plan = in_s3(dataset=dataset("hf://o/d", splitPercent=20), hub_endpoint_url=hub.url)
    first = prepare(plan)
    assert len(first.train) + len(first.eval) == 30
    before = len(hub.requests)
    assert rows_of(prepare(plan).eval) == rows_of(first.eval)
    assert [request for request in hub.requests[before:] if "resolve" in request] == []
    hub.dataset("o/d").push({"train.jsonl": lines(*texts(31))})
    again = prepare(plan)
    assert len(again.train) + len(again.eval) == 31


# ---- several processes, and more than memory holds


def test_several_processes_give_what_one_does(tokenizer, tmp_path):
    task = task_for(training_plan(task="CausalLM"))
    task.processor = tokenizer
    rows = [*texts(60), {"text": "x" * 200}, *texts(60, 61)]
    sets, told = [], []
    for name, cpus in (("one", 1.0), ("two", 2.0)):
        folder = tmp_path / name
        write_rows(folder, "rows", [Located(f"line {n}", row) for n, row in enumerate(rows, 1)], BadRows(OnBadRow.FAIL))
        done = encoder.encode(
            task, folder, "train", "rows", list(range(len(rows))), BadRows(OnBadRow.FAIL), cpus, told.append, 50
        )  # fmt: skip
        assert done.examples == 124
        sets.append(ExampleSet(folder, "train", RowTable(folder, "rows")))
    assert len({path.name[:9] for path in (tmp_path / "two").glob("train-*")}) == 2
    one, two = sets
    assert [two.get(index) for index in range(124)] == [one.get(index) for index in range(124)]
    assert rows_of(two) == rows_of(one)
    assert told[-1] <= len(rows)


def test_a_bad_row_is_named_by_whichever_process_meets_it(tokenizer, tmp_path):
    task = task_for(training_plan(task="ChatSFT"))
    task.processor = tokenizer
    tokenizer.chat_template = "{{ raise_exception('no roles') }}"
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    write_rows(tmp_path, "rows", [Located(f"line {n}", chat) for n in range(1, 101)], BadRows(OnBadRow.FAIL))
    with pytest.raises(UserError, match=r"line 1 .*no roles"):
        encoder.encode(
            task, tmp_path, "train", "rows", list(range(100)), BadRows(OnBadRow.FAIL), 2.0, lambda done: None, 50
        )
    bad = BadRows(OnBadRow.SKIP)
    done = encoder.encode(task, tmp_path, "train", "rows", list(range(100)), bad, 1.0, lambda done: None, 50)
    assert (done.examples, done.bad, bad.count, bad.first[:6]) == (0, 100, 100, "line 1")
    tokenizer.chat_template = None


def test_a_set_larger_than_memory_is_written_and_read_within_little(tmp_path):
    program = (
        "import random, resource, sys; from pathlib import Path\n"
        "from tunesmith_trainer.data.examples import ExampleSet, ExampleWriter\n"
        "from tunesmith_trainer.data.table import RowTable; from tunesmith_trainer.tasks.base import Example\n"
        "def own(): return int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1]) << 10\n"
        "folder = Path(sys.argv[1]); ids = list(range(4096)); import numpy, pyarrow, pandas; start = own()\n"
        "with ExampleWriter(folder, 'train') as writer:\n"
        "    for row in range(20_000): writer.add(Example({'input_ids': ids}, 4096, 1.0), row, 0)\n"
        "print(own() - start)\n"
        "found = ExampleSet(folder, 'train', RowTable(folder, 'rows')); rng = random.Random(0)\n"
        "for _ in range(5000): assert found.get(rng.randrange(20_000)).features['input_ids'][5] == 5\n"
        "print(own() - start)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size > 300 << 20
    assert len(list(tmp_path.iterdir())) == 2
    assert all(int(grown) < 100 << 20 for grown in done.stdout.split()), done.stdout


# ---- WordNet


def write_wordnet(folder, synsets):
    """Files as WordNet has them: synsets are (part of speech, words)."""
    for kind, suffix in (("n", "noun"), ("v", "verb"), ("a", "adj"), ("r", "adv")):
        data, index = "  1 WordNet 3.0 Copyright of nobody\n", {}
        for found, names in synsets:
            if found == kind:
                offset = len(data)
                listed = " ".join(f"{name} 0" for name in names)
                data += f"{offset:08d} 00 {kind} {len(names):02x} {listed} 000 | meaning  \n"
                for name in names:
                    index.setdefault(name, []).append(offset)
        (folder / f"data.{suffix}").write_text(data)
        lines = [
            f"{name} {kind} {len(at)} 0 {len(at)} 0 {' '.join(f'{offset:08d}' for offset in at)}  \n"
            for name, at in sorted(index.items())
        ]
        (folder / f"index.{suffix}").write_text("  1 a licence\n" + "".join(lines))
        (folder / f"{suffix}.exc").write_text("ran run\n" if kind == "v" else "")


def test_synonyms_are_single_words_of_the_same_form(tmp_path, monkeypatch):
    synsets = [
        ("n", ["movie", "film", "motion_picture"]),
        ("n", ["film", "coat"]),
        ("v", ["run", "sprint"]),
        ("a", ["good", "fine"]),
    ]
    write_wordnet(tmp_path, synsets)
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    found = wordnet.Synonyms.open()
    assert found.of("movie") == ("film",)
    assert found.of("film") == ("coat", "movie")
    assert found.of("run") == ("sprint",)
    assert found.of("ran") == found.of("movies") == found.of("nothing") == ()  # "sprint" would not fit in for "ran"


def test_the_real_wordnet_knows_english(tokenizer, in_s3, prepare, bucket, object_store):
    try:
        wordnet.find_wordnet()
    except UserError as error:
        pytest.skip(str(error))
    synonyms = wordnet.Synonyms.open().of
    assert {"film", "picture"} <= set(synonyms("movie"))
    assert "rapidly" in synonyms("quickly")
    object_store.put_json_lines([{"text": "a quick movie about happy people"}], f"{bucket}/one.jsonl")
    settings = dataset(f"{bucket}/one.jsonl", augmentation={"synonymReplacement": 0.9})
    found = prepare(in_s3(dataset=settings)).train
    texts = {
        tokenizer.decode(found.get(0, epoch).features["input_ids"], skip_special_tokens=True) for epoch in range(9)
    }
    assert len(texts) > 3
    assert all(len(text.split()) == 6 and text.startswith("a ") for text in texts)


# ---- back-translation


@pytest.fixture(scope="module")
def translator(tmp_path_factory, tiny_model):
    """A real T5 of random weights: what it says is nonsense, and always the same."""
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    words = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=len(words), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0,
        pad_token_id=1, eos_token_id=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("translator")
    model = T5ForConditionalGeneration(config)
    model.generation_config.suppress_tokens = [0, 1]  # or it would say nothing at all
    model.save_pretrained(folder)
    words.pad_token = words.eos_token
    words.save_pretrained(folder)
    return folder


def test_a_part_of_the_texts_is_translated_there_and_back_once(
    in_s3, prepare, object_store, bucket, translator, monkeypatch
):
    object_store.put_folder(translator, f"{bucket}/mt")
    object_store.put_json_lines([*texts(30), {"text": "two\n\nlines"}], f"{bucket}/some.jsonl")
    back = {"probability": 0.5, "forwardUri": f"{bucket}/mt", "backwardUri": f"{bucket}/mt"}
    plan = in_s3(dataset=dataset(f"{bucket}/some.jsonl", augmentation={"backTranslation": back}), replicas=2)
    monkeypatch.setattr(splits, "WAIT_SECONDS", 0.05)
    said, waiting = [], []
    other = threading.Thread(target=lambda: waiting.append(prepare(plan, writer=False, log=said.append)))
    other.start()
    while not said:
        other.join(0.05)
    assert said == ["waiting for the first worker to paraphrase the training data"]
    first = prepare(plan)
    other.join(60)
    assert rows_of(waiting[0].train) == rows_of(first.train)
    kept = {row["text"] for row in rows_of(first.train)} & {row["text"] for row in texts(30)}
    assert 5 < len(kept) < 25
    assert first.statistics.train.rows == 31


def test_a_folder_that_is_no_translator_is_named(in_s3, prepare, object_store, bucket, tiny_model):
    object_store.put_folder(tiny_model, f"{bucket}/mt")
    back = {"probability": 0.5, "forwardUri": f"{bucket}/mt", "backwardUri": f"{bucket}/mt"}
    plan = in_s3(dataset=dataset(f"{bucket}/data", augmentation={"backTranslation": back}))
    with pytest.raises(UserError, match=r"backTranslation\.forwardUri: it can't be loaded") as caught:
        prepare(plan)
    assert caught.value.reason is Reason.MODEL_INVALID
