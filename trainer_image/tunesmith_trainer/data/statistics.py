"""What a data set turned out to hold: for the log, the report and the model card. Kept with the tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tunesmith_api.model import Contract

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["DataStatistics", "SetStatistics", "set_statistics"]

BINS = 20


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


def set_statistics(
    source: str, rows: int, lengths: npt.NDArray[Any], truncated: int, skipped: int, classes: Mapping[str, int]
) -> SetStatistics:
    """Count up one set; `lengths` are the tokens of its examples."""
    import numpy as np

    longest = int(lengths.max()) if len(lengths) else 0
    width = max(1, -(-(longest + 1) // BINS))
    edges = np.arange(0, width * BINS + 1, width)
    edges = edges[: -(-(longest + 1) // width) + 1]
    counts, _ = np.histogram(lengths, edges)
    return SetStatistics(
        source=source,
        rows=rows,
        examples=len(lengths),
        tokens=int(lengths.sum()),
        truncated=truncated,
        skipped=skipped,
        length_edges=tuple(int(edge) for edge in edges),
        length_counts=tuple(int(count) for count in counts),
        classes=dict(classes),
    )
