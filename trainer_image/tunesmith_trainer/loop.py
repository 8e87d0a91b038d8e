"""What every rank does, from top to bottom: set up, resume, train, evaluate, save, finish.

Ray Train runs it through `worker`; tests run it without Ray. All ranks pass through the same collectives in the same
order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tunesmith_api.plan import TrainingPlan
from tunesmith_api.reports import CheckpointRef, DatasetFacts, ModelRef, TrainerState
from tunesmith_store.errors import UserError
from tunesmith_store.store import ObjectStore
from tunesmith_trainer import order
from tunesmith_trainer.assembly import Assembly, Inputs, assemble, load_inputs
from tunesmith_trainer.attention import packed_implementation, plain_implementation
from tunesmith_trainer.checkpoint import Checkpointer, RunState
from tunesmith_trainer.environment import PodEnvironment
from tunesmith_trainer.errors import Interrupted
from tunesmith_trainer.evaluate import Evaluation, evaluate
from tunesmith_trainer.finish import eval_metrics, finish, sample_before
from tunesmith_trainer.group import Group
from tunesmith_trainer.guards import LossGuard, diverged
from tunesmith_trainer.report.record import IncidentKind
from tunesmith_trainer.schedule import lr_at
from tunesmith_trainer.step import clipped_norm, compute_gradients, drop_gradients, take_step
from tunesmith_trainer.tasks.base import Batch
from tunesmith_trainer.tracking import Tracker

__all__ = ["Reporter", "RunResult", "TrainingRun"]


class Reporter(Protocol):
    """Where rank 0 tells how it goes; `progress.ProgressPusher` in pods."""

    def update(self, **changes: Any) -> None:
        """Take changed ProgressUpdate fields."""

    def log(self, *lines: str) -> None:
        """Take log lines for people."""

    def phase(self, name: str) -> None:
        """Take note that a start-up phase was reached."""


class _Silent:
    """The Reporter of all ranks but 0."""

    def update(self, **changes: Any) -> None: ...
    def log(self, *lines: str) -> None: ...
    def phase(self, name: str) -> None: ...


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves behind."""

    model: ModelRef | None
    checkpoint: CheckpointRef | None
    metrics: dict[str, float]
    global_step: int
    max_steps: int
    restarts: int
    dataset: DatasetFacts


class _StopRequested(Exception):
    """Some pod of the group got SIGTERM; known to all ranks at the same point."""


class TrainingRun:
    """One rank's part in one run. `run()` is the whole story."""

    inputs: Inputs
    parts: Assembly
    checkpointer: Checkpointer

    def __init__(
        self,
        plan: TrainingPlan,
        pod: PodEnvironment,
        group: Group,
        store: ObjectStore,
        run_digest: str,
        reporter: Reporter | None = None,
        after_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.plan, self.pod, self.group, self.store, self.run_digest = plan, pod, group, store, run_digest
        self.report: Reporter = reporter if reporter is not None and group.rank == 0 else _Silent()
        self.after_step = after_step
        self.state = RunState()
        self.guard = LossGuard(plan.loss_spike_factor)
        self.tracker = Tracker.silent()
        self.last_evaluation: Evaluation | None = None
        self._recent: list[tuple[float, int]] = []
        self._left_out = order.LeftOut()

    @property
    def is_assembled(self) -> bool:
        """Whether model, data and optimizer are there: what fails now is a step's or an evaluation's fault."""
        return hasattr(self, "parts")

    def run(self) -> RunResult:
        """Train to the end.

        Raises:
            UserError: a retry can't help.
            Retryable: a peer or the store was lost, or a peer hangs.
            Interrupted: a pod was told to stop; the state is saved.
        """
        with self.group.explained():
            self._set_up()
            self._resume()
            try:
                with packed_implementation(self.parts.bare, self.parts.packed):
                    self._train()
                    self._choose_model()
            except _StopRequested:
                self._save_and_interrupt()
            except UserError:
                self.tracker.finish({}, failed=True)
                raise
            return self._finish()

    def _train(self) -> None:
        self._evaluate_if_due()
        while not self._is_done():
            self._step()
            self._evaluate_if_due()
            self._save_if_due()

    def _is_done(self) -> bool:
        return self._stopped_early or self.state.step >= self.max_steps

    @property
    def _stopped_early(self) -> bool:
        stopping = self.plan.training.early_stopping
        return stopping is not None and self.state.evaluations_without_improvement >= stopping.patience

    # ---- set-up

    def _set_up(self) -> None:
        plan, scratch = self.plan, self.pod.scratch
        self.report.update(state=TrainerState.PREPARING, message="loading model and data")
        self.inputs = load_inputs(plan, scratch, self.group, self.store, self.report.log)
        self.task, self.max_steps = self.inputs.task, self.inputs.max_steps
        self.report.update(dataset=self.dataset_facts)
        self.report.phase("dataLoaded")
        self.parts = assemble(plan, self.inputs, self.group, self.store, scratch, self.report.log)
        self.report.phase("modelLoaded")
        if self.group.rank == 0:
            self.tracker = Tracker.open(plan, scratch / "tensorboard", self.run_digest, self.report.log)

    def _resume(self) -> None:
        """Go on from the newest complete checkpoint of this run."""
        self.checkpointer = Checkpointer(
            store=self.store,
            uri=self.plan.checkpoint_uri,
            folder=self.pod.scratch / "checkpoints",
            ranks_per_pod=self.pod.processes,
            run_digest=self.run_digest,
            keep_last=self.plan.checkpoint_keep_last,
            keep_best=self.plan.checkpoint_keep_best and self.plan.dataset.is_evaluated,
            higher_is_better=self._higher_is_better,
            describe={
                "max_steps": self.max_steps,
                "seed": self.plan.training.seed,
                "attempt": self.plan.attempt,
            },
            group=self.group,
            saved=self._saved,
            log=self.report.log,
        )
        if not self._restore():
            return
        self.state.restarts += 1
        reference = self.checkpointer.newest
        self.report.update(
            restarts=self.state.restarts,
            global_step=self.state.step,
            checkpoint=reference,
            dataset=self.dataset_facts,
        )
        text = f"resumed from step {self.state.step}"
        self._happened(IncidentKind.RESTART, self.state.step, text)
        self.report.log(f"{text} of {reference.uri if reference else ''}")

    def _happened(self, kind: IncidentKind, step: int, text: str) -> None:
        self.state.events = [*self.state.events, {"step": step, "kind": kind.value, "text": text}]

    def _restore(self, before: int | None = None) -> bool:
        """Put the newest good checkpoint, if there is one, into model, optimizer and state."""
        found = self.checkpointer.restore(self.parts.bare, self.parts.optimizer, before)
        if found is None:
            return False
        self.state = found
        if self.parts.scaler is not None and self.state.scaler:
            self.parts.scaler.load_state_dict(dict(self.state.scaler))
        self.tracker.rewind(self.state.history, self.state.evaluations)
        return True

    def _saved(self, reference: CheckpointRef) -> None:
        self.report.update(checkpoint=reference)
        self.report.log(f"checkpoint of step {reference.step} saved to {reference.uri}")

    @property
    def _higher_is_better(self) -> bool:
        return self.plan.training.metric_for_best_model in self.task.higher_is_better

    # ---- training

    def _batches(self) -> tuple[list[Batch], int, int]:
        """Return this rank's micro-batches of the step, their tokens, and how many only keep the others company."""
        training, parts, step = self.plan.training, self.parts, self.state.step
        share = self.inputs.order.share(step, parts.wrapped.dp_rank, parts.wrapped.dp_size)
        # what a step draws at random (masks, dropout) is a function of the step and the rank
        torch.manual_seed(order.step_seed(training.seed, step, parts.wrapped.dp_rank))
        self._left_out = self.inputs.order.left_out
        tokens = sum(example.length for example in share)
        idle = 0 if share else 1
        if idle:  # a small last batch may leave this rank without an example, but not out of the reduction
            share = self.inputs.order.share(step, 0, 1)[:1]
        if parts.packed or training.group_by_length:
            share = sorted(share, key=lambda example: example.length)
        cut = order.micro_batches(share, training.micro_batch_size, self.task.longest, parts.packed)
        batches = [self.task.collate(piece, parts.numerics.device, parts.packed) for piece in cut]
        if parts.wrapped.is_sharded:  # ranks that share out the model have to run it equally often
            missing = int(self.group.max([len(batches)])[0]) - len(batches)
            batches, idle = [*batches, *[batches[0]] * missing], idle + missing
        return batches, tokens, idle

    def _step(self) -> None:
        """Take one optimizer step, unless some pod has been told to stop or the step turns out bad."""
        state, parts = self.state, self.parts
        if state.step in state.skipped_steps:
            state.step += 1
            return
        began = time.monotonic()
        batches, tokens, idle = self._batches()
        units = sum(batch.units for batch in batches[: len(batches) - idle])
        stop, ready = self.pod.stop_file.exists(), self.checkpointer.ready
        agreed = self.group.sum([units, tokens, stop, ready, self._left_out.count])
        shared = parts.wrapped.ranks_per_replica
        all_units, all_tokens = agreed[0] / shared, int(agreed[1] / shared)
        self.checkpointer.settle(agreed[3])
        if agreed[2]:
            raise _StopRequested
        found = compute_gradients(
            parts.wrapped,
            batches,
            parts.loss,
            global_units=all_units,
            idle=idle,
            autocast=parts.numerics.autocast,
            scaler=parts.scaler,
        )
        loss = self.group.sum([found.loss_sum])[0] / shared / max(all_units, 1e-12)
        norm = clipped_norm(parts.wrapped, parts.optimizer, self.plan.training.max_grad_norm, parts.scaler)
        trouble = self.guard.trouble(loss, norm if parts.scaler is None else 0.0)
        if trouble:
            self._roll_back(trouble)
            return
        rate = lr_at(state.step, self.plan.training, self.max_steps)
        take_step(parts.wrapped, parts.optimizer, learning_rate=rate, scaler=parts.scaler)
        state.step += 1
        state.tokens += all_tokens
        if agreed[4]:
            self._note_left_out(int(agreed[4] / shared))
        if state.step == 1 or state.step % self.plan.training.logging_steps == 0 or state.step == self.max_steps:
            self._record(loss, rate, norm, all_tokens, time.monotonic() - began)
        state.train_seconds += time.monotonic() - began
        self.after_step(state.step)

    def _note_left_out(self, rows: int) -> None:
        """Count the rows of this step that couldn't be used; all ranks know that there were some."""
        first = next(filter(None, self.group.meet(self._left_out.first)), "")
        if not self.state.first_bad_row:
            self.report.log(f"warning: a bad row is left out: {first}; status.dataset.badRows counts them")
        self.state.bad_rows += rows
        self.state.first_bad_row = self.state.first_bad_row or first
        self.report.update(dataset=self.dataset_facts)

    @property
    def dataset_facts(self) -> DatasetFacts:
        """What the data turned out to hold, so far."""
        facts, state = self.inputs.prepared.facts, self.state
        found = {
            "bad_rows": facts.bad_rows + state.bad_rows,
            "first_bad_row": facts.first_bad_row or state.first_bad_row,
        }
        return facts.model_copy(update=found)

    def _roll_back(self, trouble: str) -> None:
        """Go back to the newest good checkpoint and leave the batch of this step out; bounded."""
        before, step = self.state, self.state.step
        rollbacks = before.rollbacks + 1
        drop_gradients(self.parts.optimizer)
        if rollbacks > self.plan.max_rollbacks:
            raise diverged(trouble, step + 1, before.rollbacks)
        # what went wrong again at once was wrong in the checkpoint already
        found = self._restore(step - 1 if self._just_restored() else None)
        self.state.rollbacks, self.state.skipped_steps = rollbacks, [*before.skipped_steps, step]
        self.state.restarts, self.state.events = before.restarts, before.events
        self.guard.forget()
        where = f"back to step {self.state.step}" if found else "no checkpoint to go back to yet"
        text = (
            f"{trouble} at step {step + 1}: {where}, its batch is left out ({rollbacks} of {self.plan.max_rollbacks})"
        )
        self._happened(IncidentKind.ROLLBACK, step + 1, text)
        self.report.update(rollbacks=rollbacks, global_step=self.state.step)
        self.report.log(text)

    def _just_restored(self) -> bool:
        reference = self.checkpointer.newest
        return bool(self.state.rollbacks) and reference is not None and self.state.step - reference.step <= 1

    def _record(self, loss: float, rate: float, grad_norm: float, tokens: int, seconds: float) -> None:
        """Write a step down and tell about it."""
        state = self.state
        self._recent = [*self._recent[-9:], (seconds, tokens)]
        mean_seconds = sum(item[0] for item in self._recent) / len(self._recent)
        speed = sum(item[1] for item in self._recent) / max(1e-9, sum(item[0] for item in self._recent))
        eta = round(mean_seconds * (self.max_steps - state.step))
        epoch = state.step / (self.inputs.order.steps_per_epoch or self.max_steps)
        record = {"step": state.step, "loss": loss, "learningRate": rate, "gradNorm": grad_norm, "tokens": tokens}
        memory = self.parts.numerics.used_bytes()
        state.history.append({**record, "seconds": round(seconds, 4), "memoryBytes": memory})
        self.tracker.record(
            state.step, {"loss": loss, "learningRate": rate, "gradNorm": grad_norm, "tokensPerSecond": speed}
        )
        self.report.update(
            state=TrainerState.TRAINING,
            message="",
            global_step=state.step,
            max_steps=self.max_steps,
            epoch=round(epoch, 4),
            loss=loss,
            learning_rate=rate,
            grad_norm=grad_norm,
            tokens_per_second=round(speed, 1),
            eta_seconds=eta,
        )
        self.report.phase("firstStep")
        self.report.log(
            f"step {state.step}/{self.max_steps}  epoch {epoch:.2f}  loss {loss:.4f}  lr {rate:.2e}  "
            f"grad {grad_norm:.2f}  {speed:,.0f} tok/s  eta {eta // 60}m{eta % 60:02d}s"
        )

    # ---- evaluation

    def _check_stop(self, part: float) -> None:
        if self.group.sum([self.pod.stop_file.exists()])[0]:
            raise _StopRequested
        self.report.update(message=f"evaluating, {part:.0%}")

    def _evaluate_if_due(self) -> None:
        """Evaluate before the first step, every evalSteps and at the end, unless the state holds that one already."""
        every, step = self.plan.training.eval_steps, self.state.step
        due = step in (0, self.max_steps) or (every is not None and step % every == 0)
        if self.inputs.prepared.eval is None or not due or any(done["step"] == step for done in self.state.evaluations):
            return
        self.report.update(state=TrainerState.EVALUATING, max_steps=self.max_steps)
        found = self._evaluate()
        self.last_evaluation = found
        self.state.evaluations.append({"step": step, **found.metrics})
        self.tracker.evaluation(step, found.metrics)
        self.report.update(state=TrainerState.TRAINING, eval_loss=found.metrics["loss"], message="")
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in found.metrics.items())
        self.report.log(f"evaluation at step {step}: {numbers} ({found.examples} examples)")
        if step == 0:
            with plain_implementation(self.parts.bare):
                sample_before(self)
            self.report.phase("evaluatedBefore")
        else:
            self._note_best(found.metrics)

    def _evaluate(self) -> Evaluation:
        held_out, parts = self.inputs.prepared.eval, self.parts
        assert held_out is not None
        return evaluate(
            self.task,
            parts.wrapped.for_evaluation(),
            held_out,
            held_out.lengths[: self.plan.training.max_eval_samples].tolist(),
            group=self.group,
            autocast=parts.numerics.autocast,
            packed=parts.packed,
            data_rank=parts.wrapped.dp_rank,
            data_ranks=parts.wrapped.dp_size,
            lockstep=parts.wrapped.is_sharded,
            between=self._check_stop,
        )

    def _note_best(self, metrics: dict[str, float]) -> None:
        """Remember the best evaluation, and stop early where no better one has come for long enough."""
        training, state = self.plan.training, self.state
        name = training.metric_for_best_model
        if name not in metrics:
            self.report.log(
                f"warning: spec.training.metricForBestModel {name!r} is none of {', '.join(metrics)}: loss is taken"
            )
            name = "loss"
        value, sign = metrics[name], 1.0 if name in self.task.higher_is_better else -1.0
        stopping = training.early_stopping
        least = float(stopping.min_delta) if stopping else 0.0
        if state.best_metric is None or sign * (value - state.best_metric) > least:
            state.best_metric, state.best_step, state.evaluations_without_improvement = value, state.step, 0
            return
        state.evaluations_without_improvement += 1
        if stopping and self._stopped_early and state.step < self.max_steps:
            text = (
                f"{name} has not improved on {state.best_metric:.4f} (step {state.best_step}) in "
                f"{stopping.patience} evaluations"
            )
            self._happened(IncidentKind.EARLY_STOP, state.step, text)
            self.report.log(f"stopped early: {text}")

    # ---- saving

    def _save(self, *, defer: bool = True, must: bool = False) -> None:
        state = self.state
        if self.parts.scaler is not None:
            state.scaler = dict(self.parts.scaler.state_dict())
        metric = state.best_metric if state.best_step == state.step else None
        cursor = self.inputs.order.cursor(state.step)
        self.checkpointer.save(self.parts.bare, self.parts.optimizer, state, cursor, metric, defer=defer, must=must)

    def _save_if_due(self) -> None:
        """Every everySteps, at the end, and where an evaluation was the best so far; the upload goes on beside."""
        state = self.state
        is_best = self.plan.checkpoint_keep_best and state.best_metric is not None and state.best_step == state.step
        due = state.step % self.plan.checkpoint_every_steps == 0 or self.checkpointer.owed
        if due or is_best or self._is_done():
            self._save(defer=not is_best, must=self._is_done())

    def _save_and_interrupt(self) -> None:
        """Save at this very step, tell the supervisors, and end this process's work."""
        reference = self.checkpointer.wait()
        if self.state.step and (reference is None or reference.step != self.state.step):
            self._save(must=True)
            reference = self.checkpointer.wait()
        self.pod.interrupted_file.write_text(reference.to_json() if reference else "")
        self.tracker.pause()
        raise Interrupted(reference)

    # ---- the end

    def _choose_model(self) -> None:
        """Go back to the model of the best evaluation, where that was asked for and it isn't the last."""
        self.checkpointer.wait()
        state = self.state
        if not self.plan.training.load_best_model_at_end or state.best_metric is None or state.best_step == state.step:
            return
        if self.checkpointer.restore_best(self.parts.bare):
            self.report.log(f"the model of step {state.best_step} is saved: it did best")
            if self.plan.publishes_adapter_only:  # a whole model is evaluated as it was written
                self.last_evaluation = self._evaluate()

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

    def _finish(self) -> RunResult:
        self.report.update(state=TrainerState.SAVING, message="saving the tuned model", eta_seconds=0)
        model, metrics = finish(self, self.metrics())
        steps = self.state.step
        return RunResult(
            model, self.checkpointer.newest, metrics, steps, steps, self.state.restarts, self.dataset_facts
        )
