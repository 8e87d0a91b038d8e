"""Held-out evaluation: loss per token, token accuracy and teacher-forced exact match. Called by `loop`.

The examples are shared over the ranks, longest first, and the sums are added up: the numbers don't depend on how many
ranks there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tunesmith_trainer.chat import IGNORE, EncodedChat
from tunesmith_trainer.data import Batch, collate
from tunesmith_trainer.group import Group
from tunesmith_trainer.model import Numerics
from tunesmith_trainer.order import micro_batches, share_of
from tunesmith_trainer.step import target_logits

__all__ = ["EvalResult", "evaluate"]


@dataclass(frozen=True)
class EvalResult:
    """Means over the assistant's tokens of all examples."""

    loss: float
    """Negative log-likelihood per token, in nats."""
    token_accuracy: float
    """Part of the tokens that the model puts first, given the true ones before."""
    exact_match: float
    """Part of the examples of which that holds for every token."""
    examples: int


@torch.no_grad()
def _sums(model: nn.Module, batch: Batch, keep: bool) -> tuple[float, float, float, float, float]:
    logits, targets = target_logits(model, batch, keep)
    counted = targets != IGNORE
    nll = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    right = (logits.argmax(-1) == targets) & counted
    exact = (right == counted).all(dim=1)
    return float(nll), float(counted.sum()), float(right.sum()), float(exact.sum()), float(len(targets))


def evaluate(
    model: nn.Module,
    examples: Sequence[EncodedChat],
    *,
    group: Group,
    numerics: Numerics,
    micro_batch_size: int,
    pad_id: int,
    keep: bool,
    between: Callable[[float], None] = lambda part: None,
) -> EvalResult:
    """Evaluate the bare model (not its DDP wrapper) on all ranks together.

    `between` is called on all ranks equally often, after every micro-batch, with the part that is done; it may raise
    to stop. `keep` is what `step.keeps_logits` said.
    """
    by_length = sorted(examples, key=lambda example: len(example.input_ids), reverse=True)
    batches = micro_batches(share_of(by_length, group.rank, group.world_size), micro_batch_size)
    rounds = math.ceil(math.ceil(len(by_length) / group.world_size) / micro_batch_size)  # of rank 0, which has the most
    totals = [0.0] * 5
    training = model.training
    model.eval()
    try:
        for number in range(rounds):
            if number < len(batches):
                batch = collate(batches[number], pad_id, numerics.device)
                context: Any = numerics.autocast()
                if context is None:
                    sums = _sums(model, batch, keep)
                else:
                    with context:
                        sums = _sums(model, batch, keep)
                totals = [total + new for total, new in zip(totals, sums, strict=True)]
            between((number + 1) / rounds)
    finally:
        model.train(training)
    nll, tokens, right, exact, count = group.sum(totals)
    return EvalResult(nll / max(1.0, tokens), right / max(1.0, tokens), exact / max(1.0, count), int(count))
