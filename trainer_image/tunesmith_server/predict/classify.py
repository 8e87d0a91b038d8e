"""`POST /classify`: the classes of texts, or of the words in them.

The form of the answers is that of text-embeddings-inference and of transformers' pipelines.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from aiohttp import web

from tunesmith_server.predict.answers import (
    TRUNCATED_HEADER,
    Handler,
    Refusal,
    boolean,
    inputs_of,
    refuse_truncated,
    text_of,
)
from tunesmith_server.predict.backends import load_forward, padded
from tunesmith_server.predict.batching import Batcher
from tunesmith_server.predict.kinds import ModelKind, config_of
from tunesmith_server.predict.spans import Word, spans_of
from tunesmith_server.predict.texts import Encoded, Pair, Texts

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Labels", "TextClassifier", "TokenClassifier"]

PATH = "/classify"


class Labels:
    """The names of a classifier's outputs, and what its numbers mean."""

    def __init__(self, config: Mapping[str, Any], size: int) -> None:
        known = {int(number): str(name) for number, name in (config.get("id2label") or {}).items()}
        self.names = [known.get(number, f"LABEL_{number}") for number in range(size)]
        self._problem = config.get("problem_type")

    def scores(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return what is answered: probabilities, or the number itself where the model was trained to say a number."""
        if self._problem == "regression":
            return logits
        if self._problem == "multi_label_classification" or len(self.names) == 1:
            return np.asarray(1 / (1 + np.exp(-logits.astype(np.float64))), np.float32)
        return softmax(logits)

    def ranked(self, scores: NDArray[np.float32]) -> list[dict[str, Any]]:
        """Return all labels of one input, the likeliest first."""
        order = np.argsort(-scores, kind="stable")
        return [{"label": self.names[number], "score": float(scores[number])} for number in order]


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return probabilities along the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), np.float32)


class _Classifier(ABC):
    """Texts in, batches through the model, logits of each text out."""

    kind: ModelKind
    takes_pairs = True

    def __init__(self, folder: Path, longest: int, threads: int) -> None:
        self._texts = Texts(folder, longest)
        self._forward = load_forward(folder, self.kind, threads)
        self._config = config_of(folder)
        self._padding = _padding(self._config, self._texts.tokenizer)
        alone = self._padding is None
        self.batcher = Batcher(self._compute, **({"most_tokens": 0} if alone else {}))

    @property
    def paths(self) -> Mapping[str, Handler]:
        """What it answers to."""
        return {PATH: self.classify}

    @property
    def sample(self) -> tuple[str, dict[str, Any]]:
        """A request that only the model can answer."""
        return PATH, {"inputs": "Hello"}

    async def classify(self, _request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """Answer with one list for each input."""
        pairs = [_pair(value) for value in inputs_of(body, "inputs")]
        if not self.takes_pairs and any(other is not None for _, other in pairs):
            raise Refusal("this model classifies the words of a text: text_pair means nothing to it", "inputs")
        raw = boolean(body, "raw_scores", False)
        items = await asyncio.to_thread(self._texts.encode, pairs)
        truncated = sum(item.truncated for item in items)
        refuse_truncated(truncated, body, "inputs", self._texts.longest)
        found = await self.batcher.answers(items)
        answers = [
            self._answer(pair, item, logits, raw) for pair, item, logits in zip(pairs, items, found, strict=True)
        ]
        return web.json_response(answers, headers={TRUNCATED_HEADER: str(truncated)})

    def _compute(self, batch: Sequence[Encoded]) -> Sequence[NDArray[np.float32]]:
        return self._split(self._forward(padded(batch, self._padding or 0)), batch)

    def _split(self, logits: NDArray[np.float32], batch: Sequence[Encoded]) -> Sequence[NDArray[np.float32]]:
        return list(logits)

    @abstractmethod
    def _answer(self, pair: Pair, item: Encoded, logits: NDArray[np.float32], raw: bool) -> list[dict[str, Any]]:
        """What is answered to one input."""


class TextClassifier(_Classifier):
    """Every label of each text with its score."""

    kind = ModelKind.TEXT_CLASSIFIER

    def _answer(self, pair: Pair, item: Encoded, logits: NDArray[np.float32], raw: bool) -> list[dict[str, Any]]:
        labels = Labels(self._config, len(logits))
        return labels.ranked(logits if raw else labels.scores(logits))


class TokenClassifier(_Classifier):
    """The spans that are found in each text. As in training, a word's class is that of its first token."""

    kind = ModelKind.TOKEN_CLASSIFIER
    takes_pairs = False

    def _split(self, logits: NDArray[np.float32], batch: Sequence[Encoded]) -> Sequence[NDArray[np.float32]]:
        return [row[: item.length] for row, item in zip(logits, batch, strict=True)]

    def _answer(self, pair: Pair, item: Encoded, logits: NDArray[np.float32], raw: bool) -> list[dict[str, Any]]:
        names = Labels(self._config, logits.shape[-1]).names
        scores = logits if raw else softmax(logits)
        return spans_of(pair[0], [_word(word, scores, names) for word in _words(item)])


def _words(item: Encoded) -> list[tuple[int, int, int]]:
    """Return each word's first token, and where the word begins and ends in the text."""
    words: list[tuple[int, int, int]] = []
    before = None
    offsets = item.encoding.encodings[0].offsets
    for token, word in enumerate(item.encoding.word_ids()):
        start, end = offsets[token]
        if word is not None and word == before:
            words[-1] = (words[-1][0], words[-1][1], end)
        elif word is not None:
            words.append((token, start, end))
        before = word
    return words


def _word(word: tuple[int, int, int], scores: NDArray[np.float32], names: Sequence[str]) -> Word:
    token, start, end = word
    best = int(scores[token].argmax())
    return Word(names[best], float(scores[token][best]), start, end)


def _pair(value: Any) -> Pair:
    if not isinstance(value, dict):
        return text_of(value, "inputs"), None
    text, other = text_of(value.get("text"), "inputs.text"), value.get("text_pair")
    return text, None if other is None else text_of(other, "inputs.text_pair")


def _padding(config: Mapping[str, Any], tokenizer: Any) -> int | None:
    """Return the token to pad with; None where the model can't tell padding from text, and reads one text at a time."""
    known = config.get("pad_token_id", tokenizer.pad_token_id)
    return None if known is None else int(known)
