"""The model that a run publishes: the number format of its files, and the model that they hold, read back.

Training moves float32 weights, or adapters beside the base. Rounded to the 16 bits that most bases are stored in, an
update smaller than half of a weight's last bit is gone. So the format is chosen by what rounding takes away, and what a
run reports is measured on the files (docs/adr/0013-published-is-measured.md). Called by `finish`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tunesmith_api.artifacts import FileEntry
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.finetunejob import Init
from tunesmith_api.v1alpha1.training import Precision, Strategy
from tunesmith_store.errors import Retryable
from tunesmith_store.files import locked, verify
from tunesmith_store.store import ObjectStore
from tunesmith_trainer import methods
from tunesmith_trainer.distributed import parallel
from tunesmith_trainer.distributed.collectives import Group
from tunesmith_trainer.models.loading import new_modules, stored_dtype
from tunesmith_trainer.models.numerics import Numerics, dtype_of
from tunesmith_trainer.tasks.base import Task
from tunesmith_trainer.tasks.dpo import DPO

__all__ = ["MOST_LOST", "Format", "choose_format", "fetch_files", "lost_share", "read_back", "reader_of", "release"]

MOST_LOST = 0.05
"""Share of the update that rounding may take before Auto writes float32 in place of the base's 16 bits."""


@dataclass(frozen=True)
class Format:
    """The number format of the published files."""

    dtype: torch.dtype
    rounded: torch.dtype
    """What was asked for, or the base's format: what the share is about."""
    lost: float
    """Share of the update that rounding to `rounded` takes, or would have taken; infinite where numbers overflow."""

    @property
    def name(self) -> str:
        """For people."""
        return _name(self.dtype)

    def rounding(self) -> str:
        """Say what rounding costs in weights; "" where it costs nothing."""
        if not self.lost:
            return ""
        share = f"{self.lost:.1%} of what training changed" if math.isfinite(self.lost) else "some weights altogether"
        if self.dtype is self.rounded:
            return f"the files hold {self.name}: rounding to it takes {share}"
        return f"the files hold {self.name}: rounding to {_name(self.rounded)} would take {share} (spec.output.dtype)"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def reader_of(task: Task) -> Task:
    """Return the task as one that reads weights from a folder, never draws them; the run's own stays as it is."""
    reader = copy.copy(task)
    reader.plan = task.plan.model_copy(update={"model_init": Init.PRETRAINED})
    return reader


# ---- writing


def choose_format(
    model: nn.Module, plan: TrainingPlan, base: Path, task: Task, removed_layers: Sequence[int] = ()
) -> Format:
    """Decide how a finished model (float32) is written.

    Asked for Auto, that is the base's own format, or float32 where rounding takes more than MOST_LOST of the update.
    Any other format is obeyed, if its range holds the weights.
    """
    asked, stored = plan.output_dtype, stored_dtype(base)
    rounded = stored if asked is Precision.AUTO else dtype_of(asked)
    if rounded is torch.float32:
        return Format(rounded, rounded, 0.0)
    start: nn.Module | None = None
    if plan.model_init is Init.PRETRAINED:
        # in the format of the files, weights are read where they lie
        start = reader_of(task).load_model(base, dtype=stored)
        if removed_layers:
            methods.remove_layers(start, removed_layers)
    lost = lost_share(model, start, rounded)
    most = MOST_LOST if asked is Precision.AUTO else math.inf
    fits = math.isfinite(lost) and lost <= most
    return Format(rounded if fits else torch.float32, rounded, lost)


@torch.no_grad()
def lost_share(model: nn.Module, start: nn.Module | None, dtype: torch.dtype) -> float:
    """Return how much of an update rounding takes: |round(w + dw) - (w + dw)| / |dw|, norms over all weights together.

    `start` holds w, by the same names; None: it is 0. Of a weight that moved by less than half of its last bit all is
    lost, of one that moved far next to nothing. What is new, as a head, has no w and doesn't count: its own size would
    hide what becomes of the rest. One tensor at a time is held in float32.
    """
    before = {} if start is None else dict(start.named_parameters())
    new = set() if start is None else set(new_modules(start))
    error = update = 0.0
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] in new:
            continue
        weight = parameter.detach().float()
        error += float((weight.to(dtype).float() - weight).square().sum(dtype=torch.float64))
        old = before.get(name)
        if old is not None and old.shape == weight.shape:
            weight = weight - old.to(weight.device).float()
        update += float(weight.square().sum(dtype=torch.float64))
    if not math.isfinite(error):
        return math.inf
    return math.sqrt(error / update) if update else math.copysign(math.inf, error) if error else 0.0


def release(bare: nn.Module, optimizer: torch.optim.Optimizer, is_sharded: bool) -> None:
    """Give the memory of a trained model back: what comes next has weights of its own. A share of it may stay.

    The model itself must not go: to take a wrapper apart can wait for other ranks for ever.
    """
    optimizer.state.clear()
    for parameter in bare.parameters():
        parameter.grad = None
        if not is_sharded:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)


# ---- reading back


def fetch_files(store: ObjectStore, uri: str, folder: Path, files: Sequence[FileEntry]) -> None:
    """Fetch the files that rank 0 has uploaded, once per pod.

    Raises:
        Retryable: they are not what rank 0 has written.
    """
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not verify(folder, files):
            return
        for entry in files:
            store.download(f"{uri.rstrip('/')}/{entry.path}", folder / entry.path)
        if bad := verify(folder, files):
            raise Retryable(f"{uri}/{bad} is not what was written: something else writes there, too")


def read_back(
    folder: Path,
    base: Path,
    task: Task,
    *,
    group: Group,
    numerics: Numerics,
    strategy: Strategy,
) -> tuple[nn.Module, Task]:
    """Load the written model on all ranks, shared out as it was trained, and the task that evaluates it.

    The number format that it computes in is that of training: what differs is what is in the files.
    """
    plan, reader = task.plan, reader_of(task)
    if isinstance(reader, DPO) and plan.method.has_adapters:  # its reference went when the adapters were merged
        stored = stored_dtype(base)
        reader.reference = _placed(reader, base, numerics.frozen_dtype(stored), group, numerics, strategy)
    weights = numerics.weights_dtype(plan.method.type, stored_dtype(folder))
    return _placed(reader, folder, weights, group, numerics, strategy), reader


def _placed(
    reader: Task, folder: Path, weights: torch.dtype, group: Group, numerics: Numerics, strategy: Strategy
) -> nn.Module:
    """Load a whole model and put this rank's part of it where it computes: as `assembly` does, without gradients."""
    mesh = parallel.mesh(reader.plan, group)
    is_shared = strategy.is_sharded or mesh is not None
    model = reader.load_model(folder, dtype=stored_dtype(folder) if is_shared else weights)
    model = parallel.shard_tensors(model.requires_grad_(False).eval(), mesh, weights)
    if strategy.is_sharded:
        parallel.share_out(model, group, numerics, mesh, weights, parallel.shards(reader.plan, strategy))
        return model
    return model.to(numerics.device)
