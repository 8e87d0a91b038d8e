"""A plan's data made ready: cleaned, split, encoded once, cached by content, damage noticed, counts told."""

import json
import threading

import pytest

from support.plans import dataset, training_plan
from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1.dataset import Columns
from tunesmith_api.v1alpha1.task import Classification
from tunesmith_store.errors import Retryable, UserError
from tunesmith_store.volumes import VolumeStore
from tunesmith_trainer import data
from tunesmith_trainer.data import cache
from tunesmith_trainer.data.arrow_files import PartWriter
from tunesmith_trainer.tasks import task_for

BASE = "pvc://b"
MODEL = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "model.safetensors": b"x" * 100}


@pytest.fixture
def store(tmp_path):
    (tmp_path / "volumes" / "b").mkdir(parents=True)
    store = VolumeStore(tmp_path / "volumes")
    for name, content in MODEL.items():
        store.put_bytes(f"{BASE}/model/{name}", content)
    return store


def put(store, rows, name="train.jsonl"):
    store.put_bytes(f"{BASE}/{name}", "".join(json.dumps(row) + "\n" for row in rows).encode())


def texts(count, start=0):
    return [{"text": f"row {number} " + "word " * (number % 5)} for number in range(start, start + count)]


class Bench:
    """Prepares plans, each time in a pod of its own unless told otherwise."""

    def __init__(self, store, tokenizer, folder):
        self.store, self.tokenizer, self.folder, self.lines, self.pods = store, tokenizer, folder, [], 0
        self.encoded = 0

    def __call__(self, plan=None, writer=True, pod=None, store=None, **changes):
        plan = plan or training_plan(
            BASE, **({"task": "CausalLM", "dataset": dataset(f"{BASE}/train.jsonl")} | changes)
        )
        self.task = task_for(plan)
        self.task.processor = self.tokenizer
        original = self.task.encode

        def counted(row):
            self.encoded += 1
            return original(row)

        self.task.encode = counted
        self.pods += pod is None
        self.lines.clear()
        scratch = self.folder / (pod or f"pod-{self.pods}")
        return data.prepare(plan, self.task, store or self.store, scratch, writer=writer, log=self.lines.append)


@pytest.fixture
def prepare(store, tokenizer, tmp_path):
    return Bench(store, tokenizer, tmp_path)


def test_examples_are_what_the_task_makes_of_the_rows(store, prepare):
    put(store, texts(30))
    found = prepare()
    assert len(found.train) == 30
    assert found.eval is None
    for index in (0, 7, 29):
        assert found.train.row(index) == texts(30)[index]
        assert found.train.get(index) == prepare.task.encode(texts(30)[index])[0]
    assert found.facts.train_examples == 30
    assert found.statistics.train.tokens == int(found.train.lengths.sum())
    assert sum(found.statistics.train.length_counts) == 30
    assert found.statistics.train.length_edges[-1] > max(found.train.lengths)
    tokens = found.statistics.train.tokens
    assert prepare.lines == [
        f"train: 30 examples from {BASE}/train.jsonl, {tokens - 30:,} of {tokens:,} tokens are learned",
        "the first training example, what is learned in ⟦ ⟧: ⟦row 0 </s>⟧",
    ]


def test_a_row_may_give_several_examples_or_none_worth_learning(store, prepare):
    put(store, [{"text": "x" * 150}, {"text": "short"}])
    found = prepare()
    assert found.train.lengths.tolist() == [64, 64, 23, 6]
    assert [found.train.row(index)["text"][:5] for index in range(4)] == ["xxxxx", "xxxxx", "xxxxx", "short"]
    assert prepare.lines == [
        f"train: 4 examples of 2 rows from {BASE}/train.jsonl, 153 of 157 tokens are learned",
        f"the first training example, what is learned in ⟦ ⟧: ⟦{'x' * 64}⟧",
    ]


def test_rows_that_the_cut_empties_are_left_out_and_counted(store, prepare):
    prepare.tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chats = [
        {"messages": [{"role": "user", "content": "x" * size}, {"role": "assistant", "content": "b"}]}
        for size in (1, 90)
    ]
    put(store, chats)
    found = prepare(task="ChatSFT")
    assert len(found.train) == 1
    assert found.statistics.train.skipped == 1
    assert prepare.lines == [
        f"train: 1 examples from {BASE}/train.jsonl, 1 left out (nothing to learn left after the cut), 2 of 23 tokens "
        "are learned, 1 of 2 turns of the assistant are learned",
        "the first training example, what is learned in ⟦ ⟧: <|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
        "⟦b<|im_end|>⟧\n",
    ]
    put(store, chats[1:])
    with pytest.raises(UserError, match=r"in none of its 1 rows .* spec\.training\.maxLength 64 tokens; raise it"):
        prepare(task="ChatSFT")


def test_bad_rows_are_left_out_and_counted_if_the_user_says_so(store, prepare):
    put(store, [{"text": "a"}, {"body": "b"}, {"text": 3}])
    found = prepare(dataset=dataset(f"{BASE}/train.jsonl", onBadRow="Skip"))
    assert (found.facts.bad_rows, found.facts.train_examples) == (2, 1)
    assert found.facts.first_bad_row.startswith(f"{BASE}/train.jsonl line 2 has no field 'text'")
    assert prepare.lines[-1].startswith(f"2 bad rows left out; the first: {BASE}/train.jsonl line 2 ")
    with pytest.raises(UserError, match="line 2 has no field 'text'"):
        prepare()
    put(store, [{"body": "b"}])
    with pytest.raises(UserError, match=r"none of its 1 rows can be used; the first: .* line 1 has no field"):
        prepare(dataset=dataset(f"{BASE}/train.jsonl", onBadRow="Skip"))


def test_no_rows_at_all(store, prepare):
    store.put_bytes(f"{BASE}/train.jsonl", b"\n \n")
    with pytest.raises(UserError, match=r"pvc://b/train\.jsonl: it has no rows") as caught:
        prepare()
    assert caught.value.reason is Reason.DATASET_INVALID


def test_duplicates_and_leaks_are_left_out(store, prepare):
    put(store, [*texts(20), *texts(5), {"text": "row 3 word word word ", "id": 1}])
    put(store, texts(2), "eval.jsonl")
    plain = prepare(dataset=dataset(f"{BASE}/train.jsonl", f"{BASE}/eval.jsonl"))
    assert (len(plain.train), plain.facts.duplicates) == (26, 0)
    found = prepare(dataset=dataset(f"{BASE}/train.jsonl", f"{BASE}/eval.jsonl", deduplication="Exact"))
    assert (len(found.train), len(found.eval), found.facts.duplicates) == (18, 2, 8)
    assert [found.train.row(index) for index in range(18)] == texts(18, 2)
    assert prepare.lines[-1].startswith("8 training rows left out")
    put(store, texts(20), "eval.jsonl")
    with pytest.raises(UserError, match="all 26 rows stand in the held-out data too"):
        prepare(dataset=dataset(f"{BASE}/train.jsonl", f"{BASE}/eval.jsonl", deduplication="Exact"))


def test_a_split_holds_out_what_it_held_out_before_the_data_grew(store, prepare):
    def sides(count):
        put(store, list(reversed(texts(count))))
        found = prepare(dataset=dataset(f"{BASE}/train.jsonl", splitPercent=20))
        assert found.facts.train_examples == len(found.train)
        return [{s.row(i)["text"] for i in range(len(s))} for s in (found.train, found.eval)]

    (train, held_out), (more_train, more_held_out) = sides(100), sides(150)
    assert len(train) + len(held_out) == 100
    assert train < more_train
    assert held_out < more_held_out
    assert f" examples from {BASE}/train.jsonl (splitPercent), " in prepare.lines[1]


def test_a_split_that_leaves_one_side_empty_is_refused(store, prepare):
    put(store, texts(1))
    with pytest.raises(UserError, match=r"spec\.dataset\.splitPercent: of the 1 rows .* none is held out"):
        prepare(dataset=dataset(f"{BASE}/train.jsonl", splitPercent=1))


def test_classes_are_counted_over_the_rows_that_are_trained_on(store, prepare):
    rows = [{"text": f"t{number % 7}", "label": "even" if number % 7 % 2 == 0 else "odd"} for number in range(14)]
    put(store, rows)
    settings = {"task": "SequenceClassification", "classification": Classification(class_weights="Balanced")}
    found = prepare(dataset=dataset(f"{BASE}/train.jsonl", deduplication="Exact"), **settings)
    assert found.statistics.train.classes == {"even": 4, "odd": 3}
    units = {found.train.row(index)["label"]: found.train.get(index).units for index in range(7)}
    assert units == pytest.approx({"even": 7 / 8, "odd": 7 / 6})
    again = prepare(dataset=dataset(f"{BASE}/train.jsonl", deduplication="Exact"), pod="other", **settings)
    assert again.train.get(0) == found.train.get(0)
    assert prepare.task.encode(rows[0])[0].units == pytest.approx(7 / 8)  # the classes came along with the cache


# ---- the cache


def test_a_second_pod_tokenizes_nothing(store, prepare):
    put(store, texts(30))
    put(store, texts(9, 100), "eval.jsonl")
    plan = {"dataset": dataset(f"{BASE}/train.jsonl", f"{BASE}/eval.jsonl")}
    first = prepare(**plan)
    told, prepare.encoded = list(prepare.lines), 0
    second = prepare(**plan, writer=False)
    assert prepare.encoded == 0
    assert [second.train.get(index) for index in range(30)] == [first.train.get(index) for index in range(30)]
    assert (second.facts, second.statistics, prepare.lines) == (first.facts, first.statistics, told)
    assert second.eval.row(3) == texts(9, 100)[3]
    assert not list((prepare.folder / "pod-2").rglob("rows-train-*"))
    assert second.train.row(3) == texts(30)[3]  # fetched when somebody asks


def test_what_a_rank_has_prepared_the_others_of_its_pod_use(store, prepare):
    put(store, texts(30))
    prepare(writer=False, pod="one")
    assert store.list(f"{BASE}/checkpoints") == []
    prepare.encoded = 0
    results, gate = [], threading.Barrier(3)

    def rank():
        gate.wait()
        results.append(len(prepare(writer=False, pod="one").train))

    ranks = [threading.Thread(target=rank) for _ in range(3)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert (results, prepare.encoded) == ([30, 30, 30], 0)


def digest_of(prepare, plan, store):
    from tunesmith_trainer.data.sources import open_sources

    return cache.token_digest(plan, store, *open_sources(plan, store))


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "MaskedLM"},
        {"training": {"max_length": 65}},
        {"dataset": dataset(f"{BASE}/train.jsonl", onBadRow="Skip")},
        {"dataset": dataset(f"{BASE}/train.jsonl", deduplication="Exact")},
        {"dataset": dataset(f"{BASE}/train.jsonl", splitPercent=5)},
        {"dataset": dataset(f"{BASE}/train.jsonl", f"{BASE}/train.jsonl")},
        {"dataset": dataset(f"{BASE}/other.jsonl")},
        {"dataset": dataset(f"{BASE}/train.jsonl", columns=Columns(text="t"))},
        {"classification": Classification(labels=["a"])},
    ],
)
def test_all_that_decides_the_tokens_is_in_the_name_of_the_entry(store, prepare, changes):
    put(store, texts(3))
    put(store, texts(3), "other.jsonl")
    plan = {"task": "CausalLM", "dataset": dataset(f"{BASE}/train.jsonl")}
    before = digest_of(prepare, training_plan(BASE, **plan), store)
    assert digest_of(prepare, training_plan(BASE, **(plan | changes)), store) != before


def test_what_does_not_decide_the_tokens_is_not(store, prepare):
    put(store, texts(3))
    plan = {"task": "CausalLM", "dataset": dataset(f"{BASE}/train.jsonl")}
    before = digest_of(prepare, training_plan(BASE, **plan), store)
    store.put_bytes(f"{BASE}/model/model.safetensors", b"other weights")
    augmented = dataset(f"{BASE}/train.jsonl", augmentation={"wordDropout": 0.1})
    changes = {
        "training": {"seed": 9, "learning_rate": 1.0, "global_batch_size": 2},
        "dataset": augmented,
        "replicas": 3,
    }
    assert digest_of(prepare, training_plan(BASE, **(plan | changes)), store) == before
    store.put_bytes(f"{BASE}/model/tokenizer.json", b"{ }")
    assert digest_of(prepare, training_plan(BASE, **plan), store) != before


def test_a_full_disk_is_named_and_left_empty(store, prepare, monkeypatch):
    put(store, texts(30))

    def full(self, batch):
        with open("/dev/full", "wb", buffering=0) as disk:
            disk.write(b"x")

    monkeypatch.setattr(PartWriter, "write", full)
    with pytest.raises(UserError, match=r"No space left.*spec\.dataset\.streaming: true") as caught:
        prepare()
    assert caught.value.reason is Reason.DISK_FULL
    assert [path for path in prepare.folder.glob("pod-1/tokens/*") if path.is_dir()] == []


def test_other_content_under_the_same_name_is_tokenized(store, prepare):
    put(store, texts(30))
    prepare()
    put(store, texts(31))
    assert len(prepare().train) == 31


@pytest.mark.parametrize("harm", ["flip", "shorten", "delete", "manifest"])
def test_a_damaged_entry_is_noticed_and_mended(store, prepare, harm):
    put(store, texts(30))
    first = prepare()
    for info in store.list(f"{BASE}/checkpoints/tokens"):
        content = bytearray(store.get_bytes(info.uri))
        content[len(content) // 2] ^= 1
        name = info.uri.rpartition("/")[2]
        if harm == "manifest" and name == "manifest.json":
            store.put_bytes(info.uri, b"{")
        elif harm == "delete" and name.startswith("train"):
            store.delete(info.uri)
        elif harm == "flip" and name.startswith("train"):
            store.put_bytes(info.uri, bytes(content))
        elif harm == "shorten" and name.startswith("train"):
            store.put_bytes(info.uri, bytes(content[:-1]))
    prepare.encoded = 0
    second = prepare()
    assert prepare.encoded == 30
    assert [second.train.get(index) for index in range(30)] == [first.train.get(index) for index in range(30)]
    if harm != "manifest":
        assert "damaged" in prepare.lines[0]
    prepare.encoded = 0
    prepare()
    assert prepare.encoded == 0


def test_trouble_with_the_cache_never_fails_a_job(store, prepare):
    put(store, texts(30))

    class Readable:
        """Lets nobody write, and fails in the middle of downloads."""

        def __getattr__(self, name):
            return getattr(store, name)

        def upload(self, path, uri):
            raise UserError(Reason.STORAGE_UNWRITABLE, "may not write")

        def download(self, uri, path):
            raise Retryable("the network is gone")

    assert len(prepare(store=Readable()).train) == 30
    assert prepare.lines[0].startswith("the tokens can't be cached at pvc://b/checkpoints/tokens/")
    prepare()
    assert len(prepare(store=Readable()).train) == 30
    assert "can't be read" in prepare.lines[0]
