"""Bad input is named before a worker starts; good input has a digest of its content."""

import base64
import json
import subprocess
import sys

import pytest

from support.plans import dataset, training_plan
from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.v1alpha1.method import Method
from tunesmith_api.v1alpha1.task import Classification, Task
from tunesmith_store.errors import UserError
from tunesmith_store.volumes import VolumeStore
from tunesmith_trainer.data import cache, wordnet
from tunesmith_trainer.data.sources import open_sources
from tunesmith_trainer.data.statistics import DataStatistics
from tunesmith_trainer.group import preflight

BASE = "pvc://b"
ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
INDEX = b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
MODEL = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x", "tokenizer.json": b"{}"}


def lines(*rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture
def store(tmp_path):
    (tmp_path / "volumes" / "b").mkdir(parents=True)
    store = VolumeStore(tmp_path / "volumes")
    for name, content in MODEL.items():
        store.put_bytes(f"{BASE}/model/{name}", content)
    store.put_bytes(f"{BASE}/train.jsonl", lines(ROW, ROW, ROW))
    store.put_bytes(f"{BASE}/eval.jsonl", lines(ROW))
    return store


@pytest.fixture
def said():
    return []


@pytest.fixture
def check(store, tmp_path, said):
    runs = iter(range(100))

    def run(pod=None, **changes):
        plan = training_plan(BASE, **({"dataset": dataset(f"{BASE}/train.jsonl")} | changes))
        return preflight.check(plan, store, tmp_path / (pod or f"scratch-{next(runs)}"), said.append)

    return run


def test_the_digest_follows_content_and_plan_but_not_the_workers(check, store):
    first = check()
    assert check() == check(replicas=3, name="other") == first
    assert check(training={"seed": 8}) != first
    store.put_bytes(f"{BASE}/train.jsonl", lines(*[ROW] * 4))
    second = check()
    assert second != first
    store.put_bytes(f"{BASE}/model/model.safetensors", b"other")
    assert check() not in (first, second)


def test_held_out_data_counts_where_it_decides_what_is_trained_on(check, store):
    plain, exact = (
        {"dataset": dataset(f"{BASE}/train.jsonl", f"{BASE}/eval.jsonl", **more)}
        for more in ({}, {"deduplication": "Exact"})
    )
    before = [check(**plain), check(**exact)]
    store.put_bytes(f"{BASE}/eval.jsonl", lines(ROW, ROW))
    assert [one == other for one, other in zip(before, [check(**plain), check(**exact)], strict=True)] == [True, False]


def test_nothing_of_the_write_test_stays(check, store):
    check()
    assert store.list(f"{BASE}/checkpoints") == store.list(f"{BASE}/tuned") == []


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        ({"train.jsonl": None}, Reason.DATASET_NOT_FOUND, "spec.dataset.train.uri: pvc://b/train.jsonl does not exist"),
        ({"train.jsonl": b"\n"}, Reason.DATASET_INVALID, "it has no rows; ChatSFT needs rows with 'messages'"),
        (
            {"train.jsonl": lines(ROW, {"text": "a"})},
            Reason.DATASET_INVALID,
            "train.jsonl line 2 has no field 'messages'",
        ),
        ({"model/config.json": None}, Reason.MODEL_INVALID, "config.json is missing"),
        ({"model/config.json": b"{"}, Reason.MODEL_INVALID, "not valid JSON"),
        ({"model/config.json": b"{}"}, Reason.MODEL_INVALID, "model_type"),
        ({"model/model.safetensors": None}, Reason.MODEL_INVALID, "no *.safetensors"),
        ({"model/tokenizer.json": None}, Reason.MODEL_INVALID, "no tokenizer"),
        ({"model/adapter_config.json": b"{}"}, Reason.MODEL_INVALID, "adapter_config.json lie beside the model"),
        (
            {
                "model/model.safetensors": None,
                "model/model-1.safetensors": b"x",
                "model/model.safetensors.index.json": INDEX,
            },
            Reason.MODEL_INVALID,
            "model.safetensors.index.json names model-2.safetensors, not there",
        ),
    ],
)
def test_what_is_wrong_is_named(check, store, change, reason, words):
    for name, content in change.items():
        if content is None:
            store.delete(f"{BASE}/{name}")
        else:
            store.put_bytes(f"{BASE}/{name}", content)
    with pytest.raises(UserError) as caught:
        check()
    assert caught.value.reason is reason
    assert words in caught.value.message
    assert caught.value.exit_code is ExitCode.INVALID_INPUT


@pytest.mark.parametrize(
    ("config", "target", "task", "refused"),
    [
        ({"tie_word_embeddings": True}, "lm_head", "ChatSFT", True),
        ({"tie_word_embeddings": True}, "model.embed_tokens", "ChatSFT", True),
        ({"text_config": {"tie_word_embeddings": True}}, "lm_head", "ChatSFT", True),
        ({"tie_word_embeddings": False}, "lm_head", "ChatSFT", False),
        ({"tie_word_embeddings": True}, "q_proj", "ChatSFT", False),
        # there it has no output head
        ({"tie_word_embeddings": True}, "embed_tokens", "SequenceClassification", False),
    ],
)
def test_adapters_at_tied_embeddings_are_refused_before_a_worker_starts(check, store, config, target, task, refused):
    store.put_bytes(f"{BASE}/model/config.json", json.dumps({"model_type": "llama", **config}).encode())
    row = ROW if task == "ChatSFT" else {"text": "a", "label": "b"}
    store.put_bytes(f"{BASE}/train.jsonl", lines(row, row))
    changes = {"task": task, "method": {"type": "LoRA", "lora": {"targetModules": ["k_proj", target]}}}
    if not refused:
        check(**changes)
        return
    with pytest.raises(UserError, match=rf"lora\.targetModules: {target}: .*remove it from the list") as caught:
        check(**changes)
    assert caught.value.reason is Reason.INVALID_SPEC


def test_an_empty_model_folder(check):
    with pytest.raises(UserError, match="no files below pvc://b/nothing") as caught:
        check(model_uri=f"{BASE}/nothing")
    assert caught.value.reason is Reason.MODEL_NOT_FOUND


def test_a_place_that_can_not_be_written_is_named(check):
    with pytest.raises(UserError, match=r"spec\.output\.uri: pvc://other/tuned"):
        check(output_uri="pvc://other/tuned")


def test_random_weights_need_no_weights(check, store):
    store.delete(f"{BASE}/model/model.safetensors")
    store.put_bytes(f"{BASE}/train.jsonl", lines({"text": "a"}))
    check(task="CausalLM", model_init="Random")
    with pytest.raises(UserError, match="safetensors"):
        check(task="CausalLM")


def test_a_model_of_images_needs_an_image_processor_and_no_tokenizer(check, store, said):
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    store.put_bytes(f"{BASE}/train.jsonl", lines({"image": pixel, "label": "dot"}))
    with pytest.raises(UserError, match=r"no image processor \(preprocessor_config\.json\)"):
        check(task="ImageClassification")
    store.put_bytes(f"{BASE}/model/preprocessor_config.json", b"{}")
    store.delete(f"{BASE}/model/tokenizer.json")
    check(task="ImageClassification")
    store.put_bytes(f"{BASE}/dot.png", base64.b64decode(pixel))
    store.put_bytes(f"{BASE}/train.jsonl", lines(*[{"image": "dot.png", "label": "dot"}] * 200))
    said.clear()
    check(task="ImageClassification")
    assert said == ["train: the first 100 rows in pvc://b/train.jsonl are well-formed"]


def test_models_that_help_are_checked_under_their_own_names(check, store):
    teacher = {"type": "Full", "distillation": {"teacherUri": f"{BASE}/teacher"}}
    with pytest.raises(UserError, match=r"spec\.method\.distillation\.teacherUri: there are no files"):
        check(method=Method.model_validate(teacher))
    back = {"probability": 0.5, "forwardUri": f"{BASE}/model", "backwardUri": f"{BASE}/none"}
    with pytest.raises(
        UserError, match=r"spec\.dataset\.augmentation\.backTranslation\.backwardUri: there are no files"
    ):
        check(dataset=dataset(f"{BASE}/train.jsonl", augmentation={"backTranslation": back}))


def test_synonyms_need_wordnet(check, monkeypatch):
    monkeypatch.setattr(wordnet, "PLACES", ())
    monkeypatch.delenv("WNSEARCHDIR", raising=False)
    with pytest.raises(UserError, match="synonymReplacement"):
        check(dataset=dataset(f"{BASE}/train.jsonl", augmentation={"synonymReplacement": 0.1}))


def test_streaming_is_checked_too(check, store):
    rows = dataset(f"{BASE}/train.jsonl", streaming=True)
    store.put_bytes(f"{BASE}/train.jsonl", lines({"text": "a", "label": "x"}))
    with pytest.raises(UserError, match=r"spec\.classification\.labels"):
        check(task="SequenceClassification", dataset=rows)
    check(task="SequenceClassification", dataset=rows, classification=Classification(labels=["x", "y"]))


def test_rows_are_counted_and_only_the_first_of_many(check, store, said, monkeypatch):
    check()
    assert said == ["train: 3 rows in pvc://b/train.jsonl are well-formed"]
    said.clear()
    store.put_bytes(f"{BASE}/train.jsonl", lines(ROW, {"x": 1}, *[ROW] * 5, {"x": 2}))
    monkeypatch.setattr(preflight, "ROWS", 5)
    check(dataset=dataset(f"{BASE}/train.jsonl", onBadRow="Skip"))
    assert said[0] == "train: the first 4 rows in pvc://b/train.jsonl are well-formed"
    assert said[1].startswith(
        "train: 1 bad rows among them will be left out; the first: pvc://b/train.jsonl line 2 has"
    )
    store.put_bytes(f"{BASE}/train.jsonl", lines({"x": 1}))
    with pytest.raises(UserError, match=r"none of 1 rows can be used; the first: .* line 1 has no field"):
        check(dataset=dataset(f"{BASE}/train.jsonl", onBadRow="Skip"))


def test_a_driver_that_is_started_anew_looks_at_no_row_again(check, store, said):
    assert check("pod") == check("pod")
    assert len(said) == 1


def test_what_the_token_cache_has_was_checked_before(check, store, said):
    plan = training_plan(BASE, dataset=dataset(f"{BASE}/train.jsonl"))
    digest = cache.token_digest(plan, store, *open_sources(plan, store))
    manifest = cache.TokenManifest(created_time="", labels={}, statistics=DataStatistics(), files=())
    store.put_bytes(f"{plan.tokens_uri}/{digest}/manifest.json", manifest.to_json().encode())
    check()
    assert said == []


def test_the_driver_loads_no_torch_and_no_transformers(tmp_path, store):
    rows = {
        "ChatSFT": ROW,
        "CausalLM": {"text": "a"},
        "MaskedLM": {"text": "a"},
        "SequenceClassification": {"text": "a", "label": "b"},
        "TokenClassification": {"tokens": ["a"], "tags": ["b"]},
        "Seq2Seq": {"source": "a", "target": "b"},
        "DPO": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "Reward": {"prompt": "a", "chosen": "b", "rejected": "c"},
    }
    assert set(rows) | {"ImageClassification"} == set(Task)
    for task, row in rows.items():
        store.put_bytes(f"{BASE}/{task}.jsonl", lines(row, row))
    program = (
        "import sys; from pathlib import Path; from support.plans import dataset, training_plan\n"
        "from tunesmith_store.volumes import VolumeStore; from tunesmith_trainer.group import preflight\n"
        "store = VolumeStore(Path(sys.argv[1]))\n"
        "for task in sys.argv[3:]:\n"
        f"    plan = training_plan('{BASE}', task=task, dataset=dataset(f'{BASE}/{{task}}.jsonl'))\n"
        "    preflight.check(plan, store, Path(sys.argv[2]) / task, print)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'pyarrow', 'nltk'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "volumes"), str(tmp_path / "scratch"), *rows]
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 rows in") == len(rows)
