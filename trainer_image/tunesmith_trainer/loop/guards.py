"""What watches over a run's steps, and goes back where one turns out bad. Called by `run`.

A step whose loss or gradient is not finite, or whose loss is a spike, is not taken. Training goes back to the newest
good checkpoint and leaves that step's batch out; how often is bounded by `spec.failurePolicy.maxRollbacks`.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median

from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_store.errors import UserError
from tunesmith_trainer.loop.checkpoints import RunCheckpoints
from tunesmith_trainer.loop.history import History
from tunesmith_trainer.report.record import IncidentKind

__all__ = ["LossGuard", "Rollback", "diverged"]

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

    def problem(self, loss: float, grad_norm: float) -> str:
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


def diverged(problem: str, step: int, rollbacks: int) -> UserError:
    """Return the error that ends a run which went wrong more often than it may be rolled back."""
    message = (
        f"{problem} at step {step}, after {rollbacks} rollbacks (spec.failurePolicy.maxRollbacks); lower "
        "spec.training.learningRate, raise warmupRatio, or set maxGradNorm"
    )
    return UserError(Reason.DIVERGED, message, ExitCode.DIVERGED)


class Rollback:
    """Goes back to the newest good checkpoint where a step is bad. All ranks call all methods, in the same order."""

    def __init__(self, plan: TrainingPlan, checkpoints: RunCheckpoints, history: History) -> None:
        self.plan, self.checkpoints, self.history = plan, checkpoints, history
        self._guard = LossGuard(plan.loss_spike_factor)

    def problem(self, loss: float, grad_norm: float) -> str:
        """Return what is wrong with a step, as `LossGuard.problem` does."""
        return self._guard.problem(loss, grad_norm)

    def go_back(self, problem: str) -> None:
        """Leave the step out that is about to be taken, and go on from the newest good checkpoint; bounded.

        Raises:
            UserError: it has been done too often.
        """
        history, before = self.history, self.history.state
        step, rollbacks, most = before.step, before.rollbacks + 1, self.plan.max_rollbacks
        if rollbacks > most:
            raise diverged(problem, step + 1, before.rollbacks)
        # what went wrong again at once was wrong in the checkpoint already
        found = self.checkpoints.restore(step - 1 if self._just_restored() else None)
        state = history.state
        state.rollbacks, state.skipped_steps = rollbacks, [*before.skipped_steps, step]
        state.restarts, state.events = before.restarts, before.events
        self._guard.forget()
        where = f"back to step {state.step}" if found else "no checkpoint to go back to yet"
        text = f"{problem} at step {step + 1}: {where}, its batch is left out ({rollbacks} of {most})"
        history.happened(IncidentKind.ROLLBACK, step + 1, text)
        history.report.update(rollbacks=rollbacks, global_step=state.step)
        history.report.log(text)

    def _just_restored(self) -> bool:
        reference, state = self.checkpoints.newest, self.history.state
        return bool(state.rollbacks) and reference is not None and state.step - reference.step <= 1
