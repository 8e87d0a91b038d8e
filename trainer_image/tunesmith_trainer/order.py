"""Which examples a step sees: a pure function of (seed, step), so that resuming needs no reader state.

Called by `loop`. The global batch of a step does not depend on how many workers share it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

from tunesmith_api.artifacts import DataCursor

__all__ = ["cursor_at", "global_batch", "micro_batches", "share_of", "step_seed", "steps_per_epoch", "total_steps"]

T = TypeVar("T")


def steps_per_epoch(examples: int, global_batch_size: int) -> int:
    """Return how many global batches one pass over the data takes; the last one may be smaller."""
    return math.ceil(examples / global_batch_size)


def total_steps(examples: int, global_batch_size: int, epochs: int, max_steps: int | None) -> int:
    """Return the optimizer steps of the whole job."""
    return max_steps if max_steps is not None else epochs * steps_per_epoch(examples, global_batch_size)


@lru_cache(maxsize=2)
def _permutation(examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(examples))
    # Python's own generator, since its shuffle is stable between versions; text as seed keeps (1, 23) and (12, 3) apart
    random.Random(f"tunesmith-order:{seed}:{epoch}").shuffle(order)
    return tuple(order)


def global_batch(step: int, *, examples: int, global_batch_size: int, seed: int) -> tuple[int, ...]:
    """Return the indices of the examples of step `step`, counted from 0 over all epochs."""
    epoch, position = divmod(step, steps_per_epoch(examples, global_batch_size))
    start = position * global_batch_size
    return _permutation(examples, seed, epoch)[start : start + global_batch_size]


def share_of(batch: Sequence[T], rank: int, world_size: int) -> Sequence[T]:
    """Return the part of a global batch that one rank computes; empty where there are more ranks than examples."""
    return batch[rank::world_size]


def micro_batches(share: Sequence[T], size: int) -> list[Sequence[T]]:
    """Cut a rank's share into pieces of at most `size`."""
    return [share[start : start + size] for start in range(0, len(share), size)]


def cursor_at(step: int, *, examples: int, global_batch_size: int) -> DataCursor:
    """Return where in the data training stands once `step` steps are done."""
    per_epoch = steps_per_epoch(examples, global_batch_size)
    epoch, position = divmod(step, per_epoch)
    return DataCursor(
        epoch=epoch,
        step_in_epoch=position,
        examples_seen=epoch * examples + min(position * global_batch_size, examples),
    )


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed from which dropout of one step on one rank draws."""
    return random.Random(f"tunesmith-step:{seed}:{step}:{rank}").getrandbits(63)
