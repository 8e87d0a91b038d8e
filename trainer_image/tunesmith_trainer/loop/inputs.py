"""What a run trains on: the base model's folder, the task, the data and their order. Called by `run` on every rank."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.task import Task as TaskName
from tunesmith_store.store import ObjectStore
from tunesmith_trainer.data import Prepared, prepare
from tunesmith_trainer.data.order import SetOrder, TrainingOrder, total_steps
from tunesmith_trainer.distributed.collectives import Group
from tunesmith_trainer.models.files import fetch_base
from tunesmith_trainer.models.limits import check_positions, check_tokens
from tunesmith_trainer.tasks import task_for
from tunesmith_trainer.tasks.base import Batch, Row, Task

__all__ = ["Inputs", "load_inputs"]

Log = Callable[..., None]
SAMPLES = 3
PREPARING = "preparing"


@dataclass(frozen=True)
class Inputs:
    """Model folder and data of a run."""

    base: Path
    task: Task
    data: Prepared
    order: TrainingOrder
    max_steps: int

    @property
    def sample_rows(self) -> list[Row]:
        """The held-out rows whose prompts the report shows, with the model's answers."""
        held_out = self.data.eval
        return [] if held_out is None else [held_out.row(index) for index in range(min(SAMPLES, len(held_out)))]

    def first_batches(self) -> Sequence[Batch]:
        """Return a few training batches on the CPU: pruning by layers measures with them."""
        examples = self.order.share(0, 0, 1)[:8]
        return [self.task.collate([example], torch.device("cpu"), False) for example in examples]


def _check_fit(config: Mapping[str, Any], task: Task, data: Prepared) -> None:
    """Check that the model has weights for all that the data holds; what is streamed isn't known yet.

    Raises:
        UserError: it hasn't.
    """
    if task.plan.task is TaskName.IMAGE_CLASSIFICATION:
        return
    sets = [found for found in (data.statistics.train, data.statistics.eval) if found is not None]
    tokenizer = getattr(task.processor, "tokenizer", task.processor)
    is_padded = not (task.plan.training.packing and task.supports_packing)
    check_tokens(config, tokenizer, max((found.largest_token for found in sets), default=0), is_padded=is_padded)
    check_positions(config, max((found.longest for found in sets), default=0))


def load_inputs(plan: TrainingPlan, scratch: Path, group: Group, store: ObjectStore, log: Log) -> Inputs:
    """Fetch model and data (once per pod) and encode the data.

    Raises:
        UserError: the model or the data can't be used.
        Retryable: the store can't be reached.
    """
    base = fetch_base(plan, store, scratch)
    config = json.loads((base / "config.json").read_text())
    task = task_for(plan, config)
    task.load_processor(base)
    if 0 < group.rank < group.local_world_size:
        # rank 0 is in this pod: it goes first, as it tells people how far it is, and writes the cache
        group.await_mark(PREPARING)
    begun = partial(group.mark, PREPARING) if group.rank == 0 else lambda: None
    found = prepare(plan, task, store, scratch, writer=group.rank == 0, log=log, begun=begun)
    _check_fit(config, task, found)
    training = plan.training
    if found.stream is not None:
        order: TrainingOrder = found.stream
        assert training.max_steps is not None
        return Inputs(base, task, found, order, training.max_steps)
    order = SetOrder(found.train, training.global_batch_size, training.seed)
    steps = total_steps(len(found.train), training.global_batch_size, training.num_train_epochs, training.max_steps)
    return Inputs(base, task, found, order, steps)
