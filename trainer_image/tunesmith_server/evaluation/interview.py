"""How one served model is asked about rows, whatever its engine; llama.cpp's way stands here, too. Used by `answers`.

How likely a reference answer is: the engine is asked to go on from the prompt under a grammar that allows the
reference's tokens alone, one after the other. llama.cpp then returns the logarithm of each one's probability over the
whole vocabulary, taken before the grammar and all sampling: teacher forcing, exact, through the server itself.
"""

from __future__ import annotations

import json
import math
import statistics
import urllib.request
from abc import ABC, abstractmethod
from typing import Any

from tunesmith_api.keys import Reason
from tunesmith_api.model import Contract
from tunesmith_api.plan import ServingPlan
from tunesmith_server.engines.base import Engine
from tunesmith_server.evaluation.rows import Row
from tunesmith_store.errors import UserError

__all__ = [
    "SPEED_RUNS",
    "SPEED_TOKENS",
    "Answer",
    "Answers",
    "Interview",
    "LlamaInterview",
    "Task",
    "bounded",
    "conversation_of",
]

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


class Interview(ABC):
    """Asks an engine."""

    most_tokens = 256
    """Of one answer."""

    def __init__(self, engine: Engine, plan: ServingPlan) -> None:
        self._engine, self._plan = engine, plan

    @abstractmethod
    def answer(self, row: Row) -> Answer:
        """Ask one row's question, and how likely its reference answer is."""

    @abstractmethod
    def speed(self) -> float:
        """Return the tokens per second of one request, the median of several."""

    def chat(self, row: Row, room: int, reference: int) -> str:
        """Ask for the answer to a conversation, greedily; `room` and `reference` are numbers of tokens."""
        # an untuned model says in a sentence what the reference says in a word
        most = min(2 * reference + 8, self.most_tokens, room)
        messages = [message.model_dump() for message in row.messages]
        body = {"model": self._plan.name, "messages": messages, "max_tokens": most, "temperature": 0}
        return self.post("/v1/chat/completions", body)["choices"][0]["message"]["content"] or ""

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """What the engine answers."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._engine.url + path, json.dumps(body).encode(), headers)  # noqa: S310 - loopback
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:  # noqa: S310 - loopback
            return json.load(response)


def conversation_of(row: Row) -> Row:
    """The row, which must be one for a language model.

    Raises:
        UserError: it is one for a classifier.
    """
    if row.text is not None:
        message = "the evaluation has texts with classes, and the model goes on with texts: give chat rows"
        raise UserError(Reason.DATASET_INVALID, message)
    return row


class LlamaInterview(Interview):
    """Asks llama.cpp, by its own calls beside the OpenAI-compatible one."""

    def answer(self, row: Row) -> Answer:
        """Ask one row's question, and how likely its reference answer is."""
        messages = [message.model_dump() for message in conversation_of(row).messages]
        prompt = self._tokens(self.post("/apply-template", {"messages": messages})["prompt"], whole=True)
        reference = self._tokens(row.reference, whole=False)
        room = self._plan.context_length - len(prompt) - 1
        if not reference or room < len(reference):
            return Answer()
        text = self.chat(row, room, len(reference))
        return Answer(text=text, loss=self._loss(prompt, reference), tokens=len(reference))

    def speed(self) -> float:
        """Return the tokens per second of one long answer, the median of several."""
        length = max(1, min(SPEED_TOKENS, self._plan.context_length // 2))
        body = {"prompt": "Once upon a time", "n_predict": length, "ignore_eos": True, "temperature": 0}
        runs = [float(self.post("/completion", body)["timings"]["predicted_per_second"]) for _ in range(SPEED_RUNS)]
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
        steps = self.post("/completion", body)["completion_probabilities"]
        if [step["id"] for step in steps] != reference:
            raise RuntimeError(f"the engine went another way than {reference}: {[step['id'] for step in steps]}")
        return -sum(bounded(step["logprob"]) for step in steps)

    def _tokens(self, text: str, *, whole: bool) -> list[int]:
        body = {"content": text, "add_special": whole, "parse_special": whole}
        found: list[int] = self.post("/tokenize", body)["tokens"]
        return found


def bounded(logprob: float | None) -> float:
    """A token's logarithm of probability, within what it may count."""
    if logprob is None or not math.isfinite(logprob):
        return LEAST_LOGPROB
    return max(logprob, LEAST_LOGPROB)
