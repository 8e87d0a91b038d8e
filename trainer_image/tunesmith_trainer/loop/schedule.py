"""The learning rate as a pure function of the step. Called by `run` before every optimizer step.

The curves are those of transformers.optimization, moved by one step during warm-up: see `lr_at`.
"""

from __future__ import annotations

import math

from tunesmith_api.plan import OptimizationPlan
from tunesmith_api.v1alpha1.training import LrSchedulerType

__all__ = ["lr_at", "warmup_steps"]


def warmup_steps(training: OptimizationPlan, max_steps: int) -> int:
    """Return over how many steps the learning rate rises (rounded up, as in Hugging Face TrainingArguments).

    `constant` has no warm-up.
    """
    if training.lr_scheduler_type is LrSchedulerType.CONSTANT:
        return 0
    return math.ceil(max_steps * training.warmup_ratio)


def lr_at(step: int, training: OptimizationPlan, max_steps: int) -> float:
    """Return the learning rate of the optimizer step number `step`, counted from 0.

    Warm-up is linear and reaches the peak in its last step: transformers takes ``step / warmup`` and wastes the first
    step on a rate of 0, we take ``(step + 1) / warmup``. After it, with p the part of the remaining steps that is done:

    * linear: ``1 - p``
    * cosine: ``(1 + cos(pi * p)) / 2`` (Loshchilov & Hutter, 2017)
    * cosine_with_restarts: the same of ``p * numCycles`` without its whole part: each cycle starts at the peak
    * warmup_stable_decay: the peak, then linear to 0 over the last ``decayRatio`` of all steps (rounded up, as warm-up;
      at most what warm-up leaves). Hu et al., 2024: MiniCPM.
    * constant, constant_with_warmup: the peak
    """
    peak, warmup = training.learning_rate, warmup_steps(training, max_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    part = (step - warmup) / max(1, max_steps - warmup)
    match training.lr_scheduler_type:
        case LrSchedulerType.CONSTANT | LrSchedulerType.CONSTANT_WITH_WARMUP:
            return peak
        case LrSchedulerType.LINEAR:
            return peak * max(0.0, 1 - part)
        case LrSchedulerType.COSINE:
            return peak * (1 + math.cos(math.pi * min(1.0, part))) / 2
        case LrSchedulerType.COSINE_WITH_RESTARTS:
            return peak * (1 + math.cos(math.pi * (training.num_cycles * part % 1.0))) / 2 if part < 1 else 0.0
        case LrSchedulerType.WARMUP_STABLE_DECAY:
            decay = min(math.ceil(max_steps * training.decay_ratio), max_steps - warmup)
            return peak * min(1.0, max(0.0, (max_steps - step) / max(1, decay)))
