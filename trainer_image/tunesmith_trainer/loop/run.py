"""What every rank does, from top to bottom: set up, resume, train, evaluate, save, finish.

Ray Train runs it through `group.worker`; tests run it without Ray. All ranks pass through the same collectives in the
same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from tunesmith_api.plan import TrainingPlan
from tunesmith_api.reports import CheckpointRef, DatasetFacts, ModelRef, TrainerState
from tunesmith_store.errors import UserError
from tunesmith_store.store import ObjectStore
from tunesmith_trainer.distributed.collectives import Group
from tunesmith_trainer.errors import StopRequested
from tunesmith_trainer.loop.assembly import Assembly, assemble
from tunesmith_trainer.loop.batches import StepShare, share_of_step
from tunesmith_trainer.loop.checkpoints import RunCheckpoints
from tunesmith_trainer.loop.context import RunContext
from tunesmith_trainer.loop.evaluation import Evaluator
from tunesmith_trainer.loop.finish import FinishedRun, finish
from tunesmith_trainer.loop.guards import Rollback
from tunesmith_trainer.loop.history import History, Reporter, SilentReporter, StepRecord
from tunesmith_trainer.loop.inputs import Inputs, load_inputs
from tunesmith_trainer.loop.schedule import lr_at
from tunesmith_trainer.loop.step import clipped_norm, compute_gradients, drop_gradients, take_step
from tunesmith_trainer.loop.tracking import Tracker
from tunesmith_trainer.models.attention import packed_implementation
from tunesmith_trainer.pod.environment import PodEnvironment

__all__ = ["RunResult", "TrainingRun"]


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


@dataclass(frozen=True)
class _Agreed:
    """What the ranks know of a step together before they compute it."""

    units: float
    tokens: int
    rows_left_out: int


class TrainingRun:
    """One rank's part in one run. `run()` is the whole story."""

    inputs: Inputs
    parts: Assembly
    checkpoints: RunCheckpoints
    evaluator: Evaluator
    rollback: Rollback

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
        self.context = RunContext(plan, pod, group, store, run_digest)
        self.plan, self.pod, self.group = plan, pod, group
        self.report: Reporter = reporter if reporter is not None and group.rank == 0 else SilentReporter()
        self.history = History(plan, self.report)
        self.after_step = after_step

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
            self.checkpoints.resume()
            try:
                with packed_implementation(self.parts.bare, self.parts.packed):
                    self._train()
                    if self.checkpoints.restore_best() and self.plan.publishes_adapter_only:
                        self.evaluator.evaluate()  # a whole model is evaluated as it was written
            except StopRequested:
                self.checkpoints.save_and_interrupt()
            except UserError:
                self.history.tracker.finish({}, failed=True)
                raise
            return self._finish()

    def _set_up(self) -> None:
        plan, store, scratch = self.plan, self.context.store, self.pod.scratch
        report, history = self.report, self.history
        report.update(state=TrainerState.PREPARING, message="loading model and data")
        inputs = self.inputs = load_inputs(plan, scratch, self.group, store, report.log)
        history.begin(inputs.data.facts, inputs.max_steps, inputs.order.steps_per_epoch)
        report.phase("dataLoaded")
        parts = self.parts = assemble(plan, inputs, self.group, store, scratch, report.log)
        report.phase("modelLoaded")
        if self.group.rank == 0:
            history.tracker = Tracker.open(plan, scratch / "tensorboard", self.context.run_digest, report.log)
        self.checkpoints = RunCheckpoints(self.context, inputs, parts, history)
        self.evaluator = Evaluator(self.context, inputs, parts, history, self._check_stop)
        self.rollback = Rollback(plan, self.checkpoints, history)

    def _train(self) -> None:
        self.evaluator.evaluate_if_due()
        while not self._is_done:
            self._step()
            self.evaluator.evaluate_if_due()
            self.checkpoints.save_if_due(last=self._is_done)

    @property
    def _is_done(self) -> bool:
        return self.evaluator.stopped_early or self.history.state.step >= self.inputs.max_steps

    def _step(self) -> None:
        """Take one optimizer step, unless some pod has been told to stop or the step turns out bad."""
        plan, parts, history, state = self.plan, self.parts, self.history, self.history.state
        if state.step in state.skipped_steps:
            state.step += 1
            return
        began = time.monotonic()
        share = share_of_step(state.step, self.context, self.inputs, parts)
        agreed = self._agree(share)
        gradients = compute_gradients(
            parts.wrapped,
            share.batches,
            parts.loss,
            global_units=agreed.units,
            idle=share.idle,
            autocast=parts.numerics.autocast,
            scaler=parts.scaler,
        )
        loss = self.group.sum([gradients.loss_sum])[0] / parts.wrapped.ranks_per_replica / max(agreed.units, 1e-12)
        norm = clipped_norm(parts.wrapped, parts.optimizer, plan.training.max_grad_norm, parts.scaler)
        if problem := self.rollback.problem(loss, norm if parts.scaler is None else 0.0):
            drop_gradients(parts.optimizer)
            self.rollback.go_back(problem)
            return
        rate = lr_at(state.step, plan.training, self.inputs.max_steps)
        take_step(parts.wrapped, parts.optimizer, learning_rate=rate, scaler=parts.scaler)
        state.step += 1
        state.tokens += agreed.tokens
        if agreed.rows_left_out:  # all ranks know that there were some
            first = next(filter(None, self.group.exchange(share.left_out.first)), "")
            history.left_out(agreed.rows_left_out, first)
        if history.is_logging_due:
            seconds = time.monotonic() - began
            history.record(StepRecord(loss, rate, norm, agreed.tokens, seconds, parts.numerics.used_bytes()))
        state.train_seconds += time.monotonic() - began
        self.after_step(state.step)

    def _agree(self, share: StepShare) -> _Agreed:
        """Add up over all ranks what each knows of the step; commit the checkpoint in flight by the same sum.

        Raises:
            StopRequested: some pod has been told to stop.
        """
        checkpointer, shared = self.checkpoints.checkpointer, self.parts.wrapped.ranks_per_replica
        stop, ready = self.pod.stop_file.exists(), checkpointer.ready
        found = self.group.sum([share.units, share.tokens, stop, ready, share.left_out.count])
        checkpointer.note_ready(found[3])
        if found[2]:
            raise StopRequested
        return _Agreed(found[0] / shared, int(found[1] / shared), int(found[4] / shared))

    def _check_stop(self) -> None:
        if self.group.sum([self.pod.stop_file.exists()])[0]:
            raise StopRequested

    def _finish(self) -> RunResult:
        self.report.update(state=TrainerState.SAVING, message="saving the tuned model", eta_seconds=0)
        history, newest = self.history, self.checkpoints.newest
        finished = FinishedRun(
            context=self.context,
            inputs=self.inputs,
            parts=self.parts,
            state=history.state,
            dataset=history.dataset_facts,
            metrics=history.metrics(),
            evaluation=self.evaluator.last,
            saved_step=history.saved_step,
            checkpoint=newest,
        )
        published = finish(finished, history.tracker, self.report)
        steps, restarts = history.state.step, history.state.restarts
        return RunResult(published.model, newest, published.metrics, steps, steps, restarts, history.dataset_facts)
