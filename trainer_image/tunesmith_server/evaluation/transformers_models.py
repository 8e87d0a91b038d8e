"""The engine Transformers, asked about rows: a language model through the chat path, a classifier through /classify.

Used by `answers`, in its process. How likely a reference answer is, the loaded model itself says: its forward pass over
prompt and reference gives the probability of each of the reference's tokens.
"""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith_api.keys import Reason
from tunesmith_api.plan import ServingPlan
from tunesmith_server.engines.base import Engine
from tunesmith_server.engines.transformers import TransformersEngine
from tunesmith_server.evaluation.interview import (
    SPEED_RUNS,
    SPEED_TOKENS,
    Answer,
    Interview,
    bounded,
    conversation_of,
)
from tunesmith_server.evaluation.rows import Row
from tunesmith_server.predict.classify import TextClassifier
from tunesmith_server.predict.generate import Generator
from tunesmith_server.predict.kinds import config_of, kind_of
from tunesmith_server.predict.texts import TOKENIZER
from tunesmith_store.errors import UserError
from tunesmith_store.pretrained import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["interview_of"]

SAMPLE = "The flight was three hours late, and nobody at the desk knew why; the crew on board, though, was kind. " * 2


def interview_of(plan: ServingPlan, folder: Path, threads: int) -> Interview:
    """Start the engine on any free port; return who asks it.

    Raises:
        UserError: models of this kind can't be compared.
    """
    engine = TransformersEngine(plan, folder, threads, port=0)
    if isinstance(engine.served, Generator):
        return _LanguageModel(engine, plan, engine.served)
    if isinstance(engine.served, TextClassifier):
        return _Classifier(engine, plan, folder)
    message = (
        f"the model is {kind_of(folder)}, and evaluation compares language models and classifiers of texts: leave out "
        "spec.evaluation and spec.gate"
    )
    raise UserError(Reason.INVALID_SPEC, message)


class _LanguageModel(Interview):
    def __init__(self, engine: Engine, plan: ServingPlan, served: Generator) -> None:
        super().__init__(engine, plan)
        self._tokenizer, self._model = served.tokenizer, served.model

    def answer(self, row: Row) -> Answer:
        messages = [message.model_dump() for message in conversation_of(row).messages]
        if not self._tokenizer.chat_template:
            message = "the model has no chat template, and the evaluation asks it chat rows: leave out spec.evaluation"
            raise UserError(Reason.MODEL_INVALID, message)
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt, reference = (self._tokenizer(it, add_special_tokens=False)["input_ids"] for it in (text, row.reference))
        room = self._plan.context_length - len(prompt) - 1
        if not reference or room < len(reference):
            return Answer()
        said = self.chat(row, room, len(reference))
        return Answer(text=said, loss=self._loss(prompt, reference), tokens=len(reference))

    def speed(self) -> float:
        length = max(1, min(SPEED_TOKENS, self._plan.context_length // 2))
        body = {"prompt": "Once upon a time", "max_tokens": length, "temperature": 0}

        def tokens() -> int:
            found: int = self.post("/v1/completions", body)["usage"]["completion_tokens"]
            return found

        return _per_second(tokens)

    def _loss(self, prompt: list[int], reference: list[int]) -> float:
        import torch

        with torch.inference_mode():
            logits = self._model(torch.tensor([[*prompt, *reference]])).logits[0, len(prompt) - 1 : -1]
            found = logits.float().log_softmax(-1)[range(len(reference)), reference]
        return -sum(bounded(float(logprob)) for logprob in found)


class _Classifier(Interview):
    def __init__(self, engine: Engine, plan: ServingPlan, folder: Path) -> None:
        super().__init__(engine, plan)
        config = config_of(folder)
        self._names = {str(number): str(name) for number, name in (config.get("id2label") or {}).items()}
        self._tokens = len(load_tokenizer(folder, TOKENIZER)(SAMPLE)["input_ids"])
        if config.get("problem_type") in ("regression", "multi_label_classification"):
            message = (
                "the model answers numbers or several classes at once, and evaluation compares classifiers with one "
                "class for each text: leave out spec.evaluation and spec.gate"
            )
            raise UserError(Reason.INVALID_SPEC, message)

    def answer(self, row: Row) -> Answer:
        if row.text is None:
            message = "the evaluation has chat rows, and the model is a classifier: give rows with text and label"
            raise UserError(Reason.DATASET_INVALID, message)
        asked = {"text": row.text} if row.text_pair is None else {"text": row.text, "text_pair": row.text_pair}
        scores = {it["label"]: it["score"] for it in self._classified(asked)}
        numbers = {name: number for number, name in self._names.items()}
        by_number = row.reference not in scores and row.reference in self._names
        right = self._names[row.reference] if by_number else row.reference
        if right not in scores:
            message = f"the evaluation has the class {right!r}, the model those of {', '.join(scores)}"
            raise UserError(Reason.DATASET_INVALID, message)
        top = max(scores, key=lambda it: scores[it])
        loss = -bounded(math.log(scores[right]) if scores[right] > 0 else None)
        return Answer(text=numbers[top] if by_number else top, loss=loss, tokens=1)

    def speed(self) -> float:
        def tokens() -> int:
            self._classified({"text": SAMPLE})
            return self._tokens

        return _per_second(tokens)

    def _classified(self, asked: dict[str, Any]) -> list[dict[str, Any]]:
        (found,) = self.post("/classify", {"model": self._plan.name, "inputs": [asked]})
        return list(found)


def _per_second(tokens: Callable[[], int]) -> float:
    """The median speed of some requests, after one that warms up."""
    tokens()
    runs = []
    for _ in range(SPEED_RUNS):
        started = time.monotonic()
        count = tokens()
        runs.append(count / (time.monotonic() - started))
    return statistics.median(runs)
