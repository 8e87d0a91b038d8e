"""Text → the numbers that a model reads, with what had to be cut off. Used by `classify` and `embeddings`."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith_server.predict.kinds import config_of
from tunesmith_store.pretrained import load_tokenizer, position_limit

__all__ = ["TOKENIZER", "Encoded", "Pair", "Texts"]

TOKENIZER = "the model's tokenizer"
"""In messages."""
MODEL_MAX = 1 << 30
"""What transformers says where a tokenizer knows no bound is larger than this."""
Pair = tuple[str, str | None]
"""A text, and the one that it is compared with."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One input."""

    features: Mapping[str, Sequence[int]]
    truncated: bool
    encoding: Any
    """The tokenizer's own record: which characters and words its tokens are."""

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.features["input_ids"])


class Texts:
    """The tokenizer of a served model."""

    def __init__(self, folder: Path, longest: int) -> None:
        """Texts of more than `longest` tokens are cut, and earlier where the model reads less."""
        self.tokenizer = load_tokenizer(folder, TOKENIZER)
        self.longest = min(longest, _bound(folder, self.tokenizer))
        self._lock = threading.Lock()  # a fast tokenizer refuses to be used and set up at once

    def encode(self, pairs: Sequence[Pair]) -> list[Encoded]:
        """Return what the model reads of each text, cut where it is too long."""
        return [self._encode(*pair) for pair in pairs]

    def _encode(self, text: str, pair: str | None) -> Encoded:
        with self._lock:
            found = self.tokenizer(text, pair, verbose=False)
            truncated = len(found["input_ids"]) > self.longest
            if truncated:
                found = self.tokenizer(text, pair, truncation=True, max_length=self.longest)
        features = {name: values for name, values in found.items() if name != "attention_mask"}
        return Encoded(features, truncated, found)


def _bound(folder: Path, tokenizer: Any) -> int:
    """Return the most tokens that the model reads."""
    bounds = [int(tokenizer.model_max_length)]
    if (positions := position_limit(config_of(folder))) is not None:
        bounds.append(positions)
    sentences = folder / "sentence_bert_config.json"
    if sentences.is_file() and (limit := json.loads(sentences.read_bytes()).get("max_seq_length")):
        bounds.append(int(limit))
    return min([bound for bound in bounds if 0 < bound < MODEL_MAX], default=MODEL_MAX)
