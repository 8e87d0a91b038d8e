"""Tagged words → spans: IOB2 tags as conlleval and seqeval read them. Used by `classify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Word", "spans_of"]

OUTSIDE = "O"


@dataclass(frozen=True, slots=True)
class Word:
    """A word's class, how sure the model is of it, and where in the text the word is."""

    tag: str
    score: float
    start: int
    end: int


def spans_of(text: str, words: Sequence[Word]) -> list[dict[str, Any]]:
    """Join neighbours of one type, as transformers' pipeline does with `aggregation_strategy="first"`.

    B-X begins a span, and so does I-X that follows no X. A span's score is the mean of its words'.
    """
    groups: list[tuple[str, list[Word]]] = []
    before = OUTSIDE
    for word in words:
        prefix, type_ = _parts(word.tag)
        if type_ == OUTSIDE:
            before = OUTSIDE
            continue
        if prefix == "B" or type_ != before:
            groups.append((type_, []))
        groups[-1][1].append(word)
        before = type_
    return [
        {
            "entity_group": type_,
            "score": sum(word.score for word in members) / len(members),
            "word": text[members[0].start : members[-1].end],
            "start": members[0].start,
            "end": members[-1].end,
        }
        for type_, members in groups
    ]


def _parts(tag: str) -> tuple[str, str]:
    return (tag[0], tag[2:]) if tag[:2] in ("B-", "I-") else ("I", tag)
