"""What a run remembers and tells of itself: its state, its curves, what happened on the way.

Owned by `run`. The other parts of the loop write to the state through it, so that no fact is remembered without being
told. The state is what a checkpoint holds: going back to one goes back in all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tunesmith_api.plan import TrainingPlan
from tunesmith_api.reports import DatasetFacts, TrainerState
from tunesmith_trainer.checkpoint import RunState
from tunesmith_trainer.loop.tracking import Tracker
from tunesmith_trainer.report.record import IncidentKind

__all__ = ["History", "Reporter", "SilentReporter", "StepRecord", "eval_metrics"]

RECENT = 10
"""Logged steps that speed and remaining time are taken from."""


class Reporter(Protocol):
    """Where rank 0 tells how it goes; `progress.ProgressPusher` in pods."""

    def update(self, **changes: Any) -> None:
        """Take changed ProgressUpdate fields."""

    def log(self, *lines: str) -> None:
        """Take log lines for people."""

    def phase(self, name: str) -> None:
        """Take note that a start-up phase was reached."""


class SilentReporter:
    """The Reporter of all ranks but 0."""

    def update(self, **changes: Any) -> None:
        """Tell nobody."""

    def log(self, *lines: str) -> None:
        """Tell nobody."""

    def phase(self, name: str) -> None:
        """Tell nobody."""


@dataclass(frozen=True)
class StepRecord:
    """How one optimizer step went, on all ranks together."""

    loss: float
    """Mean per unit."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    seconds: float
    memory_bytes: int
    """The most that this process has held so far."""


def eval_metrics(found: Mapping[str, float], suffix: str = "") -> dict[str, float]:
    """Return an evaluation's numbers by the names that the job's metrics have."""
    return {f"eval{name[0].upper()}{name[1:]}{suffix}": value for name, value in found.items() if name != "step"}


class History:
    """A run's state, and who is told of it. `begin` is called once the data are known."""

    max_steps: int
    steps_per_epoch: int | None

    def __init__(self, plan: TrainingPlan, report: Reporter) -> None:
        self.plan, self.report = plan, report
        self.state = RunState()
        self.tracker = Tracker.silent()
        self._facts = DatasetFacts()
        self._recent: list[tuple[float, int]] = []

    def begin(self, facts: DatasetFacts, max_steps: int, steps_per_epoch: int | None) -> None:
        """Take note of the data's size, and tell it."""
        self._facts, self.max_steps, self.steps_per_epoch = facts, max_steps, steps_per_epoch
        self.report.update(dataset=self.dataset_facts)

    def go_back_to(self, state: RunState) -> None:
        """Take the state that a checkpoint held."""
        self.state = state
        self.tracker.rewind(state.history, state.evaluations)

    # ---- what happens

    def happened(self, kind: IncidentKind, step: int, text: str) -> None:
        """Remember an incident for the report, and tell it."""
        self.state.events = [*self.state.events, {"step": step, "kind": kind.value, "text": text}]

    def left_out(self, rows: int, first: str) -> None:
        """Count training rows that couldn't be used; `first` says what is wrong with one of them."""
        if not self.state.first_bad_row:
            self.report.log(f"warning: a bad row is left out: {first}; status.dataset.badRows counts them")
        self.state.bad_rows += rows
        self.state.first_bad_row = self.state.first_bad_row or first
        self.report.update(dataset=self.dataset_facts)

    @property
    def dataset_facts(self) -> DatasetFacts:
        """What the data turned out to hold, so far."""
        facts, state = self._facts, self.state
        found = {
            "bad_rows": facts.bad_rows + state.bad_rows,
            "first_bad_row": facts.first_bad_row or state.first_bad_row,
        }
        return facts.model_copy(update=found)

    # ---- steps

    @property
    def is_logging_due(self) -> bool:
        """Whether the step just taken is one that is written down."""
        step = self.state.step
        return step == 1 or step % self.plan.training.logging_steps == 0 or step == self.max_steps

    def record(self, done: StepRecord) -> None:
        """Write down the step just taken, and tell it."""
        state = self.state
        self._recent = [*self._recent[1 - RECENT :], (done.seconds, done.tokens)]
        mean_seconds = sum(seconds for seconds, _ in self._recent) / len(self._recent)
        speed = sum(tokens for _, tokens in self._recent) / max(1e-9, sum(seconds for seconds, _ in self._recent))
        eta = round(mean_seconds * (self.max_steps - state.step))
        epoch = state.step / (self.steps_per_epoch or self.max_steps)
        state.history.append(
            {
                "step": state.step,
                "loss": done.loss,
                "learningRate": done.learning_rate,
                "gradNorm": done.grad_norm,
                "tokens": done.tokens,
                "seconds": round(done.seconds, 4),
                "memoryBytes": done.memory_bytes,
            }
        )
        curves = {"loss": done.loss, "learningRate": done.learning_rate, "gradNorm": done.grad_norm}
        self.tracker.record(state.step, {**curves, "tokensPerSecond": speed})
        self.report.update(
            state=TrainerState.TRAINING,
            message="",
            global_step=state.step,
            max_steps=self.max_steps,
            epoch=round(epoch, 4),
            loss=done.loss,
            learning_rate=done.learning_rate,
            grad_norm=done.grad_norm,
            tokens_per_second=round(speed, 1),
            eta_seconds=eta,
        )
        self.report.phase("firstStep")
        self.report.log(
            f"step {state.step}/{self.max_steps}  epoch {epoch:.2f}  loss {done.loss:.4f}  "
            f"lr {done.learning_rate:.2e}  grad {done.grad_norm:.2f}  {speed:,.0f} tok/s  "
            f"eta {eta // 60}m{eta % 60:02d}s"
        )

    # ---- the end

    @property
    def saved_step(self) -> int:
        """The optimizer steps behind the weights that are saved."""
        state = self.state
        return state.best_step if self.plan.training.load_best_model_at_end and state.best_step else state.step

    def metrics(self) -> dict[str, float]:
        """The job's metrics. trainLoss: mean of the last ten records; eval…: the saved weights, not yet written."""
        state = self.state
        last = [record["loss"] for record in state.history[-10:]]
        found = {
            "steps": float(state.step),
            "trainSeconds": round(state.train_seconds, 1),
            "tokensPerSecond": round(state.tokens / max(1e-9, state.train_seconds), 1),
        }
        if last:
            found["trainLoss"] = sum(last) / len(last)
        if state.rollbacks:
            found["rollbacks"] = float(state.rollbacks)
        for record in state.evaluations:
            suffix = "Before" if record["step"] == 0 else "" if record["step"] == self.saved_step else None
            if suffix is not None:
                found |= eval_metrics(record, suffix)
        return found
