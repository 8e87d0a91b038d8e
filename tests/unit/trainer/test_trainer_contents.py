"""What makes a run another one is the content of what it reads; which setting or file it was is said."""

import json
import os

import pytest

from support.plans import dataset, training_plan
from tunesmith_api.artifacts import CheckpointManifest
from tunesmith_store.volumes import VolumeStore
from tunesmith_trainer.checkpoint.storage import CheckpointStorage
from tunesmith_trainer.data.contents import Contents, differences, find_description
from tunesmith_trainer.group import preflight

BASE = "pvc://b"
ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
FILES = {
    "model/config.json": b'{"model_type": "llama"}', "model/model.safetensors": b"x", "model/tokenizer.json": b"{}",
    "train.jsonl": json.dumps(ROW).encode() + b"\n", "model/README.md": b"a card",
}  # fmt: skip


class Counting(VolumeStore):
    """Knows which files were read in ranges: to digest them."""

    def __init__(self, root):
        super().__init__(root)
        self.digested = []

    def get_range(self, uri, start, size):
        self.digested.append(uri.removeprefix(f"{BASE}/"))
        return super().get_range(uri, start, size)


@pytest.fixture
def store(tmp_path):
    (tmp_path / "b").mkdir()
    store = Counting(tmp_path)
    for name, content in FILES.items():
        store.put_bytes(f"{BASE}/{name}", content)
    return store


@pytest.fixture
def begin(store, tmp_path):
    """The start of a run: checked, and written down. Returns its digest."""

    def run(**changes):
        plan = training_plan(BASE, **({"dataset": dataset(f"{BASE}/train.jsonl")} | changes))
        contents = Contents(store, plan.checkpoint_uri)
        digest = preflight.check(plan, store, tmp_path / "scratch", lambda *_: None, contents)
        contents.write_down(plan, digest)
        return digest

    return run


@pytest.mark.parametrize("name", ["train.jsonl", "model/model.safetensors"])
def test_a_file_that_was_touched_or_copied_is_the_same(begin, store, tmp_path, name):
    first = begin()
    os.utime(tmp_path / "b" / name, ns=(1, 1))
    assert begin() == first
    store.put_bytes(f"{BASE}/{name}", FILES[name])
    assert begin() == first
    store.put_bytes(f"{BASE}/{name}", FILES[name].replace(b"b", b"c").replace(b"x", b"y"))
    assert begin() != first


def test_what_makes_no_difference_to_a_model_does_not_make_another_run(begin, store):
    first = begin()
    store.put_bytes(f"{BASE}/model/README.md", b"a better card")
    store.put_bytes(f"{BASE}/model/quantized/q8/model.gguf", b"made by a server")
    assert begin() == first


def test_a_file_is_digested_once_until_it_is_touched(begin, store, tmp_path):
    begin()
    assert "model/model.safetensors" in store.digested
    store.digested.clear()
    begin(training={"seed": 8})
    assert "model/model.safetensors" not in store.digested
    os.utime(tmp_path / "b" / "model/model.safetensors", ns=(1, 1))
    begin()
    assert "model/model.safetensors" in store.digested


def checkpoint_of(digest, step=4):
    cursor = {"epoch": 0, "step_in_epoch": step, "examples_seen": 0}
    return CheckpointManifest(
        step=step, max_steps=8, plan_digest=digest, cursor=cursor, seed=0, world_size=1, created_time="", files=()
    )


def test_a_checkpoint_that_is_ignored_says_which_settings_and_files_differ(begin, store):
    first = begin()
    store.put_bytes(f"{BASE}/train.jsonl", FILES["train.jsonl"] * 2)
    second = begin(training={"learning_rate": 2e-5, "max_steps": 9})
    said = []
    storage = CheckpointStorage(store, f"{BASE}/checkpoints", second, said.append)
    storage.commit(checkpoint_of(first))
    assert storage.manifests() == []
    assert said == [
        "checkpoint of step 4 is another run's (spec.training.learningRate was 0.01 and is 2e-05; "
        "spec.training.maxSteps was not set and is 9; pvc://b/train.jsonl has another content): ignored"
    ]
    storage.clear(4)
    storage.commit(checkpoint_of("0" * 64))
    said.clear()
    assert storage.manifests() == []
    assert said == ["checkpoint of step 4 belongs to another plan or other data: ignored"]


def test_of_many_differences_the_first_are_named_and_long_values_are_digests(begin, store):
    uri = f"{BASE}/checkpoints"
    first = begin(dataset=dataset(f"{BASE}/train.jsonl"))
    rows = "\n".join([json.dumps(ROW)] * 3)
    second = begin(
        dataset=dataset().model_validate({"train": {"inline": rows}}), training={"seed": 1, "warmup_ratio": 0.5}
    )
    text = differences(find_description(store, uri, first), find_description(store, uri, second))
    assert text.startswith("spec.dataset.train.inline was not set and is sha256 ")
    assert text.endswith(" and 2 more")
    assert "messages" not in text
