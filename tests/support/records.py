"""A complete run's record for tests of report and model card: numbers of a sentiment classifier that overfits a little."""

from __future__ import annotations

import math
from typing import Any

from support.plans import training_plan
from tunesmith_trainer.report.record import (
    Checkpoint,
    ClassCount,
    Confusion,
    Data,
    Environment,
    Evaluation,
    Histogram,
    Incident,
    IncidentKind,
    RunRecord,
    Sample,
    SavedModel,
    WorstExample,
)

__all__ = ["HIGHER", "LABELS", "evaluations", "history", "run_record"]

LABELS = ("negative", "neutral", "positive")
HIGHER = ("accuracy", "f1")


def history(steps: int = 60) -> list[dict[str, float]]:
    """What the loop records of each step: a loss that falls and wiggles."""
    return [
        {
            "step": step, "loss": 0.6 + 0.5 * math.exp(-step / 15) + 0.05 * math.sin(step * 1.7), "learningRate": 2e-5 * (1 - step / steps),
            "gradNorm": 1.2 + math.sin(step), "tokens": 900 + step, "seconds": 0.4, "memoryBytes": 700_000_000,
        }
        for step in range(1, steps + 1)
    ]  # fmt: skip


def evaluations() -> list[dict[str, float]]:
    """Held-out loss is lowest at step 40; accuracy goes on rising."""
    losses, accuracies = (1.10, 0.90, 0.80, 0.84), (0.348, 0.55, 0.62, 0.637)
    steps = (0, 20, 40, 60)
    return [
        {"step": step, "loss": loss, "accuracy": accuracy, "f1": accuracy - 0.02}
        for step, loss, accuracy in zip(steps, losses, accuracies, strict=True)
    ]


def run_record(plan: dict[str, Any] | None = None, **changes: Any) -> RunRecord:
    """A record with every part; `plan` changes the plan, the rest fields of the record."""
    made = training_plan(
        **{
            "task": "SequenceClassification",
            "name": "sentiment",
            "training": {"max_length": 128, "learning_rate": 2e-5},
            **(plan or {}),
        }
    )
    record = RunRecord.of(
        made,
        run_digest="ab" * 32,
        metrics={"trainLoss": 0.61, "steps": 60.0},
        history=history(),
        evaluations=evaluations(),
    )
    everything: dict[str, Any] = {
        "pipeline_tag": "text-classification",
        "higher_is_better": HIGHER,
        "data": Data(
            train_examples=6600, eval_examples=600, bad_rows=3, first_bad_row="train.jsonl line 8 has no label", duplicates=184,
            truncated=12, train_tokens=178_000, lengths=Histogram(edges=(0, 20, 40, 60), counts=(1600, 4000, 1000)),
            classes=tuple(ClassCount(label=label, train=2200, held_out=200) for label in LABELS),
        ),
        "confusion": Confusion(labels=LABELS, counts=((150, 30, 20), (50, 110, 40), (20, 58, 122))),
        "worst": (
            WorstExample(
                text="great, delayed again", expected="negative", predicted="positive (93%)", loss=3.1,
                attributions=(("great", 1.0), (",", 0.01), (" delayed", -0.6), (" again", -0.3)),
            ),
        ),
        "samples": (Sample(prompt="user: is it late?", expected="yes", before="The flight", after="yes"),),
        "incidents": (
            Incident(step=21, message="the loss jumped to 4.1 from 0.7 at step 21: back to step 20"),
            Incident(step=33, kind=IncidentKind.RESTART, message="resumed from step 30"),
        ),
        "environment": Environment(
            versions={"torch": "2.13.0"}, device="CPU", workers=2, trained_parameters=1000, total_parameters=4000,
            train_seconds=24.0, wall_seconds=61.5,
        ),
        "checkpoints": (Checkpoint(step=40, uri="s3://checkpoints/step-00000040", best=True),),
        "model": SavedModel(uri="s3://models/sentiment", digest="cd" * 32, size_bytes=91_000_000),
    }  # fmt: skip
    return record.model_copy(update=everything | changes)


def evaluated(*pairs: tuple[int, dict[str, float]]) -> tuple[Evaluation, ...]:
    """Evaluations from (step, metrics)."""
    return tuple(Evaluation(step=step, metrics=metrics) for step, metrics in pairs)
