"""What a data set turned out to hold: for the log, the report and the model card. Kept with the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tunesmith_api.model import Contract

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["DataStatistics", "SetStatistics", "bounded", "marked", "set_statistics"]

BINS = 20
SHOWN_CLASSES = 20
KEPT_CHARACTERS, KEPT_PIECES = 2000, 64
"""Of each piece of the first example, and how many of them."""
SHOWN_CHARACTERS = 480
"""Of the first example, in the log and in the job's status."""


class SetStatistics(Contract):
    """One set of examples."""

    source: str
    """Where its rows come from."""
    rows: int
    """Rows that were used."""
    examples: int
    """What they gave: usually one each."""
    tokens: int
    """Tokens of all examples."""
    truncated: int
    """Examples that maxLength cut something off."""
    skipped: int
    """Examples left out since nothing to learn was left in them within maxLength."""
    length_edges: tuple[int, ...]
    """Bounds of the histogram of lengths in tokens; one more than counts. A bin holds its lower bound."""
    length_counts: tuple[int, ...]
    classes: Mapping[str, int]
    """How many rows name each class; empty for tasks without classes."""
    learned_tokens: int = 0
    """Tokens that the loss counts; 0 for tasks that learn no tokens."""
    learned_turns: int = 0
    """Of conversations: the assistant's turns that are learned."""
    unlearned_turns: int = 0
    """Those that are not: cut off, or hidden by the chat template."""
    longest: int = 0
    """Most tokens that the model reads in one line."""
    largest_token: int = 0
    """The largest number of a token."""
    notes: Mapping[str, int] = {}
    """What was done to examples so that they can be learned, and to how many."""

    def described(self, name: str, max_length: int) -> str:
        """Return the line of the log."""
        parts = [f"{name}: {self.examples:,} examples"]
        if self.rows != self.examples + self.skipped:
            parts[0] += f" of {self.rows:,} rows"
        parts[0] += f" from {self.source}"
        if self.truncated:
            parts.append(f"{self.truncated:,} cut at maxLength {max_length}")
        if self.skipped:
            parts.append(f"{self.skipped:,} left out (nothing to learn left after the cut)")
        if self.learned_tokens:
            parts.append(f"{self.learned_tokens:,} of {self.tokens:,} tokens are learned")
        if self.learned_turns or self.unlearned_turns:
            total = self.learned_turns + self.unlearned_turns
            parts.append(f"{self.learned_turns:,} of {total:,} turns of the assistant are learned")
        if self.classes:
            shown = [f"{name} ({count:,})" for name, count in list(self.classes.items())[:SHOWN_CLASSES]]
            more = f" and {len(self.classes) - SHOWN_CLASSES} more" if len(self.classes) > SHOWN_CLASSES else ""
            parts.append(f"classes: {', '.join(shown)}{more}")
        return ", ".join(parts)


class DataStatistics(Contract):
    """The data of a run."""

    train: SetStatistics | None = None
    """None with streaming: it is read while training."""
    eval: SetStatistics | None = None
    bad_rows: int = 0
    first_bad_row: str = ""
    duplicates: int = 0
    """Training rows left out since they repeat an earlier one, or stand in the held-out data."""
    remarks: tuple[str, ...] = ()
    """What looks wrong with the data as a whole."""
    first_example: tuple[tuple[str, bool], ...] = ()
    """The text of the first training example in pieces, and whether each is learned."""

    @property
    def marked_example(self) -> str:
        """The first training example with what is learned in ⟦ ⟧; its middle is left out where it is long."""
        return marked(self.first_example)


def marked(pieces: Sequence[tuple[str, bool]], longest: int = SHOWN_CHARACTERS) -> str:
    """Return a text with its learned pieces in ⟦ ⟧, each piece cut in its middle so that the whole is no longer."""
    room = max(16, longest // max(1, len(pieces)) - 2)
    shown = "".join(f"⟦{_cut(text, room)}⟧" if learned else _cut(text, room) for text, learned in pieces)
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def bounded(pieces: Sequence[tuple[str, bool]]) -> tuple[tuple[str, bool], ...]:
    """Return as much of an example's pieces as is kept."""
    return tuple((_cut(text, KEPT_CHARACTERS), learned) for text, learned in pieces[:KEPT_PIECES])


def _cut(text: str, longest: int) -> str:
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half + 3 :]}"


def set_statistics(
    source: str,
    rows: int,
    lengths: npt.NDArray[Any],
    truncated: int,
    skipped: int,
    classes: Mapping[str, int],
    **counts: Any,
) -> SetStatistics:
    """Count up one set; `lengths` are the tokens of its examples, `counts` other fields."""
    import numpy as np

    longest = int(lengths.max()) if len(lengths) else 0
    width = max(1, -(-(longest + 1) // BINS))
    edges = np.arange(0, width * BINS + 1, width)
    edges = edges[: -(-(longest + 1) // width) + 1]
    bins, _ = np.histogram(lengths, edges)
    return SetStatistics(
        source=source,
        rows=rows,
        examples=len(lengths),
        tokens=int(lengths.sum()),
        truncated=truncated,
        skipped=skipped,
        length_edges=tuple(int(edge) for edge in edges),
        length_counts=tuple(int(count) for count in bins),
        classes=dict(classes),
        **counts,
    )
