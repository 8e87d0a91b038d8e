"""One optimizer step, and the loss it descends: no Ray, no I/O. Called by `loop` and `evaluate`.

Loss: the sum of the negative log-likelihoods of the assistant's tokens, divided by their number over ALL ranks and
micro-batches of the step. So the result depends neither on how many workers share a batch nor on how it is cut.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tunesmith_api.keys import ExitCode, Reason
from tunesmith_store.errors import UserError
from tunesmith_trainer.chat import IGNORE
from tunesmith_trainer.data import Batch

__all__ = ["StepResult", "keeps_logits", "make_optimizer", "target_logits", "train_step"]


@dataclass(frozen=True)
class StepResult:
    """What one rank has to report of a step."""

    nll_sum: float
    """Sum of the negative log-likelihoods of this rank's assistant tokens, in nats."""
    grad_norm: float
    """Norm of the global gradient before clipping; the same on all ranks."""


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model can leave out logits that nobody asks for.

    The output head is a fifth of the work of a small model, and most of the memory.
    """
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def target_logits(model: nn.Module, batch: Batch, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the model and return the logits that matter and what they should predict.

    Returns:
        logits [examples, columns, vocabulary] in float32 and targets [examples, columns] (IGNORE where nothing counts),
        where the columns are those positions of the batch at which any example has a target.
    """
    targets = batch.labels[:, 1:]
    columns = (targets != IGNORE).any(dim=0).nonzero().squeeze(1)
    if columns.numel() == 0:
        columns = torch.zeros(1, dtype=torch.long, device=targets.device)
    extra: dict[str, Any] = {"logits_to_keep": columns} if keep else {}
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **extra).logits
    if not keep:
        logits = logits[:, columns]
    return logits.float(), targets[:, columns]


def make_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float, betas: tuple[float, float], epsilon: float
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; biases and norms (vectors) are not decayed."""
    trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [parameter for _, parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for _, parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    on_gpu = any(parameter.is_cuda for _, parameter in trained)
    # the learning rate is set before every step
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=0.0, betas=betas, eps=epsilon, fused=on_gpu
    )


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    global_tokens: int,
    world_size: int,
    learning_rate: float,
    max_grad_norm: float,
    keep: bool,
    autocast: AbstractContextManager[Any] | None = None,
) -> StepResult:
    """Accumulate the gradients of all micro-batches of this rank, clip, check, and take one optimizer step.

    `batches` are this rank's micro-batches: at least one, if need be without targets, since gradients are averaged over
    ranks in the last one. `global_tokens` counts the assistant's tokens of the whole step over all ranks.
    `max_grad_norm` 0 leaves gradients alone. `keep` is what `keeps_logits` said of the bare model.

    Raises:
        UserError: with reason Diverged, before the step is taken, if the gradient is not finite.
    """
    nll_sum = 0.0
    for number, batch in enumerate(batches, 1):
        last = number == len(batches)
        # DistributedDataParallel averages over ranks: only once per step
        unsynced = getattr(model, "no_sync", None)
        with nullcontext() if last or unsynced is None else unsynced():
            with autocast or nullcontext():
                logits, targets = target_logits(model, batch, keep)
                nll = functional.cross_entropy(
                    logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
                )
            # times world_size, since DDP's average divides by it
            (nll * (world_size / global_tokens)).backward()
        nll_sum += float(nll.detach())
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = float(nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf))
    if not math.isfinite(norm):
        message = (
            f"the gradient is not finite (loss of this worker's part: {nll_sum / max(1, global_tokens):g}); lower "
            "spec.training.learningRate, raise warmupRatio or set maxGradNorm"
        )
        raise UserError(Reason.DIVERGED, message, ExitCode.DIVERGED)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(nll_sum, norm)
