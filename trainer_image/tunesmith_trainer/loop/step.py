"""One optimizer step: no Ray, no I/O, no knowledge of what a task is. Called by `run`.

Every task's loss is a sum over units (tokens, examples, pairs). Here it is divided by the number of units of the whole
step over ALL ranks and micro-batches. So the result depends neither on how many workers share a batch nor on how it is
cut: dividing each micro-batch by its own number, as is often done, weighs short ones more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from tunesmith_trainer.tasks.base import Batch

__all__ = ["Gradients", "StepResult", "Synced", "compute_gradients", "take_step"]

Loss = Callable[[nn.Module, Batch], torch.Tensor]


class Synced(Protocol):
    """What `parallel.wrap` makes of a model."""

    @property
    def module(self) -> nn.Module:
        """What is called forward."""

    @property
    def dp_size(self) -> int:
        """Ranks that see different examples, over which gradients are averaged."""

    def sync(self, last: bool) -> AbstractContextManager[Any]:
        """The context of one micro-batch: gradients are averaged in the last one only."""

    def clip_grad_norm(self, max_norm: float) -> float:
        """Scale the gradients down to a norm (0 leaves them alone); return the global norm before that."""


@dataclass(frozen=True)
class Gradients:
    """What the micro-batches of one rank have left in the parameters."""

    loss_sum: float
    """Sum of this rank's losses, not divided by anything."""


@dataclass(frozen=True)
class StepResult:
    """How a step went on all ranks together."""

    loss: float
    """Mean loss per unit."""
    grad_norm: float
    """Norm of the global gradient before clipping."""


def compute_gradients(
    model: Synced,
    batches: Sequence[Batch],
    loss: Loss,
    *,
    global_units: float,
    idle: int = 0,
    autocast: Callable[[], AbstractContextManager[Any] | None] = lambda: None,
    scaler: torch.amp.GradScaler | None = None,
) -> Gradients:
    """Accumulate the gradients of all micro-batches of this rank, averaged over ranks in the last one.

    `batches` has at least one, since all ranks take part in the averaging; the last `idle` of them only keep the ranks
    in step and count for nothing. `global_units` counts the units of the whole step over all ranks.
    """
    # times dp_size, since the average over ranks divides by it
    scale = model.dp_size / max(global_units, 1e-12)
    total: torch.Tensor | None = None
    for number, batch in enumerate(batches, 1):
        with model.sync(last=number == len(batches)):
            with autocast() or nullcontext():
                value = loss(model.module, batch)
            if number > len(batches) - idle:
                value = value * 0.0
            scaled = value * scale
            (scaler.scale(scaled) if scaler is not None else scaled).backward()
        # stays on the device: one wait for the GPU at the end instead of one for each micro-batch
        total = value.detach() if total is None else total + value.detach()
    return Gradients(0.0 if total is None else float(total))


def take_step(
    model: Synced,
    optimizer: torch.optim.Optimizer,
    *,
    learning_rate: float,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Take the optimizer's step with gradients that were found good, and drop them."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    drop_gradients(optimizer)


def drop_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Forget the gradients: the next step's are allocated anew."""
    optimizer.zero_grad(set_to_none=True)


def clipped_norm(
    model: Synced, optimizer: torch.optim.Optimizer, max_grad_norm: float, scaler: torch.amp.GradScaler | None
) -> float:
    """Clip the gradients; return their global norm before that, not scaled, infinite or NaN where they are."""
    if scaler is not None:
        scaler.unscale_(optimizer)
    return model.clip_grad_norm(max_grad_norm or math.inf)
