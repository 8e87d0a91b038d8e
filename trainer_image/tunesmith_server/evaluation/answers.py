"""`python3 -m tunesmith_server.evaluation.answers MODEL THREADS OUTPUT`: one model as served, asked about all rows.

A process of its own, for each model: llama.cpp doesn't give its memory back, and what a model takes is measured here.
The engine is started as a server pod starts it and asked over loopback. `compare` starts it, the task on stdin.

How likely a reference answer is: the engine is asked to go on from the prompt under a grammar that allows the
reference's tokens alone, one after the other. llama.cpp then returns the logarithm of each one's probability over the
whole vocabulary, taken before the grammar and all sampling: teacher forcing, exact, through the server itself.
"""

from __future__ import annotations

import json
import math
import os
import socket
import statistics
import sys
import urllib.request
from pathlib import Path
from typing import Any

from tunesmith_api.model import Contract
from tunesmith_api.plan import ServingPlan
from tunesmith_server.evaluation.rows import Row

__all__ = ["Answer", "Answers", "Task"]

MOST_ANSWER_TOKENS = 256
SPEED_TOKENS = 32
SPEED_RUNS = 3
LEAST_LOGPROB = -50.0
"""What a token counts that the model holds for impossible, or of which it computes nonsense."""
TIMEOUT_SECONDS = 600


class Task(Contract):
    """What the process is asked to do."""

    plan: ServingPlan
    rows: tuple[Row, ...]


class Answer(Contract):
    """What a model makes of one row; `text` and `loss` are absent where the row doesn't fit into the context."""

    text: str | None = None
    loss: float = 0.0
    """Negative log-likelihood of the reference answer, the sum over its tokens."""
    tokens: int = 0


class Answers(Contract):
    """All that was found out about one model."""

    answers: tuple[Answer, ...]
    tokens_per_second: float
    memory_bytes: int


class Interview:
    """Asks an engine. Its calls are llama.cpp's own beside the OpenAI-compatible one."""

    def __init__(self, url: str, plan: ServingPlan) -> None:
        self._url, self._plan = url, plan

    def answer(self, row: Row) -> Answer:
        """Ask one row's question, and how likely its reference answer is."""
        messages = [message.model_dump() for message in row.messages]
        prompt = self._tokens(self._post("/apply-template", {"messages": messages})["prompt"], whole=True)
        reference = self._tokens(row.reference, whole=False)
        room = self._plan.context_length - len(prompt) - 1
        if not reference or room < len(reference):
            return Answer()
        # an untuned model says in a sentence what the reference says in a word
        most = min(2 * len(reference) + 8, MOST_ANSWER_TOKENS, room)
        body = {"model": self._plan.name, "messages": messages, "max_tokens": most, "temperature": 0}
        text = self._post("/v1/chat/completions", body)["choices"][0]["message"]["content"] or ""
        return Answer(text=text, loss=self._loss(prompt, reference), tokens=len(reference))

    def speed(self) -> float:
        """Return the tokens per second of one long answer, the median of several."""
        length = max(1, min(SPEED_TOKENS, self._plan.context_length // 2))
        body = {"prompt": "Once upon a time", "n_predict": length, "ignore_eos": True, "temperature": 0}
        runs = [float(self._post("/completion", body)["timings"]["predicted_per_second"]) for _ in range(SPEED_RUNS)]
        return statistics.median(runs)

    def _loss(self, prompt: list[int], reference: list[int]) -> float:
        grammar = "root ::= " + " ".join(f"<[{token}]>" for token in reference)
        body = {
            "prompt": prompt,
            "n_predict": len(reference),
            "grammar": grammar,
            "n_probs": 1,
            "temperature": 0,
            "cache_prompt": True,
        }
        steps = self._post("/completion", body)["completion_probabilities"]
        if [step["id"] for step in steps] != reference:
            raise RuntimeError(f"the engine went another way than {reference}: {[step['id'] for step in steps]}")
        return -sum(_bounded(step["logprob"]) for step in steps)

    def _tokens(self, text: str, *, whole: bool) -> list[int]:
        body = {"content": text, "add_special": whole, "parse_special": whole}
        found: list[int] = self._post("/tokenize", body)["tokens"]
        return found

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, json.dumps(body).encode(), headers)  # noqa: S310 - loopback
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:  # noqa: S310 - loopback
            return json.load(response)


def _bounded(logprob: float | None) -> float:
    if logprob is None or not math.isfinite(logprob):
        return LEAST_LOGPROB
    return max(logprob, LEAST_LOGPROB)


def _resident_bytes() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) * 1024


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _main(model: Path, threads: int, output: Path) -> None:
    from tunesmith_server.engines.llama_cpp import LlamaEngine

    task = Task.from_json(sys.stdin.read())
    engine = LlamaEngine(task.plan, model, threads, port=_free_port())
    interview = Interview(engine.url, task.plan)
    answers = tuple(interview.answer(row) for row in task.rows)
    found = Answers(answers=answers, tokens_per_second=interview.speed(), memory_bytes=_resident_bytes())
    output.write_text(found.to_json())
    os._exit(0)  # letting go of the engine would wait for its threads


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
