"""What the figures are compared with, each in a process of its own: one JSON line.

`python -m bench.serving.alone transformers TOKENS`: tokens per second of transformers in 32 bits, one answer at a time.
`python -m bench.serving.alone bandwidth`: bytes per second that this machine reads from memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

import torch

import assets

__all__: list[str] = []

BUFFER = 1 << 30
"""Bytes: far beyond any cache."""
TIMES = 5


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of several times."""
    found = []
    for _ in range(TIMES):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def bandwidth() -> dict[str, float]:
    """The best of several ways to read a buffer once."""
    numbers = torch.ones(BUFFER // 4, dtype=torch.float32)
    ways = (numbers.sum, numbers.max, lambda: torch.dot(numbers, numbers), lambda: numbers.view(torch.int64).sum())
    return {"bytesPerSecond": BUFFER / min(map(fastest, ways))}


def transformers(tokens: int) -> dict[str, float]:
    """Greedy decoding of the same model, without its prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.smollm2())
    model = AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=torch.float32).eval()
    messages = assets.question("What a lovely day!")
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    def seconds(count: int) -> float:
        began = time.perf_counter()
        model.generate(**inputs, min_new_tokens=count, max_new_tokens=count, do_sample=False)
        return time.perf_counter() - began

    seconds(8)
    first = seconds(1)
    return {"tokensPerSecond": (tokens - 1) / (seconds(tokens) - first)}


def main() -> None:
    """Measure what is asked for, on all cores."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    found = bandwidth() if sys.argv[1] == "bandwidth" else transformers(int(sys.argv[2]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
