"""Bad input is named before a worker starts; good input has a digest of its content."""

import json

import pytest

from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.plan import OptimizationPlan, TrainingPlan
from tunesmith_api.v1alpha1.method import MethodType
from tunesmith_api.v1alpha1.task import Task
from tunesmith_api.v1alpha1.training import LrSchedulerType, Precision
from tunesmith_store.errors import UserError
from tunesmith_store.store import LocalStore
from tunesmith_trainer import preflight

ROW = (
    json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}).encode() + b"\n"
)
MODEL = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x", "tokenizer.json": b"{}"}


@pytest.fixture
def store(tmp_path):
    local = LocalStore(tmp_path / "store")
    for name, data in MODEL.items():
        local.put_bytes(f"s3://b/model/{name}", data)
    local.put_bytes("s3://b/train.jsonl", ROW * 3)
    return local


@pytest.fixture
def plan():
    training = OptimizationPlan(
        num_train_epochs=1, learning_rate=1e-3, lr_scheduler_type=LrSchedulerType.COSINE, warmup_ratio=0.1, weight_decay=0.0,
        adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, max_grad_norm=1.0, global_batch_size=8, micro_batch_size=2,
        max_length=64, precision=Precision.FP32, seed=7,
    )  # fmt: skip
    return TrainingPlan(
        name="job", namespace="ml", uid="u", task=Task.CHAT_SFT, model_uri="s3://b/model", train_uri="s3://b/train.jsonl",
        method=MethodType.FULL, training=training, replicas=1, head_host="h", checkpoint_uri="s3://b/checkpoints",
        checkpoint_every_steps=4, checkpoint_keep_last=2, output_uri="s3://b/tuned",
    )  # fmt: skip


@pytest.fixture
def check(store, tmp_path):
    runs = iter(range(100))

    def run(plan):
        return preflight.check(plan, store, tmp_path / f"scratch-{next(runs)}", lambda *lines: None)

    return run


def test_the_digest_follows_content_and_plan_but_not_the_workers(check, store, plan):
    first = check(plan)
    assert check(plan) == first
    assert check(plan.model_copy(update={"replicas": 3, "name": "other"})) == first
    assert check(plan.model_copy(update={"training": plan.training.model_copy(update={"seed": 8})})) != first
    store.put_bytes("s3://b/train.jsonl", ROW * 4)
    assert check(plan) != first


def test_nothing_of_the_write_test_stays(check, store, plan):
    check(plan)
    assert store.list("s3://b/checkpoints") == store.list("s3://b/tuned") == []


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        (
            {"s3://b/train.jsonl": None},
            Reason.DATASET_NOT_FOUND,
            "spec.dataset.train.uri: s3://b/train.jsonl does not exist",
        ),
        ({"s3://b/train.jsonl": b"\n"}, Reason.DATASET_INVALID, "has no rows"),
        ({"s3://b/model/config.json": None}, Reason.MODEL_INVALID, "config.json is missing"),
        ({"s3://b/model/config.json": b"{"}, Reason.MODEL_INVALID, "not valid JSON"),
        ({"s3://b/model/config.json": b"{}"}, Reason.MODEL_INVALID, "model_type"),
        ({"s3://b/model/model.safetensors": None}, Reason.MODEL_INVALID, "no *.safetensors"),
        ({"s3://b/model/tokenizer.json": None}, Reason.MODEL_INVALID, "no tokenizer"),
    ],
)
def test_what_is_wrong_is_named(check, store, plan, change, reason, words):
    for uri, data in change.items():
        if data is None:
            store.delete(uri)
        else:
            store.put_bytes(uri, data)
    with pytest.raises(UserError) as caught:
        check(plan)
    assert caught.value.reason is reason
    assert words in caught.value.message
    assert caught.value.exit_code is ExitCode.INVALID_INPUT


def test_an_empty_model_folder(check, plan):
    with pytest.raises(UserError, match="no files below s3://b/nothing") as caught:
        check(plan.model_copy(update={"model_uri": "s3://b/nothing"}))
    assert caught.value.reason is Reason.MODEL_NOT_FOUND
