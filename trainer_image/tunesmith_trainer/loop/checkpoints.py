"""When a run saves, where it goes on, and what of its state goes with a checkpoint. Called by `run` and `rollback`.

How checkpoints are written and read is `checkpoint`'s part.
"""

from __future__ import annotations

from tunesmith_api.reports import CheckpointRef
from tunesmith_trainer.checkpoint import Checkpointer
from tunesmith_trainer.errors import Interrupted
from tunesmith_trainer.loop.assembly import Assembly
from tunesmith_trainer.loop.context import RunContext
from tunesmith_trainer.loop.history import History
from tunesmith_trainer.loop.inputs import Inputs
from tunesmith_trainer.loop.output_folder import check_lease
from tunesmith_trainer.report.record import IncidentKind

__all__ = ["RunCheckpoints"]


class RunCheckpoints:
    """The checkpoints of one run. All ranks call all methods, in the same order."""

    def __init__(self, context: RunContext, inputs: Inputs, parts: Assembly, history: History) -> None:
        plan, pod = self.plan, self.pod = context.plan, context.pod
        self.inputs, self.parts, self.history = inputs, parts, history
        self.checkpointer = Checkpointer(
            store=context.store,
            uri=plan.checkpoint_uri,
            folder=pod.scratch / "checkpoints",
            ranks_per_pod=pod.processes,
            run_digest=context.run_digest,
            keep_last=plan.checkpoint_keep_last,
            keep_best=plan.checkpoint_keep_best and plan.dataset.is_evaluated,
            higher_is_better=plan.training.metric_for_best_model in inputs.task.higher_is_better,
            describe={"max_steps": inputs.max_steps, "seed": plan.training.seed, "attempt": plan.attempt},
            group=context.group,
            held=lambda: check_lease(context.store, plan, plan.checkpoint_uri, "spec.checkpoint.uri"),
            saved=self._saved,
            log=history.report.log,
        )

    @property
    def newest(self) -> CheckpointRef | None:
        """The newest complete checkpoint, after waiting and restoring the same on all ranks."""
        return self.checkpointer.newest

    def _saved(self, reference: CheckpointRef) -> None:
        self.history.report.update(checkpoint=reference)
        self.history.report.log(f"checkpoint of step {reference.step} saved to {reference.uri}")

    # ---- going on

    def resume(self) -> None:
        """Go on from the newest complete checkpoint of this run, where there is one."""
        if not self.restore():
            return
        history, reference = self.history, self.newest
        history.state.restarts += 1
        history.report.update(
            restarts=history.state.restarts,
            global_step=history.state.step,
            checkpoint=reference,
            dataset=history.dataset_facts,
        )
        text = f"resumed from step {history.state.step}"
        history.happened(IncidentKind.RESTART, history.state.step, text)
        history.report.log(f"{text} of {reference.uri if reference else ''}")

    def restore(self, before: int | None = None) -> bool:
        """Put the newest good checkpoint, if there is one, into model, optimizer and state."""
        found = self.checkpointer.restore(self.parts.bare, self.parts.optimizer, before)
        if found is None:
            return False
        if self.parts.scaler is not None and found.scaler:
            self.parts.scaler.load_state_dict(dict(found.scaler))
        self.history.go_back_to(found)
        return True

    def restore_best(self) -> bool:
        """Put the weights of the best evaluation back, where that was asked for and it isn't the last one's."""
        self.checkpointer.wait()
        state = self.history.state
        if not self.plan.training.load_best_model_at_end or state.best_metric is None or state.best_step == state.step:
            return False
        if self.checkpointer.restore_best(self.parts.bare) is None:
            return False
        self.history.report.log(f"the model of step {state.best_step} is saved: it did best")
        return True

    # ---- saving

    def _save(self, *, defer: bool = True, must: bool = False) -> None:
        state = self.history.state
        if self.parts.scaler is not None:
            state.scaler = dict(self.parts.scaler.state_dict())
        metric = state.best_metric if state.best_step == state.step else None
        cursor = self.inputs.order.cursor(state.step)
        self.checkpointer.save(self.parts.bare, self.parts.optimizer, state, cursor, metric, defer=defer, must=must)

    def save_if_due(self, last: bool) -> None:
        """Every everySteps, at the end, and where an evaluation was the best so far; the upload goes on beside."""
        state = self.history.state
        is_best = self.plan.checkpoint_keep_best and state.best_metric is not None and state.best_step == state.step
        due = state.step % self.plan.checkpoint_every_steps == 0 or self.checkpointer.owed
        if due or is_best or last:
            self._save(defer=not is_best, must=last)

    def save_and_interrupt(self) -> None:
        """Save at this very step, tell the supervisors, and end this process's work.

        Raises:
            Interrupted: always.
        """
        reference, step = self.checkpointer.wait(), self.history.state.step
        if step and (reference is None or reference.step != step):
            self._save(must=True)
            reference = self.checkpointer.wait()
        self.pod.interrupted_file.write_text(reference.to_json() if reference else "")
        self.history.tracker.pause()
        raise Interrupted(reference)
