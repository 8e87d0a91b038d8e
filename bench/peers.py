"""The same work by other trainers. `python -m bench.peers hf|trl STEPS [EVALUATE]`: one process, one JSON line.

Figures: `secondsPerStep` of each measured step, `tokensPerStep` without padding, `learnedPerStep`, `evalLoss`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from bench.workload import BATCH, LEARNING_RATE, MAX_LENGTH, SEED, Workload, prepare
from tunesmith_trainer.tasks.base import IGNORE
from tunesmith_trainer.tasks.chat import encode_chat

PER_DEVICE = 8  # transformers' default


class Stopwatch(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """A step begins: the time between steps counts, as it does for ours."""
        if not self._began:
            self._began = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step has ended."""
        now = time.monotonic()
        self.seconds.append(now - self._began)
        self._began = now


def encoded(work: Workload, tokenizer: Any, rows: list[dict[str, Any]]) -> list[dict[str, list[int]]]:
    """Rows as our own tokenization gives them: the comparison is of training, not of templates."""
    found = [encode_chat(tokenizer, row["messages"], MAX_LENGTH) for row in rows]
    return [{"input_ids": chat.input_ids, "labels": chat.labels} for chat in found]


def held_out_loss(model: Any, examples: list[dict[str, list[int]]]) -> float:
    """Mean loss per learned token, one example at a time: no padding, no way to differ."""
    total = count = 0.0
    model.eval()
    with torch.no_grad():
        for example in examples:
            ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"][1:])
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"))
            count += float((labels != IGNORE).sum())
    return total / count


class InOrder(Trainer):
    """transformers' Trainer on examples in the order given, so that losses can be compared."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def with_trainer(work: Workload, scratch: str, steps: int, evaluate: bool) -> dict[str, Any]:
    """transformers.Trainer with its defaults: padding to the longest of 8, logits for every token."""
    from transformers import DataCollatorForSeq2Seq

    tokenizer = AutoTokenizer.from_pretrained(work.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
    examples = encoded(work, tokenizer, work.ordered(steps))
    watch = Stopwatch()
    arguments = TrainingArguments(
        output_dir=scratch, max_steps=steps, per_device_train_batch_size=PER_DEVICE, report_to=[], save_strategy="no",
        gradient_accumulation_steps=BATCH // PER_DEVICE, learning_rate=LEARNING_RATE, lr_scheduler_type="constant", weight_decay=0.0,
        disable_tqdm=True, logging_strategy="no", use_cpu=True, seed=SEED,
    )  # fmt: skip
    InOrder(
        model=model, args=arguments, train_dataset=examples, callbacks=[watch], data_collator=DataCollatorForSeq2Seq(tokenizer)
    ).train()  # fmt: skip
    return figures(work, tokenizer, model, examples, watch.seconds, evaluate)


def figures(
    work: Workload,
    tokenizer: Any,
    model: Any,
    examples: list[dict[str, list[int]]],
    seconds: list[float],
    evaluate: bool,
) -> dict[str, Any]:
    """What is compared."""
    steps = len(seconds)
    found: dict[str, Any] = {
        "secondsPerStep": seconds,
        "tokensPerStep": sum(len(example["input_ids"]) for example in examples) / steps,
        "learnedPerStep": sum(label != IGNORE for example in examples for label in example["labels"]) / steps,
    }
    if evaluate:
        found["evalLoss"] = held_out_loss(model, encoded(work, tokenizer, work.rows(work.eval)))
    return found


def with_trl(work: Workload, scratch: str, steps: int, evaluate: bool) -> dict[str, Any]:
    """TRL's SFTTrainer with packing, on the assistant's tokens."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(work.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
    examples = encoded(work, tokenizer, work.ordered(steps))
    rows = [
        {"input_ids": example["input_ids"], "completion_mask": [int(label != IGNORE) for label in example["labels"]]}
        for example in examples
    ]
    watch = Stopwatch()
    # as many tokens a step as the examples of one of ours: rows of several examples, filled up
    longest = 2 * MAX_LENGTH
    per_step = sum(len(example["input_ids"]) for example in examples) / steps
    arguments = SFTConfig(
        output_dir=scratch, max_steps=steps, per_device_train_batch_size=max(1, round(per_step / longest)), packing=True,
        max_length=longest, learning_rate=LEARNING_RATE, lr_scheduler_type="constant", weight_decay=0.0, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False,
        seed=SEED, completion_only_loss=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    packed = trainer.train_dataset
    trainer.train()
    taken = packed.select(range(min(len(packed), steps * arguments.per_device_train_batch_size)))
    found = figures(work, tokenizer, model, examples, watch.seconds, evaluate)
    found["tokensPerStep"] = sum(len(ids) for ids in taken["input_ids"]) / steps
    return found


def main() -> None:
    """Run one peer."""
    steps, evaluate = int(sys.argv[2]), len(sys.argv) > 3
    run = {"hf": with_trainer, "trl": with_trl}[sys.argv[1]]
    with tempfile.TemporaryDirectory(prefix="bench") as scratch:
        print(json.dumps(run(prepare(), scratch, steps, evaluate)))


if __name__ == "__main__":
    main()
