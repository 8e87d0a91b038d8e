"""Held-out evaluation of any task: when it is due, what it found, which was the best. Called by `run`.

The examples are shared over the ranks, and what the task adds up is added up: the numbers don't depend
on how many ranks there are.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tunesmith_api.reports import TrainerState
from tunesmith_trainer.data.order import Examples, micro_batches, share_of
from tunesmith_trainer.distributed.collectives import Group
from tunesmith_trainer.loop.assembly import Assembly
from tunesmith_trainer.loop.context import RunContext
from tunesmith_trainer.loop.history import History
from tunesmith_trainer.loop.inputs import Inputs
from tunesmith_trainer.models.attention import plain_implementation
from tunesmith_trainer.report.record import IncidentKind
from tunesmith_trainer.report.samples import sample
from tunesmith_trainer.tasks.base import Assessment, Example, Task

__all__ = ["Evaluation", "Evaluator", "answers_of", "evaluate", "evaluate_held_out", "sampled"]

WORST = 16
"""Examples that the report can show as those the model got most wrong."""
SAMPLE_SECONDS = 20.0
"""For all answers to the report's prompts together."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of all held-out examples."""

    metrics: dict[str, float]
    assessment: Assessment
    """Of all ranks; its outcomes are the WORST ones, worst first."""
    examples: int


def _added(left: Assessment, right: Assessment) -> Assessment:
    sums = right.sums
    if left.sums:
        sums = {
            name: [a + b for a, b in zip(values, right.sums[name], strict=True)] for name, values in left.sums.items()
        }
    outcomes = heapq.nlargest(WORST, [*left.outcomes, *right.outcomes], key=lambda outcome: outcome.loss)
    return Assessment(sums, outcomes, [*left.texts, *right.texts])


@dataclass(frozen=True)
class _Place:
    """A held-out example that isn't loaded yet."""

    index: int
    length: int


def _load(examples: Examples, places: Sequence[_Place]) -> list[Example]:
    found = ((place.index, examples.get(place.index)) for place in places)
    return [replace(example, features={**example.features, "index": index}) for index, example in found]


def evaluate(
    task: Task,
    model: nn.Module,
    examples: Examples,
    lengths: Sequence[int],
    *,
    group: Group,
    autocast: Callable[[], AbstractContextManager[Any] | None],
    packed: bool,
    data_rank: int,
    data_ranks: int,
    lockstep: bool,
    between: Callable[[float], None] = lambda part: None,
    indices: Sequence[int] | None = None,
) -> Evaluation:
    """Evaluate a model on all ranks together.

    `lengths` are those of the examples to evaluate, `indices` their places in the set; left out: from the first. Ranks
    with the same `data_rank` (of `data_ranks`) share a model's layers and see the same examples. `lockstep`: the ranks
    share out the model, so all have to run it equally often. `between` is called on all ranks equally often, after
    every micro-batch, with the part that is done; it may raise to stop.
    """
    numbers = range(len(lengths)) if indices is None else indices
    places = sorted(map(_Place, numbers, lengths), key=lambda place: place.length)
    share = share_of(places, data_rank, data_ranks)  # shortest first, as training's micro-batches are cut
    batches = micro_batches(share, task.plan.training.micro_batch_size, task.longest, packed)
    rounds = int(group.max([float(len(batches))])[0])
    total = Assessment({})
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for number in range(rounds):
                idle = number >= len(batches)
                if not idle or lockstep:
                    loaded = _load(examples, batches[number] if not idle else places[:1])
                    with autocast() or nullcontext():
                        found = task.assess(model, task.collate(loaded, group.device, packed))
                    total = total if idle else _added(total, found)
                between((number + 1) / rounds)
    finally:
        model.train(was_training)
    whole = Assessment({})
    # one of those that see the same examples speaks for them
    parts = group.all_gather((data_rank, total))
    for _, part in {rank: (rank, part) for rank, part in parts}.values():
        whole = _added(whole, part) if part.sums else whole
    return Evaluation(task.metrics(whole), whole, len(lengths))


def sampled(count: int, most: int | None, seed: int) -> list[int]:
    """Return the places of the held-out examples that are evaluated, drawn from the seed where they are too many.

    Not the first ones: data that is sorted by its classes has one class there.
    """
    if most is None or most >= count:
        return list(range(count))
    return sorted(random.Random(f"tunesmith-eval:{seed}").sample(range(count), most))


def evaluate_held_out(
    context: RunContext, inputs: Inputs, parts: Assembly, model: nn.Module, task: Task, between: Callable[[float], None]
) -> Evaluation:
    """Evaluate a model that is spread over the ranks as `parts` is, on all held-out examples; see `evaluate`."""
    held_out = inputs.data.eval
    assert held_out is not None
    indices = sampled(len(held_out), context.plan.training.max_eval_samples, context.plan.training.seed)
    return evaluate(
        task,
        model,
        held_out,
        held_out.lengths[indices].tolist(),
        group=context.group,
        autocast=parts.numerics.autocast,
        packed=parts.packed,
        data_rank=parts.wrapped.dp_rank,
        data_ranks=parts.wrapped.dp_size,
        lockstep=parts.wrapped.is_sharded,
        between=between,
        indices=indices,
    )


def answers_of(
    context: RunContext, inputs: Inputs, parts: Assembly, model: nn.Module, task: Task, log: Callable[[str], None]
) -> list[str]:
    """Ask such a model a few held-out questions: on rank 0, or on all ranks where they share it out."""
    rows, group = inputs.sample_rows, context.group if parts.wrapped.is_sharded else None
    if not rows or (context.group.rank and group is None):
        return []
    return sample(model, task, rows, budget_seconds=SAMPLE_SECONDS, group=group, log=log)


class Evaluator:
    """Evaluates a run's model on its held-out data. All ranks call all methods, in the same order."""

    def __init__(
        self,
        context: RunContext,
        inputs: Inputs,
        parts: Assembly,
        history: History,
        check_stop: Callable[[], None],
    ) -> None:
        """`check_stop` is called on all ranks after every micro-batch; it may raise to stop."""
        self.context, self.plan = context, context.plan
        self.inputs, self.parts, self.history = inputs, parts, history
        self._check_stop = check_stop
        self.last: Evaluation | None = None
        """Of the model as it is now, unless steps have been taken since."""

    @property
    def stopped_early(self) -> bool:
        """Whether no better evaluation has come for as long as `earlyStopping` waits."""
        stopping = self.plan.training.early_stopping
        return stopping is not None and self.history.state.evaluations_without_improvement >= stopping.patience

    def evaluate_if_due(self) -> None:
        """Evaluate before the first step, every evalSteps and at the end, unless the state holds that one already."""
        history, step, every = self.history, self.history.state.step, self.plan.training.eval_steps
        due = step in (0, history.max_steps) or (every is not None and step % every == 0)
        if self.inputs.data.eval is None or not due or any(done["step"] == step for done in history.state.evaluations):
            return
        history.report.update(state=TrainerState.EVALUATING, max_steps=history.max_steps)
        found = self.evaluate()
        history.state.evaluations.append({"step": step, **found.metrics})
        history.tracker.evaluation(step, found.metrics)
        history.report.update(state=TrainerState.TRAINING, eval_loss=found.metrics["loss"], message="")
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in found.metrics.items())
        history.report.log(f"evaluation at step {step}: {numbers} ({found.examples} examples)")
        if step == 0:
            with plain_implementation(self.parts.bare):
                history.state.samples_before = answers_of(
                    self.context, self.inputs, self.parts, self.parts.bare, self.inputs.task, history.report.log
                )
            history.report.phase("evaluatedBefore")
        else:
            self._note_best(found.metrics)

    def evaluate(self) -> Evaluation:
        """Evaluate the model as it is now, on all held-out examples."""
        model, task = self.parts.wrapped.for_evaluation(), self.inputs.task
        self.last = evaluate_held_out(self.context, self.inputs, self.parts, model, task, self._between)
        return self.last

    def _between(self, part: float) -> None:
        self._check_stop()
        self.history.report.update(message=f"evaluating, {part:.0%}")

    def _note_best(self, metrics: dict[str, float]) -> None:
        """Remember the best evaluation, and stop early where no better one has come for long enough."""
        training, history, state = self.plan.training, self.history, self.history.state
        name = training.metric_for_best_model
        if name not in metrics:
            history.report.log(
                f"warning: spec.training.metricForBestModel {name!r} is none of {', '.join(metrics)}: loss is taken"
            )
            name = "loss"
        value, sign = metrics[name], 1.0 if name in self.inputs.task.higher_is_better else -1.0
        stopping = training.early_stopping
        least = stopping.min_delta if stopping else 0.0
        if state.best_metric is None or math.isnan(state.best_metric) or sign * (value - state.best_metric) > least:
            state.best_metric, state.best_step, state.evaluations_without_improvement = value, state.step, 0
            return
        state.evaluations_without_improvement += 1
        if stopping and self.stopped_early and state.step < history.max_steps:
            text = (
                f"{name} has not improved on {state.best_metric:.4f} (step {state.best_step}) in "
                f"{stopping.patience} evaluations"
            )
            history.happened(IncidentKind.EARLY_STOP, state.step, text)
            history.report.log(f"stopped early: {text}")
