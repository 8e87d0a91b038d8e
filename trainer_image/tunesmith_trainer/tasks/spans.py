"""Entities in tagged words: spans of IOB2 tags, and how many of them were found exactly. Called by `tokens`.

The scores are CoNLL-2003's (Tjong Kim Sang & De Meulder, 2003): an entity is right if its words and its type are. Tags
that break IOB2 are read as conlleval and seqeval read them: I-X that follows no X begins a new entity.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Span", "has_spans", "span_counts", "spans_of"]

Span = tuple[str, int, int]
"""Type, first word, word after the last."""


def has_spans(names: Sequence[str]) -> bool:
    """Whether tags mark spans (B-X, I-X, O), and not each word for itself (NOUN, VERB)."""
    return any(name.startswith("B-") for name in names) and all(
        name == "O" or name[:2] in {"B-", "I-"} for name in names
    )


def spans_of(tags: Sequence[str]) -> set[Span]:
    """Return the spans of one sentence's tags."""
    spans: set[Span] = set()
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if kind and (mark != "I" or name != kind):
            spans.add((kind, start, place))
            kind = ""
        if mark != "O" and not kind:
            kind, start = name, place
    return spans


def span_counts(expected: Sequence[str], predicted: Sequence[str]) -> tuple[int, int, int]:
    """Count one sentence's spans: found exactly, predicted, and those that are there."""
    true, said = spans_of(expected), spans_of(predicted)
    return len(true & said), len(said), len(true)
