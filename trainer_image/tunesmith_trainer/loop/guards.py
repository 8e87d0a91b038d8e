"""What watches over a run: spikes of the loss, and workers that hang. Pure where it can be; called by `run`.

A step whose loss or gradient is not finite, or whose loss is a spike, is not taken. Training goes back to the newest
good checkpoint and leaves that step's batch out; how often is bounded by `spec.failurePolicy.maxRollbacks`.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median

from tunesmith_api.keys import ExitCode, Reason
from tunesmith_store.errors import UserError

__all__ = ["LossGuard", "diverged"]

HISTORY = 32
"""Recent losses whose median is what a spike is measured against."""
LEAST_HISTORY = 8


@dataclass
class LossGuard:
    """Tells a bad step from a good one.

    `spike_factor` 0 watches for what isn't finite only. The median is robust: a few odd batches don't move it.
    """

    spike_factor: float
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))

    def trouble(self, loss: float, grad_norm: float) -> str:
        """Return what is wrong with a step, in words; "" where nothing is, and the loss is remembered then.

        `loss` is the mean per unit over all ranks, `grad_norm` the global norm before clipping.
        """
        if not math.isfinite(loss):
            return "the loss is not finite"
        if not math.isfinite(grad_norm):
            return "the gradient is not finite"
        if self.spike_factor and len(self._recent) >= LEAST_HISTORY:
            usual = median(self._recent)
            # losses near zero jump by large factors without meaning anything
            if loss > self.spike_factor * usual and loss - usual > 0.5:
                return f"the loss jumped to {loss:.3g} from {usual:.3g}"
        self._recent.append(loss)
        return ""

    def forget(self) -> None:
        """Start anew, as after going back to a checkpoint."""
        self._recent.clear()


def diverged(trouble: str, step: int, rollbacks: int) -> UserError:
    """Return the error that ends a run which went wrong more often than it may be rolled back."""
    message = (
        f"{trouble} at step {step}, after {rollbacks} rollbacks (spec.failurePolicy.maxRollbacks); lower "
        "spec.training.learningRate, raise warmupRatio, or set maxGradNorm"
    )
    return UserError(Reason.DIVERGED, message, ExitCode.DIVERGED)
