"""Every task, with all weights and with adapters, learns something real: data in S3, one rank, a model and its report out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

from assets import minilm, tiny
from assets.pictures import digits, picture_questions
from assets.tweets import LABELS, question
from support import learning
from support.plans import dataset
from tunesmith_api.artifacts import ModelManifest
from tunesmith_api.plan import StoragePlan

Rows = list[dict[str, Any]]


def _tweets(train: int, held_out: int) -> tuple[Rows, Rows]:
    return learning.tweet_rows(train, held_out, seed=3)


def classified() -> tuple[Rows, Rows]:
    return _tweets(96, 8)


def texts() -> tuple[Rows, Rows]:
    return _tweets(96, 6)


def chats() -> tuple[Rows, Rows]:
    def chat(row: dict[str, str]) -> dict[str, Any]:
        return {"messages": [*question(row["text"]), {"role": "assistant", "content": row["label"]}]}

    train, held_out = _tweets(64, 4)
    return [chat(row) for row in train], [chat(row) for row in held_out]


def multi_label() -> tuple[Rows, Rows]:
    def many(row: dict[str, str]) -> dict[str, Any]:
        return {"text": row["text"], "label": [row["label"], "long" if len(row["text"]) > 70 else "short"]}

    train, held_out = _tweets(96, 8)
    return [many(row) for row in train], [many(row) for row in held_out]


def lengths() -> tuple[Rows, Rows]:
    train, held_out = _tweets(96, 8)
    return tuple([{"text": row["text"], "label": len(row["text"]) / 100} for row in rows] for rows in (train, held_out))


def tagged() -> tuple[Rows, Rows]:
    def tags(row: dict[str, str]) -> dict[str, Any]:
        words = row["text"].split()[:20]
        return {"tokens": words, "tags": ["B-TAG" if word[0] in "@#" else "O" for word in words]}

    train, held_out = _tweets(96, 8)
    return [tags(row) for row in train], [tags(row) for row in held_out]


def translated() -> tuple[Rows, Rows]:
    def pair(row: dict[str, str]) -> dict[str, Any]:
        return {"source": row["text"], "target": row["label"]}

    train, held_out = _tweets(96, 6)
    return [pair(row) for row in train], [pair(row) for row in held_out]


def preferred() -> tuple[Rows, Rows]:
    def pair(row: dict[str, str]) -> dict[str, Any]:
        wrong = LABELS[(LABELS.index(row["label"]) + 1) % len(LABELS)]
        return {"prompt": row["text"], "chosen": f"it is {row['label']}", "rejected": f"it is {wrong}!"}

    train, held_out = _tweets(64, 4)
    return [pair(row) for row in train], [pair(row) for row in held_out]


@dataclass(frozen=True)
class Case:
    """One task on one model and data."""

    task: str
    model: Callable[[Path], Path]
    rows: Callable[[], tuple[Rows, Rows]]
    metric: str = "loss"
    more_is_better: bool = False
    training: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)


def chat_llama(folder: Path) -> Path:
    return tiny.llama(folder, tiny.CHATML)


def wide_llama(folder: Path) -> Path:
    """As wide as bitsandbytes' blocks of 64 weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny.byte_tokenizer(template=tiny.CHATML)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def real_minilm(_: Path) -> Path:
    return minilm()


CASES = {
    "chat": Case("ChatSFT", chat_llama, chats, "tokenAccuracy", True),
    "text": Case("CausalLM", tiny.llama, texts, "perplexity"),
    "masked": Case("MaskedLM", lambda folder: learning.tiny_bert(folder, "BertForMaskedLM"), texts, "perplexity", training={"max_steps": 24}),
    "sentiment": Case("SequenceClassification", real_minilm, classified, training={"learning_rate": 3e-4, "max_steps": 30}),
    "many labels": Case(
        "SequenceClassification", learning.tiny_bert, multi_label, "f1", True, {"max_steps": 24},
        plan={"classification": {"problemType": "MultiLabel"}},
    ),
    "number": Case(
        "SequenceClassification", learning.tiny_bert, lengths, "mse", training={"max_steps": 24},
        plan={"classification": {"problemType": "Regression"}},
    ),
    "tags": Case("TokenClassification", learning.tiny_bert, tagged, "accuracy", True, {"max_steps": 24}),
    "text to text": Case("Seq2Seq", learning.tiny_t5, translated, "loss"),
    "preferences": Case("DPO", tiny.llama, preferred, "loss"),
    "reward": Case("Reward", tiny.llama, preferred, "accuracy", True),
    "digits": Case("ImageClassification", tiny.vit, lambda: (digits(160), digits(40, 200)), "accuracy", True, {"max_steps": 30}),
    "pictures": Case("ChatSFT", tiny.llava, lambda: (picture_questions(48), picture_questions(12, 1)), "tokenAccuracy", True),
}  # fmt: skip
OTHER_METHODS = {
    "QLoRA": ("wide chat", {"type": "QLoRA", "lora": {"r": 4}}),
    "DoRA": ("chat", {"type": "DoRA", "lora": {"r": 4}}),
    "QAT": ("chat", {"type": "Full", "qat": {"scheme": "Int4"}}),
    "magnitude pruning": ("chat", {"type": "Full", "pruning": {"type": "Magnitude", "sparsityPercent": 30}}),
    "layer pruning": ("chat", {"type": "Full", "pruning": {"type": "Layers", "sparsityPercent": 50}}),
    "distillation": ("chat", {"type": "Full", "distillation": {"teacherUri": "BASE/model", "alpha": 0.3}}),
}
METHODS = {"Full": {"type": "Full"}, "LoRA": {"type": "LoRA", "lora": {"r": 8, "alpha": 16}}}


def run(
    case: Case, method: dict[str, Any], pool: Any, store: Any, bucket: str, folder: Path, ranks: int = 1, **changes: Any
) -> Any:
    """Train one case to its end; return the result and the run's state."""
    from support.plans import training_plan

    (folder / "made").mkdir()
    store.put_folder(case.model(folder / "made"), f"{bucket}/model")
    train, held_out = case.rows()
    store.put_json_lines(train, f"{bucket}/train.jsonl")
    store.put_json_lines(held_out, f"{bucket}/eval.jsonl")
    text = json.dumps(method).replace("BASE", bucket)
    training = {"max_steps": 16, "max_length": 320, "micro_batch_size": 8, **case.training, **changes}
    plan = training_plan(
        bucket, task=case.task, method=json.loads(text), training=training, checkpoint_every_steps=1000,
        dataset=dataset(f"{bucket}/train.jsonl", f"{bucket}/eval.jsonl"), storage=StoragePlan(endpoint_url=store.endpoint_url),
        **case.plan,
    )  # fmt: skip
    result, state = run_ranks(pool, plan, folder / "scratch", ranks, store.environment())
    if isinstance(result, Exception):
        raise result
    return result, state


def assert_better(case: Case, result: Any) -> None:
    name = f"eval{case.metric[0].upper()}{case.metric[1:]}"
    before, after = result.metrics[f"{name}Before"], result.metrics[name]
    assert (after > before) if case.more_is_better else (after < before), result.metrics


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_a_task_learns(name, method, pool, object_store, bucket, tmp_path):
    case = CASES[name]
    result, state = run(case, METHODS[method], pool, object_store, bucket, tmp_path)
    assert_better(case, result)
    assert state.history[-1]["step"] == case.training.get("max_steps", 16)
    manifest = ModelManifest.from_json(object_store.get_bytes(f"{bucket}/tuned/tunesmith-manifest.json"))
    assert {"config.json", "README.md", "report.html", "metrics.json"} <= {entry.path for entry in manifest.files}
    assert any(entry.path.endswith(".safetensors") for entry in manifest.files)
    assert b"<svg" in object_store.get_bytes(f"{bucket}/tuned/report.html")


WIDE = {"wide chat": Case("ChatSFT", wide_llama, chats, "tokenAccuracy", True)}


@pytest.mark.parametrize("name", OTHER_METHODS)
def test_a_method_learns(name, pool, object_store, bucket, tmp_path):
    case_name, method = OTHER_METHODS[name]
    case = (CASES | WIDE)[case_name]
    result, _ = run(case, method, pool, object_store, bucket, tmp_path)
    assert_better(case, result)


def test_ranks_with_unlike_numbers_of_micro_batches_learn_of_pictures_what_one_learns(
    pool, object_store, bucket, tmp_path
):
    losses = []
    for ranks in (1, 2):  # of three examples one rank has two, one at a time
        folder = tmp_path / str(ranks)
        folder.mkdir()
        cut = {"global_batch_size": 3, "micro_batch_size": 1, "max_steps": 2}
        place = (pool, object_store, f"{bucket}/{ranks}", folder, ranks)
        _, state = run(CASES["pictures"], METHODS["Full"], *place, **cut)
        losses.append([record["loss"] for record in state.history])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
