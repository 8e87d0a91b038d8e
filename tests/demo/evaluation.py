"""Accuracy of a chat model on held-out tweets, by the first label in its answers: for the model before tuning."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from assets import LABELS
from testbed import chat

# an untuned model answers "The sentiment of this tweet is neutral": it gets room for that
ANSWER_TOKENS = 10
PARALLEL_REQUESTS = 2
LABEL = re.compile(r"\b(" + "|".join(LABELS) + r")\b", re.IGNORECASE)


def label_of(answer: str) -> str:
    """The first label in an answer; "" where there is none."""
    found = LABEL.search(answer)
    return found.group(1).lower() if found else ""


def accuracy(base_url: str, model: str, rows: Path, tick: Callable[[], None] = lambda: None) -> tuple[float, int]:
    """Ask a deployed model about each tweet, greedily; return the share of right labels and the number of tweets."""
    examples = [json.loads(line)["messages"] for line in rows.read_text().splitlines()]

    def right(messages: list[dict[str, str]]) -> bool:
        answer = chat(base_url, model, messages[:-1], ANSWER_TOKENS)
        tick()
        return label_of(answer) == messages[-1]["content"]

    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        correct = sum(pool.map(right, examples))
    return correct / len(examples), len(examples)
