"""Samples of tasks that no other test trains as they are written, on this machine: as `tunesmith run` reads them, without Ray."""

import json
from pathlib import Path

import pytest
from ranks import run_ranks

from assets import tiny
from assets.tweets import LABELS
from support import learning
from tunesmith_api import keys
from tunesmith_cli.local_paths import LocalPaths
from tunesmith_cli.manifest import apply_override, checked_job, read_manifest
from tunesmith_cli.run import local_plan

ROOT = Path(__file__).resolve().parents[3]
STEPS = 12
FEW = {
    "workers.replicas": 1, "training.maxSteps": STEPS, "training.learningRate": 1e-2, "training.globalBatchSize": 8,
    "training.microBatchSize": 8, "training.maxLength": 60, "model.uri": "model", "checkpoint.uri": "checkpoints", "output.uri": "tuned",
    "dataset.train.uri": "train.jsonl", "storage": "",
}  # fmt: skip


def texts(rows):
    return [{"text": row["text"]} for row in rows]


def tagged(rows):
    split = [row["text"].split()[:16] for row in rows]
    return [{"tokens": words, "tags": ["B-ORG" if word[0] in "@#" else "O" for word in words]} for words in split]


def pairs(rows):
    return [{"source": row["text"], "target": row["label"]} for row in rows]


def preferred(rows):
    def other(label):
        return LABELS[(LABELS.index(label) + 1) % len(LABELS)]

    return [
        {"prompt": "How?", "chosen": f"it is {row['label']}", "rejected": f"it is {other(row['label'])}!"}
        for row in rows
    ]


SAMPLES = {
    "masked-lm": (lambda folder: learning.tiny_bert(folder, "BertForMaskedLM"), texts),
    "token-classification": (learning.tiny_bert, tagged),
    "seq2seq": (learning.tiny_t5, pairs),
    "reward": (lambda folder: tiny.llama(folder, tiny.CHATML), preferred),
}


def plan_of(sample, folder):
    """What `tunesmith run` would train by, with smaller numbers and places in that folder."""
    document = read_manifest(str(ROOT / f"manifests/samples/finetunejob-{sample}.yaml"))
    held_out = (
        {"dataset.eval.uri": "eval.jsonl"} if "eval" in document["spec"]["dataset"] else {"dataset.splitPercent": 20}
    )
    for field, value in {**FEW, **held_out}.items():
        apply_override(document, f"spec.{field}={value}")
    paths = LocalPaths()
    paths.localize(document, folder)
    plan = local_plan(checked_job(document, paths))
    paths.link(folder / "volumes")
    return plan


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_sample_is_trained(sample, pool, tmp_path):
    model, rows_of = SAMPLES[sample]
    (tmp_path / "model").mkdir()
    model(tmp_path / "model")
    for name, rows in zip(("train", "eval"), learning.tweet_rows(96, 6, seed=3), strict=True):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(rows)))
    environment = {keys.ENV_VOLUMES: str(tmp_path / "volumes")}
    result, state = run_ranks(pool, plan_of(sample, tmp_path), tmp_path / "scratch", 1, environment)
    if isinstance(result, Exception):
        raise result
    assert state.history[-1]["step"] == STEPS
    assert result.metrics["evalLoss"] < result.metrics["evalLossBefore"]
    assert {"config.json", "README.md", "report.html", "model.safetensors"} <= {
        it.name for it in (tmp_path / "tuned").iterdir()
    }
