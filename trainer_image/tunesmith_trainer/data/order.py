"""Which examples a step sees: a pure function of (seed, step), so that resuming needs no reader state.

Called by `loop`. The global batch of a step does not depend on how many workers share it. `SetOrder` draws from a set
that is there as a whole; `data.streaming` has the order of one that is read while training.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol, TypeVar

from tunesmith_api.artifacts import DataCursor
from tunesmith_trainer.tasks.base import Example

__all__ = [
    "Examples",
    "LeftOut",
    "SetOrder",
    "TrainingOrder",
    "cursor_at",
    "global_batch",
    "micro_batches",
    "share_of",
    "step_seed",
    "steps_per_epoch",
    "total_steps",
]

T = TypeVar("T")


class HasLength(Protocol):
    """Whatever costs a number of tokens."""

    @property
    def length(self) -> int:
        """Tokens that it costs to compute."""


Sized = TypeVar("Sized", bound=HasLength)


def steps_per_epoch(examples: int, global_batch_size: int) -> int:
    """Return how many global batches one pass over the data takes; the last one may be smaller."""
    return math.ceil(examples / global_batch_size)


def total_steps(examples: int, global_batch_size: int, epochs: int, max_steps: int | None) -> int:
    """Return the optimizer steps of the whole job."""
    return max_steps if max_steps is not None else epochs * steps_per_epoch(examples, global_batch_size)


@lru_cache(maxsize=2)
def _permutation(examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(examples))
    # Python's own generator, since its shuffle is stable between versions; text as seed tells (1, 23) from (12, 3)
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


def micro_batches(share: Sequence[Sized], size: int, max_length: int, packed: bool) -> list[list[Sized]]:
    """Cut a rank's share into pieces that need no more memory than `size` examples of `max_length` tokens.

    Short examples share a piece with more of their kind. Without packing each counts as long as the longest beside it.
    """
    budget = size * max_length
    pieces: list[list[Sized]] = []
    tokens = longest = 0
    for example in share:
        longest = max(longest, example.length)
        needed = tokens + example.length if packed else longest * (len(pieces[-1]) + 1 if pieces else 1)
        if not pieces or needed > budget:
            pieces.append([])
            tokens, longest = 0, example.length
        pieces[-1].append(example)
        tokens += example.length
    return pieces


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


@dataclass(frozen=True)
class LeftOut:
    """Rows that couldn't be used: how many, and what is wrong with the first."""

    count: int = 0
    first: str = ""


class Examples(Protocol):
    """A set of encoded examples; `data.ExampleSet` is one."""

    def __len__(self) -> int:
        """How many there are."""

    def get(self, index: int, epoch: int = 0) -> Example:
        """Return one; augmentation may make it another in each epoch."""


class TrainingOrder(Protocol):
    """Where a step's examples come from."""

    steps_per_epoch: int | None
    """None where the data is read while training, and nobody knows how long it is."""

    @property
    def left_out(self) -> LeftOut:
        """The rows that the last `share` left out, unless an earlier epoch has met them already."""

    def share(self, step: int, rank: int, world_size: int) -> list[Example]:
        """Return one rank's part of the global batch of step `step`, counted from 0."""

    def cursor(self, step: int) -> DataCursor:
        """Return where in the data training stands once `step` steps are done."""


class SetOrder:
    """A new random order in each epoch."""

    left_out = LeftOut()  # such rows were counted while the set was made

    def __init__(self, examples: Examples, global_batch_size: int, seed: int) -> None:
        self._examples, self._size, self._seed = examples, global_batch_size, seed
        self.steps_per_epoch: int | None = steps_per_epoch(len(examples), global_batch_size)

    def share(self, step: int, rank: int, world_size: int) -> list[Example]:
        """Return one rank's part of the global batch of step `step`, counted from 0."""
        count = len(self._examples)
        epoch = step // steps_per_epoch(count, self._size)
        indices = global_batch(step, examples=count, global_batch_size=self._size, seed=self._seed)
        mine = share_of(indices, rank, world_size)
        return [replace(self._examples.get(index, epoch), epoch=epoch) for index in mine]

    def cursor(self, step: int) -> DataCursor:
        """Return where in the data training stands once `step` steps are done."""
        return cursor_at(step, examples=len(self._examples), global_batch_size=self._size)
