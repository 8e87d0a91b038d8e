"""One rank's micro-batches of a step. Called by `run` before the forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tunesmith_trainer.data import order
from tunesmith_trainer.loop.assembly import Assembly
from tunesmith_trainer.loop.context import RunContext
from tunesmith_trainer.loop.inputs import Inputs
from tunesmith_trainer.tasks.base import Batch

__all__ = ["StepShare", "share_of_step"]


@dataclass(frozen=True)
class StepShare:
    """What one rank computes in a step."""

    batches: list[Batch]
    """At least one: all ranks take part in the reduction of gradients."""
    idle: int
    """How many of them, at the end, only keep the ranks in step and count for nothing."""
    tokens: int
    left_out: order.LeftOut
    """Rows of this share that couldn't be used."""

    @property
    def units(self) -> float:
        """What this rank's loss is divided by, summed up over its micro-batches."""
        return sum(batch.units for batch in self.batches[: len(self.batches) - self.idle])


def share_of_step(step: int, context: RunContext, inputs: Inputs, parts: Assembly) -> StepShare:
    """Read and collate this rank's part of the global batch of step `step`, counted from 0.

    What the step draws at random (masks, dropout) is seeded here: it is a function of the step and the rank.
    """
    training, wrapped, task = context.plan.training, parts.wrapped, inputs.task
    examples = inputs.order.share(step, wrapped.dp_rank, wrapped.dp_size)
    torch.manual_seed(order.step_seed(training.seed, step, wrapped.dp_rank))
    left_out = inputs.order.left_out
    tokens = sum(example.length for example in examples)
    idle = 0 if examples else 1
    if idle:  # a small last batch may leave this rank without an example, but not out of the reduction
        examples = inputs.order.share(step, 0, 1)[:1]
    if parts.packed or training.group_by_length:
        examples = sorted(examples, key=lambda example: example.length)
    cut = order.micro_batches(examples, training.micro_batch_size, task.longest, parts.packed)
    batches = [task.collate(piece, parts.numerics.device, parts.packed) for piece in cut]
    if wrapped.meets_always:
        missing = int(context.group.max([len(batches)])[0]) - len(batches)
        batches, idle = [*batches, *[batches[0]] * missing], idle + missing
    return StepShare(batches, idle, tokens, left_out)
