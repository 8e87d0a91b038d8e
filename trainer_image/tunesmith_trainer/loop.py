"""What every rank does, from top to bottom: set up, resume, train, evaluate, save, export.

Ray Train runs it through `worker`; tests run it without Ray. All ranks pass through the same collectives in the same
order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from tunesmith_api.artifacts import CheckpointManifest
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.reports import CheckpointRef, ModelRef, TrainerState
from tunesmith_api.v1alpha1.method import MethodType
from tunesmith_store.errors import Retryable
from tunesmith_store.files import fetch_file, fetch_model
from tunesmith_store.store import ObjectStore
from tunesmith_trainer import export, order
from tunesmith_trainer.chat import IGNORE
from tunesmith_trainer.checkpoint import Checkpointer, RunState, load_snapshot, restore, take_snapshot
from tunesmith_trainer.data import ChatDataset, collate, encode_rows
from tunesmith_trainer.environment import PodEnvironment
from tunesmith_trainer.errors import Interrupted
from tunesmith_trainer.evaluate import evaluate
from tunesmith_trainer.group import Group
from tunesmith_trainer.lora import add_adapters
from tunesmith_trainer.model import Numerics, load_base, load_tokenizer, pad_id, stored_dtype
from tunesmith_trainer.schedule import lr_at, warmup_steps
from tunesmith_trainer.step import keeps_logits, make_optimizer, train_step

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


class _StopRequested(Exception):
    """Some pod of the group got SIGTERM; known to all ranks at the same point."""


class TrainingRun:
    """One rank's part in one run. `run()` is the whole story."""

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
        self._recent: list[tuple[float, int]] = []

    def run(self) -> RunResult:
        """Train to the end.

        Raises:
            UserError: a retry can't help.
            Retryable: a peer or the store was lost.
            Interrupted: a pod was told to stop; the state is saved.
        """
        self._load()
        self._build()
        self._resume()
        self.wrapped = self.group.wrap(self.model)
        try:
            self._evaluate_if_due()
            while self.state.step < self.max_steps:
                self._step()
                self._save_if_due()
                self._evaluate_if_due()
        except _StopRequested:
            self._save_and_interrupt()
        return self._finish()

    # ---- set-up

    def _load(self) -> None:
        """Fetch model and data (once per pod) and tokenize."""
        plan, folder = self.plan, self.pod.scratch
        self.report.update(state=TrainerState.PREPARING, message="loading model and data")
        self.base = fetch_model(self.store, plan.model_uri, folder / "model")
        self.tokenizer = load_tokenizer(self.base)
        self.train_data = self._encode(plan.train_uri, "train")
        self.eval_data = self._encode(plan.eval_uri, "eval") if plan.eval_uri else None
        training = plan.training
        self.max_steps = order.total_steps(
            len(self.train_data), training.global_batch_size, training.num_train_epochs, training.max_steps
        )
        self.report.phase("dataLoaded")

    def _encode(self, uri: str, name: str) -> ChatDataset:
        path = fetch_file(self.store, uri, self.pod.scratch / "data" / name)
        column, longest = self.plan.messages_column, self.plan.training.max_length
        data = encode_rows(path, self.tokenizer, column=column, uri=uri, max_length=longest)
        cut = f", {data.truncated} cut at maxLength {longest}" if data.truncated else ""
        lost = f", {data.skipped} left out (nothing of the assistant left after the cut)" if data.skipped else ""
        self.report.log(f"{name}: {len(data)} examples from {uri}{cut}{lost}")
        return data

    def _build(self) -> None:
        """Make model and optimizer, the same on every rank."""
        plan, training = self.plan, self.plan.training
        self.numerics = Numerics.choose(training.precision, plan.gpus_per_worker)
        torch.manual_seed(training.seed)
        model = load_base(self.base, self.numerics.weights_dtype(plan.method, stored_dtype(self.base)))
        self.keep = keeps_logits(model)
        if plan.method is MethodType.LORA:
            if plan.lora is None:
                raise ValueError("plan.lora is missing for method LoRA")
            model = add_adapters(model, plan.lora, training.seed)
        self.model: nn.Module = model.to(self.numerics.device).train()
        self.optimizer = make_optimizer(
            self.model.named_parameters(),
            weight_decay=training.weight_decay,
            betas=(training.adam_beta1, training.adam_beta2),
            epsilon=training.adam_epsilon,
        )
        self.pad = pad_id(self.tokenizer)
        self.warmup = warmup_steps(self.max_steps, training.warmup_ratio)
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in self.model.parameters())
        self.report.log(
            f"{plan.method}: {trained:,} of {total:,} parameters are trained ({trained / total:.2%}), "
            f"{'bf16' if self.numerics.bf16 else 'fp32'} on {self.numerics.device}, {self.group.world_size} worker(s)"
        )
        self.report.phase("modelLoaded")

    def _resume(self) -> None:
        """Go on from the newest complete checkpoint of this run; rank 0 decides which one that is."""
        self.checkpointer = Checkpointer(
            store=self.store,
            uri=self.plan.checkpoint_uri,
            folder=self.pod.scratch / "checkpoints" / f"rank-{self.group.rank}-{os.getpid()}",
            run_digest=self.run_digest,
            keep_last=self.plan.checkpoint_keep_last,
            describe={
                "max_steps": self.max_steps,
                "seed": self.plan.training.seed,
                "world_size": self.group.world_size,
                "attempt": self.plan.attempt,
            },
            saved=self._saved,
            log=self.report.log,
        )
        found = self.checkpointer.fetch_newest() if self.group.rank == 0 else None
        text = self.group.from_first(found[0].to_json() if found else None)
        if text is None:
            return
        manifest = CheckpointManifest.from_json(text)
        folder = found[1] if found else self.checkpointer.fetch(manifest)
        if folder is None:
            raise Retryable(f"checkpoint of step {manifest.step} vanished while it was read")
        snapshot = load_snapshot(folder)
        restore(snapshot, self.model, self.optimizer)
        self.state = snapshot.state
        self.state.restarts += 1
        reference = self.checkpointer.newest
        self.report.update(restarts=self.state.restarts, global_step=self.state.step, checkpoint=reference)
        self.report.log(f"resumed from step {self.state.step} of {reference.uri if reference else ''}")

    def _saved(self, reference: CheckpointRef) -> None:
        self.report.update(checkpoint=reference)
        self.report.log(f"checkpoint of step {reference.step} saved to {reference.uri}")

    # ---- training

    def _step(self) -> None:
        """Take one optimizer step, unless some pod has been told to stop."""
        training, group, step = self.plan.training, self.group, self.state.step
        began = time.monotonic()
        indices = order.global_batch(
            step, examples=len(self.train_data), global_batch_size=training.global_batch_size, seed=training.seed
        )
        share = [self.train_data.examples[index] for index in order.share_of(indices, group.rank, group.world_size)]
        own_tokens = sum(example.trained_tokens for example in share)
        own_inputs = sum(len(example.input_ids) for example in share)
        tokens, inputs, stop = group.sum([own_tokens, own_inputs, self.pod.stop_file.exists()])
        if stop:
            raise _StopRequested
        share.sort(key=lambda example: len(example.input_ids))  # equal lengths together: less padding
        parts = order.micro_batches(share, training.micro_batch_size)
        batches = [collate(part, self.pad, self.numerics.device) for part in parts]
        if not batches:  # a small last batch may leave this rank without an example, but not out of the reduction
            idle = collate([self.train_data.examples[0]], self.pad, self.numerics.device)
            idle.labels.fill_(IGNORE)
            batches = [idle]
        torch.manual_seed(order.step_seed(training.seed, step, group.rank))
        rate = lr_at(
            step,
            peak=training.learning_rate,
            max_steps=self.max_steps,
            warmup=self.warmup,
            kind=training.lr_scheduler_type,
        )
        result = train_step(
            self.wrapped,
            self.optimizer,
            batches,
            global_tokens=int(tokens),
            world_size=group.world_size,
            learning_rate=rate,
            max_grad_norm=training.max_grad_norm,
            keep=self.keep,
            autocast=self.numerics.autocast(),
        )
        self.state.step += 1
        self.state.tokens += int(inputs)
        if self.state.step == 1 or self.state.step % training.logging_steps == 0 or self.state.step == self.max_steps:
            loss = group.sum([result.nll_sum])[0] / tokens
            self._record(loss, rate, result.grad_norm, int(inputs), time.monotonic() - began)
        self.state.train_seconds += time.monotonic() - began
        self.after_step(self.state.step)

    def _record(self, loss: float, rate: float, grad_norm: float, inputs: int, seconds: float) -> None:
        """Write a step down and tell about it."""
        state, training = self.state, self.plan.training
        self._recent = [*self._recent[-9:], (seconds, inputs)]
        mean_seconds = sum(item[0] for item in self._recent) / len(self._recent)
        speed = sum(item[1] for item in self._recent) / max(1e-9, sum(item[0] for item in self._recent))
        eta = round(mean_seconds * (self.max_steps - state.step))
        epoch = state.step / order.steps_per_epoch(len(self.train_data), training.global_batch_size)
        record = {"step": state.step, "loss": loss, "learningRate": rate, "gradNorm": grad_norm, "tokens": inputs}
        state.history.append({**record, "seconds": round(seconds, 4)})
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

    def _check_stop(self, part: float) -> None:
        if self.group.sum([self.pod.stop_file.exists()])[0]:
            raise _StopRequested
        self.report.update(message=f"evaluating, {part:.0%}")

    def _evaluate_if_due(self) -> None:
        """Evaluate before the first step, every evalSteps and at the end, unless the state holds that one already."""
        every, step = self.plan.training.eval_steps, self.state.step
        due = step in (0, self.max_steps) or (every is not None and step % every == 0)
        if self.eval_data is None or not due or any(done["step"] == step for done in self.state.evaluations):
            return
        self.report.update(state=TrainerState.EVALUATING, max_steps=self.max_steps)
        result = evaluate(
            self.model,
            self.eval_data.examples,
            group=self.group,
            numerics=self.numerics,
            micro_batch_size=self.plan.training.micro_batch_size,
            pad_id=self.pad,
            keep=self.keep,
            between=self._check_stop,
        )
        self.state.evaluations.append(
            {
                "step": step,
                "loss": result.loss,
                "tokenAccuracy": result.token_accuracy,
                "exactMatch": result.exact_match,
            }
        )
        self.report.update(state=TrainerState.TRAINING, eval_loss=result.loss, message="")
        self.report.log(
            f"evaluation at step {step}: loss {result.loss:.4f}, token accuracy {result.token_accuracy:.1%}, "
            f"exact match {result.exact_match:.1%} of {result.examples} examples"
        )
        if step == 0:
            self.report.phase("evaluatedBefore")

    # ---- saving

    def _save(self) -> None:
        training = self.plan.training
        cursor = order.cursor_at(
            self.state.step, examples=len(self.train_data), global_batch_size=training.global_batch_size
        )
        self.checkpointer.save(take_snapshot(self.model, self.optimizer, self.state), cursor)

    def _save_if_due(self) -> None:
        """Rank 0 alone: the ranks are replicas. The upload goes on beside training."""
        if self.group.rank != 0:
            return
        self.checkpointer.check()
        if self.state.step % self.plan.checkpoint_every_steps == 0 or self.state.step == self.max_steps:
            self._save()

    def _save_and_interrupt(self) -> None:
        """Save at this very step, tell the supervisors, and end this process's work."""
        reference = None
        if self.group.rank == 0:
            reference = self.checkpointer.wait()
            if self.state.step and (reference is None or reference.step != self.state.step):
                self._save()
                reference = self.checkpointer.wait()
        reference = self.group.from_first(reference)  # and so all ranks wait until it is saved
        self.pod.interrupted_file.write_text(reference.to_json() if reference else "")
        raise Interrupted(reference)

    def _metrics(self) -> dict[str, float]:
        """The job's final metrics. trainLoss is the mean of the last ten records."""
        state = self.state
        last = [record["loss"] for record in state.history[-10:]]
        metrics = {
            "steps": float(state.step),
            "trainSeconds": round(state.train_seconds, 1),
            "tokensPerSecond": round(state.tokens / max(1e-9, state.train_seconds), 1),
        }
        if last:
            metrics["trainLoss"] = sum(last) / len(last)
        names = {"evalLoss": "loss", "evalTokenAccuracy": "tokenAccuracy", "evalExactMatch": "exactMatch"}
        for record in state.evaluations:
            suffix = "Before" if record["step"] == 0 else "" if record["step"] == self.max_steps else None
            if suffix is not None:
                metrics |= {name + suffix: record[key] for name, key in names.items()}
        return metrics

    def _finish(self) -> RunResult:
        """Rank 0 exports while the others wait; all return the same result."""
        model = None
        if self.group.rank == 0:
            self.checkpointer.wait()
            self.report.update(state=TrainerState.SAVING, message="saving the tuned model", eta_seconds=0)
            metrics, state = self._metrics(), self.state
            described = export.Export(self.plan, self.run_digest, self.base, metrics, state.history, state.evaluations)
            folder = self.pod.scratch / "export"
            export.write_model(self.model, self.tokenizer, folder, described)
            model = export.publish(self.store, folder, described)
            self.report.log(f"model saved to {model.uri} ({model.size_bytes / 1e6:.0f} MB)")
        model = self.group.from_first(model)
        return RunResult(
            model, self.checkpointer.newest, self._metrics(), self.state.step, self.max_steps, self.state.restarts
        )
