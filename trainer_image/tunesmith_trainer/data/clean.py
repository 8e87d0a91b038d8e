"""Which rows are kept, and on which side: exact deduplication and the split by content. Called by `prepare`.

All of it is decided by digests of what a task reads of a row: 16 bytes a row, whatever the rows' size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith_trainer.data.rows import plain
from tunesmith_trainer.tasks.base import BadRow

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Numbers = npt.NDArray[np.int64]
    Digests = npt.NDArray[np.uint64]

__all__ = ["DIGEST_BYTES", "Selection", "is_held_out", "row_digest", "select"]

DIGEST_BYTES = 16


def row_digest(row: Mapping[str, Any]) -> bytes:
    """Return a digest of a row's content: the same for the same fields in another order.

    Raises:
        BadRow: a text of it can't be written as UTF-8.
    """
    canonical = json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=plain)
    try:
        return hashlib.blake2b(canonical.encode(), digest_size=DIGEST_BYTES).digest()
    except UnicodeEncodeError as error:
        raise BadRow("holds half a character (a lone surrogate such as \\ud800); write it whole") from error


def is_held_out(digests: Digests, percent: int) -> npt.NDArray[np.bool_]:
    """Return which rows a split of so many percent holds out: it depends on each row's own content only.

    Args:
        digests: [rows, 2], the two halves of each digest.
        percent: 1 to 99.
    """
    import numpy as np

    return np.asarray(digests[:, 0] % np.uint64(100) < np.uint64(percent))


@dataclass(frozen=True)
class Selection:
    """Rows by their numbers, in order."""

    train: Numbers
    held_out: Numbers
    """Of the training data, where it is split."""
    duplicates: int
    """Training rows left out since they repeat an earlier one, or stand in the held-out data."""


def select(train: Digests, held_out: Digests | None, split_percent: int | None, deduplicate: bool) -> Selection:
    """Decide which rows of the training data are trained on, and which are held out.

    Args:
        train: digests of the training data, [rows, 2].
        held_out: those of the held-out data, where it is a source of its own.
        split_percent: hold out so many percent of the training data.
        deduplicate: leave out training rows that repeat an earlier one or a held-out one.
    """
    import numpy as np

    split = np.zeros(len(train), bool) if split_percent is None else is_held_out(train, split_percent)
    kept = ~split
    if deduplicate:
        before = train[split] if held_out is None else held_out
        kept &= _is_first(np.concatenate([before, train]))[len(before) :]
    return Selection(np.flatnonzero(kept), np.flatnonzero(split), int((~kept & ~split).sum()))


def _is_first(digests: Digests) -> npt.NDArray[np.bool_]:
    """Return which of the digests stand for the first time."""
    import numpy as np

    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones stay in their order
    ordered = digests[order]
    starts = np.ones(len(ordered), bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.zeros(len(ordered), bool)
    first[order[starts]] = True
    return first
