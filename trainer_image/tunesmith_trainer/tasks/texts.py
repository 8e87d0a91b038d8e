"""Texts → tokens, for the tasks whose models read whole texts at once. Called by their `encode` and `collate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunesmith_trainer.tasks.base import Example

__all__ = ["indices_of", "tokenize"]

NAMES = ("input_ids", "token_type_ids")


def tokenize(
    tokenizer: Any, text: str | Sequence[str], pair: str | None, longest: int
) -> tuple[dict[str, Any], Any, bool]:
    """Tokenize one text, a pair of them, or one that is split into words, with the model's special tokens.

    Of a pair that is too long, the longer text is cut first. The tokenizer must be a fast one.

    Returns:
        `input_ids` (and `token_type_ids`, where the model has them); the tokenizer's own encoding, which knows the word
        of each token; whether something was cut off.
    """
    found = tokenizer(
        text, pair, truncation=True, max_length=longest, is_split_into_words=not isinstance(text, str), verbose=False
    )
    features = {name: list(found[name]) for name in NAMES if name in found}
    return features, found, bool(found.encodings[0].overflowing)


def indices_of(examples: Sequence[Example]) -> list[int]:
    """Return the places of examples in their set, where `evaluate` has noted them; -1 elsewhere."""
    return [int(example.features.get("index", -1)) for example in examples]
