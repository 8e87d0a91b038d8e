"""The learning rate as a pure function of the step. Called by `loop` before every optimizer step."""

from __future__ import annotations

import math

from tunesmith_api.v1alpha1.training import LrSchedulerType

__all__ = ["lr_at", "warmup_steps"]


def warmup_steps(max_steps: int, warmup_ratio: float) -> int:
    """Return over how many steps the learning rate rises (rounded up, as in Hugging Face TrainingArguments)."""
    return math.ceil(max_steps * warmup_ratio)


def lr_at(step: int, *, peak: float, max_steps: int, warmup: int, kind: LrSchedulerType) -> float:
    """Return the learning rate of the optimizer step number `step`, counted from 0.

    Warm-up is linear and reaches `peak` in its last step (the first step isn't wasted on a rate of 0). After it,
    cosine is ``peak * (1 + cos(pi * p)) / 2`` (Loshchilov & Hutter, 2017) and linear ``peak * (1 - p)``, with p the
    part of the remaining steps that is done; constant stays.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    part = (step - warmup) / max(1, max_steps - warmup)
    match kind:
        case LrSchedulerType.CONSTANT:
            return peak
        case LrSchedulerType.LINEAR:
            return peak * (1 - part)
        case LrSchedulerType.COSINE:
            return peak * (1 + math.cos(math.pi * part)) / 2
