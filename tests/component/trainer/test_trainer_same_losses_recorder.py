"""What `samelosses` writes down of a run, from a real store."""

import hashlib
import json

from samelosses.recorder import left_in


def test_what_was_given_and_what_was_published_is_written_down_and_nothing_else(object_store, bucket):
    numbers = {"metrics": {"trainLoss": 0.1 + 0.2}, "history": [{"step": 1, "loss": 1e-17}], "evaluations": []}
    files = {
        "model/config.json": "{}",
        "model/model.safetensors": "base",
        "train.jsonl": "{}\n",
        "tuned/metrics.json": json.dumps(numbers, indent=1),
        "tuned/model.safetensors": "tuned",
        "tuned/README.md": "a card with a date",
        "checkpoints/step-1/shard.safetensors": "not a model",
        "tunedup.safetensors": "beside the model",
    }
    for name, text in files.items():
        object_store.put_text(text, f"{bucket}/{name}")

    def digest(name: str) -> str:
        return hashlib.sha256(files[name].encode()).hexdigest()

    assert left_in(object_store, bucket) == {
        "inputs": {name: digest(name) for name in ("model/config.json", "model/model.safetensors", "train.jsonl")},
        "weights": {"tuned/model.safetensors": digest("tuned/model.safetensors")},
        "runs": {"tuned": numbers},
    }


def test_a_run_that_published_nothing_leaves_only_what_it_was_given(object_store, bucket):
    object_store.put_text("{}\n", f"{bucket}/eval.jsonl")
    found = left_in(object_store, bucket)
    assert list(found["inputs"]) == ["eval.jsonl"]
    assert (found["weights"], found["runs"]) == ({}, {})
