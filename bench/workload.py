"""The work that every trainer in the comparison gets: SmolLM2-135M, the same tweets in the same order, one batch size.

Prepared once into a cache folder: model, conversations as JSON Lines, and a plan for our trainer.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assets.model import smollm2
from assets.tweets import tweets
from support.plans import dataset, optimization
from tunesmith_api.plan import StoragePlan, TrainingPlan
from tunesmith_api.v1alpha1.method import Method

__all__ = ["BATCH", "LEARNING_RATE", "MAX_LENGTH", "Workload", "prepare"]

BATCH = 8
MAX_LENGTH = 128
LEARNING_RATE = 2e-5
TRAIN, EVAL_PER_CLASS = 768, 16
SEED = 11


@dataclass(frozen=True)
class Workload:
    """Where things are."""

    model: Path
    train: Path
    eval: Path

    def rows(self, path: Path) -> list[dict[str, Any]]:
        """The conversations of a file."""
        return [json.loads(line) for line in path.read_text().splitlines()]

    def ordered(self, steps: int) -> list[dict[str, Any]]:
        """The training conversations in the order in which our loop sees them in its first `steps` steps."""
        from tunesmith_trainer.data.order import global_batch

        rows = self.rows(self.train)
        return [
            rows[index]
            for step in range(steps)
            for index in global_batch(step, examples=len(rows), global_batch_size=BATCH, seed=SEED)
        ]

    def plan(self, base: str, steps: int, endpoint: str | None = None, **changes: Any) -> TrainingPlan:
        """A full fine-tune of `steps` steps, everything below the URI `base`."""
        training = optimization(
            max_steps=steps, learning_rate=LEARNING_RATE, lr_scheduler_type="constant", warmup_ratio=0.0, weight_decay=0.0,
            global_batch_size=changes.pop("global_batch_size", BATCH), micro_batch_size=8, max_length=MAX_LENGTH, seed=SEED,
        )  # fmt: skip
        values = {
            "name": "bench", "namespace": "bench", "uid": "bench", "task": "ChatSFT", "model_uri": f"{base}/model",
            "dataset": dataset(f"{base}/train.jsonl", f"{base}/eval.jsonl"), "method": Method.model_validate({"type": "Full"}),
            "training": training, "replicas": 1, "head_host": "127.0.0.1", "checkpoint_uri": f"{base}/checkpoints",
            "checkpoint_every_steps": 10_000, "checkpoint_keep_last": 1, "output_uri": f"{base}/tuned",
            "storage": StoragePlan(endpoint_url=endpoint),
        }  # fmt: skip
        return TrainingPlan(**(values | changes))


def prepare() -> Workload:
    """Make the files once; the same ones every time."""
    cache = Path(os.environ.get("TUNESMITH_CACHE") or Path.home() / ".cache" / "tunesmith") / "bench"
    folder = cache / f"tweets-{TRAIN}-{EVAL_PER_CLASS}"
    if not (folder / "eval.jsonl").exists():
        tweets(folder, TRAIN, EVAL_PER_CLASS, seed=1)
    return Workload(smollm2(), folder / "train.jsonl", folder / "eval.jsonl")
