"""Held-out evaluation of any task. Called by `run`.

The examples are shared over the ranks, and what the task adds up is added up: the numbers don't depend
on how many ranks there are.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tunesmith_trainer.data.order import Examples, micro_batches, share_of
from tunesmith_trainer.distributed.collectives import Group
from tunesmith_trainer.tasks.base import Assessment, Example, Task

__all__ = ["Evaluation", "evaluate"]

WORST = 16
"""Examples that the report can show as those the model got most wrong."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of all held-out examples."""

    metrics: dict[str, float]
    assessment: Assessment
    """Of all ranks; its outcomes are the WORST ones, worst first."""
    examples: int


def _added(left: Assessment, right: Assessment) -> Assessment:
    sums = right.sums
    if left.sums:
        sums = {
            name: [a + b for a, b in zip(values, right.sums[name], strict=True)] for name, values in left.sums.items()
        }
    outcomes = heapq.nlargest(WORST, [*left.outcomes, *right.outcomes], key=lambda outcome: outcome.loss)
    return Assessment(sums, outcomes, [*left.texts, *right.texts])


@dataclass(frozen=True)
class _Place:
    """A held-out example that isn't loaded yet."""

    index: int
    length: int


def _load(examples: Examples, places: Sequence[_Place]) -> list[Example]:
    found = ((place.index, examples.get(place.index)) for place in places)
    return [replace(example, features={**example.features, "index": index}) for index, example in found]


def evaluate(
    task: Task,
    model: nn.Module,
    examples: Examples,
    lengths: Sequence[int],
    *,
    group: Group,
    autocast: Callable[[], AbstractContextManager[Any] | None],
    packed: bool,
    data_rank: int,
    data_ranks: int,
    lockstep: bool,
    between: Callable[[float], None] = lambda part: None,
) -> Evaluation:
    """Evaluate a model on all ranks together.

    `lengths` are those of the examples to evaluate, in order from the first. Ranks with the same `data_rank` (of
    `data_ranks`) share a model's layers and see the same examples. `lockstep`: the ranks share out the model, so all
    have to run it equally often. `between` is called on all ranks equally often, after every micro-batch, with the
    part that is done; it may raise to stop.
    """
    places = sorted((_Place(index, length) for index, length in enumerate(lengths)), key=lambda place: place.length)
    share = share_of(places, data_rank, data_ranks)  # shortest first, as training's micro-batches are cut
    batches = micro_batches(share, task.plan.training.micro_batch_size, task.longest, packed)
    rounds = int(group.max([float(len(batches))])[0])
    total = Assessment({})
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for number in range(rounds):
                idle = number >= len(batches)
                if not idle or lockstep:
                    loaded = _load(examples, batches[number] if not idle else places[:1])
                    with autocast() or nullcontext():
                        found = task.assess(model, task.collate(loaded, group.device, packed))
                    total = total if idle else _added(total, found)
                between((number + 1) / rounds)
    finally:
        model.train(was_training)
    whole = Assessment({})
    # one of those that see the same examples speaks for them
    parts = group.gather((data_rank, total))
    for _, part in {rank: (rank, part) for rank, part in parts}.values():
        whole = _added(whole, part) if part.sums else whole
    return Evaluation(task.metrics(whole), whole, len(lengths))
